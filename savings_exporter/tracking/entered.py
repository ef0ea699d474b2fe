"""Which threads are in a call of the tracker: a signal handler runs in the middle of whatever its thread does."""

from __future__ import annotations

import threading


class Entered(threading.local):
    """Whether this thread is in a call of the tracker already. If so, a signal handler runs in the middle of that call:
    it must neither wait for it nor change what the call is changing.

    ``with entered.lock:`` enters and leaves. That is a lock because no signal handler runs half-way through taking or
    releasing one.
    """

    def __init__(self) -> None:
        self.lock = threading.RLock()

    def is_here(self) -> bool:
        """Whether this thread has entered."""
        return is_owned(self.lock)


def is_owned(lock: threading.RLock) -> bool:
    """Whether this thread holds a lock."""
    owned: bool = lock._is_owned()  # type: ignore[attr-defined]
    return owned
