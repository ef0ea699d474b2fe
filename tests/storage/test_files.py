"""What a store does to the files and the directory it is given."""

from __future__ import annotations

import errno
import json
import os
import stat
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from savings_exporter import SavingsTracker, StoreError
from tests.support.mounts import mounted
from tests.support.paths import DATA
from tests.support.service import run_cli


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A tmpfs of 256 KiB, unmounted at the end."""
    mountpoint = tmp_path / "disk"
    with mounted(mountpoint, "tmpfs", options="size=256k"):
        yield mountpoint


def test_a_new_document_is_for_its_owner_only(tracker: SavingsTracker, store_path: Path) -> None:
    tracker.record_request(model="m", tokens_saved=1)
    assert stat.S_IMODE(store_path.stat().st_mode) == 0o600


def test_the_mode_of_a_document_stays(store_path: Path) -> None:
    with SavingsTracker(store_path) as tracker:
        tracker.record_request(model="m", tokens_saved=1)
        store_path.chmod(0o640)
        tracker.record_request(model="m", tokens_saved=1)
        segment = store_path.with_name("proxy_savings.json.journal.00000001")
        assert stat.S_IMODE(segment.stat().st_mode) == 0o640
    assert stat.S_IMODE(store_path.stat().st_mode) == 0o640


@pytest.mark.needs("root")
def test_the_owner_of_a_document_stays(tracker: SavingsTracker, store_path: Path) -> None:
    tracker.record_request(model="m", tokens_saved=1)
    os.chown(store_path, 1234, 4321)
    assert tracker.save()
    assert (store_path.stat().st_uid, store_path.stat().st_gid) == (1234, 4321)


def test_a_symlinked_document_stays_a_link(tmp_path: Path) -> None:
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


def test_the_save_before_is_kept_whole(tracker: SavingsTracker, store_path: Path) -> None:
    tracker.record_request(model="m", tokens_saved=1)
    before = store_path.read_bytes()
    tracker.record_request(model="m", tokens_saved=2)
    assert tracker.save()
    assert store_path.with_name("proxy_savings.json.previous").read_bytes() == before


def test_without_hard_links_the_save_before_is_copied(
    tracker: SavingsTracker, store_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def link(_source: str, _target: str) -> None:
        raise PermissionError(1, "Operation not permitted")

    monkeypatch.setattr(os, "link", link)
    tracker.record_request(model="m", tokens_saved=1)
    before = store_path.read_bytes()
    assert tracker.save()
    assert store_path.with_name("proxy_savings.json.previous").read_bytes() == before


def test_temporary_files_of_dead_processes_are_removed_at_open(store_path: Path) -> None:
    with SavingsTracker(store_path) as tracker:
        tracker.record_request(model="m", tokens_saved=1)
    left, others = (
        [store_path.with_name(f".{name}.tmp") for name in names]
        for names in (
            [f"proxy_savings.json{of}.0123456789ab" for of in ("", ".previous", ".journal.00000001")],
            [
                "other.json.0123456789ab",
                "proxy_savings.json.b.0123456789ab",
                "proxy_savings.json.b.previous.0123456789ab",
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
def test_an_owner_that_a_container_does_not_know_does_not_stop_saving(store_path: Path) -> None:
    with SavingsTracker(store_path) as tracker:
        tracker.record_request(model="m", tokens_saved=1)
    os.chown(store_path, 1234, 4321)
    store_path.chmod(0o666)
    store_path.with_name("proxy_savings.json.lock").chmod(0o666)
    command = [sys.executable, "-m", "savings_exporter", "record", "--store", str(store_path)]
    inside = ["unshare", "--user", "--map-root-user", *command, "--model", "m", "--tokens-saved", "2"]
    done = subprocess.run(inside, capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.endswith(": 3 tokens saved so far\n")


def test_a_disk_error_while_the_owner_is_set_is_a_failed_save(
    tracker: SavingsTracker, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fchown(_descriptor: int, _user: int, _group: int) -> None:
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    tracker.record_request(model="m", tokens_saved=1)
    monkeypatch.setattr(os, "fchown", fchown)
    assert not tracker.save()
    assert tracker.health().error == "EIO"
    monkeypatch.undo()
    assert tracker.save()


def test_a_document_that_was_taken_away_is_written_anew(tracker: SavingsTracker, store_path: Path) -> None:
    tracker.record_request(model="m", tokens_saved=1)
    store_path.unlink()
    assert tracker.record_request(model="m", tokens_saved=2).durable
    assert tracker.save()
    assert json.loads(store_path.read_bytes())["lifetime"]["tokens_saved"] == 3


def test_a_headroom_document_is_taken_over_and_kept_as_it_was(store_path: Path) -> None:
    original = (DATA / "headroom" / "v6-latest" / "proxy_savings.json").read_bytes()
    store_path.write_bytes(original)
    with SavingsTracker(store_path) as tracker:
        assert tracker.record_request(model="gpt-5", tokens_saved=1).durable
    with SavingsTracker(store_path) as tracker:
        assert tracker.snapshot().lifetime.tokens_saved == 2672322 + 1


def test_what_cannot_be_a_store_is_refused_with_the_remedy(tmp_path: Path) -> None:
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
def test_a_read_only_directory_gives_one_clear_line(small_disk: Path) -> None:
    subprocess.run(["mount", "-o", "remount,ro", small_disk], check=True)
    store = small_disk / "proxy_savings.json"
    with pytest.raises(StoreError, match=r"Read-only file system \(EROFS\)"):
        SavingsTracker(store)
    answer = run_cli("record", "--store", str(store), "--model", "m", "--tokens-saved", "1")
    assert (answer.returncode, answer.stderr.count("\n")) == (1, 1)
    assert "Read-only file system" in answer.stderr
    assert str(small_disk) in answer.stderr


@pytest.mark.needs("mount")
def test_a_full_disk_gives_one_clear_line_and_costs_nothing(small_disk: Path) -> None:
    store = small_disk / "proxy_savings.json"
    with SavingsTracker(store) as tracker:
        tracker.record_request(model="m", tokens_saved=1)
        filler = small_disk / "filler"
        with pytest.raises(OSError, match="No space left"):
            filler.write_bytes(bytes(1024 * 1024))
        receipt = tracker.record_request(model="m", tokens_saved=10)
        assert not receipt.durable
        assert tracker.health().error == "ENOSPC"
        answer = run_cli("record", "--store", str(store), "--model", "m", "--tokens-saved", "1")
        assert answer.returncode == 1
        assert "No space left on device" in answer.stderr
        assert "Traceback" not in answer.stderr
        assert store.read_bytes().endswith(b"}\n")
        filler.unlink()
        assert receipt.wait(30)
    with SavingsTracker(store) as tracker:
        assert tracker.snapshot().lifetime.tokens_saved == 11
