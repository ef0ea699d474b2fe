"""Interrupts and signal handlers at any moment: nothing hangs, nothing is lost, nothing is counted twice."""

from __future__ import annotations

import errno
import os
import signal
import subprocess
import sys
import threading
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from savings_exporter import Receipt, SavingsTracker
from tests.support.faults import FaultyFileSystem
from tests.support.interrupts import HANDLERS
from tests.support.paths import ROOT
from tests.support.wait import WAIT_SECONDS, eventually

ONE: dict[str, Any] = {"model": "m", "tokens_saved": 1}
IS_LONG = os.environ.get("CRASH_LAB") == "long"

STEPS = ("append", "fsync_journal", "watermark", "write", "fsync_file", "replace", "fsync_dir")


def reopened(path: Path) -> int:
    with SavingsTracker(path) as tracker:
        snapshot = tracker.snapshot()
        assert snapshot.lifetime.requests == snapshot.sequence == sum(t.requests for t in snapshot.by_model.values())
        return snapshot.sequence


def run(*arguments: str | Path, seconds: float) -> None:
    done = subprocess.run(
        [sys.executable, *map(str, arguments)],
        capture_output=True,
        text=True,
        timeout=seconds,
        check=False,
        cwd=ROOT,
    )
    assert done.returncode == 0, done.stderr


@pytest.mark.slow
@pytest.mark.needs("linux")
@pytest.mark.parametrize("handler", HANDLERS)
def test_a_handler_before_any_line(handler: str) -> None:
    """Of some lines; the long form of the crash lab takes each. ``interrupt`` raises ``KeyboardInterrupt``."""
    stride = 1 if IS_LONG else 41 if handler == "interrupt" else 211
    run("-m", "tests.support.interrupts", handler, str(stride), seconds=3600 if IS_LONG else 300)


@pytest.mark.parametrize("has_direct_io", [True, False])
@pytest.mark.parametrize("step", STEPS)
def test_an_interrupt_in_a_step(store_path: Path, step: str, has_direct_io: bool) -> None:
    """Of a commit or a save by the main thread, before the step is done."""
    faults = FaultyFileSystem(has_direct_io=has_direct_io)

    def interrupt(name: str) -> None:
        if name == step and threading.current_thread() is threading.main_thread():
            faults.before = lambda _name: None
            raise KeyboardInterrupt

    with SavingsTracker(store_path, filesystem=faults) as tracker:
        faults.before = interrupt
        recorded = 0
        for _ in range(3):
            recorded += 1
            try:
                tracker.record_request(**ONE)
                tracker.save()
            except KeyboardInterrupt:
                # What was accepted before is still committed, without another call that does it.
                assert tracker.flush(WAIT_SECONDS)
                assert tracker.snapshot().lifetime.requests == recorded
        assert tracker.snapshot().lifetime.requests == recorded
        assert tracker.record_request(**ONE).durable
        assert tracker.save()
    assert reopened(store_path) == recorded + 1


def test_an_interrupt_of_unlocking(store_path: Path) -> None:
    """The store lock is released, so other processes can save."""

    class Interrupted(FaultyFileSystem):
        interrupts = 0

        def unlock(self, descriptor: int) -> None:
            if self.interrupts and threading.current_thread() is threading.main_thread():
                self.interrupts -= 1
                raise KeyboardInterrupt
            super().unlock(descriptor)

    faults = Interrupted()
    with (
        SavingsTracker(store_path, filesystem=faults, save_interval=3600) as tracker,
        SavingsTracker(store_path, save_interval=3600) as other,
    ):
        assert tracker.record_request(**ONE)
        faults.interrupts = 1
        with pytest.raises(KeyboardInterrupt):
            tracker.save()
        assert other.record_request(**ONE)
        # Each waits for the lock for some seconds.
        assert any(other.save() for _ in range(5))
    assert reopened(store_path) == 2


def test_a_wait_without_timeout(store_path: Path) -> None:
    """It ends when the record is durable, and when it is given up."""
    faults = FaultyFileSystem()
    for is_given_up in (False, True):
        with SavingsTracker(store_path, filesystem=faults) as tracker:
            assert tracker.record_request(**ONE)
            faults.fail("fsync_journal", errno.EIO)
            receipt = tracker.record_request(**ONE)
            waiting = [threading.Thread(target=receipt.wait, daemon=True) for _ in range(3)]
            for thread in waiting:
                thread.start()
            assert not receipt.wait(0)
            if not is_given_up:
                faults.mend()
        for thread in waiting:
            thread.join(WAIT_SECONDS)
        assert not any(thread.is_alive() for thread in waiting)
        assert receipt.durable != is_given_up
        faults.mend()


@pytest.mark.parametrize("step", STEPS)
def test_a_handler_in_a_step(store_path: Path, step: str) -> None:
    """The handler records, saves and closes during a commit or save of its own thread."""
    faults, receipts = FaultyFileSystem(), list[Receipt]()

    def handle(name: str) -> None:
        if name == step and threading.current_thread() is threading.main_thread():
            faults.before = lambda _name: None
            receipts.append(tracker.record_request(**ONE))
            receipts.append(tracker.record_request(**ONE, idempotency_key="k"))
            receipts.append(tracker.record_request(**ONE, idempotency_key="k", wait=False))
            # Neither waits, even for records that the background thread is about to commit.
            waited = receipts[0].wait(), tracker.flush()
            assert not tracker.save()
            pending = tracker.snapshot().pending_records
            if step not in ("write", "fsync_file", "replace"):
                assert waited == (False, False)
                assert pending >= 2

    with SavingsTracker(store_path, filesystem=faults) as tracker:
        faults.before = handle
        for _ in range(3):
            assert tracker.record_request(**ONE)
            assert tracker.save()
        if receipts:
            assert all(receipt.wait(WAIT_SECONDS) for receipt in receipts)
            assert [receipt.duplicate for receipt in receipts] == [False, False, True]
            assert receipts[1].sequence == receipts[2].sequence
            assert tracker.snapshot().lifetime.requests == 5
        # A direct write is one step.
        assert bool(receipts) == (step in faults.calls)
        total = tracker.snapshot().lifetime.requests
    assert reopened(store_path) == total


def test_a_close_in_a_commit(store_path: Path) -> None:
    """It closes nothing, but no more records are accepted, and the next close is whole."""
    faults, closed = FaultyFileSystem(), list[bool]()

    def handle(name: str) -> None:
        if name == "fsync_journal" and not closed:
            closed.append(tracker.close())

    tracker = SavingsTracker(store_path, filesystem=faults)
    assert tracker.record_request(**ONE)
    faults.before = handle
    assert tracker.record_request(**ONE)
    assert closed == [False]
    with pytest.raises(RuntimeError, match="is closed"):
        tracker.record_request(**ONE)
    assert tracker.close()
    assert reopened(store_path) == 2


def test_an_interrupt_of_a_waiting_record(store_path: Path) -> None:
    """Of a record that waits for another thread's commit: the other records are acknowledged, and it is, too."""
    faults = FaultyFileSystem()
    with SavingsTracker(store_path, filesystem=faults) as tracker, ThreadPoolExecutor(8) as pool:
        assert tracker.record_request(**ONE)
        faults.reached.clear()
        faults.hang("fsync_journal")
        first = pool.submit(tracker.record_request, **ONE)
        assert faults.reached.wait(WAIT_SECONDS)
        others = [pool.submit(tracker.record_request, **ONE) for _ in range(5)]
        eventually(lambda: tracker.health().pending_records == 6, "the others to wait")

        def interrupt() -> None:
            eventually(lambda: tracker.health().pending_records == 7, "the main thread to wait")
            signal.pthread_kill(threading.main_thread().ident or 0, signal.SIGINT)

        interrupting = pool.submit(interrupt)
        with pytest.raises(KeyboardInterrupt):
            tracker.record_request(**ONE)
        interrupting.result()
        faults.mend()
        assert all(each.result() for each in (first, *others))
        assert tracker.flush(WAIT_SECONDS)
        assert tracker.snapshot().lifetime.requests == 8
    assert reopened(store_path) == 8


def test_an_interrupt_of_a_leader(store_path: Path) -> None:
    """Its batch is committed all the same, and the threads that wait for that are released."""
    faults = FaultyFileSystem()
    with SavingsTracker(store_path, filesystem=faults) as tracker, ThreadPoolExecutor(8) as pool:
        assert tracker.record_request(**ONE)
        others: list[Future[Receipt]] = []

        def interrupt(name: str) -> None:
            if name == "fsync_journal":
                faults.before = lambda _name: None
                others.extend(pool.submit(tracker.record_request, **ONE) for _ in range(5))
                eventually(lambda: tracker.health().pending_records == 6, "the others to wait")
                raise KeyboardInterrupt

        faults.before = interrupt
        with pytest.raises(KeyboardInterrupt):
            tracker.record_request(**ONE)
        assert all(each.result(WAIT_SECONDS) for each in others)
        assert tracker.flush(WAIT_SECONDS)
        assert tracker.snapshot().lifetime.requests == 7
    assert reopened(store_path) == 7


TIMER = """
import faulthandler, signal, sys
from savings_exporter import SavingsTracker
faulthandler.dump_traceback_later(120, exit=True)
path, is_interrupting = sys.argv[1], sys.argv[2] == "interrupt"
recorded = handled = accepted = attempted = 0
is_recording = False
with SavingsTracker(path, save_interval=0.01) as tracker:
    def handle(number, frame):
        global recorded, handled, is_recording
        handled += 1
        if handled % 5 == 0:
            tracker.save()
        elif handled % 5 == 1:
            tracker.snapshot()
        else:
            recorded += 1
            tracker.record_request(model="m", tokens_saved=1, wait=bool(handled % 2))
        if is_interrupting and is_recording:
            is_recording = False
            raise KeyboardInterrupt
    signal.signal(signal.SIGALRM, handle)
    signal.setitimer(signal.ITIMER_REAL, 0.002, 0.002)
    while handled < 300:
        attempted += 1
        try:
            is_recording = True
            tracker.record_request(model="m", tokens_saved=1, wait=bool(attempted % 2))
            is_recording = False
            accepted += 1
        except KeyboardInterrupt:
            pass
    signal.setitimer(signal.ITIMER_REAL, 0)
    assert tracker.flush(30)
    total = tracker.snapshot().lifetime.requests
    assert recorded + accepted <= total <= recorded + attempted, (recorded, accepted, total, attempted)
    assert is_interrupting or accepted == attempted
with SavingsTracker(path) as tracker:
    assert tracker.snapshot().lifetime.requests == total
"""


@pytest.mark.slow
@pytest.mark.parametrize("how", ["return", "interrupt"])
def test_handlers_by_a_timer(store_path: Path, how: str) -> None:
    """They record, save and scrape, and some of them raise."""
    run("-c", TIMER, store_path, how, seconds=5 * WAIT_SECONDS)
    assert reopened(store_path) > 300 * 3 // 5


@pytest.mark.slow
@pytest.mark.needs("linux")
def test_an_exit_in_a_handler(store_path: Path) -> None:
    """A handler that closes and exits, as services have it: what was acknowledged and what was accepted is there."""
    program = """
import os, signal, sys, threading
from savings_exporter import SavingsTracker
tracker = SavingsTracker(sys.argv[1])
def stop(number, frame):
    tracker.close()
    sys.exit(0)
signal.signal(signal.SIGTERM, stop)
accepted = 0
try:
    while True:
        tracker.record_request(model="m", tokens_saved=1, wait=False)
        accepted += 1
        if accepted == 100:
            threading.Timer(0.01, os.kill, (os.getpid(), signal.SIGTERM)).start()
except RuntimeError:
    pass
finally:
    os.write(1, str(accepted).encode())
"""
    for _ in range(10):
        before = reopened(store_path)
        ended = subprocess.run(
            [sys.executable, "-c", program, str(store_path)],
            capture_output=True,
            text=True,
            timeout=2 * WAIT_SECONDS,
            check=False,
        )
        assert ended.returncode == 0, ended.stderr
        # The record whose call was interrupted counts, or not.
        assert reopened(store_path) - before in (int(ended.stdout), int(ended.stdout) + 1)
