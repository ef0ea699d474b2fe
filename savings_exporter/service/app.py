"""The HTTP application: savings in, metrics and totals out."""

from __future__ import annotations

import asyncio
import re
from collections.abc import Mapping
from http import HTTPStatus
from typing import TYPE_CHECKING

import msgspec
from prometheus_client import PROCESS_COLLECTOR, CollectorRegistry
from prometheus_client.exposition import choose_encoder
from prometheus_client.registry import Collector
from starlette.applications import Starlette
from starlette.concurrency import run_in_threadpool
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.requests import Request
from starlette.responses import PlainTextResponse, Response
from starlette.routing import Route
from starlette.types import ASGIApp, Receive, Scope, Send

from savings_exporter.errors import StoreError
from savings_exporter.service import history, openapi, problems
from savings_exporter.service.answers import Answers
from savings_exporter.service.browsers import WithHeaders
from savings_exporter.service.guard import Guard, Guarded
from savings_exporter.service.intake import Intake, IntakeLimits
from savings_exporter.service.otlp import OtlpRoute
from savings_exporter.service.pages import status as status_page
from savings_exporter.service.pages.documents import Documents
from savings_exporter.service.pages.status import StatusPage
from savings_exporter.service.paths import (
    DOCUMENTS_PATH,
    HEALTHY_PATH,
    HISTORY_PATH,
    OPENAPI_PATH,
    OTLP_PATH,
    READY_PATH,
    SAVINGS_PATH,
    route_path,
)
from savings_exporter.service.problems import RefusedError
from savings_exporter.service.recording import Recording, Take
from savings_exporter.service.requests import RequestLog, RequestLogging
from savings_exporter.service.views import as_json
from savings_exporter.service.webconfig import WebConfig
from savings_exporter.sources.otlp import METRICS, MetricMap
from savings_exporter.sources.otlp_import import OtlpImport
from savings_exporter.tracker import SavingsTracker
from savings_exporter.watched import WatchedFile

if TYPE_CHECKING:
    from opentelemetry.trace import TracerProvider

_USUAL_LIMITS = IntakeLimits()
_OPEN = WebConfig(None)
_PAGE_PATIENCE_SECONDS = 1.5


class Service:
    """The routes over one source of totals; only a tracker takes savings, and not if ``reads_only``.

    ``stopping`` is set when the service begins to stop. Requests in flight are answered, and new savings are refused,
    because they could no longer be saved. ``registry`` collects all metrics that it shows.
    """

    def __init__(
        self,
        source: SavingsTracker | WatchedFile,
        collector: Collector,
        *,
        telemetry_path: str = "/metrics",
        web_config: WebConfig = _OPEN,
        limits: IntakeLimits = _USUAL_LIMITS,
        tracer_provider: TracerProvider | None = None,
        otlp: OtlpImport | None = None,
        otlp_metrics: Mapping[str, MetricMap] = METRICS,
        reads_only: bool = False,
        is_demo: bool = False,
    ) -> None:
        self._source = source
        tracker = source if isinstance(source, SavingsTracker) and not reads_only else None
        self.registry = CollectorRegistry()
        self.registry.register(collector)
        self.registry.register(PROCESS_COLLECTOR)
        self.registry.register(web_config)
        self._telemetry_path = telemetry_path
        self._answers = Answers()
        self._description = openapi.document(
            telemetry_path, limits, takes_savings=tracker is not None, takes_otlp=otlp is not None
        )
        self._page = StatusPage(source, telemetry_path, takes_savings=tracker is not None, is_demo=is_demo)
        self.stopping = False
        self.requests = RequestLog(
            self.registry,
            (
                telemetry_path,
                SAVINGS_PATH,
                HISTORY_PATH,
                OTLP_PATH,
                HEALTHY_PATH,
                READY_PATH,
                DOCUMENTS_PATH,
                OPENAPI_PATH,
                "/",
            ),
        )
        guard = Guard(web_config)
        intake = self._intake = Intake(limits)
        otlp_routes = []
        if otlp is not None:
            self.registry.register(otlp)
            route = OtlpRoute(otlp, otlp_metrics, intake, self._refusal)
            otlp_routes.append(Route(OTLP_PATH, route.answer, methods=["POST"]))
        routed = Starlette(
            routes=[
                Route(telemetry_path, self._metrics),
                Route(SAVINGS_PATH, self._savings, methods=["GET", "POST"]),
                Route(HISTORY_PATH, self._history),
                Route(HEALTHY_PATH, self._healthy),
                Route(READY_PATH, self._ready),
                Route(OPENAPI_PATH, self._openapi),
                Route("/", self._status_page),
                *self._page.routes(),
                *otlp_routes,
                *Documents().routes(),
            ],
            middleware=[
                Middleware(RequestLogging, log=self.requests),
                Middleware(Guarded, guard=guard),
            ],
            exception_handlers=problems.HANDLERS,
        )
        app: ASGIApp = WithHeaders(routed, guard.headers)
        self.take: Take | None = None
        """Takes savings past the application; None if all requests go through it."""
        if tracker is not None:
            recording = Recording(
                tracker,
                intake,
                self.requests,
                guard,
                self._refusal,
                is_traced=tracer_provider is not None,
            )
            app = _Dispatch(recording, app)
            # Tracing wraps the application.
            self.take = recording.take if tracer_provider is None else None
        self.app = _traced(app, tracer_provider, telemetry_path)
        """The ASGI application."""

    def cut_off_bodies(self) -> None:
        """Refuse the requests whose bodies have not arrived."""
        self._intake.cut_off_all()

    async def _metrics(self, request: Request) -> Response:
        try:
            encode, content_type = choose_encoder(request.headers.get("accept", ""))
        except (TypeError, ValueError):
            # The client asked for an invalid version: it gets the default format.
            encode, content_type = choose_encoder("")
        headers = {"Content-Type": content_type}
        return await self._answers.response(request, content_type, lambda: encode(self.registry), headers)

    async def _savings(self, request: Request) -> Response:
        source = self._source
        if request.method == "POST":
            detail = "this service only reads; savings are taken by another one, started with: savings-exporter serve"
            raise HTTPException(HTTPStatus.METHOD_NOT_ALLOWED, detail, headers={"Allow": "GET, HEAD"})

        def build() -> bytes:
            content = as_json(source.snapshot(), source.health(), source.storage_path)
            # The newline is for people: without it, a shell's prompt follows the answer in the same line.
            return msgspec.json.encode(content) + b"\n"

        return await self._answers.response(request, SAVINGS_PATH, build, {"Content-Type": "application/json"})

    async def _history(self, request: Request) -> Response:
        given = request.query_params
        unknown = sorted(set(given) - {"from", "to", "by", "format"})
        if unknown:
            raise _wrong_query(unknown[0], "is not known; the parameters are from, to, by and format")
        kind = given.get("format", "json")
        if kind not in ("json", "csv"):
            raise _wrong_query("format", "must be json or csv")
        try:
            query = history.Query(given.get("from", ""), given.get("to", ""), given.get("by", "day,model"))
        except history.WrongQueryError as error:
            raise _wrong_query(error.name, error.problem) from None
        try:
            dated = await run_in_threadpool(self._source.days, *query.days)
        except StoreError as error:
            raise RefusedError(HTTPStatus.SERVICE_UNAVAILABLE, str(error)) from None
        pieces = (history.as_csv if kind == "csv" else history.as_json)(query, query.rows(dated))
        content_type = "text/csv; charset=utf-8" if kind == "csv" else "application/json"
        return await self._answers.stream(request, pieces, {"Content-Type": content_type})

    async def _healthy(self, _request: Request) -> Response:
        """Whether savings can be kept. Not a reason to restart the process: that would lose what is pending."""
        # A watched file is read when its totals are asked for, and only then is its health known.
        await self._answers.built(HEALTHY_PATH, self._source.snapshot)
        health = self._source.health()
        if not health.healthy:
            raise RefusedError(HTTPStatus.SERVICE_UNAVAILABLE, health.reason or "the store is degraded")
        return PlainTextResponse("healthy\n")

    async def _ready(self, _request: Request) -> Response:
        """Whether requests are taken, also while the store is degraded."""
        if (refusal := self._refusal()) is not None:
            raise refusal
        return PlainTextResponse("ready\n")

    async def _status_page(self, request: Request) -> Response:
        prefix, by = request.scope.get("root_path", ""), request.query_params.get("by", "")
        by = by if by in status_page.GROUPS else status_page.GROUPS[0]
        page, headers = self._page, {"Content-Type": "text/html; charset=utf-8", **status_page.HEADERS}
        answer = self._answers.response(request, ("/", prefix, by), lambda: page.render(prefix, by), headers)
        try:
            return await asyncio.wait_for(answer, _PAGE_PATIENCE_SECONDS)
        except asyncio.TimeoutError:
            # The store hangs. Its threads may all wait for it, so this is not done in one of them.
            return Response(page.render_late(prefix, by), headers=headers)

    async def _openapi(self, request: Request) -> Response:
        description = {**self._description, "servers": [{"url": request.scope.get("root_path") or "/"}]}
        return Response(msgspec.json.encode(description) + b"\n", media_type="application/json")

    def _refusal(self) -> RefusedError | None:
        """Why no request is taken at present; None if requests are taken."""
        if not self.stopping:
            return None
        return RefusedError(HTTPStatus.SERVICE_UNAVAILABLE, "the service is stopping", retry=True)


class _Dispatch:
    """Passes ``POST /v1/savings`` to its own application, past the router and the middleware of all others."""

    def __init__(self, recording: ASGIApp, others: ASGIApp) -> None:
        self._recording = recording
        self._others = others

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        is_saving = scope["type"] == "http" and scope["method"] == "POST" and route_path(scope) == SAVINGS_PATH
        await (self._recording if is_saving else self._others)(scope, receive, send)


def _traced(app: ASGIApp, provider: TracerProvider | None, telemetry_path: str) -> ASGIApp:
    """The application with server spans, which go on with the trace of the caller. Scrapes and checks have none."""
    if provider is None:
        return app
    # Imported here, because it takes time, and most services do not trace.
    from opentelemetry.instrumentation.asgi import OpenTelemetryMiddleware

    excluded = ",".join(f"{re.escape(path)}$" for path in (telemetry_path, HEALTHY_PATH, READY_PATH))
    return OpenTelemetryMiddleware(
        app, tracer_provider=provider, excluded_urls=excluded, exclude_spans=["receive", "send"]
    )


def _wrong_query(name: str, problem: str) -> RefusedError:
    return RefusedError(HTTPStatus.UNPROCESSABLE_ENTITY, f"{name} {problem}", field=name)
