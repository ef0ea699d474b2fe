"""Commits: their writes with both sync methods, the effect of each failing step, and the records that are read back."""

from __future__ import annotations

import errno
import json
import os
import re
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from opentelemetry import trace
from opentelemetry.sdk.trace import ReadableSpan, SpanProcessor, TracerProvider
from opentelemetry.trace import StatusCode

from savings_exporter import KeyConflictError, SavingsRecord, SavingsTracker, StoreError
from savings_exporter.storage.filesystem import LOCAL
from savings_exporter.telemetry.metrics import SavingsCollector
from savings_exporter.tracking.receipt import Receipt
from tests.support.faults import ERRNOS, FaultyFileSystem
from tests.support.scrape import samples
from tests.support.segments import WatchedSegments, copied, frames, segments
from tests.support.spans import Traced
from tests.support.wait import WAIT_SECONDS, eventually

SAVED: dict[str, Any] = {"model": "claude-sonnet-4-5", "provider": "anthropic", "tokens_saved": 4096}
DIRECT, BUFFERED = ["fsync_journal"], ["append", "fsync_journal"]
BLOCK_BYTES = 4096


@pytest.fixture(params=[pytest.param("direct", marks=pytest.mark.needs("direct-io")), "buffered"])
def faults(request: pytest.FixtureRequest) -> Iterator[WatchedSegments]:
    """A file system whose steps fail, with direct I/O and without."""
    faults = WatchedSegments(has_direct_io=request.param == "direct")
    yield faults
    faults.mend()


@pytest.fixture
def steps(faults: WatchedSegments) -> list[str]:
    """The steps of a commit into a segment that is there."""
    return DIRECT if faults.has_direct_io else BUFFERED


@pytest.fixture
def committing(store_path: Path, faults: WatchedSegments) -> Iterator[SavingsTracker]:
    """A tracker with a segment, so that the next record is one write; it saves only on request."""
    with SavingsTracker(store_path, filesystem=faults, save_interval=3600) as tracker:
        assert tracker.record_request(**SAVED).durable
        faults.calls.clear()
        faults.touched.clear()
        yield tracker


def failures(tracker: SavingsTracker) -> dict[str, float]:
    """The failure counters that are not zero."""
    seen = samples(SavingsCollector(tracker))
    return {name: value for name, value in seen.items() if "_failures_total" in name and value}


def commit_calls(faults: FaultyFileSystem) -> list[str]:
    """The calls, without the publication of operation counters by the background thread."""
    return [call for call in faults.calls if call != "counters"]


def requests_in(store_path: Path) -> int:
    """The number of records that a process would find if it opened the files now."""
    with copied(store_path) as copy, SavingsTracker(copy) as tracker:
        requests: int = tracker.snapshot().lifetime.requests
        return requests


# What a commit is.


def test_commit_is_one_synced_write(
    committing: SavingsTracker, faults: WatchedSegments, store_path: Path, steps: list[str]
) -> None:
    assert committing.save()
    document = store_path.read_bytes()
    faults.calls.clear()
    assert committing.record_request(**SAVED).durable
    assert commit_calls(faults) == [*steps, "watermark"]
    assert store_path.read_bytes() == document


RECORDING = """
import os, sys
from savings_exporter import SavingsTracker
tracker = SavingsTracker(sys.argv[1], save_interval=3600, sync_method=sys.argv[2])
for _ in range(40):
    assert tracker.record_request(model="m", tokens_saved=1, project="p" * 100).durable
os._exit(0)
"""


def calls_of_recording(store_path: Path, method: str) -> list[tuple[str, str, int, int]]:
    """The system calls of 40 commits: call, kind of file, size and offset of the write."""
    log = store_path.with_name("strace.log")
    # -f is not used, because it would include the calls of the background thread.
    strace = ["strace", "-y", "-e", "trace=pwritev,pwritev2,pwrite64,fdatasync", "-o", str(log)]
    subprocess.run([*strace, sys.executable, "-c", RECORDING, str(store_path), method], check=True)
    calls = []
    for line in log.read_text().splitlines():
        if found := re.match(r"(\w+)\(\d+<[^>]*proxy_savings\.json\.(journal|writer)\.[^>]*>(.*)\) = (\d+)$", line):
            name, kind, arguments, answer = found.groups()
            # With pwritev2, flags come after the offset.
            numbers = arguments.removesuffix(", 0") if name == "pwritev2" else arguments
            offset = 0 if name == "fdatasync" else int(numbers.rpartition(", ")[2])
            calls.append((name.removesuffix("2"), kind, int(answer), offset))
    # The writer's file and the first segment, with the first record, come before its watermark.
    first = next(place for place, call in enumerate(calls) if call[:3] == ("pwrite64", "writer", 16))
    return calls[first + 1 :]


@pytest.mark.slow
@pytest.mark.needs("linux", "strace")
def test_kernel_sees_fdatasync(store_path: Path) -> None:
    calls = calls_of_recording(store_path, "fdatasync")
    assert [call[:2] for call in calls] == 39 * [
        ("pwrite64", "journal"),
        ("fdatasync", "journal"),
        ("pwrite64", "writer"),
    ]
    for _, _, size, offset in calls[::3]:
        assert offset // BLOCK_BYTES == (offset + size - 1) // BLOCK_BYTES


@pytest.mark.slow
@pytest.mark.needs("linux", "strace", "direct-io")
def test_kernel_sees_direct_writes(store_path: Path) -> None:
    calls = calls_of_recording(store_path, "direct")
    assert [call[:2] for call in calls] == 39 * [("pwritev", "journal"), ("pwrite64", "writer")]
    for _, _, size, offset in calls[::2]:
        assert (size, offset % BLOCK_BYTES) == (BLOCK_BYTES, 0)


def test_frames_are_json(committing: SavingsTracker, store_path: Path) -> None:
    records = [SavingsRecord(model=f"m{number}", tokens_saved=number, project="p") for number in range(3)]
    committing.record_many(records, idempotency_key="a key")
    committing.flush()
    ((group,),) = [json.loads(bytes(frame.payload)) for frame in frames(segments(store_path)[0])[1:]]
    assert [(record["model"], record["tokens_saved"], record["project"]) for record in group["records"]] == [
        ("m0", 0, "p"),
        ("m1", 1, "p"),
        ("m2", 2, "p"),
    ]
    assert group["at"] == 3
    assert len(bytes.fromhex(group["key"])) == 16


def test_frames_that_share_a_block(committing: SavingsTracker, store_path: Path) -> None:
    for number in range(2, 12):
        assert committing.record_request(**SAVED).sequence == number
    (segment,) = segments(store_path)
    found = frames(segment)
    assert [frame.first for frame in found] == list(range(1, 12))
    assert found[-1].end < BLOCK_BYTES
    assert requests_in(store_path) == 11


def test_document_follows(store_path: Path, faults: WatchedSegments) -> None:
    def saved_requests() -> int:
        requests: int = json.loads(store_path.read_bytes())["lifetime"]["requests"] if store_path.exists() else 0
        return requests

    with SavingsTracker(store_path, filesystem=faults, save_interval=0.05) as tracker:
        for _ in range(10):
            assert tracker.record_request(**SAVED).durable
        eventually(lambda: saved_requests() == 10, "the document to be saved")


# Sync methods.


def test_no_direct_io_is_buffered(store_path: Path) -> None:
    faults = FaultyFileSystem(has_direct_io=False)
    with SavingsTracker(store_path, filesystem=faults, save_interval=3600) as tracker:
        assert tracker.record_request(**SAVED).durable
        faults.calls.clear()
        assert tracker.record_request(**SAVED).durable
        assert commit_calls(faults) == [*BUFFERED, "watermark"]
        assert not failures(tracker)


class RefusesDirectWrites(FaultyFileSystem):
    """Opens files for direct I/O but refuses the writes, as some file systems do."""

    def __init__(self, number: int) -> None:
        super().__init__()
        self.number = number

    def open_direct(self, path: str) -> int:
        return self.open_to_write(path)

    def write_direct(self, descriptor: int, data: memoryview, offset: int) -> None:
        if self.number:
            raise OSError(self.number, os.strerror(self.number))
        self.write_at(descriptor, data, offset)
        self.sync_data(descriptor)


@pytest.mark.parametrize("number", [errno.EINVAL, errno.EOPNOTSUPP], ids=errno.errorcode.get)
def test_refused_direct_write(store_path: Path, number: int) -> None:
    faults = RefusesDirectWrites(number)
    with SavingsTracker(store_path, filesystem=faults, save_interval=3600) as tracker:
        assert tracker.record_request(**SAVED).durable
        faults.calls.clear()
        assert tracker.record_request(**SAVED).durable
        assert commit_calls(faults) == [*BUFFERED, "watermark"]
        assert not failures(tracker)
    with SavingsTracker(store_path) as reopened:
        assert reopened.snapshot().lifetime.requests == 2


def test_failed_direct_write_is_no_refusal(store_path: Path) -> None:
    faults = RefusesDirectWrites(errno.EIO)
    with SavingsTracker(store_path, filesystem=faults) as tracker:
        receipt = tracker.record_request(**SAVED)
        assert not receipt.durable
        assert tracker.health().error == "EIO"
        faults.number = 0
        assert receipt.wait(WAIT_SECONDS)


def test_direct_where_there_is_none(store_path: Path) -> None:
    faults = RefusesDirectWrites(errno.EINVAL)
    with SavingsTracker(store_path, filesystem=faults, sync_method="direct") as tracker:
        receipt = tracker.record_request(**SAVED)
        assert not receipt.durable
        assert tracker.health().error == "EINVAL"
        assert tracker.snapshot().pending_records == 1
        faults.number = 0
        assert receipt.wait(WAIT_SECONDS)
        eventually(lambda: tracker.health().healthy, "the tracker to take note")
    with SavingsTracker(store_path) as reopened:
        assert reopened.snapshot().lifetime.requests == 1


def test_fdatasync_where_direct_works(store_path: Path) -> None:
    faults = FaultyFileSystem()
    with SavingsTracker(store_path, filesystem=faults, sync_method="fdatasync", save_interval=3600) as tracker:
        assert tracker.record_request(**SAVED).durable
        faults.calls.clear()
        assert tracker.record_request(**SAVED).durable
        assert commit_calls(faults) == [*BUFFERED, "watermark"]


def test_unknown_sync_method(store_path: Path) -> None:
    with pytest.raises(ValueError, match="sync_method must be auto, direct or fdatasync, got 'fsync'"):
        SavingsTracker(store_path, sync_method="fsync")  # type: ignore[arg-type]
    assert not list(store_path.parent.iterdir())


# Failures.


@pytest.mark.parametrize("number", ERRNOS, ids=errno.errorcode.get)
@pytest.mark.parametrize("step", BUFFERED)
def test_commit_that_fails_once(
    committing: SavingsTracker, faults: WatchedSegments, store_path: Path, steps: list[str], step: str, number: int
) -> None:
    if step not in steps:
        step = "fsync_journal"
    symbol = errno.errorcode[number]
    faults.fail(step, number, times=1)
    receipt = committing.record_request(**SAVED)
    assert not receipt.durable
    assert (receipt.sequence, receipt.writer) == (None, None)
    assert committing.health().error == symbol
    assert step in (committing.health().reason or "")
    assert receipt.wait(WAIT_SECONDS)
    assert receipt.sequence == 2
    eventually(lambda: committing.health().healthy, "the tracker to take note")
    seen = failures(committing)
    assert seen.pop(f'savings_commit_failures_total{{error="{symbol}",step="{step}"}}') == 1
    assert seen == ({'savings_fsync_failures_total{target="journal"}': 1} if step == "fsync_journal" else {})
    faults.calls.clear()
    assert committing.record_request(**SAVED).sequence == 3
    assert commit_calls(faults) == [*steps, "watermark"]
    committing.close()
    assert not segments(store_path)
    with SavingsTracker(store_path) as reopened:
        assert reopened.snapshot().lifetime.requests == 3


def assert_poisoned(faults: WatchedSegments, store_path: Path, before: bytes) -> None:
    """After its failure the first segment was neither written nor synced, and the second one holds what came later."""
    first, second = segments(store_path)
    assert first.read_bytes() == before
    assert first.name not in faults.touched
    assert second.name in faults.touched


@pytest.mark.parametrize("number", [errno.EIO, errno.ENOSPC, errno.EROFS], ids=errno.errorcode.get)
def test_write_that_did_not_arrive(
    committing: SavingsTracker, faults: WatchedSegments, store_path: Path, steps: list[str], number: int
) -> None:
    before = segments(store_path)[0].read_bytes()
    faults.fail(steps[0], number)
    receipt = committing.record_request(**SAVED)
    assert not receipt.durable
    assert requests_in(store_path) == 1
    faults.touched.clear()
    faults.mend()
    assert receipt.wait(WAIT_SECONDS)
    assert committing.record_request(**SAVED).sequence == 3
    assert_poisoned(faults, store_path, before)
    assert [frame.first for frame in frames(segments(store_path)[1])] == [2, 3]
    assert requests_in(store_path) == 3
    assert committing.snapshot().lifetime.requests == 3


@pytest.mark.parametrize("number", [errno.EIO, errno.ENOSPC, errno.EROFS], ids=errno.errorcode.get)
def test_write_that_arrived_and_failed(
    committing: SavingsTracker, faults: WatchedSegments, store_path: Path, number: int
) -> None:
    faults.late = OSError(number, os.strerror(number))
    # Attempts at new segments fail as well, so that the first one's copy stays the only one.
    faults.fail("fsync_dir", number)
    receipt = committing.record_request(**SAVED)
    assert not receipt.durable
    assert committing.snapshot().lifetime.requests == 1
    before = segments(store_path)[0].read_bytes()
    assert requests_in(store_path) == 2, "what a dead process wrote counts, though it was not acknowledged"
    faults.touched.clear()
    faults.late = None
    faults.mend()
    assert receipt.wait(WAIT_SECONDS)
    assert committing.record_request(**SAVED).sequence == 3
    assert_poisoned(faults, store_path, before)
    (_, copy), (again, _) = (frames(segment) for segment in segments(store_path))
    assert (copy.first, bytes(copy.payload)) == (again.first, bytes(again.payload))
    assert requests_in(store_path) == 3
    assert committing.snapshot().lifetime.requests == 3


class Interrupts(WatchedSegments):
    """Raises KeyboardInterrupt in the main thread: before a frame is written, or after it was."""

    def __init__(self, when: str, *, has_direct_io: bool) -> None:
        super().__init__(has_direct_io=has_direct_io)
        self.when = when
        self.is_armed = False

    def write_direct(self, descriptor: int, data: memoryview, offset: int) -> None:
        self._interrupt("before")
        super().write_direct(descriptor, data, offset)
        self._interrupt("after")

    def write_at(self, descriptor: int, data: bytes | memoryview, offset: int) -> None:
        self._interrupt("before")
        super().write_at(descriptor, data, offset)

    def sync_data(self, descriptor: int) -> None:
        super().sync_data(descriptor)
        self._interrupt("after")

    def _interrupt(self, when: str) -> None:
        if self.is_armed and when == self.when and threading.current_thread() is threading.main_thread():
            self.is_armed = False
            raise KeyboardInterrupt


@pytest.mark.parametrize("has_direct_io", [pytest.param(True, marks=pytest.mark.needs("direct-io")), False])
@pytest.mark.parametrize("when", ["before", "after"])
def test_interrupted_write(store_path: Path, when: str, has_direct_io: bool) -> None:
    faults = Interrupts(when, has_direct_io=has_direct_io)
    with SavingsTracker(store_path, filesystem=faults, save_interval=3600) as tracker:
        assert tracker.record_request(**SAVED).durable
        faults.is_armed = True
        with pytest.raises(KeyboardInterrupt):
            tracker.record_request(**SAVED)
        assert tracker.flush(WAIT_SECONDS)
        faults.touched.clear()
        assert tracker.record_request(**SAVED).sequence == 3
        first, second = segments(store_path)
        assert [frame.first for frame in frames(first)] == ([1] if when == "before" else [1, 2])
        assert [frame.first for frame in frames(second)] == [2, 3]
        assert set(faults.touched) == {second.name}
        assert requests_in(store_path) == 3
    with SavingsTracker(store_path) as reopened:
        assert reopened.snapshot().lifetime.requests == 3


@pytest.mark.parametrize("step", ["fsync_journal", "watermark"])
def test_commits_that_fail_for_long(
    committing: SavingsTracker, faults: WatchedSegments, store_path: Path, step: str
) -> None:
    faults.fail(step, errno.EIO)
    receipts = [committing.record_request(**SAVED) for _ in range(20)]
    assert not any(receipts)
    assert committing.flush(timeout=0.01) is False
    seen = samples(SavingsCollector(committing))
    assert (seen["savings_records_pending"], seen["savings_tokens_pending"]) == (20, 20 * 4096)
    assert seen["savings_store_healthy"] == 0
    assert sum(value for name, value in seen.items() if name.startswith("savings_requests_total")) == 1
    faults.mend()
    assert committing.flush(WAIT_SECONDS)
    assert [receipt.sequence for receipt in receipts] == list(range(2, 22))
    with SavingsTracker(store_path) as other:
        assert other.snapshot().lifetime.requests == 21


def test_close_while_commits_fail(committing: SavingsTracker, faults: WatchedSegments, store_path: Path) -> None:
    faults.fail("fsync_journal", errno.EIO)
    receipts = [committing.record_request(**SAVED) for _ in range(3)]
    assert committing.save() is False
    assert committing.close() is False
    assert not any(receipt.wait(WAIT_SECONDS) for receipt in receipts)
    faults.mend()
    with SavingsTracker(store_path) as reopened:
        # Of what was written last, the whole first batch may have arrived.
        assert reopened.snapshot().lifetime.requests in (1, 2)
        assert reopened.health().healthy


def test_failing_costs_a_call_nothing(committing: SavingsTracker, faults: WatchedSegments) -> None:
    faults.fail("fsync_journal", errno.EIO)
    assert not committing.record_request(**SAVED)
    faults.hang("fsync_journal")
    assert faults.reached.wait(WAIT_SECONDS), "the background thread retries"
    # A retry hangs now, so each of these would too if it waited for one.
    assert not any(committing.record_request(**SAVED) for _ in range(100))
    faults.mend()
    assert committing.flush(WAIT_SECONDS)
    assert committing.snapshot().lifetime.requests == 102


def test_failed_saves_stop_no_other(committing: SavingsTracker, faults: WatchedSegments, store_path: Path) -> None:
    assert committing.save()
    saved = store_path.stat().st_ino
    faults.fail("write", errno.ENOSPC)
    assert committing.record_request(**SAVED).durable
    assert not committing.save()
    program = f"""
import os
from savings_exporter import SavingsTracker
assert SavingsTracker({str(store_path)!r}).record_request(model="m", tokens_saved=1).durable
os._exit(0)
"""
    subprocess.run([sys.executable, "-c", program], check=True)
    assert store_path.stat().st_ino == saved
    faults.mend()
    assert committing.save()
    assert committing.snapshot().lifetime.requests == 3


# Segments.


@pytest.mark.parametrize("step", ["append", "fsync_journal", "fsync_dir"])
def test_segment_that_cannot_be_made(store_path: Path, faults: WatchedSegments, step: str) -> None:
    with SavingsTracker(store_path, filesystem=faults, save_interval=3600) as tracker:
        faults.fail(step, errno.EIO, times=1)
        receipt = tracker.record_request(**SAVED)
        assert not receipt.durable
        assert receipt.wait(WAIT_SECONDS)
        assert receipt.sequence == 1
        assert failures(tracker)[f'savings_commit_failures_total{{error="EIO",step="{step}"}}'] == 1
        assert len(segments(store_path)) == 1, "what came to nothing is removed"
        assert tracker.record_request(**SAVED).sequence == 2
    with SavingsTracker(store_path) as reopened:
        assert reopened.snapshot().lifetime.requests == 2


class FullDisk(FaultyFileSystem):
    """Has room for ``room`` bytes of zeros in a file, and no room for a segment that is created ahead of need."""

    room = BLOCK_BYTES

    def create(self, path: str, like: str) -> int:
        if ".journal." in path and threading.current_thread().name == "savings-save":
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return super().create(path, like)

    def write_zeros(self, descriptor: int, size: int) -> None:
        if size > self.room:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        super().write_zeros(descriptor, size)


def test_full_disk_gets_a_small_segment(store_path: Path) -> None:
    faults = FullDisk()
    with SavingsTracker(store_path, filesystem=faults, save_interval=3600) as tracker:
        assert tracker.record_request(**SAVED).durable
        assert [segment.stat().st_size for segment in segments(store_path)] == [BLOCK_BYTES]
        assert not failures(tracker)
        many = [SavingsRecord(**SAVED)] * 100
        assert tracker.record_many(many).durable
        small, larger = segments(store_path)
        assert larger.stat().st_size < 64 * 1024
        faults.room = -1
        receipt = tracker.record_many(many)
        assert not receipt.durable
        assert tracker.health().error == "ENOSPC"
        assert segments(store_path) == [small, larger]
        faults.room = BLOCK_BYTES
        assert receipt.wait(WAIT_SECONDS)
        assert receipt.sequence == 201


@pytest.mark.slow
def test_batch_larger_than_a_segment(store_path: Path, faults: WatchedSegments) -> None:
    records = [SavingsRecord(model="m" * 100, project="p" * 100, provider="x", tokens_saved=1)] * 30_000
    with SavingsTracker(store_path, filesystem=faults, save_interval=3600) as tracker:
        assert tracker.record_request(**SAVED).sequence == 1
        assert tracker.record_many(records).sequence == 30_001
        _first, segment, *_zeros = segments(store_path)
        size = segment.stat().st_size
        (frame,) = frames(segment)
        assert size > 4 * 1024 * 1024
        assert size - frame.end < BLOCK_BYTES
        assert tracker.record_request(**SAVED).sequence == 30_002
        assert requests_in(store_path) == 30_002
    with SavingsTracker(store_path) as reopened:
        assert reopened.snapshot().lifetime.requests == 30_002


class MakersOfSegments(FaultyFileSystem):
    """Logs which thread created each segment and made it durable with its name."""

    def __init__(self) -> None:
        super().__init__()
        self.makers: list[str] = []

    def probe(self, path: str) -> None:
        super().probe(path)
        if ".journal." in path:
            self.makers.append(threading.current_thread().name)


@pytest.mark.slow
def test_next_segment_is_made_ahead(store_path: Path) -> None:
    faults = MakersOfSegments()
    records = [SavingsRecord(**SAVED)] * 20

    def is_made_ahead() -> bool:
        """Whether half of the newest segment is left, and it is complete."""
        found = segments(store_path)
        data = found[-1].read_bytes()
        return len(data.rstrip(b"\0")) * 2 <= len(data) and len(faults.makers) == len(found)

    with SavingsTracker(store_path, filesystem=faults, save_interval=3600) as tracker:
        for _ in range(250):
            assert tracker.record_many(records).durable
            eventually(is_made_ahead, "the next segment")
        sizes = [segment.stat().st_size for segment in segments(store_path)]
        assert sizes == [64 * 1024, 512 * 1024, 4 * 1024 * 1024]
        assert faults.makers == ["MainThread", "savings-save", "savings-save"]
    with SavingsTracker(store_path) as reopened:
        assert reopened.snapshot().lifetime.requests == 250 * 20


def test_segments_made_ahead_that_fail(store_path: Path, faults: WatchedSegments) -> None:
    records = [SavingsRecord(**SAVED)] * 200
    with SavingsTracker(store_path, filesystem=faults, save_interval=3600) as tracker:
        assert tracker.record_request(**SAVED).durable
        faults.fail("fsync_file", errno.EIO)
        faults.fail("write", errno.EIO)
        for number in range(1, 11):
            assert tracker.record_many(records).wait(WAIT_SECONDS), number
        faults.mend()
    with SavingsTracker(store_path) as reopened:
        assert reopened.snapshot().lifetime.requests == 2001


def test_full_segments_are_removed(store_path: Path, faults: WatchedSegments) -> None:
    records = [SavingsRecord(**SAVED)] * 200
    with SavingsTracker(store_path, filesystem=faults, save_interval=3600) as tracker:
        for number in range(1, 41):
            assert tracker.record_many(records).sequence == number * 200
        before = segments(store_path)
        # The first save's previous document is itself; a later one needs what the one before it does not hold.
        assert tracker.save()
        assert tracker.record_many(records).durable
        assert tracker.save()
        assert tracker.record_many(records).durable
        assert tracker.save()
        assert len(before) >= 3
        assert before[0] not in segments(store_path)
        assert 1 <= len(segments(store_path)) <= 2
        assert requests_in(store_path) == 42 * 200
    assert not segments(store_path)
    with SavingsTracker(store_path) as reopened:
        assert reopened.snapshot().lifetime.requests == 42 * 200


# Idempotency keys.


def named(receipt: Receipt) -> tuple[int | None, str | None]:
    """The permanent identity of a record."""
    assert receipt.durable
    return receipt.sequence, receipt.writer


def test_repeated_key(committing: SavingsTracker) -> None:
    first = committing.record_request(**SAVED, idempotency_key="a")
    assert committing.record_request(**SAVED).sequence == 3
    again = committing.record_request(**SAVED, idempotency_key="a")
    assert named(again) == named(first) == (2, first.writer)
    assert (first.duplicate, again.duplicate) == (False, True)
    assert committing.record_request(**SAVED, idempotency_key="b").sequence == 4
    many = [SavingsRecord(**SAVED)] * 4
    assert committing.record_many(many, idempotency_key="c").sequence == 8
    assert committing.record_many(many, idempotency_key="c").sequence == 8
    assert committing.snapshot().lifetime.requests == 8


def test_key_with_other_content(committing: SavingsTracker) -> None:
    assert committing.record_request(**SAVED, idempotency_key="a").durable
    for other in ({**SAVED, "tokens_saved": 1}, {**SAVED, "model": "m"}):
        with pytest.raises(KeyConflictError, match="idempotency_key was used before with other content"):
            committing.record_request(**other, idempotency_key="a")
    assert committing.snapshot().lifetime.requests == 2
    assert committing.snapshot().pending_records == 0


def test_key_after_kill_and_restart(store_path: Path) -> None:
    program = f"""
import os
from savings_exporter import SavingsTracker
tracker = SavingsTracker({str(store_path)!r}, save_interval=3600)
for number in range(6):
    receipt = tracker.record_request(model="m", tokens_saved=1, idempotency_key=str(number))
    print(receipt.sequence, receipt.writer, flush=True)
    if number == 2:
        assert tracker.save()
os._exit(0)
"""
    ran = subprocess.run([sys.executable, "-c", program], check=True, capture_output=True, text=True)
    first = [(int(sequence), writer) for sequence, writer in map(str.split, ran.stdout.splitlines())]
    assert [sequence for sequence, _ in first] == [1, 2, 3, 4, 5, 6]
    saved: dict[str, Any] = {"model": "m", "tokens_saved": 1}
    with SavingsTracker(store_path) as one, SavingsTracker(store_path) as two:
        new = named(one.record_request(**saved, idempotency_key="new"))
        for tracker in (two, one):
            for number in range(6):
                receipt = tracker.record_request(**saved, idempotency_key=str(number))
                assert named(receipt) == first[number]
                assert receipt.duplicate
            assert named(tracker.record_request(**saved, idempotency_key="new")) == new
    with SavingsTracker(store_path) as reopened:
        assert named(reopened.record_request(**saved, idempotency_key="0")) == first[0]
        assert reopened.snapshot().lifetime.requests == 7


def test_key_repeated_while_commits_fail(committing: SavingsTracker, faults: WatchedSegments, store_path: Path) -> None:
    faults.fail("fsync_journal", errno.EIO)
    receipts = [committing.record_request(**SAVED, idempotency_key="a") for _ in range(3)]
    assert not any(receipts)
    assert committing.snapshot().pending_records == 1
    with pytest.raises(KeyConflictError):
        committing.record_request(model="m", tokens_saved=1, idempotency_key="a")
    faults.mend()
    assert all(receipt.wait(WAIT_SECONDS) for receipt in receipts)
    assert {named(receipt) for receipt in receipts} == {(2, receipts[0].writer)}
    with SavingsTracker(store_path) as other:
        assert named(other.record_request(**SAVED, idempotency_key="a")) == named(receipts[0])
        assert other.snapshot().lifetime.requests == 2


@pytest.mark.parametrize("key", ["", "k" * 256, 5, b"k", "\ud800"])
def test_refused_key(tracker: SavingsTracker, key: Any) -> None:
    with pytest.raises((ValueError, TypeError), match="idempotency_key must"):
        tracker.record_request(**SAVED, idempotency_key=key)
    assert tracker.snapshot().pending_records == 0


# Spans.


@pytest.fixture
def tracing(store_path: Path, faults: WatchedSegments) -> Iterator[Traced]:
    """A tracker with its spans kept in memory, whose next record is one write."""
    traced = Traced(store_path, faults)
    with traced.tracker:
        assert traced.tracker.record_request(**SAVED).durable
        traced.clear()
        yield traced


def test_span_of_a_commit(tracing: Traced, steps: list[str]) -> None:
    tracer = tracing.provider.get_tracer("test")
    with tracer.start_as_current_span("request") as request:
        assert tracing.tracker.record_request(**SAVED).durable
    ((commit, children),) = tracing.commits()
    assert commit.parent is not None
    assert commit.parent.span_id == request.get_span_context().span_id
    assert [link.context.span_id for link in commit.links] == [request.get_span_context().span_id]
    assert commit.attributes is not None
    assert (commit.attributes["savings.records"], commit.attributes["savings.sequence"]) == (1, 2)
    # A fast one carries what its steps took as attributes, a slow one has a span for each.
    told = [child.name.removeprefix("savings.commit.") for child in children] or [
        name.split(".")[1] for name in commit.attributes if name.endswith(".seconds")
    ]
    assert told == steps


def test_links_of_a_commit(tracing: Traced, faults: WatchedSegments) -> None:
    tracer = tracing.provider.get_tracer("test")
    faults.hang("fsync_journal")
    leader = threading.Thread(target=lambda: tracing.tracker.record_request(**SAVED))
    leader.start()
    assert faults.reached.wait(WAIT_SECONDS)
    for number in range(200):
        with tracer.start_as_current_span(f"request {number}"):
            tracing.tracker.record_request(**SAVED, wait=False)
    faults.mend()
    leader.join()
    assert tracing.tracker.flush(WAIT_SECONDS)
    _, (commit, _children) = tracing.commits()
    assert commit.attributes is not None
    assert commit.attributes["savings.records"] == 200
    assert len(commit.links) == 128


def test_spans_of_a_failed_commit(tracing: Traced, faults: WatchedSegments, steps: list[str]) -> None:
    faults.fail("fsync_journal", errno.EIO, times=1)
    assert tracing.tracker.record_request(**SAVED).wait(WAIT_SECONDS)
    (commit, children), *_ = tracing.commits()
    assert [child.name for child in children] == [f"savings.commit.{step}" for step in steps]
    for span in (commit, children[-1]):
        assert span.status.status_code is StatusCode.ERROR
        assert span.attributes is not None
        assert span.attributes["error.type"] == "EIO"
        assert [event.name for event in span.events] == ["exception"]
    assert all(child.status.status_code is StatusCode.UNSET for child in children[:-1])


def test_without_tracing(committing: SavingsTracker) -> None:
    assert not trace.get_current_span().is_recording()
    assert committing.record_request(**SAVED).durable


# Writers that are killed.


KILLED = """
import os, signal, sys
from savings_exporter import SavingsRecord, SavingsTracker
from tests.support.faults import FaultyFileSystem

path, moment_to_die, method, count = sys.argv[1], sys.argv[2], sys.argv[3], int(sys.argv[4])
when = ""

def die(moment):
    if moment == when:
        os.kill(os.getpid(), signal.SIGKILL)

class Killed(FaultyFileSystem):
    def write_at(self, descriptor, data, offset):
        is_frame = ".journal." in os.readlink(f"/proc/self/fd/{descriptor}")
        is_watermark = len(data) == 16
        if is_frame:
            die("before write")
            self.tear(descriptor, data, offset)
        if is_watermark:
            die("before watermark")
        super().write_at(descriptor, data, offset)
        if is_frame or is_watermark:
            die("after write" if is_frame else "after watermark")
    def write_direct(self, descriptor, data, offset):
        die("before write")
        self.tear(descriptor, data, offset)
        super().write_direct(descriptor, data, offset)
        die("after write")
    def sync_data(self, descriptor):
        super().sync_data(descriptor)
        die("after sync")
    def tear(self, descriptor, data, offset):
        if when == "within write":
            with open(os.readlink(f"/proc/self/fd/{descriptor}"), "r+b") as file:
                file.seek(offset)
                file.write(bytes(data).rstrip(bytes(1))[:-60])
            die("within write")

filesystem = Killed(has_direct_io=method == "direct")
tracker = SavingsTracker(path, filesystem=filesystem, save_interval=3600)
assert tracker.record_request(model="m", tokens_saved=1).durable
assert tracker.record_request(model="m", tokens_saved=10).durable
if count > 1:
    # The next segment is there, as after some time.
    assert tracker.record_many([SavingsRecord(model="m", tokens_saved=0)] * 1000).durable
when = moment_to_die
tracker.record_many([SavingsRecord(model="m", tokens_saved=100)] * count)
os._exit(3)
"""


def kill(store_path: Path, when: str, method: str, count: int) -> None:
    """Let a process record 1 and 10 tokens, and be killed while it commits so many records of 100."""
    arguments = [sys.executable, "-c", KILLED, str(store_path), when, method, str(count)]
    assert subprocess.run(arguments, check=False).returncode == -9


MOMENTS = [
    *((when, "direct") for when in ("before write", "within write", "after write")),
    *((when, "buffered") for when in ("before write", "within write", "after write", "after sync")),
    *((when, method) for when in ("before watermark", "after watermark") for method in ("direct", "buffered")),
]


@pytest.mark.slow
@pytest.mark.needs("linux", "direct-io")
@pytest.mark.parametrize("alive", ["alone", "beside a living process"])
@pytest.mark.parametrize(("when", "method"), MOMENTS)
def test_killed_within_a_commit(store_path: Path, when: str, method: str, alive: str) -> None:
    living = SavingsTracker(store_path) if alive != "alone" else None
    kill(store_path, when, method, 1)
    expected = 11 if when in ("before write", "within write") else 111
    tracker = living or SavingsTracker(store_path)
    with tracker:
        assert tracker.record_request(model="m", tokens_saved=1000).durable
        assert tracker.save()
        assert tracker.snapshot().lifetime.tokens_saved == expected + 1000
        torn = samples(SavingsCollector(tracker))['savings_recoveries_total{kind="torn_tail"}']
        assert torn == (1 if when == "within write" else 0)
    with SavingsTracker(store_path) as reopened:
        assert reopened.snapshot().lifetime.tokens_saved == expected + 1000


@pytest.mark.needs("linux", "direct-io")
@pytest.mark.parametrize("method", ["direct", "buffered"])
def test_killed_with_many_records(store_path: Path, method: str) -> None:
    with SavingsTracker(store_path) as living:
        assert living.record_request(model="m", tokens_saved=1).durable
        kill(store_path, "before watermark", method, 12_000)
        assert living.save()
        expected = 1 + 11 + 1_200_000
        assert living.snapshot().lifetime.tokens_saved == expected
        with copied(store_path) as copy, SavingsTracker(copy) as recovered:
            assert recovered.snapshot().lifetime.tokens_saved == expected
    with SavingsTracker(store_path) as reopened:
        assert reopened.snapshot().lifetime.tokens_saved == expected


# Locks.


class SlowProcessor(SpanProcessor):
    """A slow observer, as one that exports each span immediately. It logs whether the store lock was held."""

    def __init__(self, lock: Path) -> None:
        self._lock = lock
        self.held: dict[str, list[bool]] = {}

    def on_end(self, span: ReadableSpan) -> None:
        with self._lock.open("rb") as lock:
            is_free = LOCAL.try_lock(lock.fileno(), shared=True)
        self.held.setdefault(span.name, []).append(not is_free)


@pytest.mark.needs("linux")
def test_observers_hold_no_lock(store_path: Path) -> None:
    processor = SlowProcessor(store_path.with_name("proxy_savings.json.lock"))
    provider = TracerProvider()
    provider.add_span_processor(processor)
    with SavingsTracker(store_path, tracer_provider=provider, save_interval=3600) as tracker:
        for _ in range(3):
            assert tracker.record_request(**SAVED).durable
            # The observer was called before the call returned.
            assert processor.held["savings.commit"]
        assert tracker.save()
        assert {"savings.commit", "savings.save", "savings.save.fsync_dir"} <= processor.held.keys()
        assert not any(any(held) for held in processor.held.values())


@pytest.mark.slow
@pytest.mark.needs("linux")
def test_held_lock_delays_saves_only(committing: SavingsTracker, store_path: Path) -> None:
    program = f"""
import fcntl, sys
with open({str(store_path.with_name("proxy_savings.json.lock"))!r}, "r+") as lock:
    fcntl.flock(lock, fcntl.LOCK_EX)
    print(flush=True)
    sys.stdin.read()
"""
    with subprocess.Popen(
        [sys.executable, "-c", program], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as holder:
        assert holder.stdout is not None
        holder.stdout.readline()
        assert committing.record_request(**SAVED).durable
        assert not committing.save()
        assert committing.health().error == "EAGAIN"
        assert failures(committing)['savings_save_failures_total{error="EAGAIN",step="prepare"}'] >= 1
        assert committing.record_request(**SAVED).durable
        holder.communicate("")
    eventually(lambda: committing.health().healthy, "the document to be saved")
    assert committing.snapshot().lifetime.requests == 3


class NetworkFileSystem(FaultyFileSystem):
    """Other hosts may use it, too."""

    def is_network(self, directory: str) -> bool:
        return os.path.isdir(directory)


def test_network_takes_one_process(store_path: Path) -> None:
    with SavingsTracker(store_path, filesystem=NetworkFileSystem()) as tracker:
        assert tracker.record_request(**SAVED).durable
        assert tracker.save()
        with pytest.raises(StoreError, match="another process has it open, and only one process may open it here"):
            SavingsTracker(store_path, filesystem=NetworkFileSystem())
        assert tracker.record_request(**SAVED).durable
    with SavingsTracker(store_path, filesystem=NetworkFileSystem()) as tracker:
        assert tracker.snapshot().lifetime.requests == 2


def test_segments_are_tried_with_a_back_off(tracker: SavingsTracker, faults: FaultyFileSystem) -> None:
    """While the directory fails, each commit would otherwise try to create the next segment."""
    tracker.record_request(model="m", tokens_saved=1)
    faults.fail("fsync_dir", errno.EIO)
    durable = [tracker.record_request(model="m", tokens_saved=1).durable for _ in range(400)]
    assert sum(durable) > 100
    failed = tracker.counters.counts().counts["fsync_failures/directory"]
    assert 1 <= failed < 40
    faults.mend()
    assert tracker.flush(WAIT_SECONDS)
