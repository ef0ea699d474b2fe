"""Operation counters: what is counted, by threads at once and below a signal handler, and when they are published."""

from __future__ import annotations

import errno
import signal
import sys
import threading
from typing import Any

import pytest

from savings_exporter.model.operations import OperationCounts
from savings_exporter.storage.operation import COMMIT, FSYNC_DIR, ROTATE, SAVE, Operation
from savings_exporter.telemetry.counters import DIR_FSYNC_SUCCESS, DIR_FSYNC_SUPPORTED, OperationCounters
from tests.unit.telemetry.operations import run


def observed(counts: OperationCounts, histogram: str) -> float:
    """How often a histogram was observed."""
    return sum(
        value
        for name, value in counts.counts.items()
        if name.rpartition("/")[0] == histogram and not name.endswith("/sum")
    )


def timed(counters: OperationCounters, seconds: float, name: str = COMMIT, records: int = 1) -> None:
    """Count an operation that took so long."""
    operation = Operation(name, counters)
    operation.duration, operation.records = seconds, records
    counters.ended(operation)


def test_nothing_counted_is_empty() -> None:
    assert OperationCounters().counts() == OperationCounts()


@pytest.mark.parametrize(
    ("seconds", "bound"), [(0.0, "5e-05"), (0.00005, "5e-05"), (0.00006, "0.0001"), (10.0, "10.0"), (11.0, "+Inf")]
)
def test_bucket_of_a_duration(seconds: float, bound: str) -> None:
    counters = OperationCounters()
    timed(counters, seconds)
    found = {name: value for name, value in counters.counts().counts.items() if name.startswith("commit_seconds/")}
    assert found == {f"commit_seconds/{bound}": 1, "commit_seconds/sum": seconds}


def test_records_of_commits() -> None:
    counters = OperationCounters()
    for records in (1, 3, 3, 20_000):
        timed(counters, 0.1, records=records)
    counts = counters.counts().counts
    assert [counts[f"commit_records/{bound}"] for bound in ("1.0", "4.0", "+Inf")] == [1, 2, 1]
    assert counts["commit_records/sum"] == 20_007


def test_a_failed_commit() -> None:
    counters = OperationCounters()
    run(counters, failing="fsync_journal")
    counts = counters.counts()
    assert counts.counts["commit_failures/fsync_journal/EIO"] == 1
    assert counts.counts["fsync_failures/journal"] == 1
    assert observed(counts, "commit_seconds") == 1
    assert observed(counts, "commit_records") == 0


def test_a_failure_before_any_step() -> None:
    counters = OperationCounters()
    run(counters, failing="prepare", number=errno.EAGAIN)
    assert counters.counts().counts["commit_failures/prepare/EAGAIN"] == 1


def test_an_error_without_errno() -> None:
    counters = OperationCounters()
    with pytest.raises(MemoryError), Operation(COMMIT, counters):
        raise MemoryError
    assert counters.counts().counts["commit_failures/prepare/MemoryError"] == 1


@pytest.mark.parametrize("step", ["write", "fsync_file", "replace", "fsync_dir"])
def test_a_failed_save(step: str) -> None:
    counters = OperationCounters()
    run(counters, SAVE, failing=step)
    counts = counters.counts()
    assert counts.counts[f"save_failures/{step}/EIO"] == 1
    assert observed(counts, "save_seconds") == 1
    assert observed(counts, f"save_step_seconds/{step}") == 1
    assert [name for name in counts.counts if name.startswith("fsync_failures/")] == {
        "fsync_file": ["fsync_failures/file"],
        "fsync_dir": ["fsync_failures/directory"],
    }.get(step, [])


def test_a_failed_rotation() -> None:
    counters = OperationCounters()
    run(counters, ROTATE, steps=["fsync_file", "fsync_dir"], failing="fsync_dir")
    assert counters.counts().counts == {"fsync_failures/directory": 1}


def test_recoveries() -> None:
    counters = OperationCounters()
    for kind in ("torn_tail", "corrupt_document", "torn_tail"):
        counters.recovered(kind)
    assert counters.counts().counts == {"recoveries/torn_tail": 2, "recoveries/corrupt_document": 1}


def test_sums_of_writers() -> None:
    writers = [OperationCounters() for _ in range(3)]
    for writer in writers:
        run(writer, failing="append")
        run(writer)
    total = OperationCounts()
    for writer in writers:
        total = total.plus(writer.counts())
    assert observed(total, "commit_seconds") == 6
    assert total.counts["commit_failures/append/EIO"] == 3


@pytest.mark.parametrize(("outcome", "supported"), [("ok", 1), ("unsupported", 0)])
def test_directory_fsync_support(outcome: Any, supported: float) -> None:
    counters = OperationCounters()
    operation = Operation(SAVE, counters)
    with operation, operation.step(FSYNC_DIR, "directory") as step:
        step.outcome = outcome
    latest = {name: value for name, (_when, value) in counters.counts().latest.items()}
    assert latest == {DIR_FSYNC_SUCCESS: 1, DIR_FSYNC_SUPPORTED: supported}


def test_last_directory_fsync() -> None:
    counters = OperationCounters()
    for failing, expected in ((None, 1), (FSYNC_DIR, 0), (None, 1)):
        run(counters, SAVE, failing=failing)
        assert counters.counts().latest[DIR_FSYNC_SUCCESS][1] == expected


def test_a_drill_counts_for_good() -> None:
    counters = OperationCounters()
    run(counters, SAVE)
    counters.drilling("dir-fsync", active=True)
    run(counters, SAVE, steps=[FSYNC_DIR], failing=FSYNC_DIR, drill=True)
    assert counters.active_drills == {"dir-fsync"}
    assert counters.simulates_dir_fsync_failure
    counters.drilling("dir-fsync", active=False)
    assert not counters.active_drills
    assert not counters.simulates_dir_fsync_failure
    assert counters.counts().counts["fsync_failures/directory"] == 1
    assert counters.counts().latest[DIR_FSYNC_SUCCESS][1] == 1


def test_a_real_failure_in_a_drill() -> None:
    counters = OperationCounters()
    counters.drilling("save-latency", active=True)
    run(counters, SAVE, failing=FSYNC_DIR)
    counters.drilling("save-latency", active=False)
    assert counters.counts().latest[DIR_FSYNC_SUCCESS][1] == 0


def test_a_drill_that_ends_late() -> None:
    counters = OperationCounters()
    counters.drilling("dir-fsync", active=True)
    counters.drilling("dir-fsync", active=False)
    run(counters, SAVE, steps=[FSYNC_DIR], failing=FSYNC_DIR, drill=True)
    assert not counters.simulates_dir_fsync_failure


def test_failures_are_announced() -> None:
    seen: list[float] = []
    counters = OperationCounters(lambda: seen.append(counters.counts().counts["commit_failures/append/EIO"]))
    run(counters)
    assert seen == []
    run(counters, failing="append")
    run(counters, failing="append")
    assert seen == [1, 2]


def test_a_failed_step_is_announced() -> None:
    failures: list[None] = []
    counters = OperationCounters(lambda: failures.append(None))
    operation = Operation(SAVE, counters)
    with operation, pytest.raises(OSError, match="full"), operation.step(FSYNC_DIR, "directory"):
        raise OSError(errno.ENOSPC, "full")
    assert len(failures) == 1


def test_threads_at_once() -> None:
    counters, threads_there, rounds = OperationCounters(), 8, 2000

    def record() -> None:
        for _ in range(rounds):
            run(counters, failing="append")

    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    try:
        threads = [threading.Thread(target=record) for _ in range(threads_there)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    finally:
        sys.setswitchinterval(interval)
    counts = counters.counts()
    assert counts.counts["commit_failures/append/EIO"] == threads_there * rounds
    assert observed(counts, "commit_seconds") == threads_there * rounds


@pytest.mark.skipif(not hasattr(signal, "setitimer"), reason="the platform has no timers that signal")
def test_below_a_signal_handler() -> None:
    counters, handled = OperationCounters(), 0

    def handler(*_arguments: object) -> None:
        nonlocal handled
        handled += 1
        run(counters, failing="append")
        counters.counts()

    before = signal.signal(signal.SIGALRM, handler)
    signal.setitimer(signal.ITIMER_REAL, 0.0002, 0.0002)
    try:
        rounds = 0
        while handled < 500:
            run(counters, failing="append")
            counters.counts()
            rounds += 1
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)
    counts = counters.counts()
    assert counts.counts["commit_failures/append/EIO"] == rounds + handled
    assert observed(counts, "commit_seconds") == rounds + handled
