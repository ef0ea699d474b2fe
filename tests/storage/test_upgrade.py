"""Stores of format 1, as the first version of this program wrote them."""

from __future__ import annotations

import errno
import json
import shutil
from pathlib import Path

import pytest

from savings_exporter import SavingsTracker, StoreError
from savings_exporter.storage.lock import content_of
from savings_exporter.storage.repair import inspect
from savings_exporter.watched import WatchedFile
from tests.support.faults import FaultyFileSystem
from tests.support.paths import DATA
from tests.support.service import run_cli

DOCUMENT = "proxy_savings.json"
TOTAL = 1_111_110


def copied(kind: str, directory: Path) -> Path:
    """A store of format 1 in a separate directory."""
    shutil.copytree(DATA / "format1" / kind, directory / kind)
    return directory / kind / DOCUMENT


def contents(path: Path) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in path.parent.iterdir()}


def test_closed_store(tmp_path: Path) -> None:
    path = copied("closed", tmp_path)
    assert inspect(str(path)).problems == ()
    assert WatchedFile(path).snapshot().lifetime.tokens_saved == TOTAL
    with SavingsTracker(path) as tracker:
        snapshot = tracker.snapshot()
        assert (snapshot.lifetime.requests, snapshot.lifetime.tokens_saved) == (6, TOTAL)
        assert snapshot.by_model["model-1"].tokens_saved == 10 + 10_000
        assert snapshot.projects["p"].tokens_saved == TOTAL
        for number in (1, 3, 5):
            repeat = tracker.record_request(model="any", tokens_saved=1, idempotency_key=f"key-{number}")
            assert (repeat.durable, repeat.duplicate, repeat.sequence) == (True, True, number)
        assert not tracker.record_request(model="m", tokens_saved=1, idempotency_key="key-2").duplicate
    with SavingsTracker(path) as tracker:
        assert tracker.snapshot().lifetime.tokens_saved == TOTAL + 1


def test_converted_when_opened(tmp_path: Path) -> None:
    """Before anything is recorded, so that a process of the first version that still runs notices.

    It reads the document again when the lock file is not as it left it, and refuses the new format.
    """
    path = copied("closed", tmp_path)
    with SavingsTracker(path) as tracker:
        assert tracker.snapshot().lifetime.tokens_saved == TOTAL
        block = json.loads(path.read_bytes())["savings_exporter"]
        assert block["format"] == 2
        lock = content_of(path.with_name(f"{DOCUMENT}.lock").read_bytes())
        assert (lock.store.hex(), lock.earlier_records) == (block["store"], None)
        assert not path.with_name(f"{DOCUMENT}.journal.00000001").exists()


@pytest.mark.parametrize("step", ["write", "fsync_file", "replace", "fsync_dir"])
def test_conversion_fails(tmp_path: Path, faults: FaultyFileSystem, step: str) -> None:
    """Without it, a process of the first version might still commit to a journal that is no longer read."""
    path = copied("closed", tmp_path)
    faults.fail(step, errno.EIO)
    with pytest.raises(StoreError, match=f"cannot be converted .*{step} failed: .*EIO"):
        SavingsTracker(path, filesystem=faults)
    faults.mend()
    with SavingsTracker(path, filesystem=faults) as tracker:
        assert tracker.snapshot().lifetime.tokens_saved == TOTAL


@pytest.mark.slow
def test_lock_held_by_it(tmp_path: Path) -> None:
    path = copied("closed", tmp_path)
    faults = FaultyFileSystem()
    before = contents(path)
    descriptor = faults.open_lock(f"{path}.lock", like=str(path))
    assert faults.try_lock(descriptor)
    try:
        with pytest.raises(StoreError, match=r"an earlier version .* is saving this store; stop that process first"):
            SavingsTracker(path)
        assert contents(path) == before
    finally:
        faults.close(descriptor)


def test_previous_in_its_place(tmp_path: Path) -> None:
    path = copied("closed", tmp_path)
    with SavingsTracker(path, save_interval=3600) as tracker:
        assert tracker.record_request(model="m", tokens_saved=5).durable
        shutil.copytree(path.parent, tmp_path / "copy")
    copy = tmp_path / "copy" / DOCUMENT
    Path(f"{copy}.previous").replace(copy)
    with SavingsTracker(copy) as tracker:
        assert tracker.snapshot().lifetime.tokens_saved == TOTAL + 5


@pytest.mark.slow
@pytest.mark.parametrize("has_lock", [True, False])
def test_store_not_closed(tmp_path: Path, *, has_lock: bool) -> None:
    path = copied("open", tmp_path)
    if not has_lock:
        path.with_name(f"{DOCUMENT}.lock").unlink()
    before = contents(path)
    for attempt in (lambda: SavingsTracker(path), lambda: WatchedFile(path)):
        with pytest.raises(StoreError, match="did not close it") as refused:
            attempt()
        message = str(refused.value)
        assert "\n" not in message
        assert f"start and stop it once, with its own command (serve --store {path})" in message
    for options in ([], ["--repair"]):
        done = run_cli("verify", *options, "--store", str(path))
        assert (done.returncode, done.stdout) == (1, "")
        assert "start and stop it once" in done.stderr
    after = contents(path)
    # The lock file may be made; nothing else is touched.
    assert {name: after[name] for name in before} == before
    assert after.keys() - before.keys() <= {f"{DOCUMENT}.lock"}


def test_only_lock_says_not_closed(tmp_path: Path) -> None:
    path = copied("open", tmp_path)
    path.with_name(f"{DOCUMENT}.journal.00000001").unlink()
    with pytest.raises(StoreError, match="did not close it"):
        SavingsTracker(path)


def test_other_document_not_closed(tmp_path: Path) -> None:
    """Another program replaced the document while the journal held records that it did not."""
    path = copied("open", tmp_path)
    path.write_bytes((DATA / "headroom" / "v6-latest" / DOCUMENT).read_bytes())
    with pytest.raises(StoreError, match="did not close it"):
        SavingsTracker(path)


def test_other_document_closed(tmp_path: Path) -> None:
    path = copied("closed", tmp_path)
    path.write_bytes((DATA / "headroom" / "v6-latest" / DOCUMENT).read_bytes())
    with pytest.raises(StoreError, match="another program rewrote the document"):
        SavingsTracker(path)


def test_document_damaged(tmp_path: Path) -> None:
    """The document before it needs the journal, which only the first version reads."""
    path = copied("closed", tmp_path)
    path.write_bytes(path.read_bytes()[:-20])
    with pytest.raises(StoreError, match="did not close it"):
        SavingsTracker(path)
