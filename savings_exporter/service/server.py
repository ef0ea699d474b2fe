"""Running the application: the listening socket, signals, and a stop that answers the requests in flight."""

from __future__ import annotations

import asyncio
import contextlib
import errno
import http.client
import json
import logging
import os
import re
import signal
import socket
import threading
from collections.abc import Callable, Iterator
from http import HTTPStatus
from types import FrameType

import uvicorn
from starlette.concurrency import run_in_threadpool

from savings_exporter.errors import SettingsError
from savings_exporter.service.app import Service
from savings_exporter.service.connections import Connections, usual_limits
from savings_exporter.service.paths import SAVINGS_PATH
from savings_exporter.service.systemd import Systemd
from savings_exporter.service.webconfig import WebConfig

# How long a stop waits for answers, and for the bodies of requests.
_GRACE_SECONDS = 10
_BODY_GRACE_SECONDS = 5
_BACKLOG = 2048
_LAST_PORT = 65535
_ANSWER_SECONDS = 2
_MOST_BYTES = 8192
_STORAGE_PATH = re.compile(r'\{"storage_path":("(?:[^"\\]|\\.){,4096}")')


def listen(host: str, port: int) -> socket.socket:
    """A socket that listens on the address, before anything else is started.

    Raises:
        SettingsError: the address is taken or not ours.
    """
    shown = f"{host or '*'}:{port}"
    try:
        addresses = socket.getaddrinfo(host or None, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
        family, kind, protocol, _, address = addresses[0]
        listener = socket.socket(family, kind, protocol)
    except OSError as error:
        raise SettingsError(f"cannot listen on {shown}: {error.strerror}") from None
    try:
        if os.name == "posix":
            listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind(address)
        listener.listen(_BACKLOG)
    except OSError as error:
        listener.close()
        if error.errno != errno.EADDRINUSE:
            raise SettingsError(
                f"cannot listen on {shown}: {error.strerror}. Choose another with --web.listen-address HOST:PORT"
            ) from None
        another = f"{f'[{host}]' if ':' in host else host}:{port + 1 if port < _LAST_PORT else port - 1}"
        raise SettingsError(
            f"cannot listen on {shown}: {error.strerror}: port {port} is taken by {_who_answers(host, port)}. Choose "
            f"another port, for example with --web.listen-address {another}"
        ) from None
    return listener


def _who_answers(host: str, port: int) -> str:
    """The program that listens on a port. Another savings-exporter says which store it shows."""
    answers: list[str] = []
    # In a thread, because a server may answer without an end.
    asking = threading.Thread(target=lambda: answers.append(_answer(host, port)), daemon=True)
    asking.start()
    asking.join(_ANSWER_SECONDS)
    return "".join(answers) or f"another program (ss -ltnp 'sport = :{port}' shows which)"


def _answer(host: str, port: int) -> str:
    """A description of the savings-exporter that answers; empty when another program does."""
    connection = http.client.HTTPConnection(host or "localhost", port, timeout=_ANSWER_SECONDS)
    with contextlib.suppress(OSError, http.client.HTTPException, ValueError), contextlib.closing(connection):
        connection.request("GET", SAVINGS_PATH)
        answer = connection.getresponse()
        if answer.status == HTTPStatus.UNAUTHORIZED and answer.headers["WWW-Authenticate"]:
            return "a service that asks for a token"
        if path := _STORAGE_PATH.match(answer.read(_MOST_BYTES).decode(errors="replace")):
            shown = json.loads(path[1])
            if shown.isprintable():
                return f"the savings-exporter that shows {shown}"
    return ""


def url_of(listener: socket.socket, *, tls: bool) -> str:
    """Where the service answers."""
    host, port = listener.getsockname()[:2]
    return f"{'https' if tls else 'http'}://{f'[{host}]' if ':' in host else host}:{port}"


def instance_of(listener: socket.socket) -> str:
    """A name of this instance of the service among all: its host and its port."""
    return f"{socket.gethostname()}:{listener.getsockname()[1]}"


def run(service: Service, listener: socket.socket, web_config: WebConfig, started: Callable[[], None]) -> None:
    """Answer requests until SIGTERM or SIGINT. Then answer those in flight, and return. SIGHUP reads the web
    configuration file again. Without one it does nothing in a unit of systemd, whose reload sends it, and is otherwise
    like SIGTERM, because it then comes from a terminal that was closed.

    ``started`` is called when requests are answered and the signals are handled.
    """
    config = uvicorn.Config(
        service.app,
        access_log=False,
        interface="asgi3",
        lifespan="off",
        log_config=None,
        proxy_headers=False,
        server_header=False,
        timeout_graceful_shutdown=_GRACE_SECONDS,
        ws="none",
    )
    config.load()
    refusals = _ProtocolErrors(service)
    logging.getLogger("uvicorn.error").addFilter(refusals)
    try:
        with web_config:
            _Server(config, service, web_config, started).run(sockets=[listener])
    finally:
        logging.getLogger("uvicorn.error").removeFilter(refusals)
        service.requests.flush()


class _ProtocolErrors(logging.Filter):
    """Counts the requests that the server refuses before the application sees them, in place of a log line for each."""

    def __init__(self, service: Service) -> None:
        super().__init__()
        self._service = service

    def filter(self, record: logging.LogRecord) -> bool:
        if record.msg == "Invalid HTTP request received.":
            self._service.requests.note("", "", HTTPStatus.BAD_REQUEST, 0.0, "this is not a valid HTTP request")
            return False
        return not str(record.msg).startswith(("Unsupported upgrade request.", "No supported WebSocket library"))


class _Server(uvicorn.Server):
    """A server that returns after a signal, where uvicorn's own would let the signal kill the process."""

    def __init__(
        self, config: uvicorn.Config, service: Service, web_config: WebConfig, started: Callable[[], None]
    ) -> None:
        super().__init__(config)
        self._service = service
        self._web_config = web_config
        self._call_when_started = started
        self._systemd = Systemd()
        self._must_exit = asyncio.Event()
        self._loop: asyncio.AbstractEventLoop | None = None
        self._accepting: list[asyncio.Task[None]] = []

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        assert sockets is not None
        # It loads modules when it is used for the first time, and they may be upgraded until then.
        await run_in_threadpool(lambda: None)
        loop = self._loop = asyncio.get_running_loop()
        self.servers = []
        connections = Connections(
            self.config,
            self.server_state,
            usual_limits(),
            self._web_config.ssl_context,
            lambda status, why: self._service.requests.note("", "", status, 0.0, why),
            self._service.take,
        )
        self._accepting = [loop.create_task(connections.accept(listener)) for listener in sockets]
        self.started = True
        self._call_when_started()
        self._systemd.ready("answers requests")

    async def main_loop(self) -> None:
        # uvicorn's own wakes up ten times a second.
        await self._must_exit.wait()

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        for accepting in self._accepting:
            accepting.cancel()
        late = asyncio.get_running_loop().call_later(_BODY_GRACE_SECONDS, self._service.cut_off_bodies)
        await super().shutdown(sockets)
        late.cancel()

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        self._service.stopping = True
        self._systemd.stopping("answers the requests in flight, then saves a last time")
        super().handle_exit(sig, frame)
        if self._loop is not None:
            self._loop.call_soon_threadsafe(self._must_exit.set)

    def _hang_up(self, number: int, frame: FrameType | None) -> None:
        if self._web_config.has_file or self._systemd.is_manager:
            self._web_config.wants_reload = True
        else:
            self.handle_exit(number, frame)

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        if hasattr(signal, "SIGHUP"):
            # Where it is ignored (nohup), a terminal that is closed must not stop the service.
            is_ignored = signal.getsignal(signal.SIGHUP) == signal.SIG_IGN
            if self._web_config.has_file or not is_ignored:
                signal.signal(signal.SIGHUP, self._hang_up)
        signal.signal(signal.SIGTERM, self.handle_exit)
        interrupt = signal.signal(signal.SIGINT, self.handle_exit)
        try:
            yield
        finally:
            # The last save follows. Another SIGTERM or SIGHUP must not interrupt it; a second Ctrl-C may.
            signal.signal(signal.SIGTERM, signal.SIG_IGN)
            if hasattr(signal, "SIGHUP"):
                signal.signal(signal.SIGHUP, signal.SIG_IGN)
            signal.signal(signal.SIGINT, interrupt)
