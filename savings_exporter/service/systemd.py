"""What the service tells systemd: that it is ready, that it is stopping, and that it still answers (sd_notify(3))."""

from __future__ import annotations

import asyncio
import contextlib
import os
import socket
from collections.abc import Mapping

_MICROSECONDS = 1_000_000


class Systemd:
    """The notifications of a unit with ``Type=notify``. Without such a unit every method does nothing.

    A notification that cannot be sent is dropped: systemd reports a missing READY=1 or WATCHDOG=1 itself.
    """

    def __init__(self, environment: Mapping[str, str] = os.environ) -> None:
        self._socket = environment.get("NOTIFY_SOCKET", "")
        # The variables may belong to a parent that has forgotten to remove them.
        is_ours = environment.get("WATCHDOG_PID", str(os.getpid())) == str(os.getpid())
        period = environment.get("WATCHDOG_USEC", "") if is_ours else ""
        self._ping_seconds = int(period) / _MICROSECONDS / 2 if period.isascii() and period.isdigit() else 0.0

    @property
    def is_manager(self) -> bool:
        """Whether systemd waits for notifications of this process."""
        return bool(self._socket)

    def ready(self, status: str) -> None:
        """Requests are answered. From now on the event loop, in which this is called, feeds the watchdog."""
        self._notify(f"READY=1\nSTATUS={status}")
        if self.is_manager and self._ping_seconds:
            self._feed_watchdog(asyncio.get_running_loop())

    def stopping(self, status: str) -> None:
        """The service stops. systemd waits for the end as long as ``TimeoutStopSec`` says."""
        self._notify(f"STOPPING=1\nSTATUS={status}")

    def _feed_watchdog(self, loop: asyncio.AbstractEventLoop) -> None:
        # A timer of the loop and not a thread: a loop that hangs must be noticed. A disk that hangs does not stop the
        # loop, and must not be noticed here, because a restart would lose the pending records.
        self._notify("WATCHDOG=1")
        loop.call_later(self._ping_seconds, self._feed_watchdog, loop)

    def _notify(self, message: str) -> None:
        if not self._socket:
            return
        address = f"\0{self._socket[1:]}" if self._socket.startswith("@") else self._socket
        with contextlib.suppress(OSError), socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as client:
            client.setblocking(False)
            client.sendto(message.encode(), address)
