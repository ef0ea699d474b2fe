"""What a connection of the server speaks: HTTP by uvicorn, within limits that uvicorn does not have.

A saving that arrives as a whole goes past uvicorn's ASGI task, which costs more than recording it.
"""

from __future__ import annotations

import asyncio
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from http import HTTPStatus
from typing import Any, NamedTuple

from h11 import DONE, ERROR, SEND_BODY
from uvicorn.protocols.http.flow_control import HIGH_WATER_LIMIT, FlowControl
from uvicorn.protocols.http.h11_impl import H11Protocol

from savings_exporter.service.browsers import Headers
from savings_exporter.service.paths import SAVINGS_PATH
from savings_exporter.service.recording import Take

# A body in chunks takes more bytes than it has. No client sends smaller chunks than this allows.
_MOST_BYTES_FOR_ONE = 16

# A connection with fewer requests that wait is read from, which shows at once that the client has gone.
_MANY_REQUESTS = 16

# Requests that arrive together are parsed in pieces of this size, because each takes far more memory than its bytes.
_PIECE_OF_MANY_BYTES = 512

_TAKEN_PATH = SAVINGS_PATH.encode()


class ConnectionLimits(NamedTuple):
    """How many connections there are at most, and what each may take."""

    connections: int
    request_seconds: float = 10.0
    """How long a TLS handshake, and then the headers of a request, may take to arrive."""
    unread_seconds: float = 30.0
    """How long a client may leave an answer unread."""
    header_bytes: int = 64 * 1024
    linger_seconds: float = 5.0
    """How long a client may go on sending after the answer that ends the connection."""


class Shared(NamedTuple):
    """What all connections of a server share.

    ``ended`` is called when a connection has ended. ``refused`` is told of a request that is refused before the
    application sees it: the status and the reason. ``take`` is None if all requests go to the application.
    """

    limits: ConnectionLimits
    ended: Callable[[], None]
    refused: Callable[[int, str], None]
    take: Take | None


class Connection:
    """What is added to a protocol of uvicorn.

    Attributes:
        waiting_since: since when the connection waits for the headers of a request; None while one is answered.
        asked_at: when the headers of the latest request had arrived.
    """

    # Those of the protocol.
    cycle: Any
    flow: FlowControl
    transport: _JoinedWrites

    def __init__(self, *, shared: Shared, **options: Any) -> None:
        super().__init__(**options)
        self._shared = shared
        self._limits = shared.limits
        self.waiting_since: float | None = time.monotonic()
        self.asked_at = self.waiting_since
        self._unread_since: float | None = None
        self._lingers_since: float | None = None
        self._is_stopping = False

    def connection_made(self, transport: asyncio.Transport) -> None:
        """A client has connected."""
        super().connection_made(_JoinedWrites(transport, self._linger))  # type: ignore[misc]
        self.flow = _Flow(self.transport, lambda: self.is_ahead)

    def connection_lost(self, error: Exception | None) -> None:
        """The connection has ended."""
        super().connection_lost(error)  # type: ignore[misc]
        self._shared.ended()

    def data_received(self, data: bytes) -> None:
        """Parse what has arrived, unless it comes after an answer that ends the connection."""
        if self._lingers_since is None:
            super().data_received(data)  # type: ignore[misc]
            self._note_request()

    def on_response_complete(self) -> None:
        """Wait for the next request."""
        self.transport.flush()
        super().on_response_complete()  # type: ignore[misc]
        # The next request may be there already.
        self.waiting_since = time.monotonic() if self.cycle.response_complete else None

    def shutdown(self) -> None:
        """End the connection after the answer that is under way."""
        self._is_stopping = True
        super().shutdown()  # type: ignore[misc]

    def pause_writing(self) -> None:
        """The client does not read."""
        self._unread_since = time.monotonic()
        super().pause_writing()  # type: ignore[misc]

    def resume_writing(self) -> None:
        """The client reads again."""
        self._unread_since = None
        super().resume_writing()  # type: ignore[misc]

    def look(self, now: float) -> None:
        """End the connection if its client takes too long."""
        waiting, unread, lingering = self.waiting_since, self._unread_since, self._lingers_since
        if lingering is not None:
            if self._is_stopping or now - lingering > self._limits.linger_seconds:
                self.end_at_once()
        elif self.transport.is_closing() and unread is None:
            # What is left to send may be less than what pauses writing.
            self._unread_since = now
        elif unread is not None and now - unread > self._patience():
            self.end_at_once()
        elif waiting is not None and now - waiting > self._limits.request_seconds:
            self.transport.end()

    @property
    def awaited_since(self) -> float | None:
        """Since when the connection waits for its client: for a request or for its body. None if the client waits."""
        return self.asked_at if self.waiting_since is None and self.is_receiving else self.waiting_since

    @property
    def is_receiving(self) -> bool:
        """Whether the client has more of a request to send."""
        raise NotImplementedError

    @property
    def is_ahead(self) -> bool:
        """Whether the client has sent many requests that wait for the answers to those before them."""
        raise NotImplementedError

    def _linger(self) -> bool:
        """Go on reading for some time, if the client has more to send. It would not see the answer if the connection
        were closed while it sends.
        """
        if self._lingers_since is None and self.is_receiving:
            # Its place may be taken by another connection.
            self._lingers_since = self.waiting_since = time.monotonic()
            return True
        return False

    def _note_request(self) -> None:
        if self.waiting_since is not None and self.cycle is not None and not self.cycle.response_complete:
            self.waiting_since, self.asked_at = None, time.monotonic()

    def _patience(self) -> float:
        """How long a client may leave unread what is sent, in seconds."""
        # TLS waits for the client to agree to the end. A client that keeps the connection for later does not.
        is_sent = self.transport.is_closing() and not self.transport.get_write_buffer_size()
        return 0.0 if self._is_stopping and is_sent else self._limits.unread_seconds

    def end_at_once(self) -> None:
        """End the connection, and drop what its client has not read."""
        self.transport.abort()


class _H11Connection(Connection, H11Protocol):  # type: ignore[misc]
    """Speaks HTTP with h11, which limits the headers itself."""

    @property
    def is_receiving(self) -> bool:
        return self.conn.their_state in (SEND_BODY, ERROR)

    @property
    def is_ahead(self) -> bool:
        # They are not parsed yet.
        return (
            self.conn.their_state is DONE
            and self.conn.our_state is not DONE
            and len(self.conn.trailing_data[0]) > HIGH_WATER_LIMIT
        )


def _httptools_connection() -> type[Connection]:
    from httptools import HttpParserUpgrade
    from uvicorn.protocols.http.httptools_impl import STATUS_LINE, HttpToolsProtocol

    class HttpToolsConnection(Connection, HttpToolsProtocol):  # type: ignore[misc]
        """Speaks HTTP with httptools, which limits nothing, and takes what follows the headers of a request with
        ``Upgrade`` for another protocol. Some clients offer HTTP/2 in this way with their first request.

        The parser calls the methods ``on_...`` while it is fed. A saving is kept back from uvicorn until it is whole.
        """

        # Those of the protocol.
        expect_100_continue: bool
        headers: Headers
        parser: Any
        pipeline: Any
        scope: Any
        server_state: Any
        url: bytes

        # Of the current request: all bytes, and those of its body.
        _received = _body = 0
        # What is parsed, and what is parsed next.
        _data = _rest = b""
        # The headers of the current request, without its trailers.
        _head: Headers
        # The body so far of a saving that is kept back.
        _kept: bytes | None = None

        # Of the current request: whether more of it is to come, and whether its headers are.
        is_receiving = False
        _is_in_head = False
        # Whether the client has sent what is no request.
        _is_broken = False

        @property
        def is_ahead(self) -> bool:
            return len(self.pipeline) > _MANY_REQUESTS

        def data_received(self, data: bytes) -> None:
            if self._lingers_since is not None or self._is_broken:
                return
            self._rest += data
            self._parse()

        def _parse(self) -> None:
            """Parse what has arrived, until many requests wait."""
            while self._rest and not (self.is_ahead or self._is_broken or self.transport.is_closing()):
                is_many = self._rest.count(b"\r\n\r\n") > _MANY_REQUESTS
                size = _PIECE_OF_MANY_BYTES if is_many else len(self._rest)
                self._data, self._rest = self._rest[:size], self._rest[size:]
                self._received += len(self._data)
                super().data_received(self._data)
            if self._kept is not None:
                # The rest of its body is on the way.
                self._pass_on()
                self._note_request()
            if self._received > self._limits.header_bytes + _MOST_BYTES_FOR_ONE * self._body:
                self._refuse_overhead()

        def on_message_begin(self) -> None:
            self.is_receiving = self._is_in_head = True
            # What uvicorn prepares here is prepared when it gets the request.
            self.url, self.headers, self.expect_100_continue = b"", [], False

        def on_headers_complete(self) -> None:
            # Trailers follow after the body. Nothing asks for them, and the request is judged without them.
            self._head, self.headers, self._is_in_head = self.headers, [], False
            is_free = self.cycle is None or self.cycle.response_complete
            if self.url == _TAKEN_PATH and self._shared.take is not None and is_free and self._is_plain():
                self._kept = b""
            else:
                self._begin()

        def on_body(self, body: bytes) -> None:
            self._body += len(body)
            if self._kept is not None:
                self._kept += body
            else:
                super().on_body(body)

        def on_message_complete(self) -> None:
            self.is_receiving = False
            self._received = self._body = 0
            if self._kept is not None:
                request = _Taken(self, keep_alive=self.parser.should_keep_alive())
                if self._shared.take(self._head, self._kept, request):  # type: ignore[misc]
                    self._kept, self.cycle = None, request
                    return
                self._pass_on()
            super().on_message_complete()

        def on_response_complete(self) -> None:
            if self.pipeline or self.transport.is_closing():
                super().on_response_complete()
            else:
                # Without the timer of uvicorn: ``look`` ends connections that wait.
                self.transport.flush()
                self.flow.resume_reading()
                self.waiting_since = time.monotonic()
            if self._rest:
                self._parse()

        def answer(self, request: _Taken, status: int, headers: bytes, body: bytes) -> None:
            """Answer a request that was taken."""
            if not request.keep_alive:
                headers += b"connection: close\r\n"
            _, date = self.server_state.default_headers[0]
            head = b"%bdate: %b\r\n%bcontent-length: %d\r\n\r\n" % (STATUS_LINE[status], date, headers, len(body))
            self.transport.write_at_once(head + body)
            if not request.keep_alive:
                self.transport.close()
            self.on_response_complete()

        def send_400_response(self, msg: str) -> None:
            is_next = self._is_in_head or not self.is_receiving
            self.is_receiving = self._is_broken = True
            if is_next and self.cycle is not None and not self.cycle.response_complete:
                # The requests before it are answered, and their last answer ends the connection.
                self.cycle.keep_alive = False
            else:
                super().send_400_response(msg)

        def _is_plain(self) -> bool:
            """Whether nothing but the answer has to be sent to the client, which reads what is sent."""
            parser = self.parser
            return (
                parser.get_method() == b"POST"
                and not self.expect_100_continue
                and not parser.should_upgrade()
                and parser.get_http_version() == "1.1"
                and not self.flow.write_paused
            )

        def _pass_on(self) -> None:
            """Give uvicorn what was kept back."""
            body, self._kept = self._kept, None
            if not self.transport.is_closing():
                self._begin()
                super().on_body(body or b"")

        def _begin(self) -> None:
            """Give uvicorn a request whose headers are complete."""
            url, expect = self.url, self.expect_100_continue
            super().on_message_begin()
            self.url, self.expect_100_continue = url, expect
            self.headers += self._head
            super().on_headers_complete()
            self.headers = []

        def _should_upgrade(self) -> bool:
            # If so, uvicorn leaves the request to the method that follows.
            return any(name == b"upgrade" for name, _ in self._head)

        def handle_websocket_upgrade(self) -> None:
            """Parse the request again without ``Upgrade``, as a server does that speaks no other protocol."""
            upgrade = sys.exc_info()[1]
            assert isinstance(upgrade, HttpParserUpgrade)
            rest = self._data[upgrade.args[0] :]
            version = self.scope.get("http_version", "1.1").encode()
            head = [b"%b %b HTTP/%b" % (self.scope["method"].encode(), self.url, version)]
            head += [b"%b: %b" % header for header in self._head if header[0] != b"upgrade"]
            self._rest = b"\r\n".join([*head, b"", rest]) + self._rest

        def _refuse_overhead(self) -> None:
            if self.waiting_since is None or self.transport.is_closing():
                self.end_at_once()
                return
            status = HTTPStatus.REQUEST_HEADER_FIELDS_TOO_LARGE
            self._shared.refused(status, f"the headers are larger than {self._limits.header_bytes} bytes")
            head = f"HTTP/1.1 {status.value} {status.phrase}\r\nconnection: close\r\ncontent-length: 0\r\n\r\n"
            self.transport.write(head.encode())
            self.transport.close()

    return HttpToolsConnection


class _Ignored:
    """In place of the event that wakes up the application."""

    def set(self) -> None:
        """Do nothing."""


class _Taken:
    """A request that is not answered by the application. It stands where uvicorn keeps the request that a connection is
    about, and has what uvicorn asks and sets there.
    """

    __slots__ = ("_connection", "disconnected", "keep_alive", "response_complete")

    message_event = _Ignored()

    def __init__(self, connection: Any, *, keep_alive: bool) -> None:
        self._connection = connection
        self.disconnected = self.response_complete = False
        self.keep_alive = keep_alive

    def answer(self, status: int, headers: bytes, body: bytes) -> None:
        """Send the answer, unless the client has gone."""
        self.response_complete = True
        if not self.disconnected:
            self._connection.answer(self, status, headers, body)


def usual_protocol() -> type[Connection]:
    """The protocol for connections: that of httptools where it is installed."""
    try:
        return _httptools_connection()
    except ImportError:
        return _H11Connection


class _Flow(FlowControl):
    """Reads no more from a client while many of its requests wait. uvicorn reads on with each request that it begins,
    so that a client that sends requests faster than they are answered would fill the memory.
    """

    def __init__(self, transport: Any, is_ahead: Callable[[], bool]) -> None:
        super().__init__(transport)
        self._is_ahead = is_ahead

    def resume_reading(self) -> None:
        """Read, unless many requests wait."""
        if not self._is_ahead():
            super().resume_reading()


class _JoinedWrites:
    """A transport that sends the head of an answer together with the first part of its body. uvicorn writes them one
    after the other, and each write is a system call.

    ``linger`` is called before the connection is closed. It says whether the client still sends something.
    """

    __slots__ = ("_head", "_lingers", "_transport", "_try_to_linger")

    def __init__(self, transport: asyncio.Transport, linger: Callable[[], bool]) -> None:
        self._transport = transport
        self._try_to_linger = linger
        self._head: bytes | None = None
        self._lingers = False

    def is_closing(self) -> bool:
        """Whether nothing can be sent any more."""
        return self._lingers or self._transport.is_closing()

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

    def write_at_once(self, data: bytes) -> None:
        """Write a whole answer."""
        if not self.is_closing():
            self._transport.write(data)

    def flush(self) -> None:
        """Write what is kept."""
        head, self._head = self._head, None
        if head is not None and not self.is_closing():
            self._transport.write(head)

    def close(self) -> None:
        """Close the connection when everything is sent, and when the client has sent everything."""
        self.flush()
        if self._lingers or self._transport.is_closing() or not self._try_to_linger():
            self._transport.close()
            return
        self._lingers = True
        if self._transport.can_write_eof():  # not with TLS
            with suppress(OSError):  # the client has gone, and asyncio does not know it yet
                self._transport.write_eof()
        self._transport.resume_reading()

    def end(self) -> None:
        """Close the connection when everything is sent."""
        self.flush()
        self._transport.close()

    def __getattr__(self, name: str) -> Any:
        return getattr(self._transport, name)
