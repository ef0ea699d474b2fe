"""The recipe of one save: its order, and what each failing step does."""

from __future__ import annotations

import errno
import os
import stat
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

import pytest
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.trace import StatusCode

from savings_exporter import SavingsTracker
from savings_exporter.storage import filesystem
from savings_exporter.telemetry.metrics import SavingsCollector
from tests.support.faults import ERRNOS, Faults
from tests.support.scrape import samples
from tests.support.spans import Traced
from tests.support.wait import eventually

STEPS = ("write", "fsync_file", "replace", "fsync_dir")
SAVED: dict[str, Any] = {"model": "claude-sonnet-4-5", "provider": "anthropic", "tokens_saved": 4096}


def synced_and_renamed(path: Path, monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, str]]:
    """What one save syncs and renames, by real paths, each call really made."""
    events: list[tuple[str, str]] = []
    real_fsync, real_replace = os.fsync, os.replace

    def fsync(descriptor: int) -> None:
        events.append(("fsync", os.readlink(f"/proc/self/fd/{descriptor}")))
        real_fsync(descriptor)

    def replace(source: str, target: str) -> None:
        events.append((f"replace by {source}", target))
        real_replace(source, target)

    with SavingsTracker(path) as tracker, monkeypatch.context() as patch:
        patch.setattr(os, "fsync", fsync)
        patch.setattr(os, "replace", replace)
        assert tracker.record_request(**SAVED).durable
    return events


def assert_recipe(events: list[tuple[str, str]], path: Path) -> None:
    """The temp file synced, then the replace, then the directory synced, and nothing else."""
    assert len(events) == 3, events
    (first, temporary), (second, target), (third, directory) = events
    assert first == "fsync"
    assert Path(temporary).parent == path.parent
    assert temporary != str(path)
    assert second == f"replace by {temporary}"
    assert target == str(path)
    assert (third, directory) == ("fsync", str(path.parent))


@pytest.mark.needs("linux")
def test_a_save_syncs_the_file_then_replaces_then_syncs_the_directory(
    store_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert_recipe(synced_and_renamed(store_path, monkeypatch), store_path)


@pytest.mark.needs("linux")
def test_the_order_test_notices_a_missing_directory_fsync(store_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(filesystem, "fsync_directory", lambda path: None)
    with pytest.raises(AssertionError):
        assert_recipe(synced_and_renamed(store_path, monkeypatch), store_path)


@pytest.mark.needs("linux", "strace")
def test_the_kernel_sees_the_same_order(store_path: Path, tmp_path: Path) -> None:
    program = f"""
import os
from savings_exporter import SavingsTracker
tracker = SavingsTracker({str(store_path)!r})
assert tracker.record_request(model="m", tokens_saved=1).durable
os._exit(0)
"""
    log = tmp_path / "strace.log"
    strace = ["strace", "-f", "-y", "-e", "trace=fsync,fdatasync,rename,renameat,renameat2", "-o", str(log)]
    subprocess.run([*strace, sys.executable, "-c", program], check=True)
    calls = [line.split(maxsplit=1)[1] for line in log.read_text().splitlines() if str(tmp_path) in line]
    assert len(calls) == 4, calls
    assert calls[0].startswith("fsync(")
    assert ".tmp>" in calls[0]
    assert calls[1].startswith("rename")
    assert f'"{store_path}"' in calls[1]
    assert calls[2].startswith("fsync(")
    assert f"<{tmp_path}>" in calls[2]
    assert calls[3].startswith("fdatasync(")
    assert f"<{store_path}.lock>" in calls[3]


@pytest.mark.parametrize("number", [errno.EIO, errno.EROFS])
def test_a_failed_directory_fsync_is_a_failure_and_the_next_good_save_repairs_it(
    traced: Traced, faults: Faults, number: int, caplog: pytest.LogCaptureFixture
) -> None:
    symbol = errno.errorcode[number]
    faults.fail("fsync_dir", number)
    receipt = traced.tracker.record_request(**SAVED)
    assert not receipt.durable
    assert receipt.sequence is None
    assert traced.tracker.snapshot().lifetime.tokens_saved == 0
    assert not traced.tracker.health().healthy
    assert traced.tracker.health().error == symbol
    assert "fsync_dir" in (traced.tracker.health().reason or "")
    assert any(symbol in message and "fsync_dir" in message for message in caplog.messages)
    failed = traced.samples()
    assert failed["savings_store_healthy"] == 0
    assert failed["savings_tokens_pending"] == 4096
    assert failed["savings_records_pending"] == 1
    assert failed["savings_last_dir_fsync_success"] == 0
    assert failed["savings_dir_fsync_supported"] == 1
    assert failed['savings_fsync_failures_total{target="directory"}'] >= 1
    assert failed['savings_fsync_failures_total{target="file"}'] == 0
    assert failed[f'savings_save_failures_total{{error="{symbol}",step="fsync_dir"}}'] >= 1
    save, steps = traced.saves()[0]
    assert [step.name for step in steps] == [f"savings.save.{step}" for step in STEPS]
    for span in (save, steps[3]):
        assert span.status.status_code is StatusCode.ERROR
        assert span.attributes is not None
        assert span.attributes["error.type"] == symbol
        assert [event.name for event in span.events] == ["exception"]
    assert all(step.status.status_code is StatusCode.UNSET for step in steps[:3])

    faults.mend()
    assert receipt.wait(30)
    assert receipt.sequence == 1
    assert traced.tracker.health().healthy
    repaired = traced.samples()
    assert repaired["savings_store_healthy"] == 1
    assert repaired["savings_last_dir_fsync_success"] == 1
    assert repaired["savings_tokens_pending"] == 0
    assert repaired['savings_tokens_saved_total{model="claude-sonnet-4-5",provider="anthropic"}'] == 4096
    assert repaired['savings_fsync_failures_total{target="directory"}'] >= 1


@pytest.mark.parametrize("number", [errno.EINVAL, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOSYS, errno.EBADF])
def test_an_unsupported_directory_fsync_is_no_failure(
    traced: Traced, faults: Faults, number: int, caplog: pytest.LogCaptureFixture
) -> None:
    faults.fail("fsync_dir", number)
    assert traced.tracker.record_request(**SAVED).durable
    assert traced.tracker.record_request(**SAVED).durable
    _assert_unsupported(traced)
    assert len([message for message in caplog.messages if "no directory fsync" in message]) == 1
    # Asked for once, then remembered; the renamed file is synced instead.
    segment = ["write", "fsync_file", "replace", "fsync_file"]
    assert faults.calls == [*STEPS, "fsync_file", *segment, "append", "fsync_journal"]


def test_windows_has_no_directory_fsync(traced: Traced, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(filesystem, "IS_WINDOWS", True)
    assert traced.tracker.record_request(**SAVED).durable
    _assert_unsupported(traced)


def _assert_unsupported(traced: Traced) -> None:
    seen = traced.samples()
    assert traced.tracker.health().healthy
    assert seen["savings_dir_fsync_supported"] == 0
    assert seen["savings_store_healthy"] == 1
    assert seen['savings_fsync_failures_total{target="directory"}'] == 0
    assert all(value == 0 for name, value in seen.items() if name.startswith("savings_save_failures_total"))
    step = traced.saves()[0][1][3]
    assert step.attributes is not None
    assert step.attributes["savings.dir_fsync.result"] == "unsupported"
    assert step.status.status_code is StatusCode.UNSET


def test_ebadf_of_what_is_no_directory_any_more_is_a_failure(
    tracker: SavingsTracker, monkeypatch: pytest.MonkeyPatch
) -> None:
    real_fsync = os.fsync

    def fsync(descriptor: int) -> None:
        if stat.S_ISDIR(os.fstat(descriptor).st_mode):
            os.close(descriptor)
        real_fsync(descriptor)

    monkeypatch.setattr(os, "fsync", fsync)
    assert not tracker.record_request(**SAVED).durable
    assert tracker.health().error == "EBADF"


def test_a_directory_fsync_that_lies_is_caught_by_the_probe(
    tracker: SavingsTracker, monkeypatch: pytest.MonkeyPatch
) -> None:
    def probe(path: str) -> None:
        raise OSError(errno.EIO, os.strerror(errno.EIO), path)

    with monkeypatch.context() as patch:
        patch.setattr(filesystem, "probe", probe)
        receipt = tracker.record_request(**SAVED)
        assert not receipt.durable
        assert samples(SavingsCollector(tracker))['savings_fsync_failures_total{target="directory"}'] >= 1
    assert receipt.wait(30)


@pytest.mark.parametrize("number", ERRNOS, ids=errno.errorcode.get)
@pytest.mark.parametrize("step", STEPS)
def test_a_step_that_fails_once_costs_nothing(
    traced: Traced, faults: Faults, store_path: Path, step: str, number: int
) -> None:
    symbol = errno.errorcode[number]
    assert traced.tracker.record_request(**SAVED).durable
    receipt = traced.tracker.record_request(**SAVED)
    assert receipt.durable
    faults.fail(step, number, times=1)
    assert not traced.tracker.save()
    assert traced.tracker.health().error == symbol
    assert "is durable in the journal" in (traced.tracker.health().reason or "")
    eventually(lambda: traced.tracker.health().healthy, "the document to be saved again")
    assert receipt.sequence == 2
    seen = traced.samples()
    assert seen['savings_requests_total{model="claude-sonnet-4-5",provider="anthropic"}'] == 2
    assert seen["savings_saves_total"] == 3
    failures = {name for name, value in seen.items() if name.startswith("savings_save_failures_total") and value}
    assert failures == {f'savings_save_failures_total{{error="{symbol}",step="{step}"}}'}
    fsyncs = {"fsync_file": (1, 0), "fsync_dir": (0, 1)}.get(step, (0, 0))
    assert (
        seen['savings_fsync_failures_total{target="file"}'],
        seen['savings_fsync_failures_total{target="directory"}'],
    ) == fsyncs
    assert seen['savings_save_step_duration_seconds_count{step="write"}'] == 3
    good, bad, again = traced.saves()
    assert [span.name for span in good[1]] == [f"savings.save.{name}" for name in STEPS]
    assert [span.name for span in bad[1]] == [f"savings.save.{name}" for name in STEPS[: STEPS.index(step) + 1]]
    assert [span.name for span in again[1]] == [f"savings.save.{name}" for name in STEPS]
    assert bad[0].attributes is not None
    assert bad[0].attributes["error.type"] == symbol
    assert again[0].attributes is not None
    assert (again[0].attributes["savings.records"], again[0].attributes["savings.sequence"]) == (0, 2)
    assert again[0].attributes["file.size"] == store_path.stat().st_size
    traced.tracker.close()
    with SavingsTracker(store_path) as reopened:
        assert reopened.snapshot().lifetime.tokens_saved == 2 * 4096
    assert not list(store_path.parent.glob(".*.tmp"))


@pytest.mark.parametrize("number", ERRNOS, ids=errno.errorcode.get)
@pytest.mark.parametrize("step", STEPS)
def test_a_step_that_fails_for_ever_loses_nothing_acknowledged(
    traced: Traced, faults: Faults, store_path: Path, step: str, number: int
) -> None:
    faults.fail(step, number)
    receipts = [traced.tracker.record_request(**SAVED) for _ in range(20)]
    assert not any(receipts)
    seen = traced.samples()
    assert sum(value for name, value in seen.items() if name.startswith("savings_requests_total")) == 0
    assert (seen["savings_records_pending"], seen["savings_tokens_pending"]) == (20, 20 * 4096)
    assert traced.tracker.flush(timeout=0.01) is False
    assert traced.tracker.save() is False
    assert traced.tracker.close() is False
    assert not any(receipt.wait(30) for receipt in receipts)
    faults.mend()
    with SavingsTracker(store_path) as reopened:
        requests = reopened.snapshot().lifetime.requests
        # After the replace a whole new document is what a reader finds; before it, nothing.
        assert requests == (1 if step == "fsync_dir" else 0)


def test_while_the_document_cannot_be_saved_records_are_durable_in_the_journal(
    tracker: SavingsTracker, faults: Faults, store_path: Path
) -> None:
    assert tracker.record_request(**SAVED).durable
    assert tracker.record_request(**SAVED).durable
    faults.fail("fsync_dir", errno.EIO)
    assert not tracker.save()
    assert samples(SavingsCollector(tracker))["savings_store_healthy"] == 0
    # Whichever document a power loss brings back, the journal has the rest.
    assert tracker.record_request(**SAVED).durable
    assert samples(SavingsCollector(tracker))["savings_records_pending"] == 0
    faults.mend()
    eventually(lambda: tracker.health().healthy, "the document to be saved again")
    tracker.close()
    with SavingsTracker(store_path) as reopened:
        assert reopened.snapshot().lifetime.requests == 3


def test_after_any_failed_file_fsync_a_new_file_is_written(tracker: SavingsTracker, faults: Faults) -> None:
    faults.fail("fsync_file", errno.EIO, times=1)
    assert tracker.record_request(**SAVED).wait(30)
    assert faults.calls == ["write", "fsync_file", *STEPS]


def test_the_last_durable_save_stays_beside_one_of_unknown_outcome(
    tracker: SavingsTracker, faults: Faults, store_path: Path
) -> None:
    assert tracker.record_request(**SAVED).durable
    durable = store_path.read_bytes()
    faults.fail("fsync_dir", errno.EIO)
    assert not tracker.record_request(**SAVED).durable
    assert not tracker.save()
    assert store_path.read_bytes() != durable
    assert store_path.with_name("proxy_savings.json.previous").read_bytes() == durable


def test_while_the_disk_fails_a_call_pays_for_no_retry(tracker: SavingsTracker, faults: Faults) -> None:
    faults.fail("fsync_file", errno.EIO)
    assert not tracker.record_request(**SAVED)
    faults.hang("write")
    assert faults.reached.wait(30), "the background thread retries"
    # A retry hangs now, so each of these would too if it waited for one.
    assert not any(tracker.record_request(**SAVED) for _ in range(100))
    faults.mend()
    assert tracker.flush(30)
    assert tracker.snapshot().lifetime.requests == 101


def test_a_tracker_opens_degraded_when_only_saving_fails(store_path: Path, faults: Faults) -> None:
    with SavingsTracker(store_path) as tracker:
        tracker.record_request(**SAVED)
    # Nobody says any more that what is there is durable, so it has to be saved before anything is built on it.
    store_path.with_name("proxy_savings.json.lock").unlink()
    faults.fail("fsync_file", errno.ENOSPC)
    with SavingsTracker(store_path) as tracker:
        assert tracker.snapshot().lifetime.tokens_saved == 4096
        assert tracker.health().error == "ENOSPC"
        receipt = tracker.record_request(**SAVED)
        assert not receipt
        faults.mend()
        assert receipt.wait(30)
        assert tracker.health().healthy


def test_an_interrupted_leader_leaves_its_record_pending(
    tracker: SavingsTracker, monkeypatch: pytest.MonkeyPatch
) -> None:
    main = threading.main_thread()
    real_fsync = os.fsync

    def fsync(descriptor: int) -> None:
        if threading.current_thread() is main:
            raise KeyboardInterrupt
        real_fsync(descriptor)

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", fsync)
        with pytest.raises(KeyboardInterrupt):
            tracker.record_request(**SAVED)
        assert tracker.flush(30)
    assert tracker.snapshot().lifetime.requests == 1


def test_an_observer_that_raises_does_not_break_a_save(store_path: Path) -> None:
    class Broken(TracerProvider):
        def get_tracer(self, *_arguments: Any, **_more: Any) -> Any:
            return object()

    with SavingsTracker(store_path, tracer_provider=Broken()) as tracker:
        assert tracker.record_request(**SAVED).durable
        assert samples(SavingsCollector(tracker))["savings_saves_total"] == 1


KILLED = """
import os, signal, stat, sys
from savings_exporter import SavingsTracker
path, step, what = sys.argv[1:]
tracker = SavingsTracker(path)
if what == "later":
    assert all(tracker.record_request(model="m", tokens_saved=n).durable for n in (1, 10))
real = {"fsync": os.fsync, "write": os.write, "replace": os.replace}
def die(name):
    if name == step:
        os.kill(os.getpid(), signal.SIGKILL)
def fsync(fd):
    kind = "fsync_dir" if stat.S_ISDIR(os.fstat(fd).st_mode) else "fsync_file"
    die("before " + kind); real["fsync"](fd); die("after " + kind)
def write(fd, data):
    die("before write"); n = real["write"](fd, data[:100]); die("after write"); return n
def replace(a, b):
    die("before replace"); real["replace"](a, b); die("after replace")
os.fsync, os.write, os.replace = fsync, write, replace
tracker.record_request(model="m", tokens_saved=10) if what == "first" else tracker.save()
os._exit(3)
"""


@pytest.mark.parametrize("when", ["before", "after"])
@pytest.mark.parametrize("step", STEPS)
def test_killed_at_any_step_of_a_first_save_the_record_is_there_whole_or_not_at_all(
    store_path: Path, step: str, when: str
) -> None:
    assert killed(store_path, f"{when} {step}", "first")
    was_replaced = (step, when) in {("replace", "after"), ("fsync_dir", "before"), ("fsync_dir", "after")}
    with SavingsTracker(store_path) as tracker:
        assert tracker.snapshot().lifetime.tokens_saved == (10 if was_replaced else 0)
        assert not list(store_path.parent.glob(".*.tmp"))
        assert tracker.record_request(model="m", tokens_saved=100).sequence == (2 if was_replaced else 1)


@pytest.mark.parametrize("when", ["before", "after"])
@pytest.mark.parametrize("step", STEPS)
def test_killed_at_any_step_of_a_later_save_all_that_was_acknowledged_is_there(
    store_path: Path, step: str, when: str
) -> None:
    assert killed(store_path, f"{when} {step}", "later")
    with SavingsTracker(store_path) as tracker:
        assert tracker.snapshot().lifetime.tokens_saved == 11
        assert not list(store_path.parent.glob(".*.tmp"))
        assert tracker.record_request(model="m", tokens_saved=100).sequence == 3


def killed(store_path: Path, step: str, what: str) -> bool:
    """Whether a process that saves kills itself at a step."""
    arguments = [sys.executable, "-c", KILLED, str(store_path), step, what]
    return subprocess.run(arguments, check=False).returncode == -9
