"""Operations of the store (a commit, a save, the making of a segment) and their steps: names, durations, outcomes."""

from __future__ import annotations

import errno
import time
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Literal, TypeVar

if TYPE_CHECKING:
    from savings_exporter.storage.observers import Observer

SomeStep = TypeVar("SomeStep", bound="Step")
SomeOperation = TypeVar("SomeOperation", bound="Operation")
Outcome = Literal["ok", "failed", "unsupported"]
FsyncTarget = Literal["file", "directory", "journal"]

SAVE, COMMIT, ROTATE = "save", "commit", "rotate"
"""Saving the document, committing records to the journal, and making a segment before it is needed."""

PREPARE = "prepare"
"""What precedes the first step: taking locks and reading what other processes wrote."""

WRITE, FSYNC_FILE, REPLACE, FSYNC_DIR = "write", "fsync_file", "replace", "fsync_dir"
SAVE_STEPS = (WRITE, FSYNC_FILE, REPLACE, FSYNC_DIR)

APPEND, FSYNC_JOURNAL = "append", "fsync_journal"
COMMIT_STEPS = (APPEND, FSYNC_JOURNAL, FSYNC_DIR)
"""A direct, synchronous write is one step, ``fsync_journal``. Making a segment also takes ``fsync_dir``."""

FSYNC_TARGETS: tuple[FsyncTarget, ...] = ("file", "directory", "journal")

DIR_FSYNC_UNSUPPORTED = frozenset({errno.EINVAL, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOSYS})
"""The errors by which ``fsync`` of a directory says that the file system has no such operation."""


class Step:
    """One step of an operation, used as a context manager.

    ``duration`` is in seconds, ``size`` in bytes. ``fsync_target`` is what the step syncs, if it syncs. ``is_drill``
    marks what a drill simulates. ``trace`` is set by tracing: the span context under which the step is recorded.

    Every commit makes some. So what is rarely set is a default of the class, and a step does not refer to its
    operation: a reference cycle would be left to the garbage collector.
    """

    outcome: Outcome = "ok"
    error: BaseException | None = None
    duration = 0.0
    size: int | None = None
    trace: Any = None
    _began = 0.0

    def __init__(self, name: str, fsync_target: FsyncTarget | None = None, *, is_drill: bool = False) -> None:
        self.name = name
        self.fsync_target = fsync_target
        self.is_drill = is_drill

    def __enter__(self: SomeStep) -> SomeStep:
        self._began = time.perf_counter()
        return self

    def __exit__(self, _kind: object, error: BaseException | None, _traceback: object) -> None:
        self.duration = time.perf_counter() - self._began
        if error is not None:
            self.outcome, self.error = "failed", error


class Operation(Step):
    """A save, a commit or a rotation, used as a context manager; the observer is told when it has ended.

    ``parent`` and ``links`` are for tracing: the span above it, and the spans of the records that it carries.
    ``writer`` is whose journal a commit goes to, in hexadecimal. ``entered_ns`` is when it began, in nanoseconds since
    1970.
    """

    records = 0
    sequence: int | None = None
    writer: str | None = None
    entered_ns = 0

    def __init__(
        self,
        name: str,
        observer: Observer,
        parent: Any = None,
        links: Sequence[Any] = (),
        *,
        is_drill: bool = False,
    ) -> None:
        super().__init__(name, is_drill=is_drill)
        self.parent = parent
        self.links = links
        self.steps: list[Step] = []
        self._observer = observer

    @property
    def failed_step(self) -> str | None:
        """The name of the last step that failed, None when none did."""
        return next((step.name for step in reversed(self.steps) if step.error is not None), None)

    def __enter__(self: SomeOperation) -> SomeOperation:
        self.entered_ns = time.time_ns()
        self._began = time.perf_counter()
        return self

    def step(self, name: str, fsync_target: FsyncTarget | None = None) -> Step:
        """The next step, to be used as a context manager."""
        step = Step(name, fsync_target, is_drill=self.is_drill)
        self.steps.append(step)
        return step

    def began_ns(self, step: Step) -> int:
        """When a step began, in nanoseconds since 1970."""
        return self.entered_ns + round((step._began - self._began) * 1e9)

    def __exit__(self, kind: object, error: BaseException | None, traceback: object) -> None:
        super().__exit__(kind, error, traceback)
        self._observer.ended(self)


def error_symbol(error: BaseException) -> str:
    """The name of an error in metrics and spans: the errno's symbol, or the exception's name when it has none."""
    number = getattr(error, "errno", None)
    return errno.errorcode.get(number, f"E{number}") if isinstance(number, int) else type(error).__name__
