"""Rules of journals and saves, some of which matter only in certain interleavings; see ``tests/mutants.py``."""

from __future__ import annotations

import errno
import json
import os
import shutil
import signal
import subprocess
import sys
import textwrap
import threading
from collections.abc import Callable
from pathlib import Path

import pytest

from savings_exporter import CorruptStoreError, SavingsRecord, SavingsTracker
from savings_exporter.storage.filesystem import DirectoryFsyncUnsupportedError, FileSystem
from savings_exporter.storage.repair import inspect
from savings_exporter.storage.writers import is_alive
from tests.support.faults import FaultyFileSystem
from tests.support.spans import Traced
from tests.support.wait import WAIT_SECONDS

NEVER = 1e6
"""A save interval: saves happen when a test asks for one."""


def record(tracker: SavingsTracker, count: int = 1) -> None:
    """Record, and check that the record is acknowledged."""
    receipt = tracker.record_many([SavingsRecord(model="m", tokens_saved=1)] * count)
    assert receipt.wait(WAIT_SECONDS)


def requests(path: Path, filesystem: FileSystem | None = None) -> int:
    """The number of records in a store when it is opened."""
    with SavingsTracker(path, filesystem=filesystem, save_interval=NEVER) as tracker:
        return tracker.snapshot().lifetime.requests


def segments(path: Path) -> list[Path]:
    return sorted(path.parent.glob("*.journal.*"))


def cut_after_first_frame(segment: Path) -> None:
    data = segment.read_bytes()
    segment.write_bytes(data[: data.index(b"SXJ2", 4)].ljust(len(data), b"\0"))


class AnotherBoot(FileSystem):
    """Simulate a restart of the machine, as after a power loss."""

    def boot_id(self) -> bytes:
        return bytes(range(16))


def test_segment_order(store_path: Path, faults: FaultyFileSystem) -> None:
    """A segment that was made ahead too late is not used after a newer one."""
    made, go_on = threading.Event(), threading.Event()

    class Slow(FaultyFileSystem):
        def write_zeros(self, descriptor: int, size: int) -> None:
            if threading.current_thread().name == "savings-save":
                made.set()
                go_on.wait(WAIT_SECONDS)
            super().write_zeros(descriptor, size)

    slow = Slow(has_direct_io=False)
    with SavingsTracker(store_path, filesystem=slow, save_interval=NEVER) as tracker:
        while not made.is_set():
            record(tracker, 100)
            made.wait(0.01)
        before = tracker.snapshot().lifetime.requests
        record(tracker, 5000)  # larger than a segment, so it gets its own segment
        slow.fail("fsync_journal", errno.EIO, 1)
        receipt = tracker.record_request(model="m", tokens_saved=1)
        assert not receipt.durable
        go_on.set()
        assert receipt.wait(WAIT_SECONDS)
        assert tracker.snapshot().lifetime.requests == before + 5001
    assert requests(store_path) == before + 5001


@pytest.mark.needs("linux")
def test_lock_of_new_writer(store_path: Path) -> None:
    """A writer whose new file another process examines is not taken for a writer without a lock."""

    class Looked(FileSystem):
        looking = -1

        def create(self, path: str, like: str) -> int:
            descriptor = super().create(path, like)
            if ".writer." in path and self.looking < 0:
                self.looking = os.open(path, os.O_RDONLY)
                assert self.try_lock(self.looking, shared=True)
            return descriptor

    looked = Looked()
    with SavingsTracker(store_path, filesystem=looked, save_interval=NEVER) as tracker:
        record(tracker)
        os.close(looked.looking)
        (file,) = store_path.parent.glob("*.writer.*")
        assert is_alive(FileSystem(), str(file))


def test_first_copy_is_gone(store_path: Path) -> None:
    """If the frame at a document's read position was never on the disk, another copy of it exists."""
    faults = FaultyFileSystem(has_direct_io=False)
    with SavingsTracker(store_path, filesystem=faults, save_interval=NEVER) as tracker:
        record(tracker)
        assert tracker.save()
        faults.fail("fsync_journal", errno.EIO, 1)
        record(tracker)
        assert tracker.save()
        copy = copied(store_path, "copy")
    cut_after_first_frame(segments(copy)[0])
    assert requests(copy, AnotherBoot()) == 2


def test_removed_segment_comes_back(store_path: Path) -> None:
    """After a power loss a removed segment may reappear without its content."""
    with SavingsTracker(store_path, save_interval=NEVER) as tracker:
        record(tracker)
        record(tracker)
        (segment,) = segments(store_path)
        size = segment.stat().st_size
    segment.write_bytes(bytes(size))
    assert requests(store_path, AnotherBoot()) == 2


def test_kill_between_names(store_path: Path, faults: FaultyFileSystem) -> None:
    """A process that dies between the two names of a save at close leaves nothing that looks damaged."""
    tracker = SavingsTracker(store_path, filesystem=faults, save_interval=NEVER)
    record(tracker)
    assert tracker.save()
    record(tracker)
    fail_at(faults, "replace", 2, lambda: shutil.copytree(store_path.parent, store_path.parent / "killed"))
    tracker.close()
    killed = store_path.parent / "killed" / store_path.name
    assert requests(killed) == 2
    assert not list(killed.parent.glob("*.corrupt-*"))


def fail_at(faults: FaultyFileSystem, step: str, nth: int, do: Callable[[], object]) -> None:
    """Call a function before the nth call of a step from now on."""
    calls = []

    def before(name: str) -> None:
        if name == step:
            calls.append(name)
            if len(calls) == nth:
                do()

    faults.before = before


class Between(FileSystem):
    """Calls a function once, at the nth listing of the store's files from now on."""

    def __init__(self) -> None:
        self.nth = 0
        self.do: Callable[[], object] = lambda: None

    def names_beside(self, path: str) -> list[str]:
        names = super().names_beside(path)
        self.nth -= 1
        if self.nth == 0:
            self.do()
        return names


class Writing:
    """A writer in a separate process, which can be killed."""

    def __init__(self, path: Path) -> None:
        program = """
            import sys
            from savings_exporter import SavingsTracker
            tracker = SavingsTracker(sys.argv[1], save_interval=1e6)
            for _ in sys.stdin:
                assert tracker.record_request(model="m", tokens_saved=1).durable
                print("durable", flush=True)
        """
        command = [sys.executable, "-c", textwrap.dedent(program), str(path)]
        self._process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)

    def record(self) -> None:
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.write("\n")
        self._process.stdin.flush()
        assert self._process.stdout.readline() == "durable\n"

    def kill(self) -> None:
        self._process.send_signal(signal.SIGKILL)
        self._process.communicate()


def copied(path: Path, name: str) -> Path:
    """A copy of the store in another directory, where its writers are dead."""
    return Path(shutil.copytree(path.parent, path.parent / name)) / path.name


def held_at(path: Path, name: str) -> int:
    """The number of records that a document states."""
    return int(json.loads(Path(f"{path}{name}").read_bytes())["lifetime"]["requests"])


# Commits.


@pytest.mark.parametrize("has_direct_io", [True, False])
def test_watermark_comes_last(store_path: Path, has_direct_io: bool) -> None:
    faults = FaultyFileSystem(has_direct_io=has_direct_io)
    with SavingsTracker(store_path, filesystem=faults, save_interval=NEVER) as tracker:
        for watermarks in (2, 1):  # with a new writer's file and a new segment, and without
            faults.calls.clear()
            record(tracker)
            calls = [call for call in faults.calls if call in ("append", "fsync_journal", "fsync_dir", "watermark")]
            assert calls[-1] == "watermark"
            assert calls.count("watermark") == watermarks
            assert "fsync_journal" in calls


@pytest.mark.parametrize("step", ["fsync_journal", "fsync_dir"])
def test_new_segment_is_synced(store_path: Path, step: str) -> None:
    faults = FaultyFileSystem(has_direct_io=False)
    with SavingsTracker(store_path, filesystem=faults, save_interval=NEVER) as tracker:
        faults.fail(step, errno.EIO, 1)
        receipt = tracker.record_request(model="m", tokens_saved=1)
        assert not receipt.durable
        assert receipt.wait(WAIT_SECONDS)


def test_copies_count_once(store_path: Path) -> None:
    """A frame whose sync failed is in two segments, with the same numbers."""
    faults = FaultyFileSystem(has_direct_io=False)
    with SavingsTracker(store_path, filesystem=faults, save_interval=NEVER) as tracker:
        record(tracker)
        faults.fail("fsync_journal", errno.EIO, 1)
        record(tracker)
        record(tracker)
        first, second = segments(store_path)
        assert first.read_bytes().count(b"SXJ2") == second.read_bytes().count(b"SXJ2") == 2
        assert tracker.snapshot().lifetime.requests == 3
        copy = copied(store_path, "copy")
    assert requests(copy) == 3
    assert requests(store_path) == 3


def test_poisoned_segment(store_path: Path) -> None:
    faults = FaultyFileSystem(has_direct_io=False)
    with SavingsTracker(store_path, filesystem=faults, save_interval=NEVER) as tracker:
        record(tracker)
        faults.fail("fsync_journal", errno.EIO, 1)
        record(tracker)
        before = segments(store_path)[0].read_bytes()
        for _ in range(5):
            record(tracker)
        assert segments(store_path)[0].read_bytes() == before


# Counting.


def test_saved_is_not_counted_again(store_path: Path) -> None:
    with SavingsTracker(store_path, save_interval=NEVER) as tracker:
        record(tracker, 3)
        assert tracker.save()
        assert segments(store_path)
        copy = copied(store_path, "copy")
    assert requests(copy) == 3


def test_gap_is_refused(store_path: Path) -> None:
    with SavingsTracker(store_path, save_interval=NEVER) as tracker:
        for _ in range(3):
            record(tracker)
        copy = copied(store_path, "copy")
    segment = segments(copy)[0]
    data = bytearray(segment.read_bytes())
    second = data.index(b"SXJ2", 4)
    data[second : data.index(b"SXJ2", second + 4)] = b"x" * (data.index(b"SXJ2", second + 4) - second)
    segment.write_bytes(data)
    with pytest.raises(CorruptStoreError, match="number 2 of writer"):
        requests(copy, AnotherBoot())


def test_end_before_the_watermark(store_path: Path) -> None:
    with SavingsTracker(store_path, save_interval=NEVER) as tracker:
        record(tracker)
        record(tracker)
        copy = copied(store_path, "copy")
    cut_after_first_frame(segments(copy)[0])
    with pytest.raises(CorruptStoreError, match="number 2 of writer"):
        requests(copy)


def test_end_before_the_document(store_path: Path) -> None:
    """A journal that ends where a document has counted it may have lost the records after that."""
    with SavingsTracker(store_path, save_interval=NEVER) as tracker:
        record(tracker)
        record(tracker)
        assert tracker.save()
        copy = copied(store_path, "copy")
    cut_after_first_frame(segments(copy)[0])
    with pytest.raises(CorruptStoreError, match="cannot be determined"):
        requests(copy, AnotherBoot())


def test_up_to_the_watermark(store_path: Path) -> None:
    """A frame that was written but not synced does not count yet."""
    faults = FaultyFileSystem(has_direct_io=False)
    with SavingsTracker(store_path, filesystem=faults, save_interval=NEVER) as tracker:
        record(tracker)
        faults.hang("fsync_journal")
        thread = threading.Thread(target=record, args=(tracker,))
        thread.start()
        assert faults.reached.wait(WAIT_SECONDS)
        assert inspect(str(store_path)).ledger.records == 1  # type: ignore[union-attr]
        faults.mend()
        thread.join()
        assert inspect(str(store_path)).ledger.records == 2  # type: ignore[union-attr]


def test_watermark_of_earlier_boot(store_path: Path) -> None:
    """After a power loss the watermark may be out of date."""
    with SavingsTracker(store_path, save_interval=NEVER) as tracker:
        record(tracker)
        (file,) = store_path.parent.glob("*.writer.*")
        older = file.read_bytes()
        record(tracker)
        copy = copied(store_path, "copy")
    (copy.parent / file.name).write_bytes(older)
    assert inspect(str(copy), AnotherBoot()).ledger.records == 2  # type: ignore[union-attr]


def test_key_sent_to_two(store_path: Path) -> None:
    """Two processes receive the same request at the same instant."""
    faults = FaultyFileSystem(has_direct_io=False)
    with (
        SavingsTracker(store_path, filesystem=faults, save_interval=NEVER) as one,
        SavingsTracker(store_path, save_interval=NEVER) as other,
    ):
        record(one)
        faults.hang("fsync_journal")
        receipts = []
        thread = threading.Thread(
            target=lambda: receipts.append(one.record_request(model="m", tokens_saved=1, idempotency_key="k"))
        )
        thread.start()
        assert faults.reached.wait(WAIT_SECONDS)
        assert other.record_request(model="m", tokens_saved=1, idempotency_key="k").durable
        faults.mend()
        thread.join()
        assert receipts[0].durable
        assert one.snapshot().lifetime.requests == other.snapshot().lifetime.requests == 2
    assert requests(store_path) == 2


def test_key_known_to_another(store_path: Path) -> None:
    with (
        SavingsTracker(store_path, save_interval=NEVER) as one,
        SavingsTracker(store_path, save_interval=NEVER) as other,
    ):
        first = one.record_request(model="m", tokens_saved=1, idempotency_key="k")
        again = other.record_request(model="m", tokens_saved=1, idempotency_key="k")
        assert again.duplicate
        assert (again.writer, again.sequence) == (first.writer, first.sequence)


# Living and dead writers.


@pytest.mark.needs("linux")
def test_locked_before_it_has_a_name(store_path: Path) -> None:
    locked = []

    class Named(FileSystem):
        def replace(self, temporary: str, path: str) -> None:
            if ".writer." in path:
                with self.opened(temporary) as descriptor:
                    locked.append(not self.try_lock(descriptor, shared=True))
            super().replace(temporary, path)

    with SavingsTracker(store_path, filesystem=Named(), save_interval=NEVER) as tracker:
        record(tracker)
    assert locked == [True]


def test_living_writer_keeps_its_files(store_path: Path) -> None:
    with (
        SavingsTracker(store_path, save_interval=NEVER) as writer,
        SavingsTracker(store_path, save_interval=NEVER) as saver,
    ):
        for _ in range(4):
            record(writer)
            assert saver.save()
            assert len(segments(store_path)) == 1
            assert list(store_path.parent.glob("*.writer.*"))
        assert saver.snapshot().lifetime.requests == 4


@pytest.mark.parametrize("nth", range(1, 5))
def test_writer_dies_within_a_save(store_path: Path, nth: int) -> None:
    """A save does not remove records that a writer committed after the save had counted its journal."""
    between = Between()
    with SavingsTracker(store_path, filesystem=between, save_interval=NEVER) as saver:
        record(saver)
        writer = Writing(store_path)
        writer.record()
        assert saver.save()

        def commit_and_die() -> None:
            writer.record()
            writer.kill()

        between.nth, between.do = nth, commit_and_die
        saver.save()
        assert between.nth <= 0, "a save lists the files so often"
        assert saver.snapshot().lifetime.requests == 3
    assert requests(store_path) == 3


def test_adopted_frame_is_on_disk(store_path: Path) -> None:
    """A dead writer's frame whose sync failed is written again before it counts."""
    faults = FaultyFileSystem(has_direct_io=False)
    with SavingsTracker(store_path, filesystem=faults, save_interval=NEVER) as tracker:
        record(tracker)
        faults.fail("fsync_journal", errno.EIO)
        tracker.record_request(model="m", tokens_saved=1)
        copy = copied(store_path, "copy")
        faults.mend()
    with SavingsTracker(copy, save_interval=NEVER) as adopter:
        assert adopter.snapshot().lifetime.requests == 2
        lost = copied(copy, "lost")
    cut_after_first_frame(segments(lost)[0])
    assert requests(lost, AnotherBoot()) == 2


def test_counters_survive_close(store_path: Path) -> None:
    for rounds in range(1, 4):
        with SavingsTracker(store_path, save_interval=NEVER) as tracker:
            record(tracker)
            counts = tracker.snapshot().operations.counts
            assert (
                sum(
                    count
                    for name, count in counts.items()
                    if name.startswith("commit_seconds/") and not name.endswith("sum")
                )
                == rounds
            )


# Saves.


def test_saves_keep_the_previous(store_path: Path) -> None:
    with SavingsTracker(store_path, save_interval=NEVER) as tracker:
        for count in range(1, 4):
            record(tracker)
            assert tracker.save()
            assert held_at(store_path, "") == count
            assert held_at(store_path, ".previous") == max(count - 1, 1)


def test_previous_keeps_its_segment(store_path: Path) -> None:
    """A segment stays as long as the previous document needs it."""
    faults = FaultyFileSystem(has_direct_io=False)
    with SavingsTracker(store_path, filesystem=faults, save_interval=NEVER) as tracker:
        record(tracker)
        assert tracker.save()
        record(tracker)
        faults.fail("fsync_journal", errno.EIO, 1)
        record(tracker)
        record(tracker)
        assert tracker.save()
        copy = copied(store_path, "copy")
    Path(f"{copy}.previous").replace(copy)
    assert requests(copy) == 4


def test_both_names_at_close(store_path: Path) -> None:
    with SavingsTracker(store_path, save_interval=NEVER) as tracker:
        record(tracker)
        assert tracker.save()
        record(tracker)
    assert held_at(store_path, "") == held_at(store_path, ".previous") == 2
    assert not os.path.samefile(store_path, f"{store_path}.previous")
    assert not segments(store_path)


def test_damaged_is_kept_aside(store_path: Path) -> None:
    with SavingsTracker(store_path, save_interval=NEVER) as tracker:
        record(tracker)
    damaged = store_path.read_bytes().replace(b"tokens_saved", b"tokens_saved?", 1)
    store_path.write_bytes(damaged)
    assert requests(store_path) == 1
    (aside,) = store_path.parent.glob("*.corrupt-*")
    assert aside.read_bytes() == damaged


def test_document_is_opened_again(store_path: Path) -> None:
    """A file system that has shut down may still sync a directory without an error."""

    class ShutDown(FileSystem):
        is_down = False

        def probe(self, path: str) -> None:
            if self.is_down:
                raise OSError(errno.EIO, os.strerror(errno.EIO), path)
            super().probe(path)

    fs = ShutDown()
    with SavingsTracker(store_path, filesystem=fs, save_interval=NEVER) as tracker:
        record(tracker)
        fs.is_down = True
        assert not tracker.save()
        fs.is_down = False
        assert tracker.save()


@pytest.mark.needs("linux")
@pytest.mark.parametrize("number", [errno.EIO, errno.EROFS, errno.EINVAL, errno.ENOTSUP])
def test_failed_or_unsupported(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int) -> None:
    """A file system without a directory fsync is distinguished from one whose directory fsync fails."""

    def fail(_descriptor: int) -> None:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(os, "fsync", fail)
    expected = OSError if number in (errno.EIO, errno.EROFS) else DirectoryFsyncUnsupportedError
    with pytest.raises(expected):
        FileSystem().fsync_directory(str(tmp_path))


def test_order_of_observers(store_path: Path) -> None:
    """Tracing comes before metrics, whose exemplars name the span."""
    traced = Traced(store_path)
    with traced.tracker as tracker:
        record(tracker)
        assert tracker.counters.exemplars()


# Readers without a lock.


@pytest.mark.parametrize("nth", range(1, 4))
def test_reader_and_two_saves(store_path: Path, nth: int) -> None:
    """The records of a journal that is removed while it is read are in a newer document."""
    between = Between()
    with (
        SavingsTracker(store_path, filesystem=between, save_interval=NEVER) as reader,
        SavingsTracker(store_path, save_interval=NEVER) as saver,
        SavingsTracker(store_path, save_interval=NEVER) as writer,
    ):
        record(writer, 3)
        assert reader.snapshot().lifetime.requests == 3
        assert writer.save()
        record(writer, 2)

        def close_and_save() -> None:
            writer.close()
            assert saver.save()
            assert saver.save()
            assert not segments(store_path)
            assert not list(store_path.parent.glob("*.writer.*"))

        between.nth, between.do = nth, close_and_save
        assert reader.snapshot().lifetime.requests == 5


@pytest.mark.parametrize("nth", range(1, 5))
def test_inspect_and_a_save(store_path: Path, nth: int) -> None:
    between = Between()
    with SavingsTracker(store_path, save_interval=NEVER) as writer:
        record(writer, 3)
        assert writer.save()
        record(writer, 2)
        between.nth, between.do = nth, writer.close
        found = inspect(str(store_path), between)
        assert found.ledger is not None
        assert (found.ledger.records, found.problems) == (5, ())


@pytest.mark.parametrize("nth", range(1, 5))
def test_segment_made_meanwhile(store_path: Path, nth: int) -> None:
    """A segment that is created while a store is opened is not reported as lost."""
    between = Between()
    with SavingsTracker(store_path, save_interval=NEVER) as writer:
        record(writer)
        between.nth, between.do = nth, lambda: record(writer, 3000)
        with SavingsTracker(store_path, filesystem=between, save_interval=NEVER) as other:
            assert other.snapshot().lifetime.requests == 3001


@pytest.mark.parametrize("nth", range(1, 5))
def test_segment_gone_meanwhile(store_path: Path, nth: int) -> None:
    """A segment that its writer removes while a store is opened does not prevent the opening."""
    between = Between()
    with SavingsTracker(store_path, save_interval=NEVER) as writer:
        record(writer)
        needless = segments(store_path)[0].with_suffix(".00000000")
        needless.write_bytes(bytes(4096))
        between.nth, between.do = nth, needless.unlink
        with SavingsTracker(store_path, filesystem=between, save_interval=NEVER) as other:
            assert other.snapshot().lifetime.requests == 1
