"""Reading the bodies of POST requests, and decoding records, within limits."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Sequence
from http import HTTPStatus
from typing import Any, NamedTuple, TypeVar

import msgspec
from starlette.concurrency import run_in_threadpool
from starlette.types import Receive

from savings_exporter.model.record import DecodedRecord, SavingsRecord
from savings_exporter.service.problems import RefusedError
from savings_exporter.wording import WrongValue

T = TypeVar("T")

# The rest of a body that is too large is read and dropped, because a client whose connection is closed while it sends
# does not see the answer. Beyond this size the connection is closed all the same.
_MAX_DROPPED_BYTES = 256 * 1024 * 1024

# A larger body, or one of more records, is decoded in a thread, so that other requests are answered meanwhile, and one
# after the other, because a decoded body can take twenty times the memory of its bytes. Any other is decoded in some
# milliseconds at most, and a thread would cost more than that.
_LARGE_BODY_BYTES = 256 * 1024
_MANY_RECORDS = 1000

# A batch begins with this key, except if a client escapes or indents a lot.
_BATCH_START = b'"records"'
_BATCH_START_WITHIN = 32


class IntakeLimits(NamedTuple):
    """How much is accepted: in one request, and in all requests that are being answered."""

    body_bytes: int = 8 * 1024 * 1024
    body_seconds: float = 30.0
    """How long a body may take to arrive."""
    records: int = 10_000
    posts_in_flight: int = 1_000
    body_bytes_in_flight: int = 64 * 1024 * 1024


class Intake:
    """The POST requests that are being answered, and the bytes of their bodies.

    Attributes:
        in_flight: how many requests are being answered.
        requests: those of them whose bodies are read.
    """

    def __init__(self, limits: IntakeLimits) -> None:
        self.limits = limits
        self.in_flight = 0
        self.requests: dict[Reception, None] = {}
        self.body_bytes_in_flight = 0
        self._timer: asyncio.TimerHandle | None = None
        self._watched: asyncio.AbstractEventLoop | None = None
        self._decoding_a_large_body = asyncio.Lock()

    @property
    def is_full(self) -> bool:
        """Whether no more requests are accepted now."""
        return self.in_flight >= self.limits.posts_in_flight

    async def decoded(self, decode: Callable[[bytes], T], body: bytes) -> T:
        """What a function makes of a large body. It is called in a thread, and for one body at a time."""
        async with self._decoding_a_large_body:
            return await run_in_threadpool(decode, body)

    def watch(self, loop: asyncio.AbstractEventLoop) -> None:
        """Cut off the requests whose bodies are late. One timer for all of them costs less than one for each."""
        # A program may use an application in one event loop after the other.
        if self._timer is None or self._watched is not loop:
            self._watched = loop
            self._timer = loop.call_later(self.limits.body_seconds, self._cut_off_late, loop)

    def cut_off_all(self) -> None:
        """Cut off the requests whose bodies have not arrived."""
        for request in tuple(self.requests):
            request.cut_off()

    def _cut_off_late(self, loop: asyncio.AbstractEventLoop) -> None:
        now, self._timer = time.perf_counter(), None
        for request in self.requests:
            left = request.began + self.limits.body_seconds - now
            if left > 0:
                self._timer = loop.call_later(left, self._cut_off_late, loop)
                break
            request.cut_off()


class Reception:
    """One request, as a context manager: it counts as in flight until the block ends.

    Args:
        began: when the request began, on the performance counter.

    Raises:
        RefusedError: on entry: too many requests are being answered.
    """

    __slots__ = ("_held", "_intake", "_is_cut_off", "_is_read", "_task", "began")

    def __init__(self, intake: Intake, began: float) -> None:
        self.began = began
        self._intake = intake
        self._held = 0
        self._task: asyncio.Task[Any] | None = None
        self._is_read = self._is_cut_off = False

    def __enter__(self) -> Reception:
        intake = self._intake
        if intake.is_full:
            raise RefusedError(HTTPStatus.SERVICE_UNAVAILABLE, "too many requests are being answered", retry=True)
        intake.in_flight += 1
        intake.requests[self] = None
        return self

    def __exit__(self, *_exception: object) -> None:
        del self._intake.requests[self]
        self._intake.in_flight -= 1
        self._intake.body_bytes_in_flight -= self._held

    async def body(self, receive: Receive, loop: asyncio.AbstractEventLoop) -> bytes:
        """The body of the request. A slow sender is cut off after some time.

        Raises:
            RefusedError: the body is too large, or too late, or other requests hold too much.
        """
        intake = self._intake
        intake.watch(loop)
        self._task = asyncio.current_task(loop)
        try:
            message = await receive()
            if message["type"] == "http.request" and not message.get("more_body"):
                body: bytes = message.get("body", b"")
                if len(body) <= intake.limits.body_bytes:
                    self._hold(len(body))
                    return body
            return await self._rest(message, receive)
        except asyncio.CancelledError:
            if not self._is_cut_off:
                raise
            assert self._task is not None
            if hasattr(self._task, "uncancel"):  # since Python 3.11
                self._task.uncancel()
            detail = "the body did not arrive in time; nothing was recorded"
            raise RefusedError(HTTPStatus.REQUEST_TIMEOUT, detail, close=True) from None
        finally:
            self._is_read = True

    async def read(self, receive: Receive) -> bytes:
        """The body of a request whose cost does not matter, as in ``body``."""
        return await self.body(receive, asyncio.get_running_loop())

    def cut_off(self) -> None:
        """Stop reading the body, unless it is read."""
        if self._task is not None and not self._is_read and not self._is_cut_off:
            self._is_cut_off = True
            self._task.cancel()

    async def _rest(self, message: Any, receive: Receive) -> bytes:
        """Read a body that comes in parts, or is too large."""
        limits, size, body = self._intake.limits, 0, bytearray()
        while True:
            if message["type"] == "http.disconnect":
                detail = "the client closed the connection before its request was complete"
                raise RefusedError(HTTPStatus.BAD_REQUEST, detail, close=True)
            chunk = message.get("body", b"")
            size += len(chunk)
            if size > _MAX_DROPPED_BYTES:
                break
            if size > limits.body_bytes:
                self._intake.body_bytes_in_flight -= self._held
                self._held = 0
                body.clear()
            else:
                self._hold(len(chunk))
                body += chunk
            if not message.get("more_body"):
                break
            message = await receive()
        if size > limits.body_bytes:
            detail = f"the body is larger than {limits.body_bytes} bytes"
            raise RefusedError(HTTPStatus.REQUEST_ENTITY_TOO_LARGE, detail, close=True)
        return bytes(body)

    def _hold(self, size: int) -> None:
        """Account for bytes that are kept in memory until the request is answered."""
        intake = self._intake
        if intake.body_bytes_in_flight + size > intake.limits.body_bytes_in_flight:
            detail = "too many large requests are being answered"
            raise RefusedError(HTTPStatus.SERVICE_UNAVAILABLE, detail, retry=True)
        intake.body_bytes_in_flight += size
        self._held += size


class _Batch(msgspec.Struct, forbid_unknown_fields=True):
    records: list[DecodedRecord]


_decode_record = msgspec.json.Decoder(DecodedRecord).decode
_decode_batch = msgspec.json.Decoder(_Batch).decode


def takes_long(body: bytes) -> bool:
    """Whether decoding a body would keep other requests waiting."""
    return len(body) > _LARGE_BODY_BYTES or body.count(b"{") > _MANY_RECORDS


def decode_one(body: bytes) -> SavingsRecord | None:
    """The record of a body that holds one and is small; None if it is anything else, or something is wrong with it."""
    if takes_long(body) or body.find(_BATCH_START, 0, _BATCH_START_WITHIN) >= 0:
        return None
    try:
        return _decode_record(body)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError):
        return None


def decode_records(body: bytes, most: int) -> Sequence[SavingsRecord]:
    """The records of a body: one, or ``{"records": [...]}`` with at most ``most`` of them.

    Raises:
        RefusedError: it is not JSON, or something in it is wrong.
    """
    try:
        if body.find(_BATCH_START, 0, _BATCH_START_WITHIN) >= 0:
            return _checked(_decode_batch(body).records, most)
        return (_decode_record(body),)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError):
        return _decode_slowly(body, most)


def _decode_slowly(body: bytes, most: int) -> Sequence[SavingsRecord]:
    """Decode what could not be decoded as what it looked like, or find out what is wrong with it."""
    if not body:
        raise RefusedError(HTTPStatus.BAD_REQUEST, "the body is empty")
    kind: type[SavingsRecord | _Batch] = DecodedRecord
    try:
        if _is_batch(body):
            kind = _Batch
            return _checked(_decode_batch(body).records, most)
        return (_decode_record(body),)
    except msgspec.ValidationError as error:
        wrong = WrongValue(error, kind)
        raise RefusedError(HTTPStatus.UNPROCESSABLE_ENTITY, wrong.text, field=wrong.field or "$") from None
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        raise RefusedError(HTTPStatus.BAD_REQUEST, f"the body is not JSON: {error}") from None


def _checked(records: list[DecodedRecord], most: int) -> list[DecodedRecord]:
    if not 1 <= len(records) <= most:
        detail = f"records must hold 1 to {most} records, and holds {len(records)}"
        raise RefusedError(HTTPStatus.UNPROCESSABLE_ENTITY, detail, field="records")
    return records


def _is_batch(body: bytes) -> bool:
    try:
        parsed = msgspec.json.decode(body)
    except msgspec.ValidationError:
        # A number beyond the range of a float: valid JSON, and the typed decoder names the field in its error.
        parsed = msgspec.json.decode(body, type=dict[str, msgspec.Raw])
    return isinstance(parsed, dict) and "records" in parsed
