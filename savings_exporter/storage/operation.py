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

    ``duration`` is in seconds, ``size`` in bytes. ``fsync_target`` is what the step syncs, if it syncs. ``trace`` is
    set by tracing: the span context under which the step is recorded.
    """

    __slots__ = ("_began", "_operation", "duration", "error", "fsync_target", "name", "outcome", "size", "trace")

    def __init__(self, name: str, operation: Operation, fsync_target: FsyncTarget | None = None) -> None:
        self.name = name
        self.outcome: Outcome = "ok"
        self.error: BaseException | None = None
        self.duration = 0.0
        self.size: int | None = None
        self.fsync_target: FsyncTarget | None = fsync_target
        self.trace: Any = None
        self._operation = operation
        self._began = 0.0

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
        """Whether the step is simulated by a drill."""
        return self._operation.drill

    @property
    def began_ns(self) -> int:
        """When it began, in nanoseconds since 1970."""
        operation = self._operation
        return operation.entered_ns + round((self._began - operation._began) * 1e9)


class Operation(Step):
    """A save, a commit or a rotation, used as a context manager; the observer is told when it has ended.

    ``parent`` and ``links`` are for tracing: the span above it, and the spans of the records that it carries.
    ``drill`` marks an operation that a drill simulates. ``writer`` is whose journal a commit goes to, in hexadecimal.
    """

    __slots__ = (
        "_observer",
        "drill",
        "entered_ns",
        "failed_step",
        "links",
        "parent",
        "records",
        "sequence",
        "steps",
        "writer",
    )

    def __init__(self, name: str, observer: Observer, parent: Any = None, links: Sequence[Any] = ()) -> None:
        super().__init__(name, self)
        self.parent = parent
        self.links = links
        self.steps: list[Step] = []
        self.records = 0
        self.sequence: int | None = None
        self.writer: str | None = None
        self.failed_step: str | None = None
        self.drill = False
        self.entered_ns = 0
        self._observer = observer

    def __enter__(self: SomeOperation) -> SomeOperation:
        self.entered_ns = time.time_ns()
        self._began = time.perf_counter()
        return self

    def step(self, name: str, fsync_target: FsyncTarget | None = None) -> Step:
        """The next step, to be used as a context manager."""
        step = Step(name, self, fsync_target)
        self.steps.append(step)
        return step

    def __exit__(self, _kind: object, error: BaseException | None, _traceback: object) -> None:
        self.duration = time.perf_counter() - self._began
        if error is not None:
            self.outcome, self.error = "failed", error
        self._observer.ended(self)


def error_symbol(error: BaseException) -> str:
    """The name of an error in metrics and spans: the errno's symbol, or the exception's name when it has none."""
    number = getattr(error, "errno", None)
    return errno.errorcode.get(number, f"E{number}") if isinstance(number, int) else type(error).__name__
