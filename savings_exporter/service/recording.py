"""``POST /v1/savings``, as an ASGI application of its own: a router would cost more than everything that it does."""

from __future__ import annotations

import time
from collections.abc import Callable
from http import HTTPStatus

import msgspec
from starlette.types import Receive, Scope, Send

from savings_exporter.model.keys import checked_key
from savings_exporter.service import problems
from savings_exporter.service.intake import Intake, decode_records
from savings_exporter.service.paths import SAVINGS_PATH
from savings_exporter.service.problems import RefusedError
from savings_exporter.service.requests import RequestLog
from savings_exporter.tracker import SavingsTracker

_JSON = b"application/json"
_encode = msgspec.json.Encoder().encode


class Recording:
    """Records the savings of a request, and answers when they are durable, or when they cannot become durable now.

    ``refusal`` says why a request is refused, and ``closed`` why all are. ``log`` accounts for each answer.
    """

    def __init__(
        self,
        tracker: SavingsTracker,
        intake: Intake,
        log: RequestLog,
        refusal: Callable[[Scope], RefusedError | None],
        closed: Callable[[], RefusedError | None],
    ) -> None:
        self._tracker = tracker
        self._intake = intake
        self._log = log
        self._refusal = refusal
        self._closed = closed

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer one request."""
        began, code, detail = time.perf_counter(), HTTPStatus.INTERNAL_SERVER_ERROR, "the request failed"
        try:
            try:
                answer = await self._answer(scope, receive)
            except RefusedError as error:
                code, detail = error.status, error.detail
                await problems.refusal(error)(scope, receive, send)
                return
            except Exception:
                await problems.unexpected()(scope, receive, send)
                raise  # for the server, which logs it
            code = HTTPStatus.OK if answer["durable"] else HTTPStatus.ACCEPTED
            body = _encode(answer) + b"\n"
            headers = [(b"content-type", _JSON), (b"content-length", b"%d" % len(body))]
            await send({"type": "http.response.start", "status": code, "headers": headers})
            await send({"type": "http.response.body", "body": body})
        finally:
            self._log.note("POST", SAVINGS_PATH, code, time.perf_counter() - began, detail)

    async def _answer(self, scope: Scope, receive: Receive) -> dict[str, object]:
        # Checked before the body is read: requests that arrived before the stop are still answered.
        refusal = self._refusal(scope) or self._closed()
        if refusal is not None:
            raise refusal
        content_type = encoding = key = None
        for name, value in scope["headers"]:
            if name == b"content-type":
                content_type = value
            elif name == b"idempotency-key":
                key = value
            elif name == b"content-encoding":
                encoding = value
        with self._intake.request() as request:
            body = await request.body(receive)
            if content_type != _JSON and not _is_json(content_type):
                raise RefusedError(HTTPStatus.UNSUPPORTED_MEDIA_TYPE, "the Content-Type must be application/json")
            if encoding is not None and encoding.strip().lower() not in (b"", b"identity"):
                raise RefusedError(HTTPStatus.UNSUPPORTED_MEDIA_TYPE, "the body must be sent without Content-Encoding")
            most = self._intake.limits.records
            records = await self._intake.decoded(lambda body: decode_records(body, most), body)
            try:
                checked = checked_key(key.decode("latin-1")) if key is not None else None
                receipt = await self._tracker.record_many_async(records, idempotency_key=checked)
            except ValueError as error:  # KeyConflictError is one
                raise _refused_key(error) from None
        answer: dict[str, object] = {
            "sequence": receipt.sequence,
            "writer": receipt.writer,
            "accepted": len(records),
            "durable": receipt.durable,
        }
        if receipt.duplicate:
            answer["duplicate"] = True
        return answer


def _is_json(content_type: bytes | None) -> bool:
    return content_type is not None and content_type.partition(b";")[0].strip().lower() == _JSON


def _refused_key(error: ValueError) -> RefusedError:
    """The refusal of an idempotency key, which is a header here and an argument in Python."""
    detail = str(error).replace("idempotency_key", "Idempotency-Key", 1)
    return RefusedError(HTTPStatus.UNPROCESSABLE_ENTITY, detail, field="Idempotency-Key")
