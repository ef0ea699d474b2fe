"""Shows a tracker in a web application: ``mount`` for Starlette and FastAPI, ``mount_wsgi`` for Flask and Django."""

from __future__ import annotations

from collections.abc import AsyncIterator, Iterable
from contextlib import asynccontextmanager
from http import HTTPStatus
from typing import TYPE_CHECKING, Any

import msgspec
from prometheus_client import PROCESS_COLLECTOR, CollectorRegistry
from prometheus_client.exposition import CONTENT_TYPE_LATEST, generate_latest
from starlette.applications import Starlette
from starlette.concurrency import run_in_threadpool
from starlette.responses import Response

from savings_exporter.service import problems
from savings_exporter.service.app import Service
from savings_exporter.service.paths import SAVINGS_PATH
from savings_exporter.service.views import as_json
from savings_exporter.service.webconfig import WebConfig
from savings_exporter.telemetry.metrics import SavingsCollector
from savings_exporter.tracker import SavingsTracker

if TYPE_CHECKING:
    from _typeshed.wsgi import StartResponse, WSGIApplication, WSGIEnvironment

_METRICS_PATH = "/metrics"
_READING = ("GET", "HEAD")


def mount(app: Starlette, tracker: SavingsTracker, path: str = "/savings") -> None:
    """Add the GET routes of the service to a Starlette or FastAPI application: the page, ``/metrics``, the totals and
    the others, below a path. The tracker is closed when the application stops, after its own lifespan has ended.

    Savings are not accepted over HTTP. The routes ask for no credentials of their own, and the host is not checked:
    middleware of the application applies to them.

    Raises:
        ValueError: the path does not begin with a slash, or ends with one.
    """
    _check(path)
    # The application decides which hosts it answers for.
    service = Service(tracker, SavingsCollector(tracker), web_config=WebConfig(None, names=None), reads_only=True)
    app.mount(path, service.app)
    own = app.router.lifespan_context

    @asynccontextmanager
    async def lifespan(application: Any) -> AsyncIterator[Any]:
        try:
            async with own(application) as state:
                yield state
        finally:
            await run_in_threadpool(tracker.close)

    app.router.lifespan_context = lifespan


def mount_wsgi(app: WSGIApplication, tracker: SavingsTracker, path: str = "/savings") -> WSGIApplication:
    """A WSGI application that answers ``/metrics`` and ``/v1/savings`` (the totals as JSON) below a path, and passes
    all other requests on. The tracker closes itself when Python exits, as gunicorn's workers do.

    These two routes are answered before the application, so its authentication does not apply to them.

    Raises:
        ValueError: the path does not begin with a slash, or ends with one.
    """
    _check(path)
    registry = CollectorRegistry()
    registry.register(SavingsCollector(tracker))
    registry.register(PROCESS_COLLECTOR)

    def totals() -> bytes:
        return msgspec.json.encode(as_json(tracker.snapshot(), tracker.health(), tracker.storage_path)) + b"\n"

    def metrics() -> bytes:
        return generate_latest(registry)

    routes = {
        path + _METRICS_PATH: (metrics, CONTENT_TYPE_LATEST),
        path + SAVINGS_PATH: (totals, "application/json"),
    }

    def answer(environ: WSGIEnvironment, start_response: StartResponse) -> Iterable[bytes]:
        route = routes.get(environ.get("PATH_INFO", ""))
        if route is None:
            return app(environ, start_response)
        status, headers = HTTPStatus.OK, {}
        if environ["REQUEST_METHOD"] in _READING:
            build, headers["Content-Type"] = route
            body = build()
        else:
            status = HTTPStatus.METHOD_NOT_ALLOWED
            refused = _only_reads()
            body, headers = bytes(refused.body), {name.title(): text for name, text in refused.headers.items()}
        headers["Content-Length"] = str(len(body))
        start_response(f"{status.value} {status.phrase}", list(headers.items()))
        return [] if environ["REQUEST_METHOD"] == "HEAD" else [body]

    return answer


def _only_reads() -> Response:
    response = problems.problem(HTTPStatus.METHOD_NOT_ALLOWED, "use GET for this path; the program records its savings")
    response.headers["Allow"] = "GET, HEAD"
    return response


def _check(path: str) -> None:
    if not path.startswith("/") or path.endswith("/"):
        raise ValueError(f"path must begin with a slash and not end with one, such as /savings, got {path!r}")
