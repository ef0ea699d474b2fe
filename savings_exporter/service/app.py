"""The HTTP application: savings in, metrics and totals out. Every error is ``application/problem+json`` (RFC 9457)."""

from __future__ import annotations

import asyncio
import hmac
import re
from http import HTTPStatus
from typing import Any

import msgspec
from prometheus_client import PROCESS_COLLECTOR, CollectorRegistry
from prometheus_client.exposition import choose_encoder
from prometheus_client.registry import Collector
from starlette.applications import Starlette
from starlette.concurrency import run_in_threadpool
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.requests import ClientDisconnect, Request
from starlette.responses import HTMLResponse, PlainTextResponse, Response
from starlette.routing import Route
from starlette.types import ASGIApp, Receive, Scope, Send

from savings_exporter.errors import KeyConflictError
from savings_exporter.model.keys import checked_key
from savings_exporter.model.record import SavingsRecord
from savings_exporter.service import status_page
from savings_exporter.service.views import as_json, printable
from savings_exporter.tracker import SavingsTracker
from savings_exporter.tracking.receipt import Receipt
from savings_exporter.watched import WatchedFile

SAVINGS_PATH = "/v1/savings"
HEALTHY_PATH, READY_PATH = "/-/healthy", "/-/ready"

MAX_BODY_BYTES = 8 * 1024 * 1024
MAX_RECORDS = 10_000

# What is taken on at once, in requests and in bytes of their bodies, and how long a body may take to arrive.
MAX_POSTS_IN_FLIGHT = 1_000
MAX_BODY_BYTES_IN_FLIGHT = 64 * 1024 * 1024
BODY_TIMEOUT_SECONDS = 30.0

# The rest of a body that is too large is read and dropped, because a client that is cut off while it sends does not
# get to see why. Beyond this it is cut off all the same.
_MAX_DROPPED_BYTES = 256 * 1024 * 1024

# A larger one is decoded in a thread, so that other requests are answered meanwhile, and one after the other, because
# a decoded body can take twenty times the memory of its bytes.
_LARGE_BODY_BYTES = 64 * 1024

# An answer repeats no more than this of what a client sent.
_MAX_SHOWN = 500

_RETRY_AFTER_SECONDS = "5"

# The status page runs nothing and loads nothing, whatever name a client has made up.
_PAGE_HEADERS = {"Content-Security-Policy": "default-src 'none'; style-src 'unsafe-inline'"}

_json = msgspec.json.Encoder()


class _Batch(msgspec.Struct, forbid_unknown_fields=True):
    records: list[SavingsRecord]


class Service:
    """The routes over one source of totals; only a tracker takes savings.

    ``stopping`` is set when the service begins to stop: what is in flight is answered, and new savings are refused,
    so that nothing is accepted that could not be saved any more.
    """

    def __init__(
        self,
        source: SavingsTracker | WatchedFile,
        collector: Collector,
        *,
        telemetry_path: str = "/metrics",
        token: str | None = None,
    ) -> None:
        self._source = source
        self._registry = CollectorRegistry()
        self._registry.register(collector)
        self._registry.register(PROCESS_COLLECTOR)
        self._telemetry_path = telemetry_path
        self._posts_in_flight = 0
        self._body_bytes_in_flight = 0
        self._decoding_a_large_body = asyncio.Lock()
        self.stopping = False
        self.app = Starlette(
            routes=[
                Route(telemetry_path, self._metrics),
                Route(SAVINGS_PATH, self._savings, methods=["GET", "POST"]),
                Route(HEALTHY_PATH, self._healthy),
                Route(READY_PATH, self._ready),
                Route("/", self._status_page),
            ],
            middleware=[Middleware(_BearerToken, token=token)] if token else [],
            exception_handlers={
                HTTPException: _http_problem,
                _RefusedError: _refused_problem,
                ClientDisconnect: _client_disconnected,
                Exception: _unexpected_problem,
            },
        )

    async def _metrics(self, request: Request) -> Response:
        try:
            encode, content_type = choose_encoder(request.headers.get("accept", ""))
        except (TypeError, ValueError):
            # A version that is no number: the client gets what one without a preference gets.
            encode, content_type = choose_encoder("")
        return Response(await run_in_threadpool(encode, self._registry), headers={"Content-Type": content_type})

    async def _savings(self, request: Request) -> Response:
        source = self._source
        if request.method == "POST":
            if isinstance(source, SavingsTracker):
                return await self._record(request, source)
            detail = "watch only reads; savings are taken by another service, started with: savings-exporter serve"
            raise HTTPException(HTTPStatus.METHOD_NOT_ALLOWED, detail, headers={"Allow": "GET, HEAD"})
        snapshot = await run_in_threadpool(source.snapshot)
        return _json_response(as_json(snapshot, source.health(), source.storage_path))

    async def _healthy(self, _request: Request) -> Response:
        """Whether savings can be kept. Not a reason to restart the process: that would lose what is pending."""
        # A watched file is looked at when somebody asks for its totals, and this asks whether that would work.
        await run_in_threadpool(self._source.snapshot)
        health = self._source.health()
        if not health.healthy:
            raise _RefusedError(HTTPStatus.SERVICE_UNAVAILABLE, health.reason or "the store is degraded")
        return PlainTextResponse("healthy\n")

    async def _ready(self, _request: Request) -> Response:
        """Whether requests are taken, also while the store is degraded."""
        if self.stopping:
            raise _RefusedError(HTTPStatus.SERVICE_UNAVAILABLE, "the service is stopping", retry=True)
        return PlainTextResponse("ready\n")

    async def _status_page(self, request: Request) -> Response:
        source, prefix = self._source, request.scope.get("root_path", "")
        snapshot = await run_in_threadpool(source.snapshot)
        page = status_page.render(
            snapshot, source.health(), source.storage_path, prefix + self._telemetry_path, prefix + SAVINGS_PATH
        )
        return HTMLResponse(page.encode("utf-8", "backslashreplace"), headers=_PAGE_HEADERS)

    async def _record(self, request: Request, tracker: SavingsTracker) -> Response:
        if self._posts_in_flight >= MAX_POSTS_IN_FLIGHT:
            raise _RefusedError(HTTPStatus.SERVICE_UNAVAILABLE, "too many requests are being answered", retry=True)
        # Asked before the body is read: what came in before the stop is still answered.
        if self.stopping:
            raise _RefusedError(HTTPStatus.SERVICE_UNAVAILABLE, "the service is stopping", retry=True)
        self._posts_in_flight += 1
        body = bytearray()
        try:
            await self._read(request, body)
            if len(body) > _LARGE_BODY_BYTES:
                async with self._decoding_a_large_body:
                    records = await run_in_threadpool(_records, request, body)
            else:
                records = _records(request, body)
            receipt = await _recorded(tracker, records, _key(request))
        finally:
            self._posts_in_flight -= 1
            self._body_bytes_in_flight -= len(body)
        answer = {
            "sequence": receipt.sequence,
            "writer": receipt.writer,
            "accepted": len(records),
            "durable": receipt.durable,
        }
        if receipt.duplicate:
            answer["duplicate"] = True
        return _json_response(answer, HTTPStatus.OK if answer["durable"] else HTTPStatus.ACCEPTED)

    async def _read(self, request: Request, body: bytearray) -> None:
        """Read a body. A slow sender is cut off after some time."""
        try:
            size = await asyncio.wait_for(self._read_all(request, body), BODY_TIMEOUT_SECONDS)
        except asyncio.TimeoutError:
            detail = f"the body did not arrive within {BODY_TIMEOUT_SECONDS:g} seconds; nothing was recorded"
            raise _RefusedError(HTTPStatus.REQUEST_TIMEOUT, detail, close=True) from None
        if size > MAX_BODY_BYTES:
            detail = f"the body is larger than {MAX_BODY_BYTES} bytes"
            raise _RefusedError(HTTPStatus.REQUEST_ENTITY_TOO_LARGE, detail, close=True)

    async def _read_all(self, request: Request, body: bytearray) -> int:
        """Read a body of any size, and keep it if it is not too large. Returns its size."""
        size = 0
        async for chunk in request.stream():
            size += len(chunk)
            if size > _MAX_DROPPED_BYTES:
                break
            if size > MAX_BODY_BYTES:
                self._body_bytes_in_flight -= len(body)
                body.clear()
            elif self._body_bytes_in_flight + len(chunk) > MAX_BODY_BYTES_IN_FLIGHT:
                raise _RefusedError(
                    HTTPStatus.SERVICE_UNAVAILABLE, "too many large requests are being answered", retry=True
                )
            else:
                self._body_bytes_in_flight += len(chunk)
                body += chunk
        return size


class _RefusedError(Exception):
    """``retry``: the client may try again soon; ``close``: what it still sends is not read any more."""

    def __init__(
        self, status: HTTPStatus, detail: str, *, field: str | None = None, retry: bool = False, close: bool = False
    ) -> None:
        self.status = status
        self.detail = detail
        self.field = field
        self.retry = retry
        self.close = close


class _BearerToken:
    """Lets only callers with the token through; liveness and readiness are for everybody."""

    def __init__(self, app: ASGIApp, token: str) -> None:
        self._app = app
        self._token = token.encode()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http" and scope["path"] not in (HEALTHY_PATH, READY_PATH):
            scheme, _, shown = dict(scope["headers"]).get(b"authorization", b"").partition(b" ")
            if scheme.lower() != b"bearer" or not hmac.compare_digest(shown.strip(), self._token):
                response = _problem(HTTPStatus.UNAUTHORIZED, "a bearer token is needed, and this is not the one")
                response.headers["WWW-Authenticate"] = "Bearer"
                await response(scope, receive, send)
                return
        await self._app(scope, receive, send)


def _records(request: Request, body: bytearray) -> list[SavingsRecord]:
    content_type = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    if content_type != "application/json":
        raise _RefusedError(HTTPStatus.UNSUPPORTED_MEDIA_TYPE, "the Content-Type must be application/json")
    try:
        if not _is_batch(body):
            return [msgspec.json.decode(body, type=SavingsRecord)]
        records = msgspec.json.decode(body, type=_Batch).records
    except msgspec.ValidationError as error:
        raise _RefusedError(HTTPStatus.UNPROCESSABLE_ENTITY, str(error), field=_field(str(error))) from None
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        raise _RefusedError(HTTPStatus.BAD_REQUEST, f"the body is not JSON: {error}") from None
    if not 1 <= len(records) <= MAX_RECORDS:
        detail = f"records must hold 1 to {MAX_RECORDS} records, and holds {len(records)}"
        raise _RefusedError(HTTPStatus.UNPROCESSABLE_ENTITY, detail, field="records")
    return records


def _key(request: Request) -> str | None:
    key = request.headers.get("idempotency-key")
    try:
        return checked_key(key)
    except ValueError as error:
        detail = str(error).replace("idempotency_key", "Idempotency-Key")
        raise _RefusedError(HTTPStatus.UNPROCESSABLE_ENTITY, detail, field="Idempotency-Key") from None


async def _recorded(tracker: SavingsTracker, records: list[SavingsRecord], key: str | None) -> Receipt:
    try:
        return await tracker.record_many_async(records, idempotency_key=key)
    except KeyConflictError as error:
        detail = str(error).replace("idempotency_key", "Idempotency-Key", 1)
        raise _RefusedError(HTTPStatus.UNPROCESSABLE_ENTITY, detail, field="Idempotency-Key") from None


def _is_batch(body: bytearray) -> bool:
    try:
        parsed = msgspec.json.decode(body)
    except msgspec.ValidationError:
        # A number beyond the range of a float: JSON, but no number of ours, as the typed decoder will say by its name.
        parsed = msgspec.json.decode(body, type=dict[str, msgspec.Raw])
    return isinstance(parsed, dict) and "records" in parsed


def _field(message: str) -> str:
    """The field that a validation error is about, such as ``records[3].model``; the body itself is ``$``."""
    # The message may hold a key that a client made up, so it is taken apart without searching back and forth.
    what, found, path = message.rpartition(" - at `$")
    if not found:
        what, path = message, ""
    named = re.match(r"(?:Object (?:missing required|contains unknown) field `([^`]*)`|(\w+) must )", what)
    parts = [path.removesuffix("`").removeprefix("."), (named[1] or named[2]) if named else ""]
    return ".".join(part for part in parts if part) or "$"


def _json_response(content: Any, status: HTTPStatus = HTTPStatus.OK) -> Response:
    return Response(_json.encode(content), status, media_type="application/json")


def _problem(status: HTTPStatus, detail: str, field: str | None = None) -> Response:
    body = {"title": status.phrase, "status": int(status), "detail": printable(_cut(detail))}
    if field is not None:
        body["field"] = _cut(field)
    return Response(_json.encode(body), status, media_type="application/problem+json")


def _cut(text: str) -> str:
    return text if len(text) <= _MAX_SHOWN else text[:_MAX_SHOWN] + "..."


async def _refused_problem(_request: Request, error: Exception) -> Response:
    assert isinstance(error, _RefusedError)
    response = _problem(error.status, error.detail, error.field)
    if error.retry:
        response.headers["Retry-After"] = _RETRY_AFTER_SECONDS
    if error.close:
        response.headers["Connection"] = "close"
    return response


async def _http_problem(_request: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException)
    response = _problem(HTTPStatus(error.status_code), error.detail)
    response.headers.update(error.headers or {})
    return response


async def _client_disconnected(_request: Request, _error: Exception) -> Response:
    return Response(status_code=HTTPStatus.BAD_REQUEST)


async def _unexpected_problem(_request: Request, _error: Exception) -> Response:
    # The server logs the error itself, which Starlette raises again after this answer.
    return _problem(HTTPStatus.INTERNAL_SERVER_ERROR, "the request failed; the service's log says why")
