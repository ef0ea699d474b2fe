"""Operations of the store (commits, saves, rotations) and their steps: names, durations and outcomes."""

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
"""A save of the document, a commit of records to the journal, and the creation of a segment outside of a commit."""

PREPARE = "prepare"
"""Everything before the first step: taking locks and reading the data that other processes wrote."""

WRITE, FSYNC_FILE, REPLACE, FSYNC_DIR = "write", "fsync_file", "replace", "fsync_dir"
SAVE_STEPS = (WRITE, FSYNC_FILE, REPLACE, FSYNC_DIR)

APPEND, FSYNC_JOURNAL = "append", "fsync_journal"
COMMIT_STEPS = (APPEND, FSYNC_JOURNAL, FSYNC_DIR)
"""A direct, synchronous write is a single step, ``fsync_journal``. Creating a segment also includes ``fsync_dir``."""

FSYNC_TARGETS: tuple[FsyncTarget, ...] = ("file", "directory", "journal")

DIR_FSYNC_UNSUPPORTED = frozenset({errno.EINVAL, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOSYS})
"""The errors of a directory's ``fsync`` which mean that the file system does not support the operation."""


class Step:
    """One step of an operation, used as a context manager.

    ``duration`` is in seconds, ``size`` in bytes. ``fsync_target`` is what the step syncs, or None when it syncs
    nothing. ``is_drill`` marks a step that a drill simulates. Tracing sets ``trace``, the span context under which the
    step is recorded.

    Every commit creates several steps, so steps must be cheap. Attributes that are rarely set are defaults of the
    class. A step does not refer to its operation, because only the garbage collector could free such a reference cycle.
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
    """A save, a commit or a rotation, used as a context manager. The observer is notified when the operation has ended.

    ``parent`` and ``links`` are for tracing: the parent span, and the spans of the records in the operation.
    ``writer`` is the writer whose journal a commit goes to, in hexadecimal. ``entered_ns`` is the start time in
    nanoseconds since 1970.
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
        """The name of the last step that failed; None when no step failed."""
        return next((step.name for step in reversed(self.steps) if step.error is not None), None)

    def __enter__(self: SomeOperation) -> SomeOperation:
        self.entered_ns = time.time_ns()
        self._began = time.perf_counter()
        return self

    def step(self, name: str, fsync_target: FsyncTarget | None = None) -> Step:
        """Add the next step, to be used as a context manager."""
        step = Step(name, fsync_target, is_drill=self.is_drill)
        self.steps.append(step)
        return step

    def began_ns(self, step: Step) -> int:
        """The start time of a step, in nanoseconds since 1970."""
        return self.entered_ns + round((step._began - self._began) * 1e9)

    def __exit__(self, kind: object, error: BaseException | None, traceback: object) -> None:
        super().__exit__(kind, error, traceback)
        self._observer.ended(self)


def error_symbol(error: BaseException) -> str:
    """The name of an error in metrics and spans: the symbol of its errno, or the exception's name without an errno."""
    number = getattr(error, "errno", None)
    return errno.errorcode.get(number, f"E{number}") if isinstance(number, int) else type(error).__name__
