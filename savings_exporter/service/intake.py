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

# A larger body is decoded in a thread, so that other requests are answered meanwhile, and one after the other, because
# a decoded body can take twenty times the memory of its bytes.
_LARGE_BODY_BYTES = 64 * 1024

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
    """The POST requests that are being answered, and the bytes of their bodies."""

    def __init__(self, limits: IntakeLimits) -> None:
        self.limits = limits
        self.posts_in_flight = 0
        self.body_bytes_in_flight = 0
        # The tasks that read a body, with the time at which each began, the oldest first.
        self._reading: dict[asyncio.Task[Any], float] = {}
        self._cut_off: set[asyncio.Task[Any]] = set()
        self._watch: asyncio.TimerHandle | None = None
        self._decoding_a_large_body = asyncio.Lock()

    def request(self) -> Reception:
        """One request, as a context manager. It counts as in flight until the block ends."""
        return Reception(self)

    async def decoded(self, decode: Callable[[bytes], T], body: bytes) -> T:
        """What a function makes of a large body. It is called in a thread, and for one body at a time."""
        async with self._decoding_a_large_body:
            return await run_in_threadpool(decode, body)

    async def read(self, receive: Receive, reception: Reception) -> bytes:
        """Read the body of a request. A slow sender is cut off after some time.

        Raises:
            RefusedError: the body is too large, or too late, or other requests hold too much.
        """
        task = asyncio.current_task()
        assert task is not None
        self._reading[task] = time.monotonic()
        if self._watch is None:
            self._watch = asyncio.get_running_loop().call_later(self.limits.body_seconds, self._cut_off_late)
        try:
            message = await receive()
            if message["type"] == "http.request" and not message.get("more_body"):
                body: bytes = message.get("body", b"")
                if len(body) <= self.limits.body_bytes:
                    reception.hold(len(body))
                    return body
            return await self._read_rest(message, receive, reception)
        except asyncio.CancelledError:
            if task not in self._cut_off:
                raise
            self._cut_off.discard(task)
            if hasattr(task, "uncancel"):  # since Python 3.11
                task.uncancel()
            detail = f"the body did not arrive within {self.limits.body_seconds:g} seconds; nothing was recorded"
            raise RefusedError(HTTPStatus.REQUEST_TIMEOUT, detail, close=True) from None
        finally:
            self._reading.pop(task, None)

    async def _read_rest(self, message: Any, receive: Receive, reception: Reception) -> bytes:
        """Read a body that comes in parts, or is too large."""
        limits, size, body = self.limits, 0, bytearray()
        while True:
            if message["type"] == "http.disconnect":
                detail = "the client closed the connection before its request was complete"
                raise RefusedError(HTTPStatus.BAD_REQUEST, detail, close=True)
            chunk = message.get("body", b"")
            size += len(chunk)
            if size > _MAX_DROPPED_BYTES:
                break
            if size > limits.body_bytes:
                reception.release()
                body.clear()
            else:
                reception.hold(len(chunk))
                body += chunk
            if not message.get("more_body"):
                break
            message = await receive()
        if size > limits.body_bytes:
            detail = f"the body is larger than {limits.body_bytes} bytes"
            raise RefusedError(HTTPStatus.REQUEST_ENTITY_TOO_LARGE, detail, close=True)
        return bytes(body)

    def _cut_off_late(self) -> None:
        """Cut off the bodies that are late. One timer for all of them costs a request less than one for each."""
        now, self._watch = time.monotonic(), None
        for task, began in list(self._reading.items()):
            left = began + self.limits.body_seconds - now
            if left > 0:
                self._watch = asyncio.get_running_loop().call_later(left, self._cut_off_late)
                break
            del self._reading[task]
            self._cut_off.add(task)
            task.cancel()


class Reception:
    """One request that is being answered.

    Raises:
        RefusedError: on entry: too many requests are being answered.
    """

    __slots__ = ("_held", "_intake")

    def __init__(self, intake: Intake) -> None:
        self._intake = intake
        self._held = 0

    def __enter__(self) -> Reception:
        intake = self._intake
        if intake.posts_in_flight >= intake.limits.posts_in_flight:
            raise RefusedError(HTTPStatus.SERVICE_UNAVAILABLE, "too many requests are being answered", retry=True)
        intake.posts_in_flight += 1
        return self

    def __exit__(self, *_exception: object) -> None:
        self._intake.posts_in_flight -= 1
        self.release()

    @property
    def is_large(self) -> bool:
        """Whether the body is so large that decoding it would keep other requests waiting."""
        return self._held > _LARGE_BODY_BYTES

    def hold(self, size: int) -> None:
        """Account for bytes that are kept in memory until the request is answered."""
        intake = self._intake
        if intake.body_bytes_in_flight + size > intake.limits.body_bytes_in_flight:
            detail = "too many large requests are being answered"
            raise RefusedError(HTTPStatus.SERVICE_UNAVAILABLE, detail, retry=True)
        intake.body_bytes_in_flight += size
        self._held += size

    def release(self) -> None:
        """Account for bytes that are not kept any more."""
        self._intake.body_bytes_in_flight -= self._held
        self._held = 0


class _Batch(msgspec.Struct, forbid_unknown_fields=True):
    records: list[DecodedRecord]


_decode_record = msgspec.json.Decoder(DecodedRecord).decode
_decode_batch = msgspec.json.Decoder(_Batch).decode


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
