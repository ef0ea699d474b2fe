"""Clients that are slow, silent, greedy or many keep nobody else waiting, and take a bounded amount of memory."""

from __future__ import annotations

import asyncio
import contextlib
import http.client
import json
import os
import re
import resource
import socket
import ssl
import subprocess
import sys
import time
from collections.abc import AsyncIterator, Coroutine, Iterator
from pathlib import Path
from typing import Any, Literal, TypeVar
from urllib.parse import urlsplit

import pytest
import uvicorn
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import PlainTextResponse
from starlette.routing import Route
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol
from uvicorn.server import ServerState

from savings_exporter import SavingsTracker
from savings_exporter.service import connections, protocols
from savings_exporter.service.connections import Connections
from savings_exporter.service.protocols import ConnectionLimits
from tests.support.service import Service, running
from tests.support.wait import eventually

T = TypeVar("T")

RECORD = {"model": "m", "tokens_saved": 1}
GET = b"GET / HTTP/1.1\r\nHost: h\r\n\r\n"
HUGE = b"x" * 30_000_000
GO_ON = asyncio.Event()


async def _answer(request: Request) -> PlainTextResponse:
    if request.url.path == "/refuse":
        return PlainTextResponse("refused", 403)
    body = await request.body()
    if request.url.path == "/slow":
        await GO_ON.wait()
    if request.url.path == "/later":
        await asyncio.sleep(0.001)
    if request.url.path == "/echo":
        return PlainTextResponse(body)
    return PlainTextResponse(HUGE if request.url.path == "/huge" else "answered")


APP = Starlette(
    routes=[
        Route("/", _answer, methods=["GET", "POST"]),
        Route("/huge", _answer),
        Route("/slow", _answer),
        Route("/echo", _answer, methods=["POST"]),
        Route("/later", _answer, methods=["GET", "POST"]),
        Route("/refuse", _answer, methods=["POST"]),
    ]
)


class Serving:
    """An application behind limited connections, on a loopback port."""

    def __init__(self, port: int) -> None:
        self.port = port
        self.refused: list[int] = []
        self.state = ServerState()

    async def connect(self) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
        return await asyncio.open_connection("127.0.0.1", self.port)


@contextlib.asynccontextmanager
async def serving(limits: ConnectionLimits) -> AsyncIterator[Serving]:
    config = uvicorn.Config(APP, lifespan="off", log_config=None, ws="none")
    config.load()
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        listener.listen(100)
        served = Serving(listener.getsockname()[1])
        connections = Connections(
            config, served.state, limits, lambda: None, lambda code, _why: served.refused.append(code)
        )
        accepting = asyncio.create_task(connections.accept(listener))
        try:
            yield served
        finally:
            accepting.cancel()
            for connection in tuple(served.state.connections):
                connection.transport.abort()
            await asyncio.sleep(0)


def run_in(loop_name: Literal["asyncio", "uvloop"], task: Coroutine[Any, Any, T]) -> T:
    """The result of a task in an event loop of a kind."""
    loop = uvicorn.Config(APP, loop=loop_name, log_config=None).get_loop_factory()()  # type: ignore[misc]
    try:
        return loop.run_until_complete(asyncio.wait_for(task, 30))
    finally:
        loop.close()


LIMITS = ConnectionLimits(connections=100, request_seconds=0.2, unread_seconds=0.2)


@pytest.mark.parametrize(
    "sent", [b"", b"GET / HTTP/1.1\r\nHost:", GET, GET + b"GET / HT"], ids=["nothing", "a part", "a request", "more"]
)
def test_client_that_stops_is_cut_off(sent: bytes) -> None:
    async def run() -> bytes:
        async with serving(LIMITS) as served:
            reader, writer = await served.connect()
            writer.write(sent)
            return await asyncio.wait_for(reader.read(), 30)

    assert asyncio.run(run()).count(b"answered") == sent.count(GET)


def test_client_that_does_not_read_is_cut_off() -> None:
    async def run() -> int:
        async with serving(LIMITS) as served:
            reader, writer = await served.connect()
            writer.write(b"GET /huge HTTP/1.1\r\nHost: h\r\n\r\n")
            await reader.readexactly(1000)
            while served.state.connections:
                await asyncio.sleep(0.01)
            return len(await reader.read())

    assert asyncio.run(run()) < len(HUGE) / 2


def test_idle_connection_makes_room_for_a_new_one() -> None:
    async def run() -> list[bytes]:
        async with serving(ConnectionLimits(connections=3, request_seconds=60, unread_seconds=60)) as served:
            silent = [await served.connect() for _ in range(10)]
            answers = []
            for _ in range(5):
                reader, writer = await served.connect()
                writer.write(GET)
                answers.append(await asyncio.wait_for(reader.readuntil(b"answered"), 30))
            assert len(served.state.connections) <= 3
            for _, writer in silent:
                writer.close()
            return answers

    assert len(asyncio.run(run())) == 5


POST = b"POST /refuse HTTP/1.1\r\nHost: h\r\nContent-Length: 20000000\r\n"


@pytest.mark.parametrize("loop", ["asyncio", "uvloop"])
@pytest.mark.parametrize("parser", ["httptools", "h11"])
@pytest.mark.parametrize(
    ("head", "status"),
    [
        (POST + b"Connection: close\r\n\r\n", 403),
        (POST + b"X: \0\r\n\r\n", 400),
        (POST + b"X: " + b"x" * 2000, 431),
    ],
    ids=["refused", "not valid", "long headers"],
)
def test_refused_client_sees_the_answer_while_it_sends(
    monkeypatch: pytest.MonkeyPatch, head: bytes, status: int, parser: str, loop: Literal["asyncio", "uvloop"]
) -> None:
    """The connection is not closed before the client has sent its body, because it would be reset."""
    if parser == "h11":
        monkeypatch.setitem(sys.modules, "httptools", None)
        if status == 431:
            # h11 has a limit of its own.
            head, status = head + b"x" * 100_000, 400

    async def run() -> bytes:
        async with serving(ConnectionLimits(connections=10, header_bytes=1000)) as served:
            reader, writer = await served.connect()
            writer.write(head)
            # The answer is on its way. Now the body follows.
            answer = await reader.readuntil(b"\r\n\r\n")
            writer.write(b"x" * 20_000_000)
            await writer.drain()
            rest = await reader.read()
            writer.close()
            while served.state.connections:
                await asyncio.sleep(0.01)
            return answer + rest

    answer = run_in(loop, run())
    assert answer.startswith(b"HTTP/1.1 %d " % status)
    assert answer.lower().count(b"connection: close") == 1


def test_refused_client_that_does_not_end_is_cut_off() -> None:
    async def run() -> None:
        async with serving(ConnectionLimits(connections=10, linger_seconds=0.2)) as served:
            reader, writer = await served.connect()
            writer.write(POST + b"Connection: close\r\n\r\n")
            assert (await reader.read()).startswith(b"HTTP/1.1 403 ")
            while served.state.connections:
                writer.write(b"x" * 1000)
                await asyncio.sleep(0.01)
            writer.close()

    asyncio.run(asyncio.wait_for(run(), 30))


def test_slow_bodies_make_room_for_a_new_connection() -> None:
    """Clients that send no bodies keep nobody out."""

    async def run() -> None:
        async with serving(ConnectionLimits(connections=3, request_seconds=60, unread_seconds=60)) as served:
            slow = [await served.connect() for _ in range(3)]
            for _, writer in slow:
                writer.write(b"POST /echo HTTP/1.1\r\nHost: h\r\nContent-Length: 5\r\n\r\nsav")
            while len(served.state.tasks) < 3:
                await asyncio.sleep(0.01)
            reader, writer = await served.connect()
            writer.write(GET)
            await reader.readuntil(b"answered")
            # The one that has waited longest had to go.
            assert await slow[0][0].read() == b""
            for reader, writer in slow[1:]:
                writer.write(b"ed")
                await reader.readuntil(b"saved")

    asyncio.run(asyncio.wait_for(run(), 30))


def test_long_headers_are_refused() -> None:
    async def run() -> tuple[bytes, list[int]]:
        async with serving(ConnectionLimits(connections=10, header_bytes=1000)) as served:
            reader, writer = await served.connect()
            writer.write(b"GET / HTTP/1.1\r\nHost: h\r\n" + b"x: y\r\n" * 200)
            return await asyncio.wait_for(reader.read(), 30), served.refused

    answer, refused = asyncio.run(run())
    assert answer.startswith(b"HTTP/1.1 431 ")
    assert refused == [431]


@pytest.mark.parametrize("rest", [b"0\r\nx: " + b"y" * 3_000_000, b"1;" + b"z" * 3_000_000], ids=["trailer", "chunk"])
def test_endless_framing_of_a_body(rest: bytes) -> None:
    """What is around the bytes of a body is bounded, too."""

    async def run() -> bytes:
        async with serving(ConnectionLimits(connections=10)) as served:
            reader, writer = await served.connect()
            writer.write(b"POST / HTTP/1.1\r\nHost: h\r\nTransfer-Encoding: chunked\r\n\r\n")
            writer.write(b"5\r\nhello\r\n" + rest)
            with contextlib.suppress(ConnectionError):
                return await asyncio.wait_for(reader.read(), 30)
            return b""

    assert b"answered" not in asyncio.run(run())


def test_body_in_small_chunks_is_taken() -> None:
    async def run() -> bytes:
        async with serving(ConnectionLimits(connections=10)) as served:
            reader, writer = await served.connect()
            writer.write(b"POST / HTTP/1.1\r\nHost: h\r\nTransfer-Encoding: chunked\r\n\r\n")
            writer.write(b"1\r\nx\r\n" * 200_000 + b"0\r\n\r\n")
            return await asyncio.wait_for(reader.readuntil(b"answered"), 30)

    assert asyncio.run(run()).startswith(b"HTTP/1.1 200 ")


def test_requests_of_one_connection_are_answered_in_order() -> None:
    """Those without a body in the answer, too."""

    async def run() -> list[bytes]:
        async with serving(ConnectionLimits(connections=10)) as served:
            reader, writer = await served.connect()
            writer.write(GET + GET.replace(b"GET", b"HEAD") + GET + GET.replace(b"/ ", b"/nowhere "))
            answers = await reader.readuntil(b"Not Found")
            return re.findall(rb"HTTP/1.1 (\d+)", answers)

    assert asyncio.run(run()) == [b"200", b"200", b"200", b"404"]


@pytest.mark.parametrize("protocol", ["usual_protocol", "_H11Connection"])
def test_requests_that_wait_are_bounded(protocol: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A client that sends requests faster than they are answered is not read from meanwhile."""
    if protocol != "usual_protocol":
        monkeypatch.setattr(connections, "usual_protocol", lambda: getattr(protocols, protocol))
    several = (b"POST /later HTTP/1.1\r\nHost: h\r\nContent-Length: 1000\r\n\r\n" + b"x" * 1000) * 100

    async def run() -> int:
        async with serving(ConnectionLimits(connections=10)) as served:
            reader, writer = await served.connect()
            sent = answered = most = 0

            async def send() -> None:
                nonlocal sent
                while True:
                    writer.write(several)
                    sent += len(several)
                    await writer.drain()

            sending = asyncio.create_task(send())
            while answered < 500 and most < 40_000_000:
                await reader.readuntil(b"HTTP/1.1 200")
                answered += 1
                most = max(most, sent - answered * len(several) // 100)
            sending.cancel()
            return most

    # The kernel holds some megabytes.
    assert asyncio.run(asyncio.wait_for(run(), 60)) < 30_000_000


def test_requests_that_arrive_together_are_bounded() -> None:
    """Each takes far more memory than its bytes."""
    number = 1000

    async def run() -> int:
        async with serving(ConnectionLimits(connections=10)) as served:
            reader, writer = await served.connect()
            writer.write(GET.replace(b"/ ", b"/later ") * (number - 1) + GET.replace(b"/ ", b"/nowhere "))
            most = 0
            for _ in range(number - 1):
                await reader.readuntil(b"answered")
                (connection,) = served.state.connections
                assert isinstance(connection, HttpToolsProtocol)
                most = max(most, len(connection.pipeline))
            await reader.readuntil(b"Not Found")
            return most

    assert asyncio.run(asyncio.wait_for(run(), 60)) < 100


@pytest.mark.parametrize("protocol", ["h2c", "websocket"])
@pytest.mark.parametrize("at_once", [True, False])
def test_offer_of_another_protocol_is_ignored(protocol: str, at_once: bool) -> None:
    """The request is answered as it is, with its body, as are those that follow."""

    async def run() -> list[bytes]:
        async with serving(ConnectionLimits(connections=10)) as served:
            reader, writer = await served.connect()
            offer = f"Connection: Upgrade\r\nUpgrade: {protocol}\r\n".encode()
            parts = [b"POST /echo HTTP/1.1\r\nHost: h\r\n", offer, b"Content-Length: 5\r\n\r\n", b"saved", GET]
            for part in [b"".join(parts)] if at_once else parts:
                writer.write(part)
                await asyncio.sleep(0.01)  # so that it is read on its own
            answers = await asyncio.wait_for(reader.readuntil(b"answered"), 30)
            return re.findall(rb"HTTP/1.1 \d+|saved|answered", answers)

    assert asyncio.run(run()) == [b"HTTP/1.1 200", b"saved", b"HTTP/1.1 200", b"answered"]


def test_client_that_goes_away_before_several_answers(caplog: pytest.LogCaptureFixture) -> None:
    """That is no error of the service."""

    async def run() -> None:
        async with serving(ConnectionLimits(connections=10)) as served:
            _, writer = await served.connect()
            writer.write(GET.replace(b"/ ", b"/slow ") * 2)
            while not served.state.tasks:
                await asyncio.sleep(0.01)
            writer.transport.abort()
            while served.state.connections:
                await asyncio.sleep(0.01)
            GO_ON.set()
            while served.state.tasks:
                await asyncio.sleep(0.01)

    run_in("uvloop", run())
    assert not [record for record in caplog.records if record.levelname == "ERROR"]


@pytest.mark.parametrize("loop", ["asyncio", "uvloop"])
def test_client_that_goes_away_before_it_is_refused(
    caplog: pytest.LogCaptureFixture, loop: Literal["asyncio", "uvloop"]
) -> None:
    """That is no error of the service, and what it holds is given back."""

    async def run() -> None:
        async with serving(ConnectionLimits(connections=10)) as served:
            for _ in range(20):
                with socket.create_connection(("127.0.0.1", served.port)) as client:
                    client.sendall(POST + b"Connection: close\r\n\r\n")
                await asyncio.sleep(0.01)
            while served.state.connections:
                await asyncio.sleep(0.01)

    run_in(loop, run())
    assert not [record for record in caplog.records if record.levelname == "ERROR"]


def _few_descriptors() -> None:
    resource.setrlimit(resource.RLIMIT_NOFILE, (256, 256))


@contextlib.contextmanager
def _certified(directory: Path) -> Iterator[Path]:
    subprocess.run(
        [
            *("openssl", "req", "-x509", "-newkey", "rsa:2048", "-nodes", "-days", "2", "-subj", "/CN=127.0.0.1"),
            *("-addext", "subjectAltName=IP:127.0.0.1", "-keyout", "key.pem", "-out", "cert.pem"),
        ],
        cwd=directory,
        check=True,
        capture_output=True,
    )
    config = directory / "web.yml"
    config.write_text("tls_server_config: {cert_file: cert.pem, key_file: key.pem}")
    yield config


@pytest.mark.needs("openssl")
@pytest.mark.parametrize("has_tls", [False, True], ids=["plain", "tls"])
def test_many_silent_connections(store_path: Path, tmp_path: Path, has_tls: bool) -> None:
    """More than the process may have descriptors: savings are recorded, and the log stays short."""
    with contextlib.ExitStack() as stack:
        options = ["serve", "--store", str(store_path)]
        context = None
        if has_tls:
            options += ["--web.config.file", str(stack.enter_context(_certified(tmp_path)))]
            context = ssl.create_default_context(cafile=str(tmp_path / "cert.pem"))
        service = stack.enter_context(running(*options, preexec_fn=_few_descriptors))
        service.context = context
        address = urlsplit(service.url)
        for round_of in range(3):
            silent = [
                stack.enter_context(socket.create_connection((address.hostname or "", address.port or 0), timeout=30))
                for _ in range(300)
            ]
            assert service.post(RECORD)[0] == 200
            assert service.get("/-/ready")[0] == 200
            for connection in silent if round_of else ():
                connection.close()
        assert service.metrics()['savings_requests_total{model="m",provider="unknown"}'] == 3
        status, _, log = service.stop()
    assert status == 0
    assert len(log.splitlines()) < 20


@pytest.mark.needs("openssl")
def test_client_that_keeps_its_connection_does_not_hold_up_the_stop(store_path: Path, tmp_path: Path) -> None:
    """With TLS, the end of a connection is agreed. A client that keeps one for later does not read that it is asked."""
    options = ["serve", "--store", str(store_path), "--web.config.file"]
    with _certified(tmp_path) as config, running(*options, str(config)) as service:
        address = urlsplit(service.url)
        context = ssl.create_default_context(cafile=str(tmp_path / "cert.pem"))
        kept = http.client.HTTPSConnection(address.netloc, context=context, timeout=30)
        with contextlib.closing(kept):
            kept.request("GET", "/-/ready")
            assert kept.getresponse().read() == b"ready\n"
            status, _, log = service.stop()
    assert (status, "graceful shutdown exceeded" in log) == (0, False)


def test_descriptors_used_up(store_path: Path) -> None:
    """By something else in the process than connections: the service waits, and goes on when there are some again."""
    with running("serve", "--store", str(store_path)) as service:
        assert service.post(RECORD)[0] == 200
        used = len(os.listdir(f"/proc/{service.process.pid}/fd"))
        resource.prlimit(service.process.pid, resource.RLIMIT_NOFILE, (used - 2, 4096))
        address = urlsplit(service.url)
        with socket.create_connection((address.hostname or "", address.port or 0), timeout=30) as waiting:
            waiting.sendall(b"GET /-/ready HTTP/1.1\r\nHost: 127.0.0.1\r\nConnection: close\r\n\r\n")
            resource.prlimit(service.process.pid, resource.RLIMIT_NOFILE, (4096, 4096))
            assert waiting.recv(100).startswith(b"HTTP/1.1 200")
        assert service.post(RECORD)[0] == 200
        _, _, log = service.stop()
    assert log.count("no more connections can be accepted now") <= 1


WITHOUT_WHEELS = """
import sys
sys.modules["httptools"] = sys.modules["uvloop"] = None
"""


def test_without_httptools_and_uvloop(store_path: Path, tmp_path: Path) -> None:
    (tmp_path / "sitecustomize.py").write_text(WITHOUT_WHEELS)
    with running("serve", "--store", str(store_path), env={"PYTHONPATH": str(tmp_path)}) as service:
        assert [service.post(RECORD)[0] for _ in range(3)] == [200, 200, 200]
        assert _loaded(service, "httptools") == _loaded(service, "uvloop") == 0
        assert service.post({"model": "m"})[0] == 422
        assert service.get("/-/ready")[0] == 200
        assert json.loads(service.get("/v1/savings")[1])["lifetime"]["requests"] == 3
        assert service.stop()[0] == 0
    with SavingsTracker(store_path) as tracker:
        assert tracker.snapshot().lifetime.requests == 3


def test_with_httptools_and_uvloop(store_path: Path) -> None:
    with running("serve", "--store", str(store_path)) as service:
        assert _loaded(service, "httptools") > 0 < _loaded(service, "uvloop")


def _loaded(service: Service, library: str) -> int:
    return Path(f"/proc/{service.process.pid}/maps").read_text().count(f"/{library}/")


def test_idle_service_sleeps(store_path: Path) -> None:
    with running("serve", "--store", str(store_path)) as service:
        assert service.post(RECORD)[0] == 200
        eventually(lambda: service.metrics()["savings_saves_total"] >= 1, "the save after the record")
        eventually(lambda: _wakeups(service) == 0, "no more work")
        before, began = _switches(service), time.monotonic()
        time.sleep(5)
        assert (_switches(service) - before) / (time.monotonic() - began) < 2


def _wakeups(service: Service) -> int:
    before = _switches(service)
    time.sleep(1)
    return _switches(service) - before


def _switches(service: Service) -> int:
    tasks = Path(f"/proc/{service.process.pid}/task").iterdir()
    return sum(
        int(re.findall(r"\nvoluntary_ctxt_switches:\s+(\d+)", (task / "status").read_text())[0]) for task in tasks
    )
