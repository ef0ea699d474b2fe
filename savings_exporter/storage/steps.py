"""The names of the steps of saves and commits, how they are observed, and what an errno means."""

from __future__ import annotations

import errno
import logging
import time
from collections import deque
from collections.abc import Callable, Sequence
from contextlib import suppress
from typing import Any, Literal, Protocol, TypeVar

logger = logging.getLogger(__name__)

Subject = TypeVar("Subject")
SomeStep = TypeVar("SomeStep", bound="Step")
SomeOperation = TypeVar("SomeOperation", bound="Operation")
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


_SLOW_SECONDS = 0.01


class Step:
    """One step while it runs, as a block of its operation, and when it has ended.

    ``duration`` is seconds. ``fsync_target`` is what it syncs, if it does.
    ``trace`` belongs to the observers: what the step is shown as.
    """

    outcome: Outcome = "ok"
    error: BaseException | None = None
    duration = 0.0
    size: int | None = None
    fsync_target: FsyncTarget | None = None
    trace: Any = None

    def __init__(self, name: str, operation: Operation) -> None:
        self.name = name
        self._operation = operation

    def __enter__(self: SomeStep) -> SomeStep:
        self._began = time.perf_counter()
        return self

    def __exit__(self, _kind: object, error: BaseException | None, _traceback: object) -> None:
        self.duration = time.perf_counter() - self._began
        if error is not None:
            self.outcome, self.error = "failed", error
            self._operation.failed_step = self.name

    @property
    def is_drill(self) -> bool:
        """Whether it only pretends to have happened."""
        return self._operation.drill

    @property
    def began_ns(self) -> int:
        """When it began, in nanoseconds since 1970."""
        operation = self._operation
        return operation.entered_ns + round((self._began - operation._began) * 1e9)


class Operation(Step):
    """A save, a commit or a rotation, as a block; its observer is told when it has ended.

    ``parent`` and ``links`` are the observers' too: what it is a part of, and what its records were part of.
    ``drill`` is set on what did not happen: a fire drill tells the observers of it.
    """

    records = 0
    sequence: int | None = None
    failed_step: str | None = None
    drill = False

    def __init__(self, name: str, observer: Observer, parent: Any = None, links: Sequence[Any] = ()) -> None:
        super().__init__(name, self)
        self.parent = parent
        self.links = links
        self.steps: list[Step] = []
        self._observer = observer

    def __enter__(self: SomeOperation) -> SomeOperation:
        self.entered_ns = time.time_ns()
        return super().__enter__()

    def step(self, name: str) -> Step:
        """The next step of it, to be run as a block."""
        step = Step(name, self)
        self.steps.append(step)
        return step

    def __exit__(self, _kind: object, error: BaseException | None, _traceback: object) -> None:
        self.duration = time.perf_counter() - self._began
        if error is not None:
            self.outcome, self.error = "failed", error
        self._observer.ended(self)


class Observer(Protocol):
    """Is told of operations."""

    def ended(self, operation: Operation) -> None:
        """An operation has ended; what is known of it and its steps is filled in."""

    def recovered(self, kind: str) -> None:
        """Opening the store mended something; ``kind`` says what."""


class Observers:
    """Several observers as one, told in this order. What one raises is logged: watching a save must not break it.

    Of a commit that went well they are told later, while the disk is at work for the next one or when somebody asks:
    what they do then costs no record its time. Slow ones (a span processor that exports at once) are told at the end
    of each, where they keep no other process waiting.
    """

    def __init__(self, observers: Sequence[Observer]) -> None:
        self._observers = tuple(observers)
        self._untold: deque[Operation] = deque()
        self._are_slow = False

    def ended(self, operation: Operation) -> None:
        """Tell each observer, of a commit that went well later."""
        self._untold.append(operation)
        if operation.name != COMMIT or operation.error is not None or self._are_slow:
            self.tell()

    def tell(self) -> None:
        """Tell each observer of what has ended until now."""
        with suppress(IndexError):  # another thread may be as fast
            while self._untold:
                operation, began = self._untold.popleft(), time.perf_counter()
                for observer in self._observers:
                    _guarded(observer.ended, operation)
                self._are_slow = time.perf_counter() - began > _SLOW_SECONDS

    def recovered(self, kind: str) -> None:
        """Tell each observer."""
        for observer in self._observers:
            _guarded(observer.recovered, kind)


def error_symbol(error: BaseException) -> str:
    """What metrics and spans call an error: the errno's symbol, or the exception's name when it has none."""
    number = getattr(error, "errno", None)
    return errno.errorcode.get(number, f"E{number}") if isinstance(number, int) else type(error).__name__


def _guarded(tell: Callable[[Subject], None], subject: Subject) -> None:
    try:
        tell(subject)
    except Exception:
        logger.exception("an observer of the store failed; saving goes on")
