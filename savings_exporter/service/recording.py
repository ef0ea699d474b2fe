"""``POST /v1/savings``, as an ASGI application of its own: a router would cost more than everything that it does."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable
from functools import lru_cache
from typing import Any, TypeAlias

import msgspec
from starlette.types import Receive, Scope, Send

from savings_exporter.model.keys import checked_key
from savings_exporter.model.record import SavingsRecord
from savings_exporter.service import problems
from savings_exporter.service.browsers import WithHeaders
from savings_exporter.service.guard import Guard
from savings_exporter.service.intake import Intake, Reception, decode_records
from savings_exporter.service.paths import SAVINGS_PATH
from savings_exporter.service.problems import RefusedError
from savings_exporter.service.requests import RequestLog
from savings_exporter.tracker import SavingsTracker
from savings_exporter.tracking.receipt import Receipt

# HTTPStatus is slow to compare and to encode.
_OK, _ACCEPTED, _UNSUPPORTED_MEDIA_TYPE, _UNPROCESSABLE, _FAILED, _UNAVAILABLE = 200, 202, 415, 422, 500, 503

# The receipt of a call that recorded a request's records, how many records came after them in that call, and how many
# they are.
_Recorded: TypeAlias = "tuple[Receipt, int, int]"

_JSON = b"application/json"
_DURABLE = '{"sequence":%d,"writer":"%s","accepted":%d,"durable":true}\n'


class Recording:
    """Records the savings of a request, and answers when they are durable, or when they cannot become durable now.

    ``guard`` says why a request is refused, and ``closed`` why all are. ``log`` accounts for each answer. With
    ``is_traced``, each request is recorded on its own, so that its span is linked to its commit.
    """

    def __init__(
        self,
        tracker: SavingsTracker,
        intake: Intake,
        log: RequestLog,
        guard: Guard,
        closed: Callable[[], RefusedError | None],
        *,
        is_traced: bool,
    ) -> None:
        self._tracker = tracker
        self._intake = intake
        self._most = intake.limits.records
        self._log = log
        self._guard = guard
        self._closed = closed
        self._is_traced = is_traced
        self._round: _Round | None = None

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer one request."""
        began, code, detail = time.perf_counter(), _FAILED, "the request failed"
        try:
            try:
                with Reception(self._intake, began) as request:
                    receipt, after, count = await self._recorded(scope, request, receive)
                # Looked at once and in this order, because the records may become durable at any moment.
                is_pending, last = receipt.pending, receipt.sequence
                if last is None and not is_pending:
                    raise RefusedError(_UNAVAILABLE, "too many records with a key are pending", retry=True)
            except RefusedError as error:
                code, detail = int(error.status), error.detail
                await WithHeaders(problems.refusal(error), self._guard.headers)(scope, receive, send)
                return
            except Exception:
                await WithHeaders(problems.unexpected(), self._guard.headers)(scope, receive, send)
                raise  # for the server, which logs it
            if last is not None and not receipt.duplicate:
                code = _OK
                body = _DURABLE % (last - after, receipt.writer, count)
            else:
                code = _ACCEPTED if last is None else _OK
                body = _other_answer(receipt, last, count)
            await send(
                {
                    "type": "http.response.start",
                    "status": code,
                    "headers": [*_headers(len(body)), *self._guard.receipt_headers()],
                }
            )
            await send({"type": "http.response.body", "body": body.encode()})
        finally:
            self._log.note("POST", SAVINGS_PATH, code, time.perf_counter() - began, detail)

    async def _recorded(self, scope: Scope, request: Reception, receive: Receive) -> _Recorded:
        """Record what a request holds."""
        # Checked before the body is read: requests that arrived before the stop are still answered.
        refusal = self._guard.refusal(scope)
        if refusal is not None:
            refusal = await self._guard.confirmed(refusal)
        if refusal is None:
            refusal = self._closed()
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
        loop = asyncio.get_running_loop()
        body = await request.body(receive, loop)
        if content_type != _JSON and not _is_json(content_type):
            raise RefusedError(_UNSUPPORTED_MEDIA_TYPE, "the Content-Type must be application/json")
        if encoding is not None and encoding.strip().lower() not in (b"", b"identity"):
            raise RefusedError(_UNSUPPORTED_MEDIA_TYPE, "the body must be sent without Content-Encoding")
        if request.is_large:
            records = await self._intake.decoded(lambda body: decode_records(body, self._most), body)
        else:
            records = decode_records(body, self._most)
        if key is None and len(records) == 1 and not self._is_traced:
            part = self._round
            if part is None:
                part = self._round = _Round()
                loop.call_soon(self._end_round)
            return await part.added(records[0], loop.create_future())
        try:
            checked = checked_key(key.decode("latin-1")) if key is not None else None
            return await self._tracker.record_many_async(records, idempotency_key=checked), 0, len(records)
        except ValueError as error:  # KeyConflictError is one
            raise _refused_key(error) from None

    def _end_round(self) -> None:
        part, self._round = self._round, None
        assert part is not None
        part.task = asyncio.create_task(self._record_round(part))

    async def _record_round(self, part: _Round) -> None:
        try:
            receipt = await self._tracker.record_many_async(part.records)
        except BaseException as error:
            part.fail(error)
            raise
        part.end(receipt)


class _Round:
    """The records of the requests that one round of the event loop reads. They are recorded in one call, because a call
    for each costs more than decoding it.
    """

    __slots__ = ("_waiting", "records", "task")

    def __init__(self) -> None:
        self.records: list[SavingsRecord] = []
        # One for each request. A request that is cancelled leaves the others alone.
        self._waiting: list[asyncio.Future[_Recorded]] = []
        # Kept, because the event loop keeps no reference to a task.
        self.task: asyncio.Task[None] | None = None

    def added(self, record: SavingsRecord, waiting: asyncio.Future[_Recorded]) -> asyncio.Future[_Recorded]:
        """Add the record of a request, and a future for the result."""
        self.records.append(record)
        self._waiting.append(waiting)
        return waiting

    def end(self, receipt: Receipt) -> None:
        after = len(self.records)
        for waiting in self._waiting:
            after -= 1
            if not waiting.done():
                waiting.set_result((receipt, after, 1))

    def fail(self, error: BaseException) -> None:
        for waiting in self._waiting:
            if not waiting.done():
                waiting.set_exception(error)


@lru_cache(maxsize=1024)
def _headers(size: int) -> list[tuple[bytes, bytes]]:
    return [(b"content-type", _JSON), (b"content-length", b"%d" % size)]


def _other_answer(receipt: Receipt, last: int | None, count: int) -> str:
    """The answer for records that are not durable, or that repeat others, whose last sequence number is ``last``."""
    is_durable = last is not None
    answer: dict[str, Any] = {
        "sequence": last,
        "writer": receipt.writer if is_durable else None,
        "accepted": count,
        "durable": is_durable,
    }
    if receipt.duplicate:
        answer["duplicate"] = True
    return msgspec.json.encode(answer).decode() + "\n"


def _is_json(content_type: bytes | None) -> bool:
    return content_type is not None and content_type.partition(b";")[0].strip().lower() == _JSON


def _refused_key(error: ValueError) -> RefusedError:
    """The refusal of an idempotency key, which is a header here and an argument in Python."""
    detail = str(error).replace("idempotency_key", "Idempotency-Key", 1)
    return RefusedError(_UNPROCESSABLE, detail, field="Idempotency-Key")
