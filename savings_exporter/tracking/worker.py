"""A thread that does what is due, when it is due or when it is woken."""

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


class Worker:
    """A thread that calls ``work`` when that is due. ``due`` says when, on the monotonic clock."""

    def __init__(self, name: str, due: Callable[[], float], work: Callable[[], None]) -> None:
        self._name = name
        self._due = due
        self._work = work
        self._wakeups: queue.SimpleQueue[None] = queue.SimpleQueue()
        self._thread: threading.Thread | None = None
        # The first one does the work. A call that was interrupted while it started a thread may start another.
        self._running: list[threading.Thread] = []
        self._is_ended = False

    def wake(self) -> None:
        """Have the thread look what is due. A signal handler may call this at any moment."""
        if self._wakeups.empty():
            self._wakeups.put(None)

    def start(self) -> None:
        """Start the thread, unless it runs.

        Raises:
            RuntimeError: no thread can be started now.
        """
        if self._thread is None:
            thread = threading.Thread(target=self._run, name=self._name, daemon=True)
            thread.start()
            self._thread = thread

    def stop(self) -> None:
        """End the thread, after what it is doing."""
        self._is_ended = True
        self.wake()
        for thread in self._running[:1]:
            if thread is not threading.current_thread():
                thread.join()

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
                # Such as no memory. A thread that ended would leave records pending for ever.
                logger.exception("the thread %s failed; it continues", self._name)
                time.sleep(FIRST_SECONDS)
