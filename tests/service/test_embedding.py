"""The routes of the service in applications of others, served by real servers."""

from __future__ import annotations

import json
import socket
import subprocess
import sys
import threading
import urllib.error
import urllib.request
import wsgiref.simple_server
from collections.abc import AsyncIterator, Callable, Iterable, Iterator
from contextlib import asynccontextmanager, contextmanager
from http import HTTPStatus
from pathlib import Path
from typing import Any

import pytest
import uvicorn
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import PlainTextResponse
from starlette.routing import Route

from savings_exporter import SavingsTracker
from savings_exporter.embedding import mount, mount_wsgi
from tests.support.scrape import parsed
from tests.support.wait import WAIT_SECONDS, eventually


class Answer:
    def __init__(self, response: Any) -> None:
        self.status, self.headers, self.text = response.status, response.headers, response.read().decode()


def ask(url: str, method: str = "GET", **headers: str) -> Answer:
    data = b"{}" if method == "POST" else None
    request = urllib.request.Request(url, data, {"Content-Type": "application/json", **headers}, method=method)
    try:
        with urllib.request.urlopen(request, timeout=WAIT_SECONDS) as response:
            return Answer(response)
    except urllib.error.HTTPError as error:
        with error:
            return Answer(error)


@contextmanager
def served(app: Starlette) -> Iterator[str]:
    """The URL of an application of Starlette, which runs until the end of the block."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        server = uvicorn.Server(uvicorn.Config(app, log_config=None, timeout_graceful_shutdown=1))
        thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]})
        thread.start()
        try:
            eventually(lambda: server.started, "the server to start")
            yield f"http://127.0.0.1:{listener.getsockname()[1]}"
        finally:
            server.should_exit = True
            thread.join()


class Silent(wsgiref.simple_server.WSGIRequestHandler):
    def log_message(self, *_arguments: object) -> None:
        pass


def own_wsgi(environ: dict[str, Any], start_response: Callable[..., object]) -> Iterable[bytes]:
    start_response("200 OK", [("Content-Type", "text/plain")])
    return [environ["PATH_INFO"].encode()]


@contextmanager
def served_wsgi(app: Any) -> Iterator[str]:
    with wsgiref.simple_server.make_server("127.0.0.1", 0, app, handler_class=Silent) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        try:
            yield f"http://127.0.0.1:{server.server_port}"
        finally:
            server.shutdown()
            thread.join()


def record(tracker: SavingsTracker) -> None:
    assert tracker.record_request(model="m", tokens_saved=7).durable


def test_starlette(store_path: Path) -> None:
    """The routes that read answer under the path and under any host name, the application's own stay, and its lifespan
    can record until it ends.
    """
    tracker = SavingsTracker(store_path)
    lives: list[str] = []

    @asynccontextmanager
    async def lifespan(_app: Starlette) -> AsyncIterator[None]:
        lives.append("began")
        yield
        await tracker.record_request_async(model="m", tokens_saved=1)
        lives.append("ended")

    async def own(request: Request) -> PlainTextResponse:
        return PlainTextResponse("own")

    app = Starlette(routes=[Route("/own", own)], lifespan=lifespan)
    mount(app, tracker, "/at/savings")
    with served(app) as url:
        record(tracker)
        answer = ask(f"{url}/at/savings/metrics", Host="proxy.example.com")
        assert answer.status == HTTPStatus.OK, answer.text
        assert sum(n for key, n in parsed(answer.text).items() if key.startswith("savings_requests_total{")) == 1
        assert json.loads(ask(f"{url}/at/savings/v1/savings").text)["lifetime"]["tokens_saved"] == 7
        page = ask(f"{url}/at/savings")
        assert page.status == HTTPStatus.OK
        assert "/at/savings/metrics" in page.text
        description = json.loads(ask(f"{url}/at/savings/openapi.json").text)
        assert description["servers"] == [{"url": "/at/savings"}]
        assert set(description["paths"]["/v1/savings"]) == {"get"}
        assert ask(f"{url}/own").text == "own"
        refused = ask(f"{url}/at/savings/v1/savings", "POST")
        assert (refused.status, refused.headers["Allow"]) == (HTTPStatus.METHOD_NOT_ALLOWED, "GET, HEAD")
        assert ask(f"{url}/metrics").status == HTTPStatus.NOT_FOUND
    assert lives == ["began", "ended"]
    with pytest.raises(RuntimeError, match="closed"):
        record(tracker)
    with SavingsTracker(store_path) as again:
        assert again.snapshot().lifetime.tokens_saved == 8


def test_wsgi(store_path: Path) -> None:
    with SavingsTracker(store_path) as tracker, served_wsgi(mount_wsgi(own_wsgi, tracker, "/s")) as url:
        record(tracker)
        answer = ask(f"{url}/s/metrics")
        assert sum(n for key, n in parsed(answer.text).items() if key.startswith("savings_requests_total{")) == 1
        assert json.loads(ask(f"{url}/s/v1/savings").text)["lifetime"]["tokens_saved"] == 7
        head = ask(f"{url}/s/v1/savings", "HEAD")
        assert (head.status, head.text) == (HTTPStatus.OK, "")
        refused = ask(f"{url}/s/v1/savings", "POST")
        assert (refused.status, refused.headers["Allow"]) == (HTTPStatus.METHOD_NOT_ALLOWED, "GET, HEAD")
        assert json.loads(refused.text)["status"] == HTTPStatus.METHOD_NOT_ALLOWED
        assert [ask(url + path).text for path in ("/", "/s", "/s/metricsx")] == ["/", "/s", "/s/metricsx"]


@pytest.mark.parametrize("path", ["", "savings", "/", "/savings/"])
def test_wrong_path(store_path: Path, path: str) -> None:
    with SavingsTracker(store_path) as tracker:
        with pytest.raises(ValueError, match="path must begin with a slash"):
            mount(Starlette(), tracker, path)
        with pytest.raises(ValueError, match="path must begin with a slash"):
            mount_wsgi(own_wsgi, tracker, path)


def test_tracker_needs_no_web_framework() -> None:
    """A program that only records does not load one."""
    code = "import sys; from savings_exporter import SavingsTracker; sys.exit('starlette' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
