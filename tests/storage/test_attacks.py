"""What once broke a promise: each was a loss, a double count or a hang before it was mended."""

from __future__ import annotations

import enum
import errno
import os
import signal
import stat
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

import pytest

from savings_exporter import SavingsRecord, SavingsTracker
from savings_exporter.errors import StoreError
from savings_exporter.storage import filesystem
from savings_exporter.storage.repair import repair
from savings_exporter.storage.steps import Observers
from tests.support.faults import Faults
from tests.support.wait import WAIT_SECONDS

ONE: dict[str, Any] = {"model": "m", "tokens_saved": 1}


def reopened(path: Path) -> int:
    with SavingsTracker(path) as tracker:
        snapshot = tracker.snapshot()
        assert snapshot.lifetime.requests == snapshot.sequence
        return snapshot.sequence


def test_a_mark_is_not_known_before_what_it_says_could_be_read(
    store_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with SavingsTracker(store_path, save_interval=1000) as tracker, SavingsTracker(store_path) as other:
        for _ in range(2):
            assert tracker.record_request(**ONE)
        # So many go by the document: the journal's end stays where it is.
        assert other.record_many([SavingsRecord(**ONE)] * 10_001)

        def unreadable(path: str) -> Any:
            raise OSError(errno.EMFILE, os.strerror(errno.EMFILE), path)

        with monkeypatch.context() as patch:
            patch.setattr(filesystem, "read", unreadable)
            assert tracker.snapshot().sequence == 2
        assert tracker.snapshot().sequence == 10_003
        assert tracker.record_request(**ONE).sequence == 10_004
    assert reopened(store_path) == 10_004


def test_repair_beside_a_living_tracker_is_noticed_by_it(store_path: Path) -> None:
    with SavingsTracker(store_path, save_interval=1000) as tracker:
        for _ in range(3):
            assert tracker.record_request(**ONE)
            tracker.save()
        assert tracker.record_request(**ONE)
        store_path.with_name(store_path.name + ".previous").write_bytes(b"rot")
        assert "nothing is lost" in repair(str(store_path), Observers([]))
        assert tracker.record_request(**ONE).sequence == 5
        assert reopened(store_path) == 5


def test_a_repeat_is_not_acknowledged_from_what_is_only_in_the_page_cache(store_path: Path, faults: Faults) -> None:
    program = f"""
import os
from savings_exporter import SavingsTracker
tracker = SavingsTracker({str(store_path)!r})
for _ in range(2):
    tracker.record_request(model="m", tokens_saved=1)
def fail(descriptor):
    raise OSError(5, "Input/output error")
os.fsync = os.fdatasync = fail
assert not tracker.record_request(model="m", tokens_saved=1, idempotency_key="k")
os.kill(os.getpid(), 9)
"""
    killed = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)
    assert killed.returncode == -signal.SIGKILL, killed.stderr
    faults.fail("fsync_file", errno.EIO)
    with SavingsTracker(store_path) as tracker:
        receipt = tracker.record_request(**ONE, idempotency_key="k")
        assert not receipt.durable
        faults.mend()
        assert receipt.wait(WAIT_SECONDS)
        assert tracker.record_request(**ONE, idempotency_key="k").sequence == receipt.sequence
        assert tracker.snapshot().sequence == 3


@pytest.mark.slow
def test_who_joins_shows_nothing_of_a_document_that_is_not_durable_yet(store_path: Path) -> None:
    program = f"""
import os, stat
from savings_exporter import SavingsRecord, SavingsTracker
one = SavingsRecord(model="m", tokens_saved=1)
tracker = SavingsTracker({str(store_path)!r}, save_interval=1000)
for _ in range(2):
    assert tracker.record_many([one])
fsync = os.fsync
def fail_for_directories(descriptor):
    if stat.S_ISDIR(os.fstat(descriptor).st_mode):
        raise OSError(5, "Input/output error")
    fsync(descriptor)
os.fsync = fail_for_directories
assert not tracker.record_many([one] * 10_001)
print("failing", flush=True)
input()
os.fsync = fsync
assert tracker.save()
print("mended", flush=True)
input()
os._exit(0)
"""
    command = [sys.executable, "-c", program]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as failing:
        assert failing.stdin
        assert failing.stdout
        assert failing.stdout.readline() == "failing\n"
        with SavingsTracker(store_path) as tracker:
            assert tracker.snapshot().sequence == 2
            failing.stdin.write("\n")
            failing.stdin.flush()
            assert failing.stdout.readline() == "mended\n"
            assert tracker.record_request(**ONE, wait=False).wait(WAIT_SECONDS)
            assert tracker.snapshot().sequence == 10_004
        failing.stdin.write("\n")
    assert reopened(store_path) == 10_004


def test_a_fork_that_cannot_open_the_lock_file_yet_records_when_it_can(store_path: Path) -> None:
    directory = store_path.parent
    with SavingsTracker(store_path) as tracker:
        assert tracker.record_request(**ONE)
        directory.rename(directory.with_name("moved"))
        child = os.fork()
        if child == 0:
            receipt = tracker.record_request(**ONE)
            refused = not receipt.durable and not tracker.health().healthy
            directory.with_name("moved").rename(directory)
            os._exit(0 if refused and receipt.wait(WAIT_SECONDS) and tracker.close() else 1)
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
        assert tracker.snapshot().sequence == 2
    assert reopened(store_path) == 2


def test_a_pipe_in_place_of_a_file_is_refused_and_waited_for_by_nobody(store_path: Path) -> None:
    with SavingsTracker(store_path) as tracker:
        assert tracker.record_request(**ONE)
    os.mkfifo(f"{store_path}.journal.00000099")
    with pytest.raises(StoreError, match=r"Not a regular file \(EINVAL\) on .*\.journal\.00000099"):
        SavingsTracker(store_path)


@pytest.mark.needs("root")
def test_a_lock_file_made_by_root_is_for_the_user_of_the_document(store_path: Path) -> None:
    with SavingsTracker(store_path) as tracker:
        assert tracker.record_request(**ONE)
    lock = store_path.with_name(store_path.name + ".lock")
    lock.unlink()
    os.chown(store_path, 1234, 1234)
    assert reopened(store_path) == 1
    status = lock.stat()
    assert (status.st_uid, status.st_gid, stat.S_IMODE(status.st_mode)) == (1234, 1234, 0o600)


def test_records_that_wait_for_a_failing_disk_are_folded_a_few_at_a_time(
    tracker: SavingsTracker, faults: Faults
) -> None:
    faults.fail("fsync_file", errno.EIO)
    records = 12_345
    for number in range(records):
        tracker.record_request(model=f"m{number % 7}", tokens_saved=number, wait=False)
    pending = tracker.snapshot()
    assert (pending.pending_records, pending.pending_tokens) == (records, sum(range(records)))
    faults.mend()
    assert tracker.save()
    snapshot = tracker.snapshot()
    assert snapshot.lifetime.tokens_saved == sum(range(records))
    assert snapshot.by_model["m3"].requests == len(range(3, records, 7))


class Text(str):
    __slots__ = ()


class Model(str, enum.Enum):
    OPUS = "opus"


class Count(enum.IntEnum):
    TEN = 10


class Dollars(float):
    __slots__ = ()


def test_arguments_of_subclasses_are_taken_as_what_they_are(tracker: SavingsTracker) -> None:
    for key in (Text("k"), Model.OPUS, None):
        for model in (Text("sonnet"), Model.OPUS):
            receipt = tracker.record_request(
                model=model,
                project=Text("p"),
                provider=Text("anthropic"),
                tokens_saved=Count.TEN,
                savings_usd=Dollars(0.5),
                timestamp=Text("2026-01-01T00:00:00Z"),
                idempotency_key=key,
            )
            assert receipt.durable
    assert {model: totals.tokens_saved for model, totals in tracker.snapshot().by_model.items()} == {
        "sonnet": 30,
        "opus": 10,
    }


def test_a_record_with_fields_of_its_own_is_refused_before_anything_changes(tracker: SavingsTracker) -> None:
    class Mine(SavingsRecord, frozen=True, kw_only=True):
        team: str = "t"

    with pytest.raises(TypeError, match=r"records\[1\] must be a SavingsRecord, not Mine"):
        tracker.record_many([SavingsRecord(**ONE), Mine(**ONE)])
    assert tracker.record_request(**ONE).sequence == 1


def test_a_renamed_lock_file_is_agreed_on_anew(store_path: Path) -> None:
    with SavingsTracker(store_path) as one:
        assert one.record_request(**ONE)
        lock = store_path.with_name(store_path.name + ".lock")
        lock.rename(lock.with_suffix(".bak"))
        with SavingsTracker(store_path) as two:
            receipts = [tracker.record_request(**ONE) for tracker in (one, two, one, two)]
            assert [receipt.sequence for receipt in receipts] == [2, 3, 4, 5]
    assert reopened(store_path) == 5


def test_a_moved_directory_is_not_written_to_as_if_it_were_here(store_path: Path) -> None:
    directory = store_path.parent
    with SavingsTracker(store_path) as tracker:
        for _ in range(2):
            assert tracker.record_request(**ONE)
        directory.rename(directory.with_name("moved"))
        directory.mkdir()
        assert not tracker.record_request(**ONE).durable
        assert not tracker.health().healthy


def test_a_signal_handler_that_records_does_not_wait_for_the_commit_it_interrupts(
    tracker: SavingsTracker, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert tracker.record_request(**ONE)
    inner = []
    real = os.fdatasync

    def interrupted(descriptor: int) -> None:
        monkeypatch.setattr(os, "fdatasync", real)
        inner.append(tracker.record_request(**ONE))
        real(descriptor)

    assert tracker.record_request(**ONE)
    monkeypatch.setattr(os, "fdatasync", interrupted)
    assert tracker.record_request(**ONE)
    assert not inner[0].durable or inner[0].sequence == 4
    assert inner[0].wait(WAIT_SECONDS)
    assert tracker.snapshot().sequence == 4


def test_a_thread_that_could_not_be_started_is_started_by_the_next_record(
    tracker: SavingsTracker, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(_thread: threading.Thread) -> None:
        raise RuntimeError("can't start new thread")

    with monkeypatch.context() as patch:
        patch.setattr(threading.Thread, "start", fail)
        with pytest.raises(RuntimeError):
            tracker.record_request(**ONE)
    assert tracker.record_request(**ONE, wait=False).wait(WAIT_SECONDS)
    assert tracker.snapshot().sequence == 1


HANDLERS = """
import signal, sys
from savings_exporter import SavingsTracker
recorded = handled = 0
with SavingsTracker(sys.argv[1]) as tracker:
    def handle(number, frame):
        global recorded, handled
        handled += 1
        if handled % 3 == 0:
            tracker.save()
        else:
            recorded += 1
            tracker.record_request(model="m", tokens_saved=1, wait=bool(handled % 2))
    signal.signal(signal.SIGALRM, handle)
    signal.setitimer(signal.ITIMER_REAL, 0.002, 0.002)
    while handled < 300:
        recorded += 1
        tracker.record_request(model="m", tokens_saved=1, wait=bool(recorded % 2))
    signal.setitimer(signal.ITIMER_REAL, 0)
    assert tracker.flush(30)
    assert tracker.snapshot().lifetime.requests == recorded
"""


def test_signal_handlers_that_record_and_save_lose_nothing_and_end(store_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-c", HANDLERS, str(store_path)],
        capture_output=True,
        text=True,
        check=False,
        timeout=2 * WAIT_SECONDS,
    )
    assert done.returncode == 0, done.stderr
    assert reopened(store_path) > 300
