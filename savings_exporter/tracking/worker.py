"""A thread that runs its work when the work is due or when the thread is woken."""

from __future__ import annotations

import logging
import math
import queue
import threading
import time
from collections.abc import Callable
from contextlib import suppress

from savings_exporter.tracking.retry import FIRST_SECONDS

logger = logging.getLogger(__name__)

_JOIN_SECONDS = 0.5


class Worker:
    """A thread that calls ``work`` when it is due. ``due`` returns that time, on the monotonic clock."""

    def __init__(self, name: str, due: Callable[[], float], work: Callable[[], None]) -> None:
        self._name = name
        self._due = due
        self._work = work
        self._wakeups: queue.SimpleQueue[None] = queue.SimpleQueue()
        self._thread: threading.Thread | None = None
        # Only the first thread does the work. If a call is interrupted while it starts a thread, a later call may start
        # another one.
        self._running: list[threading.Thread] = []
        self._is_ended = False

    def wake(self) -> None:
        """Make the thread check for due work. A signal handler may call this at any time."""
        if self._wakeups.empty():
            self._wakeups.put(None)

    def start(self) -> None:
        """Start the thread, unless it is running.

        Raises:
            RuntimeError: the thread cannot be started now.
        """
        if self._thread is None:
            thread = threading.Thread(target=self._run, name=self._name, daemon=True)
            thread.start()
            self._thread = thread

    def stop(self) -> None:
        """Stop the thread after its current work."""
        self._is_ended = True
        self.wake()
        for thread in self._running[:1]:
            # A signal that comes just before a wait without a limit is not handled until that wait ends.
            while thread is not threading.current_thread() and thread.is_alive():
                thread.join(_JOIN_SECONDS)

    def _run(self) -> None:
        self._running.append(threading.current_thread())
        while not self._is_ended and self._running[0] is threading.current_thread():
            pause = self._due() - time.monotonic()
            if pause > 0:
                with suppress(queue.Empty):
                    self._wakeups.get(timeout=pause if pause < math.inf else None)
            try:
                if not self._is_ended:
                    self._work()
            except Exception:
                # For example, no memory is available. If the thread ended, records would stay pending forever.
                logger.exception("the thread %s failed; it continues", self._name)
                time.sleep(FIRST_SECONDS)


class Publisher:
    """A thread that calls ``work`` on request, so that a caller can wait for it for a limited time."""

    def __init__(self, name: str, work: Callable[[], None]) -> None:
        self._name = name
        self._work = work
        # Locks rather than events, because a signal handler may ask while its thread asks.
        self._asked: queue.SimpleQueue[threading.Lock | None] = queue.SimpleQueue()
        self._is_late = False
        self._has_started = False

    def start(self) -> None:
        """Start the thread.

        Raises:
            RuntimeError: the thread cannot be started now.
        """
        if not self._has_started:
            threading.Thread(target=self._run, name=self._name, daemon=True).start()
            self._has_started = True

    def stop(self) -> None:
        """Stop the thread after its current work, without waiting for it."""
        self._asked.put(None)

    def publish(self, patience: float) -> None:
        """Wait until ``work`` has been called after this request, for at most ``patience`` seconds. While an earlier
        call is late, this does not wait.
        """
        done = threading.Lock()
        done.acquire()
        is_late = self._is_late
        if not is_late or self._asked.empty():
            self._asked.put(done)
        if not is_late and not done.acquire(timeout=patience):
            self._is_late = True

    def _run(self) -> None:
        while (done := self._asked.get()) is not None:
            try:
                self._work()
                self._is_late = False
            except Exception:
                logger.exception("the thread %s failed; it continues", self._name)
            done.release()
        # Two calls of ``start`` at the same time may have started two threads.
        self._asked.put(None)
