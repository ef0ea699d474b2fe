"""What a disk can do for a store: each step of a save and of a commit, and savings made durable a second.

PostgreSQL's pg_test_fsync answers the same question for its write-ahead log.
"""

from __future__ import annotations

import errno
import os
import secrets
import shlex
import tempfile
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from itertools import islice
from statistics import median

import msgspec

from savings_exporter.errors import StoreError
from savings_exporter.storage.atomic_file import AtomicFile, Directory
from savings_exporter.storage.filesystem import LOCAL
from savings_exporter.storage.mounts import FilesystemType, filesystem_type, mount_of
from savings_exporter.storage.observers import Observers
from savings_exporter.storage.operation import (
    APPEND,
    COMMIT,
    FSYNC_DIR,
    FSYNC_JOURNAL,
    ROTATE,
    SAVE,
    SAVE_STEPS,
    Operation,
    error_symbol,
)
from savings_exporter.storage.segment import NO_DIRECT_IO, SyncMethod, make_segment
from savings_exporter.tracker import DOCUMENT_NAME, SavingsTracker, default_path

THREADS = (1, 8, 64)

_GROWING_FILE = "append_and_fsync_growing_file"

DIRECT_WRITE = "direct_write"
"""A direct, synchronous write of a block: what a commit is where the journal is written directly."""

# Some seconds in all: people wait for it.
_SAVE_SECONDS, _JOURNAL_SECONDS, _GROWING_FILE_SECONDS, _COMMITS_SECONDS = 1.5, 0.75, 0.5, 1.0

_DOCUMENT_BYTES = 64 * 1024
"""A document with some models and weeks of history is about as large."""

_FRAME_BYTES = 4096
"""The block that a small commit to a journal writes."""

_SEGMENT_BYTES = 4 * 1024 * 1024
"""The most that one of the journal's files takes, so that measuring fills no disk."""

_FASTEST_REAL_SYNC_SECONDS = 20e-6
"""In less, nothing goes to a device and comes back."""


_MUCH_SLOWER = 1.25


class Filesystem(msgspec.Struct, frozen=True, kw_only=True):
    """Where the directory lies. The mount point and the device are None where the platform does not say."""

    type: str
    is_network: bool
    mount_point: str | None
    device: str | None


class Timing(msgspec.Struct, frozen=True, kw_only=True):
    """How long a step took, in seconds, over so many runs."""

    runs: int
    median_seconds: float
    worst_seconds: float


class Report(msgspec.Struct, frozen=True, kw_only=True):
    """What was found in a directory.

    ``steps`` are those of a save; those of a commit by ``pwrite`` and ``fdatasync`` and by a direct write; and for
    comparison an append to a growing file with its sync. ``fsync_dir`` and ``direct_write`` are None where they are not
    supported. ``commits_per_second`` are savings made durable a second,
    each recorded by one call, by the number of threads that call.
    """

    directory: str
    filesystem: Filesystem
    directory_fsync_supported: bool
    steps: dict[str, Timing | None]
    commits_per_second: dict[int, float]
    verdict: str
    warnings: tuple[str, ...]


def directory_of(path: str | None) -> str:
    """The directory that is measured for a path, which is a directory itself or a document in one.

    For None it is the default store's directory, or the nearest one above it while there is none.

    Raises:
        StoreError: there is no such directory.
    """
    if path is None:
        directory = os.path.dirname(default_path())
        while not LOCAL.is_directory(directory):
            directory = os.path.dirname(directory)
        return directory
    path = LOCAL.resolved(path)
    directory = path if LOCAL.is_directory(path) else os.path.dirname(path)
    if os.path.exists(directory) and not LOCAL.is_directory(directory):
        raise StoreError(f"{directory}: is not a directory")
    if not LOCAL.is_directory(directory):
        raise StoreError(f"{directory}: the directory does not exist; make it first: mkdir -p {shlex.quote(directory)}")
    return directory


def examine(directory: str) -> Report:
    """Measure a directory for some seconds, in a temporary directory in it that is always removed.

    Raises:
        StoreError: a store cannot be kept in it; the message says why.
    """
    try:
        found = filesystem_type(directory)
        mount = mount_of(directory)
        with tempfile.TemporaryDirectory(prefix=".savings-exporter-doctor-", dir=directory) as scratch:
            steps = {**_save_steps(scratch), **_journal_steps(scratch)}
            commits = _commits_per_second(os.path.join(scratch, DOCUMENT_NAME))
    except OSError as error:
        reason = f"{error.strerror or error} ({error_symbol(error)})"
        raise StoreError(
            f"{directory}: a store cannot be kept here: {reason}; fix that or name another directory"
        ) from None
    return Report(
        directory=_text(directory),
        filesystem=Filesystem(
            type=found.name,
            is_network=found.is_network,
            mount_point=_text(mount.point) if mount else None,
            device=_text(mount.device) if mount else None,
        ),
        directory_fsync_supported=steps[FSYNC_DIR] is not None,
        steps=steps,
        commits_per_second=commits,
        verdict=_verdict(commits),
        warnings=tuple(_warnings(found, steps)),
    )


class _Timings:
    """An observer that keeps each step's durations."""

    def __init__(self) -> None:
        self._durations: dict[str, list[float]] = {}

    def ended(self, operation: Operation) -> None:
        for step in operation.steps:
            if step.outcome == "ok":
                self._durations.setdefault(step.name, []).append(step.duration)

    def recovered(self, kind: str) -> None:
        pass

    def of(self, step: str) -> Timing | None:
        """None when it never succeeded."""
        durations = self._durations.get(step)
        if durations is None:
            return None
        return Timing(
            runs=len(durations), median_seconds=round(median(durations), 9), worst_seconds=round(max(durations), 9)
        )


def _save_steps(scratch: str) -> dict[str, Timing | None]:
    timings = _Timings()
    path = os.path.join(scratch, "document")
    file = AtomicFile(LOCAL, path, Directory(LOCAL, path))
    data = secrets.token_bytes(_DOCUMENT_BYTES)  # which no file system can compress
    for _ in _runs(_SAVE_SECONDS):
        with Operation(SAVE, timings) as save:
            file.save(data, save, both=False)
    return {step: timings.of(step) for step in SAVE_STEPS}


def _journal_steps(scratch: str) -> dict[str, Timing | None]:
    buffered = _segment_timings(scratch, "fdatasync")
    try:
        direct = _segment_timings(scratch, "direct")
    except OSError as error:
        if error.errno not in NO_DIRECT_IO:
            raise
        direct = _Timings()
    return {
        APPEND: buffered.of(APPEND),
        FSYNC_JOURNAL: buffered.of(FSYNC_JOURNAL),
        DIRECT_WRITE: direct.of(FSYNC_JOURNAL),
        _GROWING_FILE: _growing_file_timings(scratch).of(_GROWING_FILE),
    }


def _segment_timings(scratch: str, method: SyncMethod) -> _Timings:
    timings, frame = _Timings(), secrets.token_bytes(_FRAME_BYTES)
    path = os.path.join(scratch, f"segment-{method}")
    with Operation(ROTATE, Observers()) as making:
        segment = make_segment(LOCAL, path, _SEGMENT_BYTES, making, Directory(LOCAL, path), method)
    try:
        for _ in islice(_runs(_JOURNAL_SECONDS), _SEGMENT_BYTES // _FRAME_BYTES):
            with Operation(COMMIT, timings) as commit:
                segment.write(frame, commit)
        if segment.content()[:_FRAME_BYTES] != frame:
            raise OSError(errno.EIO, "What is read is not what was written")
    finally:
        segment.close()
    return timings


def _growing_file_timings(scratch: str) -> _Timings:
    timings, frame = _Timings(), secrets.token_bytes(_FRAME_BYTES)
    path = os.path.join(scratch, "growing")
    with _closed(LOCAL.create(path, like=path)) as growing:
        for run in islice(_runs(_GROWING_FILE_SECONDS), _SEGMENT_BYTES // _FRAME_BYTES):
            with Operation(COMMIT, timings) as commit, commit.step(_GROWING_FILE):
                LOCAL.write_at(growing, frame, run * _FRAME_BYTES)
                LOCAL.sync_data(growing)
    return timings


def _commits_per_second(path: str) -> dict[int, float]:
    with SavingsTracker(path) as tracker:
        return {threads: _rate(tracker, threads) for threads in THREADS}


def _rate(tracker: SavingsTracker, threads: int) -> float:
    # Every call is made by a thread of the pool, so that an interrupt of this one meets no save.
    with ThreadPoolExecutor(threads) as pool:
        started = time.perf_counter()
        recorded = sum(pool.map(_recorded, [tracker] * threads))
        return recorded / (time.perf_counter() - started)


def _recorded(tracker: SavingsTracker) -> int:
    recorded = 0
    for _ in _runs(_COMMITS_SECONDS):
        if not tracker.record_request(model="doctor", tokens_saved=1).durable:
            raise StoreError(f"a store that was tried out failed: {tracker.health().reason}")
        recorded += 1
    return recorded


def _runs(seconds: float) -> Iterator[int]:
    """Count for so long, and at least once: 0, 1, 2, ..."""
    deadline = time.perf_counter() + seconds
    run = 0
    while run == 0 or time.perf_counter() < deadline:
        yield run
        run += 1


@contextmanager
def _closed(descriptor: int) -> Iterator[int]:
    try:
        yield descriptor
    finally:
        LOCAL.close(descriptor)


def _text(path: str) -> str:
    """A path that can be printed: names on a disk need not be UTF-8."""
    return os.fsencode(path).decode("utf-8", "replace")


def _verdict(commits: dict[int, float]) -> str:
    fewest, *_, most = THREADS
    return (
        f"A saving costs its caller {readable(1 / commits[fewest])} here; {most} threads together make "
        f"{commits[most]:,.0f} savings durable a second."
    )


def _warnings(found: FilesystemType, steps: dict[str, Timing | None]) -> Iterator[str]:
    sync = steps[FSYNC_JOURNAL]
    is_real = sync is not None and sync.median_seconds >= _FASTEST_REAL_SYNC_SECONDS
    if sync is not None and not is_real:
        yield (
            f"A sync takes {readable(sync.median_seconds)}, less than a disk needs: this filesystem is in memory, or "
            "the disk or the virtual machine ignores flushes. A power loss would then take savings that were "
            "acknowledged. (A disk whose cache survives a power loss may be that fast.)"
        )
    append, direct = steps[APPEND], steps[DIRECT_WRITE]
    if direct is None:
        yield "This file system has no direct, synchronous writes: the journal is written with fdatasync."
    elif append is not None and sync is not None and is_real:
        buffered = append.median_seconds + sync.median_seconds
        if direct.median_seconds > buffered * _MUCH_SLOWER:
            yield (
                f"A direct write takes {readable(direct.median_seconds)}, and pwrite with fdatasync "
                f"{readable(buffered)}: set SAVINGS_EXPORTER_SYNC_METHOD=fdatasync (in Python, "
                'sync_method="fdatasync").'
            )
    if steps[FSYNC_DIR] is None:
        yield (
            "This filesystem has no directory fsync: the renamed file is synced instead, and a power loss may bring "
            "back the document of the save before."
        )
    if found.is_network:
        yield (
            f"{found.name} is a network filesystem: its locks may hold on one host only, so let one process only use "
            "a store here."
        )


def readable(seconds: float) -> str:
    """A duration to be read by people: three digits, in µs, ms or s."""
    for unit, factor in (("µs", 1e6), ("ms", 1e3)):
        value = float(f"{seconds * factor:.3g}")
        if value < 1000:
            return f"{value:g} {unit}"
    return f"{seconds:.3g} s"
