"""The recipe of one save: its order, and what each failing step does."""

from __future__ import annotations

import errno
import os
import stat
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.trace import StatusCode

from savings_exporter import SavingsTracker
from savings_exporter.storage.filesystem import FileSystem
from savings_exporter.telemetry.metrics import SavingsCollector
from tests.support.faults import ERRNOS, FaultyFileSystem
from tests.support.scrape import samples
from tests.support.segments import copied
from tests.support.spans import Traced
from tests.support.wait import WAIT_SECONDS, eventually

STEPS = ("write", "fsync_file", "replace", "fsync_dir")
BOTH_STEPS = ("write", "fsync_file", *STEPS)
"""The steps of a save that writes the document under both of its names: the first one, and one at a close."""
SAVED: dict[str, Any] = {"model": "claude-sonnet-4-5", "provider": "anthropic", "tokens_saved": 4096}


@pytest.fixture
def traced(store_path: Path, faults: FaultyFileSystem) -> Iterator[Traced]:
    """A tracker with its spans kept in memory, on a store with a saved document; it saves only on request."""
    traced = Traced(store_path, faults, save_interval=3600)
    with traced.tracker as tracker:
        assert tracker.record_request(**SAVED).durable
        assert tracker.save()
        assert tracker.record_request(**SAVED).durable
        faults.calls.clear()
        traced.clear()
        yield traced


@pytest.fixture
def saving(traced: Traced) -> SavingsTracker:
    """The tracker of ``traced``."""
    return traced.tracker


def save_calls(faults: FaultyFileSystem) -> list[str]:
    """The calls of saves."""
    return [call for call in faults.calls if call in STEPS]


class Recording(FileSystem):
    """Logs syncs and renames, by real paths."""

    def __init__(self) -> None:
        self.events: list[tuple[str, str]] = []

    def fsync_file(self, descriptor: int) -> None:
        self.events.append(("fsync", os.readlink(f"/proc/self/fd/{descriptor}")))
        super().fsync_file(descriptor)

    def replace(self, temporary: str, path: str) -> None:
        self.events.append((f"replace by {temporary}", path))
        super().replace(temporary, path)

    def fsync_directory(self, path: str) -> None:
        self.events.append(("fsync", path))
        super().fsync_directory(path)


class WithoutDirectoryFsync(Recording):
    def fsync_directory(self, path: str) -> None:
        pass


def synced_and_renamed(path: Path, recording: Recording) -> list[tuple[str, str]]:
    """The syncs and renames of one save."""
    with SavingsTracker(path, filesystem=recording, save_interval=3600) as tracker:
        assert tracker.record_request(**SAVED).durable
        assert tracker.save()
        recording.events.clear()
        assert tracker.save()
        return list(recording.events)


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
def test_order(store_path: Path) -> None:
    assert_recipe(synced_and_renamed(store_path, Recording()), store_path)


@pytest.mark.needs("linux")
def test_order_without_directory_fsync(store_path: Path) -> None:
    with pytest.raises(AssertionError):
        assert_recipe(synced_and_renamed(store_path, WithoutDirectoryFsync()), store_path)


@pytest.mark.slow
@pytest.mark.needs("linux", "strace")
def test_kernel_sees_the_order(store_path: Path, tmp_path: Path) -> None:
    program = f"""
import os
from savings_exporter import SavingsTracker
tracker = SavingsTracker({str(store_path)!r}, save_interval=3600)
assert tracker.record_request(model="m", tokens_saved=1).durable
assert tracker.save()
os.access("/the next save", os.F_OK)
assert tracker.save()
os._exit(0)
"""
    log = tmp_path / "strace.log"
    # Without -f: the calls of the thread that saves.
    strace = ["strace", "-y", "-e", "trace=fsync,fdatasync,link,linkat,rename,renameat,renameat2,access,faccessat2"]
    subprocess.run([*strace, "-o", str(log), sys.executable, "-c", program], check=True)
    later = log.read_text().partition("/the next save")[2]
    calls = [line for line in later.splitlines() if str(tmp_path) in line]
    temporary, link, previous, replace, directory = calls
    assert temporary.startswith("fsync(")
    assert ".tmp>" in temporary
    assert link.startswith("link")
    assert f'"{store_path}"' in link
    assert previous.startswith("rename")
    assert f'"{store_path}.previous"' in previous
    assert replace.startswith("rename")
    assert f'"{store_path}")' in replace
    assert directory.startswith("fsync(")
    assert f"<{tmp_path}>" in directory


def test_first_save_has_both_names(tracker: SavingsTracker, faults: FaultyFileSystem, store_path: Path) -> None:
    assert tracker.record_request(**SAVED).durable
    faults.calls.clear()
    assert tracker.save()
    previous = store_path.with_name("proxy_savings.json.previous")
    assert previous.read_bytes() == store_path.read_bytes()
    assert not previous.samefile(store_path), "damage to one must leave the other"
    assert save_calls(faults) == ["write", "fsync_file", "write", "fsync_file", "replace", "replace", "fsync_dir"]


@pytest.mark.parametrize("number", [errno.EIO, errno.EROFS], ids=errno.errorcode.get)
def test_failed_directory_fsync(
    traced: Traced, faults: FaultyFileSystem, number: int, caplog: pytest.LogCaptureFixture
) -> None:
    tracker, symbol = traced.tracker, errno.errorcode[number]
    faults.fail("fsync_dir", number)
    assert not tracker.save()
    assert not tracker.health().healthy
    assert tracker.health().error == symbol
    assert "fsync_dir" in (tracker.health().reason or "")
    assert any(symbol in message and "fsync_dir" in message for message in caplog.messages)
    failed = traced.samples()
    assert failed["savings_store_healthy"] == 0
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
    # Whichever document a power loss brings back, the journal has the rest.
    assert tracker.record_request(**SAVED).sequence == 3

    faults.mend()
    eventually(lambda: tracker.health().healthy, "the document to be saved again")
    repaired = traced.samples()
    assert repaired["savings_store_healthy"] == 1
    assert repaired["savings_last_dir_fsync_success"] == 1
    assert repaired['savings_tokens_saved_total{model="claude-sonnet-4-5",provider="anthropic"}'] == 3 * 4096
    assert repaired['savings_fsync_failures_total{target="directory"}'] >= 1


class DirectoriesThatFail(FaultyFileSystem):
    """The kernel's answer to a sync of a directory is an error; ``closed``: the directory was closed by then."""

    def __init__(self, number: int, *, closed: bool = False) -> None:
        super().__init__()
        self.number = number
        self.asked = 0
        self._closed = closed

    def _fsync(self, descriptor: int) -> None:
        if stat.S_ISDIR(os.fstat(descriptor).st_mode):
            self.asked += 1
            if self._closed:
                os.close(descriptor)
            raise OSError(self.number, os.strerror(self.number))
        super()._fsync(descriptor)


UNSUPPORTED = [errno.EINVAL, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOSYS, errno.EBADF]


@pytest.mark.parametrize("number", UNSUPPORTED, ids=errno.errorcode.get)
def test_unsupported_directory_fsync(store_path: Path, number: int, caplog: pytest.LogCaptureFixture) -> None:
    faults = DirectoriesThatFail(number)
    traced = Traced(store_path, faults, save_interval=3600)
    with traced.tracker as tracker:
        assert tracker.record_request(**SAVED).durable
        faults.calls.clear()
        assert tracker.save()
        assert tracker.save()
        assert tracker.health().healthy
        seen = traced.samples()
        # The directory fsync is tried once and the result is cached; the renamed file is synced instead.
        assert faults.asked == 1
        first = ["write", "fsync_file", "write", "fsync_file", "replace", "replace", "fsync_file"]
        assert save_calls(faults) == [*first, "write", "fsync_file", "replace", "fsync_file"]
    assert seen["savings_dir_fsync_supported"] == 0
    assert seen["savings_store_healthy"] == 1
    assert seen['savings_fsync_failures_total{target="directory"}'] == 0
    assert all(value == 0 for name, value in seen.items() if name.startswith("savings_save_failures_total"))
    step = traced.saves()[0][1][-1]
    assert step.attributes is not None
    assert step.attributes["savings.dir_fsync.result"] == "unsupported"
    assert step.status.status_code is StatusCode.UNSET
    assert len([message for message in caplog.messages if "no directory fsync" in message]) == 1


def test_ebadf_of_no_directory(store_path: Path) -> None:
    with SavingsTracker(store_path) as tracker:
        assert tracker.record_request(**SAVED).durable
    faults = DirectoriesThatFail(errno.EBADF, closed=True)
    with SavingsTracker(store_path, filesystem=faults, save_interval=3600) as tracker:
        assert not tracker.save()
        assert tracker.health().error == "EBADF"


class ShutDown(FaultyFileSystem):
    """Once ``is_down``, no file can be opened by its name, and a sync of the directory still succeeds, as on XFS."""

    is_down = False

    def probe(self, path: str) -> None:
        if self.is_down:
            raise OSError(errno.EIO, os.strerror(errno.EIO), path)
        super().probe(path)


def test_probe_catches_a_shut_down(store_path: Path) -> None:
    faults = ShutDown()
    with SavingsTracker(store_path, filesystem=faults, save_interval=3600) as tracker:
        assert tracker.record_request(**SAVED).durable
        faults.is_down = True
        assert not tracker.save()
        assert tracker.health().error == "EIO"
        assert samples(SavingsCollector(tracker))['savings_fsync_failures_total{target="directory"}'] >= 1
        faults.is_down = False
        eventually(lambda: tracker.health().healthy, "the document to be saved again")


@pytest.mark.parametrize("number", ERRNOS, ids=errno.errorcode.get)
@pytest.mark.parametrize("step", STEPS)
def test_step_that_fails_once(
    traced: Traced, faults: FaultyFileSystem, store_path: Path, step: str, number: int
) -> None:
    tracker, symbol = traced.tracker, errno.errorcode[number]
    before = traced.samples()
    faults.fail(step, number, times=1)
    assert not tracker.save()
    assert tracker.health().error == symbol
    assert "is durable in the journal" in (tracker.health().reason or "")
    eventually(lambda: tracker.health().healthy, "the document to be saved again")
    seen = traced.samples()
    assert seen['savings_requests_total{model="claude-sonnet-4-5",provider="anthropic"}'] == 2
    assert seen["savings_saves_total"] == before["savings_saves_total"] + 2
    failures = {name for name, value in seen.items() if name.startswith("savings_save_failures_total") and value}
    assert failures == {f'savings_save_failures_total{{error="{symbol}",step="{step}"}}'}
    fsyncs = {"fsync_file": (1, 0), "fsync_dir": (0, 1)}.get(step, (0, 0))
    assert (
        seen['savings_fsync_failures_total{target="file"}'],
        seen['savings_fsync_failures_total{target="directory"}'],
    ) == fsyncs
    writes = 'savings_save_step_duration_seconds_count{step="write"}'
    assert seen[writes] == before[writes] + 2
    bad, again = traced.saves()
    assert [span.name for span in bad[1]] == [f"savings.save.{name}" for name in STEPS[: STEPS.index(step) + 1]]
    assert [span.name for span in again[1]] == [f"savings.save.{name}" for name in STEPS]
    assert bad[0].attributes is not None
    assert bad[0].attributes["error.type"] == symbol
    assert again[0].attributes is not None
    assert again[0].attributes["savings.sequence"] == 2
    assert again[0].attributes["file.size"] == store_path.stat().st_size
    tracker.close()
    with SavingsTracker(store_path) as reopened:
        assert reopened.snapshot().lifetime.tokens_saved == 2 * 4096
    assert not list(store_path.parent.glob(".*.tmp"))


@pytest.mark.parametrize("number", ERRNOS, ids=errno.errorcode.get)
@pytest.mark.parametrize("step", STEPS)
def test_step_that_fails_for_long(
    saving: SavingsTracker, faults: FaultyFileSystem, store_path: Path, step: str, number: int
) -> None:
    faults.fail(step, number)
    assert not saving.save()
    receipts = [saving.record_request(**SAVED) for _ in range(20)]
    assert all(receipts), "the journal acknowledges, not the document"
    seen = samples(SavingsCollector(saving))
    assert (seen["savings_records_pending"], seen["savings_store_healthy"]) == (0, 0)
    assert saving.save() is False
    assert saving.health().error == errno.errorcode[number]
    assert saving.close() is True, "everything recorded is durable"
    faults.mend()
    with SavingsTracker(store_path) as reopened:
        assert reopened.snapshot().lifetime.requests == 22
    assert not list(store_path.parent.glob(".*.tmp"))


def test_failed_file_fsync_writes_anew(saving: SavingsTracker, faults: FaultyFileSystem) -> None:
    faults.fail("fsync_file", errno.EIO, times=1)
    assert not saving.save()
    eventually(lambda: saving.health().healthy, "the document to be saved again")
    assert save_calls(faults) == ["write", "fsync_file", *STEPS]


def test_previous_of_unknown_outcome(saving: SavingsTracker, faults: FaultyFileSystem, store_path: Path) -> None:
    durable = store_path.read_bytes()
    previous = store_path.with_name("proxy_savings.json.previous")
    faults.fail("fsync_dir", errno.EIO, times=1)
    assert not saving.save()
    assert store_path.read_bytes() != durable
    assert previous.read_bytes() == durable
    # A power loss brings back the durable one: it and the journal hold everything.
    with copied(store_path) as copy:
        copy.write_bytes(durable)
        with SavingsTracker(copy) as recovered:
            assert recovered.snapshot().lifetime.requests == 2


@pytest.mark.parametrize("step", STEPS)
def test_opens_while_saves_fail(store_path: Path, faults: FaultyFileSystem, step: str) -> None:
    with SavingsTracker(store_path) as tracker:
        assert tracker.record_request(**SAVED).durable
    # A damaged document is replaced as soon as the store is opened.
    store_path.write_bytes(store_path.read_bytes()[:-100])
    faults.fail(step, errno.ENOSPC)
    with SavingsTracker(store_path, filesystem=faults) as tracker:
        assert tracker.snapshot().lifetime.tokens_saved == 4096
        assert tracker.health().error == "ENOSPC"
        if step != "fsync_dir":
            assert tracker.record_request(**SAVED).durable
        faults.mend()
        assert tracker.record_request(**SAVED).wait(WAIT_SECONDS)
        eventually(lambda: tracker.health().healthy, "the document to be saved")


class InterruptsSyncs(FaultyFileSystem):
    """Raises KeyboardInterrupt at the main thread's next sync of a document."""

    is_armed = False

    def fsync_file(self, descriptor: int) -> None:
        if self.is_armed and threading.current_thread() is threading.main_thread():
            self.is_armed = False
            raise KeyboardInterrupt
        super().fsync_file(descriptor)


def test_interrupted_save(store_path: Path) -> None:
    faults = InterruptsSyncs()
    with SavingsTracker(store_path, filesystem=faults, save_interval=3600) as tracker:
        assert tracker.record_request(**SAVED).durable
        faults.is_armed = True
        with pytest.raises(KeyboardInterrupt):
            tracker.save()
        assert tracker.record_request(**SAVED).durable
        # The lock is free again: another process may save.
        with SavingsTracker(store_path) as other:
            assert other.save()
        assert tracker.save()
        assert tracker.snapshot().lifetime.requests == 2
    assert not list(store_path.parent.glob(".*.tmp"))


class BrokenProvider(TracerProvider):
    def get_tracer(self, *_arguments: Any, **_more: Any) -> Any:
        return object()


def test_observer_that_raises(store_path: Path) -> None:
    with SavingsTracker(store_path, tracer_provider=BrokenProvider(), save_interval=3600) as tracker:
        assert tracker.record_request(**SAVED).durable
        assert tracker.save()
        assert samples(SavingsCollector(tracker))["savings_saves_total"] == 1


KILLED = """
import os, signal, sys
from savings_exporter import SavingsTracker
from tests.support.faults import FaultyFileSystem

path, moment, what = sys.argv[1:]
armed = False

def die(when):
    if armed and when == moment:
        os.kill(os.getpid(), signal.SIGKILL)

class Killed(FaultyFileSystem):
    def write_all(self, descriptor, data):
        die("before write")
        super().write_all(descriptor, data[:100])
        die("within write")
        super().write_all(descriptor, data[100:])
        die("after write")
    def fsync_file(self, descriptor):
        die("before fsync_file"); super().fsync_file(descriptor); die("after fsync_file")
    def link(self, source, target):
        die("before link"); super().link(source, target); die("after link")
    def replace(self, source, target):
        die("before replace"); super().replace(source, target); die("after replace")
    def fsync_directory(self, directory):
        die("before fsync_dir"); super().fsync_directory(directory); die("after fsync_dir")

tracker = SavingsTracker(path, filesystem=Killed(), save_interval=3600)
assert tracker.record_request(model="m", tokens_saved=1).durable
if what == "later":
    assert tracker.save()
assert tracker.record_request(model="m", tokens_saved=10).durable
armed = True
tracker.close() if what == "closing" else tracker.save()
os._exit(3)
"""


MOMENTS = [
    (f"{when} {step}", what) for what in ("first", "later", "closing") for when in ("before", "after") for step in STEPS
]
MOMENTS += [("within write", what) for what in ("first", "later", "closing")]
MOMENTS += [("before link", "later"), ("after link", "later")]


@pytest.mark.slow
@pytest.mark.parametrize(("moment", "what"), MOMENTS)
def test_killed_within_a_save(store_path: Path, moment: str, what: str) -> None:
    arguments = [sys.executable, "-c", KILLED, str(store_path), moment, what]
    assert subprocess.run(arguments, check=False).returncode == -9
    with SavingsTracker(store_path) as tracker:
        assert tracker.snapshot().lifetime.tokens_saved == 11
        assert not list(store_path.parent.glob(".*.tmp"))
        assert tracker.record_request(model="m", tokens_saved=100).sequence == 1
    with SavingsTracker(store_path) as reopened:
        assert reopened.snapshot().lifetime.tokens_saved == 111
