"""Answers that take time or memory: they are built in threads, shared, compressed and sent in parts."""

from __future__ import annotations

import asyncio
import re
import zlib
from collections.abc import Callable, Hashable, Iterable, Iterator, Mapping
from http import HTTPStatus
from typing import Any, TypeVar

from starlette.concurrency import run_in_threadpool
from starlette.requests import Request
from starlette.responses import Response, StreamingResponse
from starlette.types import Receive, Scope, Send

from savings_exporter.service.problems import RefusedError

T = TypeVar("T")

_LEAST_COMPRESSED_BYTES = 1024
_MOST_BYTES_BEING_SENT = 64 * 1024 * 1024
# What the server keeps for a client that does not read.
_PART_BYTES = 64 * 1024
_MOST_STREAMS = 2
_STREAM_PATIENCE_SECONDS = 10.0

_GZIP = 16 + zlib.MAX_WBITS
_FAST = 1
_GZIP_ACCEPTED = re.compile(r"(?:^|,)\s*(?:gzip|\*)\s*(?:;\s*q=(?!0(?:\.0*)?\s*(?:,|$))[^,]*)?(?:,|$)", re.IGNORECASE)


class Answers:
    """Builds answers.

    Args:
        most_bytes: how much may be in memory of answers that clients have not read; one answer may be larger.
    """

    def __init__(self, most_bytes: int = _MOST_BYTES_BEING_SENT) -> None:
        self._most_bytes = most_bytes
        self._bytes = 0
        self._waiting: dict[Hashable, asyncio.Task[Any]] = {}
        self._turns: dict[Hashable, asyncio.Lock] = {}
        self._streams = 0
        self._stream_ended = asyncio.Event()

    async def built(self, kind: Hashable, build: Callable[[], T]) -> T:
        """What a function returns that is called in a thread after this call began. Of each kind, one function runs at
        a time, and all requests that wait for it share the next result.
        """
        waiting = self._waiting.get(kind)
        if waiting is None or waiting.get_loop() is not asyncio.get_running_loop():
            waiting = self._waiting[kind] = asyncio.create_task(self._build(kind, build))
            # Retrieved, because all clients may have gone when it fails.
            waiting.add_done_callback(lambda task: task.cancelled() or task.exception())
        # A client that goes away does not take the result from the others.
        return await asyncio.shield(waiting)

    async def _build(self, kind: Hashable, build: Callable[[], T]) -> T:
        try:
            async with self._turns.setdefault(kind, asyncio.Lock()):
                # Who asks from now on needs a newer result.
                del self._waiting[kind]
                return await run_in_threadpool(build)
        finally:
            # Clients choose the kinds: Accept names any version of a format.
            if kind not in self._waiting:
                self._turns.pop(kind, None)

    async def response(
        self, request: Request, kind: Hashable, build: Callable[[], bytes], headers: Mapping[str, str]
    ) -> Response:
        """The answer with a body that a function builds, as in ``built``.

        Raises:
            RefusedError: clients leave too many large answers unread.
        """
        if self._bytes > self._most_bytes:
            detail = "too many large answers are being sent; they were not read yet"
            raise RefusedError(HTTPStatus.SERVICE_UNAVAILABLE, detail, retry=True)
        is_compressed = accepts_gzip(request)

        def built() -> _Body:
            data = build()
            return _Body(*((_gzip(data), True) if is_compressed and _is_large(data) else (data, False)))

        body = await self.built((kind, is_compressed), built)
        return _InParts(self, body, headers)

    async def stream(self, request: Request, pieces: Iterable[bytes], headers: Mapping[str, str]) -> Response:
        """The answer with a body that is made while it is sent.

        Raises:
            RefusedError: others are being sent, and do not end.
        """
        try:
            await asyncio.wait_for(self._turn_to_stream(), _STREAM_PATIENCE_SECONDS)
        except asyncio.TimeoutError:
            detail = "others are being sent"
            raise RefusedError(HTTPStatus.SERVICE_UNAVAILABLE, detail, retry=True) from None
        is_compressed = accepts_gzip(request)
        return _Stream(self, _gzipped(pieces) if is_compressed else pieces, _encoded(headers, is_compressed))

    async def _turn_to_stream(self) -> None:
        while self._streams >= _MOST_STREAMS:
            self._stream_ended.clear()
            await self._stream_ended.wait()
        self._streams += 1

    def end_stream(self) -> None:
        """Called when a stream has ended."""
        self._streams -= 1
        self._stream_ended.set()

    def hold(self, body: _Body) -> None:
        """Called when a client begins to get a body."""
        if not body.readers:
            self._bytes += len(body.data)
        body.readers += 1

    def release(self, body: _Body) -> None:
        """Called when a client has the body, or has gone."""
        body.readers -= 1
        if not body.readers:
            self._bytes -= len(body.data)


def accepts_gzip(request: Request) -> bool:
    """Whether a client takes gzip."""
    return _GZIP_ACCEPTED.search(request.headers.get("accept-encoding", "")) is not None


class _Body:
    """A body, which several clients may get."""

    __slots__ = ("data", "is_compressed", "readers")

    def __init__(self, data: bytes, is_compressed: bool) -> None:
        self.data = data
        self.is_compressed = is_compressed
        self.readers = 0


class _InParts(Response):
    """Sends a body in parts, so that the server keeps only one of them for a client that reads slowly."""

    def __init__(self, answers: Answers, body: _Body, headers: Mapping[str, str]) -> None:
        length = {"Content-Length": str(len(body.data))}
        super().__init__(headers={**_encoded(headers, body.is_compressed), **length})
        self._answers = answers
        self._shared = body

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:  # noqa: ARG002
        data = self._shared.data
        self._answers.hold(self._shared)
        try:
            await send({"type": "http.response.start", "status": self.status_code, "headers": self.raw_headers})
            for start in range(0, max(len(data), 1), _PART_BYTES):
                part, is_last = data[start : start + _PART_BYTES], start + _PART_BYTES >= len(data)
                await send({"type": "http.response.body", "body": part, "more_body": not is_last})
        finally:
            self._answers.release(self._shared)


class _Stream(StreamingResponse):
    def __init__(self, answers: Answers, pieces: Iterable[bytes], headers: Mapping[str, str]) -> None:
        super().__init__(pieces, headers=headers)
        self._answers = answers

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            await super().__call__(scope, receive, send)
        finally:
            self._answers.end_stream()


def _encoded(headers: Mapping[str, str], is_compressed: bool) -> dict[str, str]:
    encoding = {"Content-Encoding": "gzip"} if is_compressed else {}
    return {**headers, "Vary": "Accept-Encoding", **encoding}


def _is_large(data: bytes) -> bool:
    return len(data) >= _LEAST_COMPRESSED_BYTES


def _gzip(data: bytes) -> bytes:
    return b"".join(_gzipped([data]))


def _gzipped(pieces: Iterable[bytes]) -> Iterator[bytes]:
    # Fast: over a network of today, a better compression takes longer than it saves.
    compressor = zlib.compressobj(_FAST, wbits=_GZIP)
    for piece in pieces:
        if compressed := compressor.compress(piece):
            yield compressed
    yield compressor.flush()
