"""What a store does to the files and the directory it is given."""

from __future__ import annotations

import errno
import json
import os
import shutil
import stat
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from savings_exporter import SavingsRecord, SavingsTracker, StoreError
from savings_exporter.storage.filesystem import FileSystem
from savings_exporter.watched import WatchedFile
from tests.support.mounts import mounted
from tests.support.paths import DATA
from tests.support.segments import segments
from tests.support.service import run_cli
from tests.support.wait import WAIT_SECONDS


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A tmpfs of 256 KiB, unmounted at the end."""
    mountpoint = tmp_path / "disk"
    with mounted(mountpoint, "tmpfs", options="size=256k"):
        yield mountpoint


def test_new_files_are_for_the_owner(tracker: SavingsTracker, store_path: Path) -> None:
    tracker.record_request(model="m", tokens_saved=1)
    assert tracker.save()
    files = list(store_path.parent.iterdir())
    # The document, the previous one, the lock file, the writer's file and its segment.
    assert len(files) == 5
    assert {stat.S_IMODE(file.stat().st_mode) for file in files} == {0o600}


def test_files_get_the_documents_mode(store_path: Path) -> None:
    with SavingsTracker(store_path) as tracker:
        tracker.record_request(model="m", tokens_saved=1)
    store_path.chmod(0o640)
    with SavingsTracker(store_path) as tracker:
        tracker.record_request(model="m", tokens_saved=1)
        assert tracker.save()
        (segment,) = segments(store_path)
        (writer,) = (file for file in store_path.parent.glob("*.writer.*") if tracker_of(file) == tracker_of(segment))
        for file in (store_path, segment, writer):
            assert stat.S_IMODE(file.stat().st_mode) == 0o640


def tracker_of(file: Path) -> str:
    """The writer that a writer's file or a segment is of."""
    return file.name.split(".")[3]


@pytest.mark.needs("root")
def test_files_get_the_documents_owner(tracker: SavingsTracker, store_path: Path) -> None:
    tracker.record_request(model="m", tokens_saved=1)
    assert tracker.save()
    os.chown(store_path, 1234, 4321)
    assert tracker.save()
    with SavingsTracker(store_path) as other:
        other.record_request(model="m", tokens_saved=1)
        _mine, others = sorted(segments(store_path), key=lambda segment: segment.stat().st_uid)
        for file in (store_path, others):
            assert (file.stat().st_uid, file.stat().st_gid) == (1234, 4321)


def test_symlink_stays(tmp_path: Path) -> None:
    (tmp_path / "real").mkdir()
    link = tmp_path / "proxy_savings.json"
    link.symlink_to(Path("real", "savings.json"))
    for expected in (1, 2):
        with SavingsTracker(link) as tracker:
            tracker.record_request(model="m", tokens_saved=1)
            assert tracker.snapshot().lifetime.requests == expected
        assert link.is_symlink()
    with SavingsTracker(tmp_path / "real" / "savings.json") as tracker:
        assert tracker.snapshot().lifetime.requests == 2
    assert sorted(entry.name for entry in tmp_path.iterdir()) == ["proxy_savings.json", "real"]
    assert (tmp_path / "real" / "savings.json").is_file()


def test_previous_is_the_save_before(tracker: SavingsTracker, store_path: Path) -> None:
    tracker.record_request(model="m", tokens_saved=1)
    assert tracker.save()
    before = store_path.read_bytes()
    tracker.record_request(model="m", tokens_saved=2)
    assert tracker.save()
    assert store_path.read_bytes() != before
    assert store_path.with_name("proxy_savings.json.previous").read_bytes() == before


class WithoutHardLinks(FileSystem):
    def link(self, path: str, new: str) -> None:
        raise PermissionError(errno.EPERM, os.strerror(errno.EPERM))


def test_previous_without_hard_links(store_path: Path) -> None:
    with SavingsTracker(store_path, filesystem=WithoutHardLinks()) as tracker:
        tracker.record_request(model="m", tokens_saved=1)
        assert tracker.save()
        before = store_path.read_bytes()
        tracker.record_request(model="m", tokens_saved=1)
        assert tracker.save()
        assert store_path.with_name("proxy_savings.json.previous").read_bytes() == before
        assert store_path.stat().st_nlink == 1
        assert not list(store_path.parent.glob(".*.tmp"))


def test_temporaries_are_removed(store_path: Path) -> None:
    with SavingsTracker(store_path) as tracker:
        tracker.record_request(model="m", tokens_saved=1)
    left, others = (
        [store_path.with_name(f".{name}.tmp") for name in names]
        for names in (
            [f"proxy_savings.json{of}.0123456789ab" for of in ("", ".previous", ".writer.0123456789abcdef")],
            [
                "other.json.0123456789ab",
                "proxy_savings.json.b.0123456789ab",
                "proxy_savings.json.b.previous.0123456789ab",
                "proxy_savings.json.b.writer.0123456789abcdef.0123456789ab",
                "proxy_savingsXjson.0123456789ab",
                "proxy_savings.json.notes",
            ],
        )
    )
    for path in (*left, *others):
        path.write_bytes(b"half")
    with SavingsTracker(store_path):
        assert [path for path in left if path.exists()] == []
        assert [path for path in others if not path.exists()] == []


@pytest.mark.needs("user-namespace")
def test_owner_unknown_in_a_container(store_path: Path) -> None:
    with SavingsTracker(store_path) as tracker:
        tracker.record_request(model="m", tokens_saved=1)
    os.chown(store_path, 1234, 4321)
    store_path.chmod(0o666)
    store_path.with_name("proxy_savings.json.lock").chmod(0o666)
    command = [sys.executable, "-m", "savings_exporter", "record", "--store", str(store_path)]
    inside = ["unshare", "--user", "--map-root-user", *command, "--model", "m", "--tokens-saved", "2"]
    done = subprocess.run(inside, capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.endswith(": 3 tokens saved in total\n")


class CannotGiveAway(FileSystem):
    """Setting the owner of a new file fails, while ``fails``."""

    fails = False

    def create(self, path: str, like: str) -> int:
        if self.fails:
            raise OSError(errno.EIO, os.strerror(errno.EIO), path)
        return super().create(path, like)


def test_error_while_a_file_is_made(store_path: Path) -> None:
    fs = CannotGiveAway()
    with SavingsTracker(store_path, filesystem=fs) as tracker:
        tracker.record_request(model="m", tokens_saved=1)
        fs.fails = True
        assert not tracker.save()
        assert tracker.health().error == "EIO"
        fs.fails = False
        assert tracker.save()


def test_removed_document_is_written_again(tracker: SavingsTracker, store_path: Path) -> None:
    tracker.record_request(model="m", tokens_saved=1)
    assert tracker.save()
    store_path.unlink()
    assert tracker.record_request(model="m", tokens_saved=2).durable
    assert tracker.save()
    assert json.loads(store_path.read_bytes())["lifetime"]["tokens_saved"] == 3


def test_headroom_document_is_taken_over(store_path: Path) -> None:
    original = (DATA / "headroom" / "v6-latest" / "proxy_savings.json").read_bytes()
    store_path.write_bytes(original)
    with SavingsTracker(store_path) as tracker:
        assert tracker.record_request(model="gpt-5", tokens_saved=1).durable
        assert store_path.read_bytes() == original, "nothing is saved before the interval is over"
        assert tracker.save()
    with SavingsTracker(store_path) as tracker:
        assert tracker.snapshot().lifetime.tokens_saved == 2672322 + 1


def test_what_cannot_be_a_store(tmp_path: Path) -> None:
    with pytest.raises(StoreError, match=r"is a directory; name a file in it"):
        SavingsTracker(tmp_path)
    with pytest.raises(StoreError, match=r"mkdir -p .*missing"):
        SavingsTracker(tmp_path / "missing" / "proxy_savings.json")
    os.mkfifo(tmp_path / "fifo")
    with pytest.raises(StoreError, match=r"Not a regular file"):
        SavingsTracker(tmp_path / "fifo")
    (tmp_path / "file").write_text("")
    with pytest.raises(StoreError, match=r"ENOTDIR"):
        SavingsTracker(tmp_path / "file" / "proxy_savings.json")


@pytest.mark.needs("mount")
def test_read_only_directory(small_disk: Path) -> None:
    subprocess.run(["mount", "-o", "remount,ro", small_disk], check=True)
    store = small_disk / "proxy_savings.json"
    with pytest.raises(StoreError, match=r"Read-only file system \(EROFS\)"):
        SavingsTracker(store)
    answer = run_cli("record", "--store", str(store), "--model", "m", "--tokens-saved", "1")
    assert (answer.returncode, answer.stderr.count("\n")) == (1, 1)
    assert "Read-only file system" in answer.stderr
    assert str(small_disk) in answer.stderr


def fill(directory: Path) -> Path:
    """A file that takes all that is left of a disk."""
    filler = directory / "filler"
    with pytest.raises(OSError, match="No space left"):
        filler.write_bytes(bytes(1024 * 1024))
    return filler


@pytest.mark.slow
@pytest.mark.needs("mount")
def test_full_disk(small_disk: Path) -> None:
    store = small_disk / "proxy_savings.json"
    with SavingsTracker(store) as tracker:
        tracker.record_request(model="m", tokens_saved=1)
        assert tracker.save()
        filler = fill(small_disk)
        # What the first segment has room for is durable.
        assert tracker.record_request(model="m", tokens_saved=10).durable
        assert not tracker.save()
        assert tracker.health().error == "ENOSPC"
        receipt = tracker.record_many([SavingsRecord(model="m" * 100, tokens_saved=1)] * 400)
        assert not receipt.durable
        answer = run_cli("record", "--store", str(store), "--model", "m", "--tokens-saved", "1")
        assert answer.returncode == 1
        assert "No space left on device" in answer.stderr
        assert "Traceback" not in answer.stderr
        assert store.read_bytes().endswith(b"}\n")
        filler.unlink()
        assert receipt.wait(WAIT_SECONDS)
    with SavingsTracker(store) as tracker:
        assert tracker.snapshot().lifetime.tokens_saved == 411


@pytest.mark.needs("mount")
def test_nearly_full_disk(small_disk: Path) -> None:
    store = small_disk / "proxy_savings.json"
    with SavingsTracker(store) as tracker:
        tracker.snapshot()
        filler = fill(small_disk)
        with filler.open("r+b") as file:
            file.truncate(filler.stat().st_size - 24 * 1024)
        # Less than a first segment has, and more than a record needs.
        assert tracker.record_request(model="m", tokens_saved=1).durable
        (segment,) = segments(store)
        assert segment.stat().st_size == 4096
    assert not list(small_disk.glob(".*.tmp"))
    filler.unlink(missing_ok=True)
    with SavingsTracker(store) as tracker:
        assert tracker.snapshot().lifetime.tokens_saved == 1


def test_when_the_store_began_to_count(store_path: Path) -> None:
    """The time stays, over saves, over restarts, and when another process opens the store."""
    with SavingsTracker(store_path) as tracker:
        created_at = tracker.snapshot().created_at
        assert created_at is not None
        assert tracker.record_request(model="m", tokens_saved=1).durable
    with SavingsTracker(store_path) as tracker:
        assert tracker.record_request(model="m", tokens_saved=1, timestamp="2020-01-01T00:00:00Z").durable
        assert tracker.save()
        assert tracker.snapshot().created_at == created_at
    assert WatchedFile(store_path).snapshot().created_at == created_at


def test_killed_before_the_first_save(store_path: Path) -> None:
    """A store that has no document yet began when it got its name, not when it is opened again."""
    seen = set()
    with SavingsTracker(store_path, save_interval=3600) as tracker:
        assert tracker.record_request(model="m", tokens_saved=1).durable
        seen.add(tracker.snapshot().created_at)
        for number in range(2):
            copy = store_path.parent / f"copy{number}"
            shutil.copytree(store_path.parent, copy, ignore=shutil.ignore_patterns("copy*"))
            assert not (copy / store_path.name).exists()
            with SavingsTracker(copy / store_path.name) as other:
                assert other.snapshot().lifetime.tokens_saved == 1
                seen.add(other.snapshot().created_at)
            assert WatchedFile(copy / store_path.name).snapshot().created_at in seen
    assert len(seen) == 1
