"""Commits: what one writes, what each failing step of one does, and what is read back."""

from __future__ import annotations

import errno
import fcntl
import json
import os
import shutil
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path
from typing import Any

import pytest
from opentelemetry import trace
from opentelemetry.sdk.trace import ReadableSpan, SpanProcessor, TracerProvider
from opentelemetry.trace import StatusCode

from savings_exporter import SavingsRecord, SavingsTracker, StoreError
from savings_exporter.storage import filesystem, journal
from savings_exporter.telemetry.metrics import SavingsCollector
from tests.support.faults import ERRNOS, Faults
from tests.support.scrape import samples
from tests.support.spans import Traced
from tests.support.wait import WAIT_SECONDS, eventually

SAVED: dict[str, Any] = {"model": "claude-sonnet-4-5", "provider": "anthropic", "tokens_saved": 4096}
COMMIT_STEPS = ("append", "fsync_journal")


@pytest.fixture
def committing(tracker: SavingsTracker) -> SavingsTracker:
    """A tracker whose store has a document and a segment, so that the next record is a commit and nothing else."""
    assert tracker.record_request(**SAVED).durable
    assert tracker.record_request(**SAVED).durable
    return tracker


def failures(tracker: SavingsTracker) -> dict[str, float]:
    """The failure counters that are not zero."""
    seen = samples(SavingsCollector(tracker))
    return {name: value for name, value in seen.items() if "_failures_total" in name and value}


def segments(store_path: Path) -> list[str]:
    return sorted(path.name for path in store_path.parent.glob("*.journal.*"))


def test_a_commit_is_one_write_and_one_sync(committing: SavingsTracker, faults: Faults, store_path: Path) -> None:
    document = store_path.read_bytes()
    assert committing.record_request(**SAVED).durable
    assert faults.calls == ["append", "fsync_journal"]
    assert store_path.read_bytes() == document


@pytest.mark.needs("linux", "strace")
def test_the_kernel_sees_one_block_and_one_fdatasync_a_commit(store_path: Path, tmp_path: Path) -> None:
    program = f"""
from savings_exporter import SavingsTracker
import os
tracker = SavingsTracker({str(store_path)!r}, save_interval=3600)
for _ in range(40):
    assert tracker.record_request(model="m", tokens_saved=1, project="p" * 100).durable
os._exit(0)
"""
    log = tmp_path / "strace.log"
    strace = ["strace", "-f", "-y", "-e", "trace=pwrite64,fsync,fdatasync", "-o", str(log)]
    subprocess.run([*strace, sys.executable, "-c", program], check=True)
    calls = [
        line.split(maxsplit=1)[1] for line in log.read_text().splitlines() if "/proxy_savings.json.journal." in line
    ]
    writes, syncs = calls[::2], calls[1::2]
    # The first record is saved with the first document.
    assert len(writes) == len(syncs) == 39
    assert all(call.startswith("fdatasync(") and call.endswith("= 0") for call in syncs)
    for call in writes:
        size, offset = (int(part.rstrip(")")) for part in call.split(" = ")[0].rsplit(", ", 2)[1:])
        assert offset // journal.BLOCK_BYTES == (offset + size - 1) // journal.BLOCK_BYTES, call


def test_the_journal_is_lines_that_people_can_read(committing: SavingsTracker, store_path: Path) -> None:
    committing.record_many(
        [SavingsRecord(model=f"m{number}", tokens_saved=number, project="p") for number in range(3)],
        idempotency_key="a key",
    )
    data = store_path.with_name(segments(store_path)[0]).read_bytes()
    lines = [json.loads(line) for line in data[data.index(b'{"model":"m0"') :].split(b"\n")[:3]]
    assert [(line["model"], line["tokens_saved"], line["project"]) for line in lines] == [
        ("m0", 0, "p"),
        ("m1", 1, "p"),
        ("m2", 2, "p"),
    ]
    assert [line.get("idempotency_key") for line in lines] == [None, None, "a key"]


def test_the_document_follows_after_the_interval(store_path: Path) -> None:
    def saved_requests() -> int:
        requests: int = json.loads(store_path.read_bytes())["lifetime"]["requests"]
        return requests

    with SavingsTracker(store_path, save_interval=0.05) as tracker:
        for _ in range(10):
            assert tracker.record_request(**SAVED).durable
        eventually(lambda: saved_requests() == 10, "the document to be saved")


@pytest.mark.parametrize("number", ERRNOS, ids=errno.errorcode.get)
@pytest.mark.parametrize("step", COMMIT_STEPS)
def test_a_commit_that_fails_once_costs_nothing_and_its_segment_is_not_used_again(
    committing: SavingsTracker, faults: Faults, store_path: Path, step: str, number: int
) -> None:
    symbol = errno.errorcode[number]
    faults.fail(step, number, times=1)
    receipt = committing.record_request(**SAVED)
    assert not receipt.durable
    assert committing.health().error == symbol
    assert step in (committing.health().reason or "")
    assert receipt.wait(WAIT_SECONDS)
    assert receipt.sequence == 3
    eventually(lambda: committing.health().healthy, "the tracker to take note")
    seen = failures(committing)
    assert seen.pop(f'savings_commit_failures_total{{error="{symbol}",step="{step}"}}') == 1
    assert seen == ({'savings_fsync_failures_total{target="journal"}': 1} if step == "fsync_journal" else {})
    used = segments(store_path)
    faults.calls.clear()
    assert committing.record_request(**SAVED).sequence == 4
    assert set(segments(store_path)) - set(used), "a new segment"
    assert faults.calls[-2:] == ["append", "fsync_journal"]
    committing.close()
    with SavingsTracker(store_path) as reopened:
        assert reopened.snapshot().lifetime.requests == 4


@pytest.mark.parametrize("step", COMMIT_STEPS)
def test_while_the_journal_fails_records_go_by_the_document(
    committing: SavingsTracker, faults: Faults, store_path: Path, step: str
) -> None:
    faults.fail(step, errno.EIO)
    receipts = [committing.record_request(**SAVED) for _ in range(20)]
    assert committing.flush(WAIT_SECONDS)
    assert [receipt.sequence for receipt in receipts] == list(range(3, 23))
    with SavingsTracker(store_path) as other:
        assert other.snapshot().lifetime.requests == 22


@pytest.mark.parametrize("step", ["write", "fsync_file", "replace", "fsync_dir"])
def test_a_segment_that_cannot_be_made_is_done_without(
    store_path: Path, monkeypatch: pytest.MonkeyPatch, step: str
) -> None:
    with SavingsTracker(store_path) as tracker:
        assert tracker.record_request(**SAVED).durable
        faults = Faults(monkeypatch)
        faults.fail(step, errno.ENOSPC, times=1)
        # The commit fails at making the segment, and the document takes the record at once.
        assert tracker.record_request(**SAVED).durable
        assert failures(tracker)['savings_commit_failures_total{error="ENOSPC",step="rotate"}'] == 1
        assert tracker.record_request(**SAVED).sequence == 3
    with SavingsTracker(store_path) as reopened:
        assert reopened.snapshot().lifetime.requests == 3


def test_a_full_segment_is_followed_by_another_and_removed_when_nothing_needs_it(
    store_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(journal, "SEGMENT_BYTES", 8192)
    with SavingsTracker(store_path, save_interval=3600) as tracker:
        for number in range(1, 301):
            assert tracker.record_request(**SAVED).sequence == number
        # Several were filled; a full one makes the document be saved before the interval is over.
        eventually(lambda: len(segments(store_path)) <= 3, "segments to be removed")
        assert int(segments(store_path)[-1][-8:]) > 5
    with SavingsTracker(store_path) as reopened:
        assert reopened.snapshot().lifetime.requests == 300


def test_a_batch_larger_than_a_segment_goes_by_the_document(store_path: Path) -> None:
    records = [SavingsRecord(model="m" * 128, project="p" * 128, provider="x" * 128, tokens_saved=1)] * 10_000
    with SavingsTracker(store_path) as tracker:
        tracker.record_request(**SAVED)
        assert tracker.record_many(records).sequence == 10_001
        assert not segments(store_path)


def test_a_repeated_key_is_counted_once_and_gets_the_first_receipt(committing: SavingsTracker) -> None:
    first = committing.record_request(**SAVED, idempotency_key="a")
    assert committing.record_request(**SAVED).sequence == 4
    again = committing.record_request(**SAVED, idempotency_key="a")
    assert (first.sequence, again.sequence, again.durable) == (3, 3, True)
    assert committing.record_request(**SAVED, idempotency_key="b").sequence == 5
    many = [SavingsRecord(**SAVED)] * 4
    assert committing.record_many(many, idempotency_key="c").sequence == 9
    assert committing.record_many(many, idempotency_key="c").sequence == 9
    assert committing.snapshot().lifetime.requests == 9


def test_a_key_is_known_after_a_restart_a_crash_and_in_other_processes(store_path: Path) -> None:
    program = f"""
import os
from savings_exporter import SavingsTracker
tracker = SavingsTracker({str(store_path)!r})
for number in range(6):
    tracker.record_request(model="m", tokens_saved=1, idempotency_key=str(number))
    if number == 2:
        assert tracker.save()
os._exit(0)
"""
    subprocess.run([sys.executable, "-c", program], check=True)
    with SavingsTracker(store_path) as one, SavingsTracker(store_path) as two:
        assert one.record_request(model="m", tokens_saved=1, idempotency_key="new").sequence == 7
        for tracker in (two, one):
            for number in range(6):
                receipt = tracker.record_request(model="m", tokens_saved=1, idempotency_key=str(number))
                assert receipt.sequence == number + 1
            assert tracker.record_request(model="m", tokens_saved=1, idempotency_key="new").sequence == 7
    with SavingsTracker(store_path) as reopened:
        assert reopened.record_request(model="m", tokens_saved=1, idempotency_key="0").sequence == 1
        assert reopened.snapshot().lifetime.requests == 7


def test_a_key_repeated_while_the_disk_fails_is_counted_once(
    committing: SavingsTracker, faults: Faults, store_path: Path
) -> None:
    faults.fail("fsync_journal", errno.EIO)
    faults.fail("fsync_file", errno.EIO)
    receipts = [committing.record_request(**SAVED, idempotency_key="a") for _ in range(3)]
    assert not any(receipts)
    assert committing.snapshot().pending_records == 1
    faults.mend()
    assert all(receipt.wait(WAIT_SECONDS) for receipt in receipts)
    assert {receipt.sequence for receipt in receipts} == {3}
    with SavingsTracker(store_path) as other:
        assert other.record_request(**SAVED, idempotency_key="a").sequence == 3
        assert other.snapshot().lifetime.requests == 3


def test_the_last_hundred_thousand_keys_are_known(store_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("savings_exporter.idempotency.MAX_KEYS", 10)
    with SavingsTracker(store_path) as tracker:
        for number in range(15):
            tracker.record_request(**SAVED, idempotency_key=str(number))
    with SavingsTracker(store_path) as tracker:
        assert tracker.record_request(**SAVED, idempotency_key="5").sequence == 6
        assert tracker.record_request(**SAVED, idempotency_key="4").sequence == 16


@pytest.mark.parametrize("key", ["", "k" * 256, 5, b"k", "\ud800"])
def test_a_key_that_is_none_is_refused_by_its_name(tracker: SavingsTracker, key: Any) -> None:
    with pytest.raises((ValueError, TypeError), match="idempotency_key must"):
        tracker.record_request(**SAVED, idempotency_key=key)
    assert tracker.snapshot().pending_records == 0


@pytest.fixture
def traced(traced: Traced) -> Traced:
    """A tracker whose spans are kept, and whose next record is a commit."""
    assert traced.tracker.record_request(**SAVED).durable
    return traced


def test_a_commit_is_a_span_with_its_steps_below_the_span_that_led_it(traced: Traced) -> None:
    tracer = traced.provider.get_tracer("test")
    with tracer.start_as_current_span("request") as request:
        assert traced.tracker.record_request(**SAVED).durable
    ((commit, steps),) = traced.commits()
    assert commit.parent is not None
    assert commit.parent.span_id == request.get_span_context().span_id
    assert [link.context.span_id for link in commit.links] == [request.get_span_context().span_id]
    assert [step.name for step in steps] == ["savings.commit.append", "savings.commit.fsync_journal"]
    assert commit.attributes is not None
    assert (commit.attributes["savings.records"], commit.attributes["savings.sequence"]) == (1, 2)
    assert commit.start_time is not None
    assert steps[0].start_time is not None
    assert steps[1].end_time is not None
    assert commit.end_time is not None
    assert commit.start_time <= steps[0].start_time <= steps[1].end_time <= commit.end_time


def test_a_commit_is_linked_to_at_most_128_records(traced: Traced, faults: Faults) -> None:
    tracer = traced.provider.get_tracer("test")
    faults.hang("append")
    leader = threading.Thread(target=lambda: traced.tracker.record_request(**SAVED))
    leader.start()
    assert faults.reached.wait(WAIT_SECONDS)
    for number in range(200):
        with tracer.start_as_current_span(f"request {number}"):
            traced.tracker.record_request(**SAVED, wait=False)
    faults.mend()
    leader.join()
    assert traced.tracker.flush(WAIT_SECONDS)
    _, (commit, _steps) = traced.commits()
    assert commit.attributes is not None
    assert commit.attributes["savings.records"] == 200
    assert len(commit.links) == 128


def test_a_failed_commit_says_so_in_its_spans(traced: Traced, faults: Faults) -> None:
    faults.fail("fsync_journal", errno.EIO, times=1)
    assert traced.tracker.record_request(**SAVED).wait(WAIT_SECONDS)
    ((commit, steps),) = traced.commits()
    for span in (commit, steps[1]):
        assert span.status.status_code is StatusCode.ERROR
        assert span.attributes is not None
        assert span.attributes["error.type"] == "EIO"
        assert [event.name for event in span.events] == ["exception"]
    assert steps[0].status.status_code is StatusCode.UNSET


class _SlowProcessor(SpanProcessor):
    """Takes its time, as one does that exports each span at once; knows who held the store's lock meanwhile."""

    def __init__(self, lock: Path) -> None:
        self._lock = lock
        self.locked: list[bool] = []

    def on_end(self, span: ReadableSpan) -> None:
        with self._lock.open("rb") as lock:
            try:
                fcntl.flock(lock, fcntl.LOCK_SH | fcntl.LOCK_NB)
                self.locked.append(False)
            except BlockingIOError:
                self.locked.append(True)
        time.sleep(0.02)


def test_slow_observers_keep_the_lock_from_nobody(store_path: Path) -> None:
    processor = _SlowProcessor(store_path.with_name("proxy_savings.json.lock"))
    provider = TracerProvider()
    provider.add_span_processor(processor)
    with SavingsTracker(store_path, tracer_provider=provider, save_interval=3600) as tracker:
        for _ in range(3):
            assert tracker.record_request(**SAVED).durable
        tracker.flush()
        processor.locked.clear()
        for _ in range(3):
            assert tracker.record_request(**SAVED).durable
            # The commit and its two steps, before the call came back.
            assert len(processor.locked) % 3 == 0
        assert processor.locked == [False] * 9


def test_nothing_is_traced_where_nobody_looks(committing: SavingsTracker) -> None:
    assert not trace.get_current_span().is_recording()
    assert committing.record_request(**SAVED).durable


KILLED = """
import os, signal, sys
from savings_exporter import SavingsTracker
path, when = sys.argv[1:]
tracker = SavingsTracker(path)
assert tracker.record_request(model="m", tokens_saved=1).durable
assert tracker.record_request(model="m", tokens_saved=10).durable
real = {"append": os.pwrite, "fsync_journal": os.fdatasync}
def die(name):
    if name == when:
        os.kill(os.getpid(), signal.SIGKILL)
def pwrite(fd, data, offset):
    if os.fstat(fd).st_size < 4096:
        die("before mark")
        return real["append"](fd, data, offset)
    die("before append")
    if when == "within append":
        real["append"](fd, data[:60], offset)
        die("within append")
    size = real["append"](fd, data, offset); die("after append"); return size
def fdatasync(fd):
    die("before fsync_journal"); real["fsync_journal"](fd); die("after fsync_journal")
os.pwrite, os.fdatasync = pwrite, fdatasync
tracker.record_request(model="m", tokens_saved=100)
os._exit(3)
"""


@pytest.mark.parametrize("alive", ["alone", "beside a living process"])
@pytest.mark.parametrize(
    "when",
    ["before append", "within append", "after append", "before fsync_journal", "after fsync_journal", "before mark"],
)
def test_a_writer_killed_within_a_commit_leaves_it_whole_or_not_at_all(store_path: Path, when: str, alive: str) -> None:
    living = SavingsTracker(store_path) if alive != "alone" else None
    killed = subprocess.run([sys.executable, "-c", KILLED, str(store_path), when], check=False)
    assert killed.returncode == -9
    expected = 11 if when in ("before append", "within append") else 111
    tracker = living or SavingsTracker(store_path)
    with tracker:
        assert tracker.record_request(model="m", tokens_saved=1000).durable
        assert tracker.snapshot().lifetime.tokens_saved == expected + 1000
        torn = samples(SavingsCollector(tracker))['savings_recoveries_total{kind="torn_tail"}']
        assert torn == (1 if when == "within append" else 0)
    with SavingsTracker(store_path) as reopened:
        assert reopened.snapshot().lifetime.tokens_saved == expected + 1000


def test_a_save_that_came_to_nothing_keeps_others_from_nothing(
    committing: SavingsTracker, store_path: Path, faults: Faults
) -> None:
    faults.fail("write", errno.ENOSPC)
    # More than 10,000 go by the document.
    assert not committing.record_many([SavingsRecord(model="m", tokens_saved=1)] * 12_000).durable
    saved = store_path.stat().st_ino
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
    assert committing.snapshot().lifetime.requests == 12_003


KILLED_WITH_MANY = """
import os, signal, sys
from savings_exporter import SavingsRecord, SavingsTracker
from savings_exporter.storage import filesystem
path, step, count = sys.argv[1:]
def die(*_):
    os.kill(os.getpid(), signal.SIGKILL)
tracker = SavingsTracker(path)
setattr(filesystem, step, die)
tracker.record_many([SavingsRecord(model="m" * 128, project="p" * 128, tokens_saved=1)] * int(count))
os._exit(3)
"""


# More records than 10,000 go by the document; of 6,000 with long names two frames do not fit into one segment.
@pytest.mark.parametrize(("step", "count", "arrives"), [("probe", 12_000, True), ("sync_data", 6_000, False)])
def test_a_living_process_knows_of_one_that_died_before_it_could_say_what_it_wrote(
    store_path: Path, step: str, count: int, *, arrives: bool
) -> None:
    many = [SavingsRecord(model="m" * 128, project="p" * 128, tokens_saved=1)] * 6_000
    with SavingsTracker(store_path) as living:
        assert living.record_many(many).durable
        assert living.record_many(many).durable
        killed = subprocess.run(
            [sys.executable, "-c", KILLED_WITH_MANY, str(store_path), step, str(count)], check=False
        )
        assert killed.returncode == -9
        for _ in range(3):
            assert living.record_request(model="m", tokens_saved=1000).wait(WAIT_SECONDS)
        expected = living.snapshot().lifetime.tokens_saved
        assert expected in (15_000, 15_000 + count)
        assert expected == 15_000 + count or not arrives
        copy = store_path.with_name("copy.json")
        for file in store_path.parent.glob(f"{store_path.name}*"):
            shutil.copy(file, f"{copy}{file.name.removeprefix(store_path.name)}")
        with SavingsTracker(copy) as recovered:
            assert recovered.snapshot().lifetime.tokens_saved == expected
    with SavingsTracker(store_path) as reopened:
        assert reopened.snapshot().lifetime.tokens_saved == expected


@pytest.mark.slow
def test_a_process_that_holds_the_lock_for_long_makes_records_pending_not_lost(
    committing: SavingsTracker, store_path: Path
) -> None:
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
        receipt = committing.record_request(**SAVED)
        assert not receipt.durable
        assert committing.health().error == "EAGAIN"
        assert failures(committing)['savings_commit_failures_total{error="EAGAIN",step="prepare"}'] >= 1
        holder.communicate("")
    assert receipt.wait(WAIT_SECONDS)


def test_on_a_network_filesystem_a_second_process_is_refused(store_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def filesystem_type(path: str) -> filesystem.FilesystemType:
        assert os.path.isdir(path)
        return filesystem.FilesystemType("nfs", is_network=True)

    monkeypatch.setattr(filesystem, "filesystem_type", filesystem_type)
    with SavingsTracker(store_path) as tracker:
        assert tracker.record_request(**SAVED).durable
        assert tracker.record_request(**SAVED).durable
        with pytest.raises(StoreError, match="on a network filesystem only one may"):
            SavingsTracker(store_path)
    with SavingsTracker(store_path) as tracker:
        assert tracker.snapshot().lifetime.requests == 2


INTERRUPTED = """
import linecache, os, sys
from savings_exporter import SavingsTracker
path, step, count = sys.argv[1], sys.argv[2], int(sys.argv[3])
tracker = SavingsTracker(path)
tracker.record_request(model="m", tokens_saved=1)
tracker.record_request(model="m", tokens_saved=1)
lines = 0
def interrupt(frame, event, argument):
    # Before any line of what this thread runs of ours, once. Not before one that enters or leaves a lock: there a
    # signal is handled after the lock was let go, and tracing would come before.
    global lines
    if "savings_exporter" not in frame.f_code.co_filename:
        return None
    if event == "line" and not linecache.getline(frame.f_code.co_filename, frame.f_lineno).lstrip().startswith("with "):
        lines += 1
        if lines == count:
            sys.settrace(None)
            raise KeyboardInterrupt
    return interrupt
sys.settrace(interrupt)
try:
    {"record": lambda: tracker.record_request(model="m", tokens_saved=1), "save": tracker.save}[step]()
except KeyboardInterrupt:
    print("interrupted")
sys.settrace(None)
assert tracker.flush(30), "not all became durable"
expected = tracker.snapshot().lifetime.requests
assert expected in (2, 3), expected
assert tracker.record_request(model="m", tokens_saved=1).wait(30)
assert tracker.snapshot().lifetime.requests == expected + 1
assert tracker.close()
other = SavingsTracker(path)
assert other.snapshot().lifetime.requests == expected + 1, (other.snapshot().lifetime.requests, expected)
assert sum(t.requests for t in other.snapshot().by_model.values()) == expected + 1
"""


@pytest.mark.slow
@pytest.mark.parametrize("step", ["record", "save"])
def test_an_interrupt_between_any_two_lines_counts_a_record_once_or_not_at_all(step: str, tmp_path: Path) -> None:
    """Every seventh line; the long form of the crash lab takes each."""
    stride = 1 if os.environ.get("CRASH_LAB") == "long" else 7
    memory = "/dev/shm" if os.access("/dev/shm", os.W_OK) else None
    for count in range(1, 10_000, stride):
        with tempfile.TemporaryDirectory(dir=memory) as directory:
            path = os.path.join(directory, "proxy_savings.json")
            run = subprocess.run(
                [sys.executable, "-c", INTERRUPTED, path, step, str(count)],
                capture_output=True,
                text=True,
                timeout=WAIT_SECONDS * 3,
                check=False,
            )
        assert run.returncode == 0, (count, run.stderr)
        if "interrupted" not in run.stdout:
            assert count > 50
            break
