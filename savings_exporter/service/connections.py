"""The connections of the server: how many there are, how long they may take, and how much they may send.

uvicorn speaks HTTP on them. What it does not limit is limited here.
"""

from __future__ import annotations

import asyncio
import errno
import logging
import socket
import time
from collections.abc import Callable
from contextlib import suppress
from email.utils import formatdate
from functools import partial
from operator import itemgetter
from typing import TYPE_CHECKING, cast

import uvicorn
from uvicorn.server import ServerState

from savings_exporter.service.protocols import Connection, ConnectionLimits, Shared, usual_protocol
from savings_exporter.service.recording import Take

if TYPE_CHECKING:
    from ssl import SSLContext

logger = logging.getLogger(__name__)

_MOST_CONNECTIONS = 1000
# Descriptors that are left to the store, the sources, the log and the exporters of traces.
_OTHER_DESCRIPTORS = 100
_LEAST_CONNECTIONS = 16

_LOOK_SECONDS = 1.0
_LOG_INTERVAL_SECONDS = 60.0
# What the operator of the client can mend, by OpenSSL's names.
_PROBLEMS = {
    "CERTIFICATE_VERIFY_FAILED": "its certificate is not one of client_ca_file, or has expired",
    "HTTP_REQUEST": "it spoke HTTP without TLS; its address must begin with https://",
    "PEER_DID_NOT_RETURN_A_CERTIFICATE": "it showed no certificate, which client_auth_type demands",
}
_NO_DESCRIPTORS = (errno.EMFILE, errno.ENFILE, errno.ENOBUFS, errno.ENOMEM)


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

    At the limit, a new connection takes the place of the one that has waited longest for its client: for a request, or
    for the body of one. Clients that connect and say nothing therefore keep nobody out.

    Args:
        config: the configuration of uvicorn, loaded.
        state: what uvicorn's connections share.
        context: the TLS context for a connection that begins now; None without TLS.
        refused: is told of a request that is refused before the application sees it: the status and the reason.
        take: takes requests that need not go through the application; None if all do.
    """

    def __init__(
        self,
        config: uvicorn.Config,
        state: ServerState,
        limits: ConnectionLimits,
        context: Callable[[], SSLContext | None],
        refused: Callable[[int, str], None],
        take: Take | None = None,
    ) -> None:
        self.limits = limits
        self._config = config
        self._state = state
        self._context = context
        self._protocol = usual_protocol()
        # The connections that uvicorn does not have yet, because of their TLS handshakes: since when, and the socket.
        self._beginning: dict[asyncio.Task[None], tuple[float, socket.socket]] = {}
        self._room = asyncio.Event()
        self._shared = Shared(limits, self._room.set, refused, take)
        self._look: asyncio.TimerHandle | None = None
        self._logged_at = float("-inf")

    async def accept(self, listener: socket.socket) -> None:
        """Accept connections, until this is cancelled."""
        loop = asyncio.get_running_loop()
        listener.setblocking(False)
        while True:
            try:
                accepted, address = await loop.sock_accept(listener)
            except OSError as error:
                if error.errno in _NO_DESCRIPTORS:
                    self._log_shortage(f"no more connections can be accepted now: {error.strerror}")
                    await self._make_room(1)
                # Anything else is an error of that connection.
                continue
            task = loop.create_task(self._begin(accepted, address[0]))
            self._beginning[task] = time.monotonic(), accepted
            self._keep_looking()
            await self._wait_for_room()

    @property
    def _open(self) -> set[Connection]:
        # uvicorn keeps them. Each of its connections here is one of ours.
        return cast("set[Connection]", self._state.connections)

    async def _begin(self, accepted: socket.socket, peer: str) -> None:
        loop, context = asyncio.get_running_loop(), self._context()
        options = {} if context is None else {"ssl": context, "ssl_handshake_timeout": self.limits.request_seconds}
        try:
            accepted.setblocking(False)
            await loop.connect_accepted_socket(self._made, accepted, **options)  # type: ignore[arg-type]
        except Exception as error:
            # A handshake that fails is an error of the client. It is normal on a public address.
            if (problem := _PROBLEMS.get(getattr(error, "reason", ""))) is not None:
                # The client sees only that the connection ends.
                logger.warning("a connection from %s was refused: %s", peer, problem)
            else:
                logger.debug("a connection was not established: %s", error)
            accepted.close()
        finally:
            task = asyncio.current_task()
            assert task is not None
            del self._beginning[task]
            self._room.set()

    def _made(self) -> asyncio.Protocol:
        options = {"config": self._config, "server_state": self._state, "app_state": {}}
        return cast(asyncio.Protocol, self._protocol(shared=self._shared, **options))

    async def _wait_for_room(self) -> None:
        """Wait until there are as many connections as there may be. One more is answered meanwhile."""
        while len(self._open) + len(self._beginning) > self.limits.connections:
            self._log_shortage(f"{self.limits.connections} connections are open; the idle ones are closed for new ones")
            # The newest one may not have had the time to say something.
            await self._make_room(2)

    async def _make_room(self, least: int) -> None:
        """End the connection that has waited longest, if there are at least so many that wait, and wait a moment for
        any connection to end.
        """
        self._room.clear()
        waiting = [(since, each.end_at_once) for each in self._open if (since := each.awaited_since) is not None]
        waiting += [(since, partial(_end_stream, beginning)) for since, beginning in self._beginning.values()]
        if len(waiting) >= least:
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
