"""``POST /v1/savings``: an ASGI application of its own, because a router would cost more than everything that it does,
and a way past ASGI for the usual request: one record that has arrived as a whole.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable
from functools import lru_cache, partial
from typing import Any, NamedTuple, Protocol, TypeAlias

import msgspec
from starlette.types import Receive, Scope, Send

from savings_exporter.model.keys import checked_key
from savings_exporter.model.record import SavingsRecord
from savings_exporter.service import problems
from savings_exporter.service.browsers import Headers, WithHeaders
from savings_exporter.service.guard import Guard
from savings_exporter.service.intake import Intake, Reception, decode_one, decode_records, takes_long
from savings_exporter.service.paths import SAVINGS_PATH
from savings_exporter.service.problems import RefusedError
from savings_exporter.service.requests import RequestLog
from savings_exporter.tracker import SavingsTracker
from savings_exporter.tracking.receipt import Receipt

logger = logging.getLogger(__name__)

# HTTPStatus is slow to compare and to encode.
_OK, _ACCEPTED, _UNSUPPORTED_MEDIA_TYPE, _UNPROCESSABLE, _FAILED, _UNAVAILABLE = 200, 202, 415, 422, 500, 503

_JSON = b"application/json"
_DURABLE = '{"sequence":%d,"writer":"%s","accepted":%d,"durable":true}\n'
_TYPE, _LENGTH = b"content-type", b"content-length"

# Requests with these headers need more than a decoder.
_SPECIAL = frozenset({b"content-encoding", b"idempotency-key"})


class Asked(Protocol):
    """A request that is answered without ASGI."""

    def answer(self, status: int, headers: bytes, body: bytes) -> None:
        """Answer it. ``headers`` are lines, without those of the length and the connection."""


class Take(Protocol):
    """Takes a ``POST`` of savings that has arrived as a whole, or leaves it to the application."""

    def __call__(self, headers: Headers, body: bytes, asked: Asked) -> bool:
        """Whether the request is taken. Then it is answered through ``asked``."""


class _Recorded(NamedTuple):
    """The receipt of the call that recorded a request's records, how many records came after them in that call, and how
    many they are.
    """

    receipt: Receipt
    after: int
    records: int

    def answer(self) -> tuple[int, bytes]:
        """The status and the body of the answer.

        Raises:
            RefusedError: the records are not accepted.
        """
        receipt, after, records = self
        # Looked at once and in this order, because the records may become durable at any moment.
        is_pending, last = receipt.pending, receipt.sequence
        if last is not None and not receipt.duplicate:
            return _OK, (_DURABLE % (last - after, receipt.writer, records)).encode()
        if last is None and not is_pending:
            raise RefusedError(_UNAVAILABLE, "too many records with a key are pending", retry=True)
        return (_ACCEPTED if last is None else _OK), _other_answer(receipt, last, records)


# What to do with the result of a request, or with an exception.
_Ended: TypeAlias = "Callable[[_Recorded | BaseException], None]"


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
        self._encoded: tuple[Headers, bytes] = [], b""

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer one request."""
        began, code, detail = time.perf_counter(), _FAILED, "the request failed"
        try:
            try:
                with Reception(self._intake, began) as request:
                    recorded = await self._recorded(scope, request, receive)
                code, body = recorded.answer()
            except RefusedError as error:
                code, detail = int(error.status), error.detail
                await WithHeaders(problems.refusal(error), self._guard.headers)(scope, receive, send)
                return
            except Exception:
                await WithHeaders(problems.unexpected(), self._guard.headers)(scope, receive, send)
                raise  # for the server, which logs it
            await send(
                {
                    "type": "http.response.start",
                    "status": code,
                    "headers": [*_headers(len(body)), *self._guard.receipt_headers()],
                }
            )
            await send({"type": "http.response.body", "body": body})
        finally:
            self._log.note("POST", SAVINGS_PATH, code, time.perf_counter() - began, detail)

    def take(self, headers: Headers, body: bytes, asked: Asked) -> bool:
        """Take a request, if it holds one record and nothing is wrong with it. See ``Take``."""
        began, intake = time.perf_counter(), self._intake
        if intake.is_full or self._closed() is not None or self._guard.refusal_of_post(headers) is not None:
            return False
        content_type = None
        for name, value in headers:
            if name == _TYPE:
                content_type = value
            elif name in _SPECIAL:
                return False
        if content_type != _JSON and not _is_json(content_type):
            return False
        record = decode_one(body)
        if record is None:
            return False
        intake.in_flight += 1
        self._add(record, partial(self._answer, asked, began))
        return True

    def _answer(self, asked: Asked, began: float, result: _Recorded | BaseException) -> None:
        """Answer a request that was taken."""
        self._intake.in_flight -= 1
        lines, detail = self._receipt_lines(), ""
        try:
            if isinstance(result, BaseException):
                raise result
            code, body = result.answer()
        except BaseException as error:
            response, detail = problems.unexpected(), "the request failed"
            if isinstance(error, RefusedError):
                response, detail = problems.refusal(error), error.detail
            code, body = response.status_code, bytes(response.body)
            lines = _lines([*(each for each in response.raw_headers if each[0] != _LENGTH), *self._guard.headers()])
        asked.answer(code, lines, body)
        self._log.note("POST", SAVINGS_PATH, code, time.perf_counter() - began, detail)

    def _receipt_lines(self) -> bytes:
        """The headers of an answer to records that were accepted."""
        headers = self._guard.receipt_headers()
        if headers is not self._encoded[0]:
            self._encoded = headers, _lines([(_TYPE, _JSON), *headers])
        return self._encoded[1]

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
            if name == _TYPE:
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
        if takes_long(body):
            records = await self._intake.decoded(lambda body: decode_records(body, self._most), body)
        else:
            records = decode_records(body, self._most)
        if key is None and len(records) == 1 and not self._is_traced:
            waiting: asyncio.Future[_Recorded] = loop.create_future()
            self._add(records[0], partial(_settle, waiting))
            return await waiting
        try:
            checked = checked_key(key.decode("latin-1")) if key is not None else None
            receipt = await self._tracker.record_many_async(records, idempotency_key=checked)
            return _Recorded(receipt, 0, len(records))
        except ValueError as error:  # KeyConflictError is one
            raise _refused_key(error) from None

    def _add(self, record: SavingsRecord, ended: _Ended) -> None:
        """Add a record to the round, which is recorded when the event loop has read what has arrived."""
        part = self._round
        if part is None:
            part = self._round = _Round()
            asyncio.get_running_loop().call_soon(self._end_round)
        part.records.append(record)
        part.ended.append(ended)

    def _end_round(self) -> None:
        part, self._round = self._round, None
        assert part is not None
        part.task = asyncio.create_task(self._record_round(part))

    async def _record_round(self, part: _Round) -> None:
        after = len(part.records)
        try:
            receipt = await self._tracker.record_many_async(part.records)
        except BaseException as error:
            for ended in part.ended:
                _end(ended, error)
            raise
        for ended in part.ended:
            after -= 1
            _end(ended, _Recorded(receipt, after, 1))


def _end(ended: _Ended, result: _Recorded | BaseException) -> None:
    try:
        ended(result)
    except Exception:
        # The other requests of the round must have their answers.
        logger.exception("a request could not be answered")


class _Round:
    """The records of the requests that one round of the event loop reads. They are recorded in one call, because a call
    for each costs more than decoding it.
    """

    __slots__ = ("ended", "records", "task")

    def __init__(self) -> None:
        self.records: list[SavingsRecord] = []
        # One for each request: what to do with its result.
        self.ended: list[_Ended] = []
        # Kept, because the event loop keeps no reference to a task.
        self.task: asyncio.Task[None] | None = None


def _settle(waiting: asyncio.Future[_Recorded], result: _Recorded | BaseException) -> None:
    # A request that was cancelled does not wait any more.
    if waiting.done():
        return
    if isinstance(result, BaseException):
        waiting.set_exception(result)
    else:
        waiting.set_result(result)


@lru_cache(maxsize=1024)
def _headers(size: int) -> Headers:
    return [(_TYPE, _JSON), (_LENGTH, b"%d" % size)]


def _lines(headers: Headers) -> bytes:
    return b"".join(b"%b: %b\r\n" % header for header in headers)


def _other_answer(receipt: Receipt, last: int | None, count: int) -> bytes:
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
    return msgspec.json.encode(answer) + b"\n"


def _is_json(content_type: bytes | None) -> bool:
    return content_type is not None and content_type.partition(b";")[0].strip().lower() == _JSON


def _refused_key(error: ValueError) -> RefusedError:
    """The refusal of an idempotency key, which is a header here and an argument in Python."""
    detail = str(error).replace("idempotency_key", "Idempotency-Key", 1)
    return RefusedError(_UNPROCESSABLE, detail, field="Idempotency-Key")
