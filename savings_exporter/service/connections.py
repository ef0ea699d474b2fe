"""The connections of the server: how many there are, how long they may take, and how much they may send.

uvicorn speaks HTTP on them. What it does not limit is limited here.
"""

from __future__ import annotations

import asyncio
import errno
import logging
import socket
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from email.utils import formatdate
from functools import partial
from http import HTTPStatus
from operator import itemgetter
from typing import TYPE_CHECKING, Any, NamedTuple, cast

import uvicorn
from uvicorn.protocols.http.h11_impl import H11Protocol
from uvicorn.server import ServerState

if TYPE_CHECKING:
    from ssl import SSLContext

logger = logging.getLogger(__name__)

_MOST_CONNECTIONS = 1000
# Descriptors that are left to the store, the sources, the log and the exporters of traces.
_OTHER_DESCRIPTORS = 100
_LEAST_CONNECTIONS = 16

# A body in chunks takes more bytes than it has. No client sends smaller chunks than this allows.
_MOST_BYTES_FOR_ONE = 16

_LOOK_SECONDS = 1.0
_LOG_INTERVAL_SECONDS = 60.0
_NO_DESCRIPTORS = (errno.EMFILE, errno.ENFILE, errno.ENOBUFS, errno.ENOMEM)


class ConnectionLimits(NamedTuple):
    """How many connections there are at most, and what each may take."""

    connections: int
    request_seconds: float = 10.0
    """How long a TLS handshake, and then the headers of a request, may take to arrive."""
    unread_seconds: float = 30.0
    """How long a client may leave an answer unread."""
    header_bytes: int = 64 * 1024


def usual_limits() -> ConnectionLimits:
    """The limits for this process. The connections leave descriptors for everything else."""
    most = _MOST_CONNECTIONS
    with suppress(ImportError, OSError):  # not on Windows
        import resource

        soft, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
        if soft != resource.RLIM_INFINITY:
            most = min(most, max(soft - _OTHER_DESCRIPTORS, _LEAST_CONNECTIONS))
    return ConnectionLimits(most)


class Connections:
    """Accepts connections on a listening socket.

    At the limit, a new connection takes the place of the one that has waited longest without a request. Clients that
    connect and say nothing therefore keep nobody out.

    Args:
        config: the configuration of uvicorn, loaded.
        state: what uvicorn's connections share.
        context: the TLS context for a connection that begins now; None without TLS.
        refused: is told of a request that is refused before the application sees it: the status and the reason.
    """

    def __init__(
        self,
        config: uvicorn.Config,
        state: ServerState,
        limits: ConnectionLimits,
        context: Callable[[], SSLContext | None],
        refused: Callable[[int, str], None],
    ) -> None:
        self.limits = limits
        self.refused = refused
        self._config = config
        self._state = state
        self._context = context
        self._protocol = _protocol()
        # The connections that uvicorn does not have yet, because of their TLS handshakes: since when, and the socket.
        self._beginning: dict[asyncio.Task[None], tuple[float, socket.socket]] = {}
        self._room = asyncio.Event()
        self._look: asyncio.TimerHandle | None = None
        self._logged_at = float("-inf")

    async def accept(self, listener: socket.socket) -> None:
        """Accept connections, until this is cancelled."""
        loop = asyncio.get_running_loop()
        listener.setblocking(False)
        while True:
            await self._wait_for_room()
            try:
                accepted, _ = await loop.sock_accept(listener)
            except OSError as error:
                if error.errno in _NO_DESCRIPTORS:
                    self._log_shortage(f"no more connections can be accepted now: {error.strerror}")
                    await self._make_room()
                # Anything else is an error of that connection.
                continue
            task = loop.create_task(self._begin(accepted))
            self._beginning[task] = time.monotonic(), accepted
            self._keep_looking()

    @property
    def _open(self) -> set[_Connection]:
        # uvicorn keeps them. Each of its connections here is one of ours.
        return cast("set[_Connection]", self._state.connections)

    def ended(self) -> None:
        """Called when a connection has ended."""
        self._room.set()

    async def _begin(self, accepted: socket.socket) -> None:
        loop, context = asyncio.get_running_loop(), self._context()
        options = {} if context is None else {"ssl": context, "ssl_handshake_timeout": self.limits.request_seconds}
        try:
            accepted.setblocking(False)
            await loop.connect_accepted_socket(self._made, accepted, **options)  # type: ignore[arg-type]
        except Exception as error:
            # A handshake that fails is an error of the client. It is normal on a public address.
            logger.debug("a connection was not established: %s", error)
            accepted.close()
        finally:
            task = asyncio.current_task()
            assert task is not None
            del self._beginning[task]
            self._room.set()

    def _made(self) -> asyncio.Protocol:
        options = {"config": self._config, "server_state": self._state, "app_state": {}}
        return cast(asyncio.Protocol, self._protocol(connections=self, **options))

    async def _wait_for_room(self) -> None:
        while len(self._open) + len(self._beginning) >= self.limits.connections:
            self._log_shortage(f"{self.limits.connections} connections are open; the idle ones are closed for new ones")
            await self._make_room()

    async def _make_room(self) -> None:
        """End the connection that has waited longest, and wait a moment for any connection to end."""
        self._room.clear()
        waiting = [(each.waiting_since, each.end_at_once) for each in self._open if each.waiting_since is not None]
        waiting += [(since, partial(_end_stream, beginning)) for since, beginning in self._beginning.values()]
        if waiting:
            min(waiting, key=itemgetter(0))[1]()
        with suppress(asyncio.TimeoutError):
            await asyncio.wait_for(self._room.wait(), _LOOK_SECONDS)

    def _log_shortage(self, what: str) -> None:
        now = time.monotonic()
        if now >= self._logged_at + _LOG_INTERVAL_SECONDS:
            self._logged_at = now
            logger.warning("%s", what)

    def _keep_looking(self) -> None:
        """Look at the connections every second, as long as there are any."""
        if self._look is None:
            self._set_date()
            self._look = asyncio.get_running_loop().call_later(_LOOK_SECONDS, self._look_at_all)

    def _look_at_all(self) -> None:
        self._look, now = None, time.monotonic()
        for connection in tuple(self._open):
            connection.look(now)
        if self._open or self._beginning:
            self._keep_looking()

    def _set_date(self) -> None:
        # In place: an answer may have begun with this list.
        self._state.default_headers[:] = [(b"date", formatdate(usegmt=True).encode()), *self._config.encoded_headers]


def _end_stream(beginning: socket.socket) -> None:
    """Let a handshake see the end of the stream, so that it fails."""
    with suppress(OSError):
        beginning.shutdown(socket.SHUT_RDWR)


class _Connection:
    """What is added to a protocol of uvicorn.

    Attributes:
        waiting_since: since when the connection waits for the headers of a request; None while one is answered.
    """

    # Those of the protocol.
    cycle: Any
    transport: _JoinedWrites

    def __init__(self, *, connections: Connections, **options: Any) -> None:
        super().__init__(**options)
        self._all = connections
        self._limits = connections.limits
        self.waiting_since: float | None = time.monotonic()
        self._unread_since: float | None = None
        self._is_stopping = False

    def connection_made(self, transport: asyncio.Transport) -> None:
        super().connection_made(_JoinedWrites(transport))  # type: ignore[misc]

    def connection_lost(self, error: Exception | None) -> None:
        super().connection_lost(error)  # type: ignore[misc]
        self._all.ended()

    def data_received(self, data: bytes) -> None:
        super().data_received(data)  # type: ignore[misc]
        if self.cycle is not None and not self.cycle.response_complete:
            self.waiting_since = None

    def on_response_complete(self) -> None:
        self.transport.flush()
        super().on_response_complete()  # type: ignore[misc]
        # The next request may be there already.
        self.waiting_since = time.monotonic() if self.cycle.response_complete else None

    def shutdown(self) -> None:
        self._is_stopping = True
        super().shutdown()  # type: ignore[misc]

    def pause_writing(self) -> None:
        self._unread_since = time.monotonic()
        super().pause_writing()  # type: ignore[misc]

    def resume_writing(self) -> None:
        self._unread_since = None
        super().resume_writing()  # type: ignore[misc]

    def look(self, now: float) -> None:
        """End the connection if its client takes too long."""
        waiting, unread = self.waiting_since, self._unread_since
        if self.transport.is_closing() and unread is None:
            # What is left to send may be less than what pauses writing.
            self._unread_since = now
        elif unread is not None and now - unread > self._patience():
            self.end_at_once()
        elif waiting is not None and now - waiting > self._limits.request_seconds:
            self.transport.close()

    def _patience(self) -> float:
        """How long a client may leave unread what is sent, in seconds."""
        # TLS waits for the client to agree to the end. A client that keeps the connection for later does not.
        is_sent = self.transport.is_closing() and not self.transport.get_write_buffer_size()
        return 0.0 if self._is_stopping and is_sent else self._limits.unread_seconds

    def end_at_once(self) -> None:
        """End the connection, and drop what its client has not read."""
        self.transport.abort()


class _H11Connection(_Connection, H11Protocol):  # type: ignore[misc]
    """Speaks HTTP with h11, which limits the headers itself."""


def _httptools_connection() -> type[_Connection]:
    from httptools import HttpParserUpgrade
    from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

    class HttpToolsConnection(_Connection, HttpToolsProtocol):  # type: ignore[misc]
        """Speaks HTTP with httptools, which limits nothing, and takes what follows the headers of a request with
        ``Upgrade`` for another protocol. Some clients offer HTTP/2 in this way with their first request.
        """

        # Those of the protocol.
        headers: list[tuple[bytes, bytes]]
        scope: Any
        url: bytes

        # Of the current request: all bytes, and those of its body.
        _received = _body = 0
        # What is parsed, and what is parsed next.
        _data = _rest = b""

        def data_received(self, data: bytes) -> None:
            self._received += len(data)
            self._rest = data
            while self._rest:
                self._data, self._rest = self._rest, b""
                super().data_received(self._data)
            if self._received > self._limits.header_bytes + _MOST_BYTES_FOR_ONE * self._body:
                self._refuse_overhead()

        def on_body(self, body: bytes) -> None:
            self._body += len(body)
            super().on_body(body)

        def on_message_complete(self) -> None:
            self._received = self._body = 0
            super().on_message_complete()

        def _should_upgrade(self) -> bool:
            # If so, uvicorn leaves the request to the method that follows.
            return any(name == b"upgrade" for name, _ in self.headers)

        def handle_websocket_upgrade(self) -> None:
            """Parse the request again without ``Upgrade``, as a server does that speaks no other protocol."""
            upgrade = sys.exc_info()[1]
            assert isinstance(upgrade, HttpParserUpgrade)
            rest = self._data[upgrade.args[0] :]
            version = self.scope.get("http_version", "1.1").encode()
            head = [b"%b %b HTTP/%b" % (self.scope["method"].encode(), self.url, version)]
            head += [b"%b: %b" % header for header in self.headers if header[0] != b"upgrade"]
            self._rest = b"\r\n".join([*head, b"", rest])

        def _refuse_overhead(self) -> None:
            if self.waiting_since is None or self.transport.is_closing():
                self.end_at_once()
                return
            status = HTTPStatus.REQUEST_HEADER_FIELDS_TOO_LARGE
            self._all.refused(status, f"the headers are larger than {self._limits.header_bytes} bytes")
            head = f"HTTP/1.1 {status.value} {status.phrase}\r\nconnection: close\r\ncontent-length: 0\r\n\r\n"
            self.transport.write(head.encode())
            self.transport.close()

    return HttpToolsConnection


def _protocol() -> type[_Connection]:
    """The protocol for connections: that of httptools where it is installed."""
    try:
        return _httptools_connection()
    except ImportError:
        return _H11Connection


class _JoinedWrites:
    """A transport that sends the head of an answer together with the first part of its body. uvicorn writes them one
    after the other, and each write is a system call.
    """

    __slots__ = ("_head", "_transport", "is_closing")

    def __init__(self, transport: asyncio.Transport) -> None:
        self._transport = transport
        self._head: bytes | None = None
        self.is_closing = transport.is_closing

    def write(self, data: bytes) -> None:
        """Write, or keep the head of an answer."""
        head = self._head
        if self.is_closing():
            # The client has gone before the answers to all that it sent. uvloop raises then, and asyncio does not.
            return
        if head is not None:
            self._head = None
            self._transport.write(head + data)
        elif data.startswith(b"HTTP/1.1 ") and not data.startswith(b"HTTP/1.1 1"):
            self._head = data
        else:
            self._transport.write(data)

    def flush(self) -> None:
        """Write what is kept."""
        head, self._head = self._head, None
        if head is not None and not self.is_closing():
            self._transport.write(head)

    def close(self) -> None:
        """Close the connection when everything is sent."""
        self.flush()
        self._transport.close()

    def __getattr__(self, name: str) -> Any:
        return getattr(self._transport, name)
