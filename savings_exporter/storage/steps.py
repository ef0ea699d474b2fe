"""The names of the steps of a save, how they are observed, and what an errno means."""

from __future__ import annotations

import errno
import logging
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Literal, Protocol, TypeVar

logger = logging.getLogger(__name__)

Subject = TypeVar("Subject")
Outcome = Literal["ok", "failed", "unsupported"]
FsyncTarget = Literal["file", "directory", "journal"]

SAVE = "save"
PREPARE = "prepare"
"""What comes before a save's first step: taking the lock and reading what other processes saved."""

WRITE, FSYNC_FILE, REPLACE, FSYNC_DIR = "write", "fsync_file", "replace", "fsync_dir"
SAVE_STEPS = (WRITE, FSYNC_FILE, REPLACE, FSYNC_DIR)
FSYNC_TARGETS: tuple[FsyncTarget, ...] = ("file", "directory", "journal")

DIR_FSYNC_UNSUPPORTED = frozenset({errno.EINVAL, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOSYS})
"""What ``fsync`` of a directory says on a filesystem that has no such thing."""


class Operation:
    """One save, or one step of it, while it runs and when it has ended.

    ``duration`` is in seconds. ``fsync_target`` is what a failed step was syncing, if it was syncing.
    """

    def __init__(self, name: str, parent: Operation | None = None) -> None:
        self.name = name
        self.parent = parent
        self.outcome: Outcome = "ok"
        self.error: BaseException | None = None
        self.failed_step: str | None = None
        self.fsync_target: FsyncTarget | None = None
        self.duration = 0.0
        self.records = 0
        self.sequence: int | None = None
        self.size: int | None = None


class Observer(Protocol):
    """Sees every operation begin and end, in the thread that runs it; steps lie within their save."""

    def begin(self, operation: Operation) -> None:
        """An operation begins."""

    def end(self, operation: Operation) -> None:
        """It has ended; outcome, error, duration and sizes are filled in."""

    def recovered(self, kind: str) -> None:
        """Opening the store mended something; ``kind`` says what."""


class Observers:
    """Several observers as one. What an observer raises is logged: watching a save must not break it."""

    def __init__(self, observers: Sequence[Observer]) -> None:
        self._observers = tuple(observers)

    def begin(self, operation: Operation) -> None:
        """Tell each observer, in order."""
        for observer in self._observers:
            _guarded(observer.begin, operation)

    def end(self, operation: Operation) -> None:
        """Tell each observer, in the opposite order, so that the first one spans the others."""
        for observer in reversed(self._observers):
            _guarded(observer.end, operation)

    def recovered(self, kind: str) -> None:
        """Tell each observer."""
        for observer in self._observers:
            _guarded(observer.recovered, kind)


@contextmanager
def observed(observer: Observer, name: str, parent: Operation | None = None) -> Iterator[Operation]:
    """Run a block as an operation: timed, and its outcome told to the observer."""
    operation = Operation(name, parent)
    observer.begin(operation)
    started = time.perf_counter()
    try:
        yield operation
    except BaseException as error:
        operation.outcome, operation.error = "failed", error
        if parent is not None:
            parent.failed_step = name
        raise
    finally:
        operation.duration = time.perf_counter() - started
        observer.end(operation)


def error_symbol(error: BaseException) -> str:
    """What metrics and spans call an error: the errno's symbol, or the exception's name when it has none."""
    number = getattr(error, "errno", None)
    return errno.errorcode.get(number, f"E{number}") if isinstance(number, int) else type(error).__name__


def _guarded(tell: Callable[[Subject], None], subject: Subject) -> None:
    try:
        tell(subject)
    except Exception:
        logger.exception("an observer of the store failed; saving goes on")
