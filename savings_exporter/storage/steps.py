"""The names of the steps of saves and commits, how they are observed, and what an errno means."""

from __future__ import annotations

import errno
import logging
import time
from collections.abc import Callable, Sequence
from typing import Any, Literal, Protocol, TypeVar

logger = logging.getLogger(__name__)

Subject = TypeVar("Subject")
Outcome = Literal["ok", "failed", "unsupported"]
FsyncTarget = Literal["file", "directory", "journal"]

SAVE, COMMIT, ROTATE = "save", "commit", "rotate"
"""Saving the document, committing records to the journal, and making the journal's next segment."""

PREPARE = "prepare"
"""What comes before a first step: taking the lock and reading what other processes wrote."""

WRITE, FSYNC_FILE, REPLACE, FSYNC_DIR = "write", "fsync_file", "replace", "fsync_dir"
SAVE_STEPS = (WRITE, FSYNC_FILE, REPLACE, FSYNC_DIR)
APPEND, FSYNC_JOURNAL = "append", "fsync_journal"
COMMIT_STEPS = (APPEND, FSYNC_JOURNAL)
FSYNC_TARGETS: tuple[FsyncTarget, ...] = ("file", "directory", "journal")

DIR_FSYNC_UNSUPPORTED = frozenset({errno.EINVAL, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOSYS})
"""What ``fsync`` of a directory says on a filesystem that has no such thing."""


class Operation:
    """A save, a commit or a rotation, or one step of it, while it runs and when it has ended.

    ``duration`` is in seconds. ``fsync_target`` is what a failed step was syncing, if it was syncing. ``links`` and
    ``trace`` belong to the observers: what the carried records were part of, and what this operation is shown as.
    """

    __slots__ = (
        *("name", "parent", "outcome", "error", "failed_step", "fsync_target", "duration"),
        *("records", "sequence", "size", "links", "trace"),
    )

    def __init__(self, name: str, parent: Operation | None = None, links: Sequence[Any] = ()) -> None:
        self.name = name
        self.parent = parent
        self.links = links
        self.outcome: Outcome = "ok"
        self.error: BaseException | None = None
        self.failed_step: str | None = None
        self.fsync_target: FsyncTarget | None = None
        self.duration = 0.0
        self.records = 0
        self.sequence: int | None = None
        self.size: int | None = None
        self.trace: Any = None


class Observer(Protocol):
    """Sees every operation begin and end, in the thread that runs it; steps lie within their operation."""

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


class observed:  # noqa: N801  # used as a statement; a class, because a commit pays for three of them
    """Run a block as an operation: timed, and its outcome told to the observer."""

    __slots__ = ("_observer", "_operation", "_started")

    def __init__(
        self, observer: Observer, name: str, parent: Operation | None = None, links: Sequence[Any] = ()
    ) -> None:
        self._observer = observer
        self._operation = Operation(name, parent, links)

    def __enter__(self) -> Operation:
        self._observer.begin(self._operation)
        self._started = time.perf_counter()
        return self._operation

    def __exit__(self, _kind: object, error: BaseException | None, _traceback: object) -> None:
        operation = self._operation
        operation.duration = time.perf_counter() - self._started
        if error is not None:
            operation.outcome, operation.error = "failed", error
            if operation.parent is not None:
                operation.parent.failed_step = operation.name
        self._observer.end(operation)


def error_symbol(error: BaseException) -> str:
    """What metrics and spans call an error: the errno's symbol, or the exception's name when it has none."""
    number = getattr(error, "errno", None)
    return errno.errorcode.get(number, f"E{number}") if isinstance(number, int) else type(error).__name__


def _guarded(tell: Callable[[Subject], None], subject: Subject) -> None:
    try:
        tell(subject)
    except Exception:
        logger.exception("an observer of the store failed; saving goes on")
