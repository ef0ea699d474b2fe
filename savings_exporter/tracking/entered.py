"""Records which threads are in a call of the tracker, because a signal handler may interrupt such a call."""

from __future__ import annotations

import threading


class Entered(threading.local):
    """Whether this thread is already in a call of the tracker. If so, the current code runs in a signal handler that
    interrupted this call. It must not wait for the call, and must not change data that the call is changing.

    ``with entered.lock:`` marks the time in which a thread is in a call. It is a lock because a signal handler never
    runs in the middle of its acquisition or release.
    """

    def __init__(self) -> None:
        self.lock = threading.RLock()

    def is_here(self) -> bool:
        """Whether this thread is in a call of the tracker."""
        return is_owned(self.lock)


def is_owned(lock: threading.RLock) -> bool:
    """Whether this thread holds a lock."""
    owned: bool = lock._is_owned()  # type: ignore[attr-defined]
    return owned
