"""Files of a store that are removed or renamed by hand while a tracker has it open."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from savings_exporter import SavingsRecord, SavingsTracker
from savings_exporter.storage.repair import inspect
from tests.support.wait import eventually


def removed(path: Path) -> None:
    path.unlink()


def renamed(path: Path) -> None:
    path.rename(path.with_name(f"moved-{path.name}"))


BY_HAND = pytest.mark.parametrize("lose", [removed, renamed])


def files(store_path: Path, kind: str) -> list[Path]:
    """A store's documents, or its segments, writers' files or lock file."""
    return sorted(store_path.parent.glob(f"{store_path.name}{kind}"))


def total_of_copy(store_path: Path, directory: Path) -> int:
    """The total that a process would find if it opened the store now."""
    shutil.copytree(store_path.parent, directory)
    with SavingsTracker(directory / store_path.name) as tracker:
        total = tracker.snapshot().lifetime.tokens_saved
    shutil.rmtree(directory)
    return total


@pytest.fixture
def busy(store_path: Path) -> SavingsTracker:
    """A tracker with 1 token in the document and 30 in its journal alone; its save comes only when it is asked for."""
    store_path.parent.joinpath("store").mkdir()
    tracker = SavingsTracker(store_path.parent / "store" / store_path.name, save_interval=3600)
    assert tracker.record_request(model="m", tokens_saved=1)
    assert tracker.save()
    for tokens in (10, 20):
        assert tracker.record_request(model="m", tokens_saved=tokens)
    return tracker


@BY_HAND
@pytest.mark.parametrize(
    "kinds", [["", ".previous"], [".journal.*"], [".writer.*"], [".lock"], [".journal.*", ".writer.*"], ["*"]]
)
def test_next_save(busy: SavingsTracker, tmp_path: Path, lose: Callable[[Path], None], kinds: list[str]) -> None:
    path = Path(busy.storage_path)
    for kind in kinds:
        for file in files(path, kind):
            lose(file)
    assert busy.record_request(model="m", tokens_saved=100).durable
    assert busy.save()
    assert inspect(str(path)).problems == ()
    assert total_of_copy(path, tmp_path / "copy") == 131
    assert busy.record_request(model="m", tokens_saved=1000).durable
    assert total_of_copy(path, tmp_path / "copy") == 1131
    assert busy.health().healthy
    assert busy.close()
    with SavingsTracker(path) as tracker:
        assert tracker.snapshot().lifetime.tokens_saved == 1131


@BY_HAND
@pytest.mark.parametrize("kind", ["", ".journal.*", ".writer.*", ".lock"])
def test_closed_then(busy: SavingsTracker, lose: Callable[[Path], None], kind: str) -> None:
    path = Path(busy.storage_path)
    for file in files(path, kind):
        lose(file)
    assert busy.close()
    with SavingsTracker(path) as tracker:
        assert tracker.snapshot().lifetime.tokens_saved == 31


@pytest.mark.slow
@BY_HAND
@pytest.mark.parametrize("kind", [".journal.*", ".writer.*"])
def test_background_makes_again(store_path: Path, lose: Callable[[Path], None], kind: str) -> None:
    """Without a save: so that another process finds what this one acknowledged."""
    with SavingsTracker(store_path, save_interval=3600) as tracker:
        assert tracker.record_request(model="m", tokens_saved=1)
        for file in files(store_path, kind):
            lose(file)
        assert tracker.record_request(model="m", tokens_saved=2)
        assert tracker.flush()
        # A record with wait=False also wakes the thread.
        tracker.record_request(model="m", tokens_saved=4, wait=False)
        eventually(lambda: files(store_path, kind), f"{kind} to be made again")
        assert tracker.flush()
        with SavingsTracker(store_path) as other:
            assert other.snapshot().lifetime.tokens_saved == 7


@pytest.mark.parametrize("kind", [".journal.*", ".writer.*", ".lock", ""])
def test_other_process_saves(store_path: Path, kind: str) -> None:
    """Another process meets the gap before the one whose file it is makes it again."""
    with SavingsTracker(store_path, save_interval=3600) as tracker, SavingsTracker(store_path) as other:
        assert tracker.record_many([SavingsRecord(model="m", tokens_saved=1)] * 3)
        assert tracker.save()
        assert tracker.record_request(model="m", tokens_saved=10)
        for file in files(store_path, kind):
            file.unlink()
        assert other.record_request(model="m", tokens_saved=100)
        for _ in range(2):
            other.save()
        assert tracker.record_request(model="m", tokens_saved=1000).durable
        assert tracker.save()
        assert other.save()
        assert tracker.snapshot().lifetime.tokens_saved == other.snapshot().lifetime.tokens_saved == 1113
    with SavingsTracker(store_path) as tracker:
        assert tracker.snapshot().lifetime.tokens_saved == 1113


@BY_HAND
@pytest.mark.parametrize("kinds", [[".writer.*"], [".journal.*", ".writer.*"]])
def test_idle_writer_is_kept(busy: SavingsTracker, lose: Callable[[Path], None], kinds: list[str]) -> None:
    """An idle writer without its file is not treated as dead, no matter how often another process saves."""
    path = Path(busy.storage_path)
    with SavingsTracker(path, save_interval=3600) as other:
        assert other.save()
        for kind in kinds:
            for file in files(path, kind):
                lose(file)
        for _ in range(4):
            assert other.record_request(model="m", tokens_saved=100)
            assert other.save()
    assert busy.record_request(model="m", tokens_saved=1000).durable
    assert busy.close()
    with SavingsTracker(path) as tracker:
        assert tracker.snapshot().lifetime.tokens_saved == 1431
