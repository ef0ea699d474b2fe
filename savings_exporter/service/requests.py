"""Counts, measures and logs the requests of the service, so that a refused saving is visible to its operator."""

from __future__ import annotations

import asyncio
import itertools
import logging
import time
from bisect import bisect_left
from collections.abc import Collection, Iterator
from contextvars import Context
from http import HTTPStatus

import msgspec
from prometheus_client import CollectorRegistry
from prometheus_client.core import CounterMetricFamily, HistogramMetricFamily, Metric
from prometheus_client.registry import Collector
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from savings_exporter.service.paths import DOCUMENTS_PATH, HEALTHY_PATH, READY_PATH, SAVINGS_PATH, route_path

logger = logging.getLogger(__name__)

REASON = "savings_exporter.reason"
"""Where a route puts into the scope why it refuses a request, if its answer is no problem document."""

_OTHER = "other"
_METHODS = ("GET", "HEAD", "POST")
# The answers to a POST. Their series exist from the start, so that increase() sees the first refused request.
_POST_CODES = (200, 202, 400, 401, 405, 408, 413, 415, 422, 500, 503)
_BOUNDS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0)
_LOG_INTERVAL_SECONDS = 60.0
_REFUSED = 400


class RequestLog(Collector):
    """Counts answered requests, and logs refused ones: at most one line a minute for each method, route and status.

    The label values are bounded: a path that is not one of ``routes`` counts as ``other``, and so does any method
    other than GET, HEAD and POST. Only the event loop calls ``note``, so that the counters need no locks.
    """

    def __init__(self, registry: CollectorRegistry, routes: Collection[str]) -> None:
        self._routes = frozenset(routes)
        self._began = time.time()
        self._answered: dict[tuple[str, str, int], _Answered] = {}
        self._refusals: dict[tuple[str, str, int], _Refusal] = {}
        for code in _POST_CODES:
            self._answered["POST", SAVINGS_PATH, code] = _Answered()
        registry.register(self)

    def note(self, method: str, path: str, code: int, seconds: float, detail: str) -> None:
        """Account for one answer. ``detail`` says why a request was refused."""
        answered = self._answered.get((method, path, code))
        if answered is None or code >= _REFUSED:
            method = method if method in _METHODS else _OTHER
            path = DOCUMENTS_PATH if path.startswith(DOCUMENTS_PATH) else path
            route = path if path in self._routes else _OTHER
            kind = method, route, int(code)
            answered = self._answered.setdefault(kind, _Answered())
            # Health and readiness are questions: 503 is an answer.
            if code >= _REFUSED and route not in (HEALTHY_PATH, READY_PATH):
                self._refusals.setdefault(kind, _Refusal(f"{method} {route}", code)).note(detail)
        answered.seconds += seconds
        answered.buckets[bisect_left(_BOUNDS, seconds)] += 1

    def collect(self) -> Iterator[Metric]:
        """The counters as metrics."""
        answered = sorted(self._answered.copy().items())
        count = CounterMetricFamily(
            "savings_http_requests", "Requests that this process answered.", labels=["method", "route", "code"]
        )
        durations = HistogramMetricFamily(
            "savings_http_request_duration_seconds",
            "Duration of a request, from its headers to the end of its answer.",
            labels=["method", "route"],
        )
        for (method, route, code), group in answered:
            count.add_metric([method, route, str(code)], sum(group.buckets), created=self._began)
        for (method, route), several in itertools.groupby(answered, key=lambda item: item[0][:2]):
            same = [each for _, each in several]
            numbers = itertools.accumulate(map(sum, zip(*(each.buckets for each in same), strict=True)))
            buckets = [(str(bound), number) for bound, number in zip((*_BOUNDS, "+Inf"), numbers, strict=True)]
            durations.add_metric([method, route], buckets, sum(each.seconds for each in same))
        yield count
        yield durations

    def flush(self) -> None:
        """Log the refused requests that wait for their line."""
        for refusal in self._refusals.values():
            refusal.log()


class _Answered:
    """The answers of one kind: how many took at most each bound and how many longer, and how long all took."""

    __slots__ = ("buckets", "seconds")

    def __init__(self) -> None:
        self.buckets = [0] * (len(_BOUNDS) + 1)
        self.seconds = 0.0


class RequestLogging:
    """Middleware that passes requests on and notes their answers."""

    def __init__(self, app: ASGIApp, log: RequestLog) -> None:
        self._app = app
        self._log = log

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass a request on, and account for its answer."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        began = time.perf_counter()
        answer = _Answer(send)
        try:
            await self._app(scope, receive, answer.send)
        finally:
            seconds = time.perf_counter() - began
            detail = scope.get(REASON) or answer.detail()
            self._log.note(scope["method"], route_path(scope), answer.code, seconds, detail)


class _Answer:
    """Passes an answer on, and keeps its status and the body of an error."""

    def __init__(self, send: Send) -> None:
        self._send = send
        self._body = b""
        # The application ended without an answer, or raised: the server answers with this status.
        self.code = int(HTTPStatus.INTERNAL_SERVER_ERROR)

    async def send(self, message: Message) -> None:
        if message["type"] == "http.response.start":
            self.code = message["status"]
        elif self.code >= HTTPStatus.BAD_REQUEST:
            self._body = message.get("body", b"")
        await self._send(message)

    def detail(self) -> str:
        """Why the request was refused, from the body of the error."""
        try:
            return msgspec.json.decode(self._body, type=_Problem).detail
        except (msgspec.DecodeError, UnicodeDecodeError):
            return "the request failed"


class _Problem(msgspec.Struct):
    detail: str = ""


class _Refusal:
    """Logs the refused requests of one kind: the first at once, the following ones once a minute, with their number."""

    def __init__(self, request: str, code: int) -> None:
        self._request = request
        self._code = code
        self._logged_at = float("-inf")
        self._waiting = 0
        self._detail = ""

    def note(self, detail: str) -> None:
        self._detail = detail
        self._waiting += 1
        delay = self._logged_at + _LOG_INTERVAL_SECONDS - time.monotonic()
        if delay <= 0:
            self.log()
        elif self._waiting == 1:
            # Without the context of this request: the line is about the latest one.
            asyncio.get_running_loop().call_later(delay, self._log_if_due, context=Context())

    def _log_if_due(self) -> None:
        if time.monotonic() >= self._logged_at + _LOG_INTERVAL_SECONDS:
            self.log()

    def log(self) -> None:
        """Log the requests that wait for a line, if there are any."""
        if not self._waiting:
            return
        count, self._waiting, self._logged_at = self._waiting, 0, time.monotonic()
        line = "%s: refused a request with status %d: %s"
        if count > 1:
            line = f"%s: refused {count} requests with status %d, the latest one: %s"
        logger.warning(line, self._request, self._code, self._detail)
