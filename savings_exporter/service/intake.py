"""Reading and decoding the bodies of POST requests, within limits."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from http import HTTPStatus
from typing import NamedTuple

import msgspec
from starlette.concurrency import run_in_threadpool
from starlette.requests import Request

from savings_exporter.model.keys import checked_key
from savings_exporter.model.record import SavingsRecord
from savings_exporter.service.problems import RefusedError
from savings_exporter.wording import WrongValue

# The rest of a body that is too large is read and dropped, because a client whose connection is closed while it sends
# does not see the answer. Beyond this size the connection is closed all the same.
_MAX_DROPPED_BYTES = 256 * 1024 * 1024

# A larger body is decoded in a thread, so that other requests are answered meanwhile, and one after the other, because
# a decoded body can take twenty times the memory of its bytes.
_LARGE_BODY_BYTES = 64 * 1024


class IntakeLimits(NamedTuple):
    """How much is accepted: in one request, and in all requests that are being answered."""

    body_bytes: int = 8 * 1024 * 1024
    body_seconds: float = 30.0
    """How long a body may take to arrive."""
    records: int = 10_000
    posts_in_flight: int = 1_000
    body_bytes_in_flight: int = 64 * 1024 * 1024


class Posted(NamedTuple):
    """The content of a request."""

    records: list[SavingsRecord]
    idempotency_key: str | None


class Intake:
    """The POST requests that are being answered, and the bytes of their bodies."""

    def __init__(self, limits: IntakeLimits) -> None:
        self._limits = limits
        self._posts_in_flight = 0
        self._body_bytes_in_flight = 0
        self._decoding_a_large_body = asyncio.Lock()

    @asynccontextmanager
    async def received(self, request: Request) -> AsyncIterator[Posted]:
        """The content of a request. The request counts as in flight until the block ends.

        Raises:
            RefusedError: it is not valid, or a limit is reached.
        """
        if self._posts_in_flight >= self._limits.posts_in_flight:
            raise RefusedError(HTTPStatus.SERVICE_UNAVAILABLE, "too many requests are being answered", retry=True)
        self._posts_in_flight += 1
        body = bytearray()
        try:
            await self._read(request, body)
            yield Posted(await self._decoded(request, body), _idempotency_key(request))
        finally:
            self._posts_in_flight -= 1
            self._body_bytes_in_flight -= len(body)

    async def _read(self, request: Request, body: bytearray) -> None:
        """Read a body. A slow sender is cut off after some time."""
        limits = self._limits
        try:
            size = await asyncio.wait_for(self._read_all(request, body), limits.body_seconds)
        except asyncio.TimeoutError:
            detail = f"the body did not arrive within {limits.body_seconds:g} seconds; nothing was recorded"
            raise RefusedError(HTTPStatus.REQUEST_TIMEOUT, detail, close=True) from None
        if size > limits.body_bytes:
            detail = f"the body is larger than {limits.body_bytes} bytes"
            raise RefusedError(HTTPStatus.REQUEST_ENTITY_TOO_LARGE, detail, close=True)

    async def _read_all(self, request: Request, body: bytearray) -> int:
        """Read a body of any size, and keep it if it is not too large. Returns its size."""
        size = 0
        async for chunk in request.stream():
            size += len(chunk)
            if size > _MAX_DROPPED_BYTES:
                break
            if size > self._limits.body_bytes:
                self._body_bytes_in_flight -= len(body)
                body.clear()
            elif self._body_bytes_in_flight + len(chunk) > self._limits.body_bytes_in_flight:
                raise RefusedError(
                    HTTPStatus.SERVICE_UNAVAILABLE, "too many large requests are being answered", retry=True
                )
            else:
                self._body_bytes_in_flight += len(chunk)
                body += chunk
        return size

    async def _decoded(self, request: Request, body: bytearray) -> list[SavingsRecord]:
        if len(body) <= _LARGE_BODY_BYTES:
            return self._records(request, body)
        async with self._decoding_a_large_body:
            return await run_in_threadpool(self._records, request, body)

    def _records(self, request: Request, body: bytearray) -> list[SavingsRecord]:
        content_type = request.headers.get("content-type", "").partition(";")[0].strip().lower()
        if content_type != "application/json":
            raise RefusedError(HTTPStatus.UNSUPPORTED_MEDIA_TYPE, "the Content-Type must be application/json")
        if request.headers.get("content-encoding", "identity").strip().lower() not in ("", "identity"):
            raise RefusedError(HTTPStatus.UNSUPPORTED_MEDIA_TYPE, "the body must be sent without Content-Encoding")
        if not body:
            raise RefusedError(HTTPStatus.BAD_REQUEST, "the body is empty")
        kind: type[SavingsRecord | _Batch] = SavingsRecord
        try:
            if _is_batch(body):
                kind = _Batch
            decoded = msgspec.json.decode(body, type=kind)
        except msgspec.ValidationError as error:
            wrong = WrongValue(error, kind)
            raise RefusedError(HTTPStatus.UNPROCESSABLE_ENTITY, wrong.text, field=wrong.field or "$") from None
        except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
            raise RefusedError(HTTPStatus.BAD_REQUEST, f"the body is not JSON: {error}") from None
        if isinstance(decoded, SavingsRecord):
            return [decoded]
        records = decoded.records
        if not 1 <= len(records) <= self._limits.records:
            detail = f"records must hold 1 to {self._limits.records} records, and holds {len(records)}"
            raise RefusedError(HTTPStatus.UNPROCESSABLE_ENTITY, detail, field="records")
        return records


class _Batch(msgspec.Struct, forbid_unknown_fields=True):
    records: list[SavingsRecord]


def refused_key(error: ValueError) -> RefusedError:
    """The refusal of an idempotency key, which is a header here and an argument in Python."""
    detail = str(error).replace("idempotency_key", "Idempotency-Key", 1)
    return RefusedError(HTTPStatus.UNPROCESSABLE_ENTITY, detail, field="Idempotency-Key")


def _idempotency_key(request: Request) -> str | None:
    try:
        return checked_key(request.headers.get("idempotency-key"))
    except ValueError as error:
        raise refused_key(error) from None


def _is_batch(body: bytearray) -> bool:
    try:
        parsed = msgspec.json.decode(body)
    except msgspec.ValidationError:
        # A number beyond the range of a float: valid JSON, and the typed decoder names the field in its error.
        parsed = msgspec.json.decode(body, type=dict[str, msgspec.Raw])
    return isinstance(parsed, dict) and "records" in parsed
