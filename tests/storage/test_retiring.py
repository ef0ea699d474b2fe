"""Segments, writers' files and entries are removed when they are no longer needed, and not before."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from savings_exporter import SavingsRecord, SavingsTracker
from tests.support.faults import FaultyFileSystem

KILLED = """
import os, sys
from savings_exporter import SavingsTracker
tracker = SavingsTracker(sys.argv[1], save_interval=3600)
for tokens in sys.argv[2:]:
    assert tracker.save() if tokens == "save" else tracker.record_request(model="m", tokens_saved=int(tokens)).durable
os._exit(0)
"""


@pytest.fixture
def path(tmp_path: Path) -> Path:
    """The path of a store in a directory without other files."""
    (tmp_path / "store").mkdir()
    return tmp_path / "store" / "proxy_savings.json"


def killed(path: Path, *steps: int | str) -> None:
    """A process that records a number of tokens or saves, step by step, and is killed."""
    subprocess.run([sys.executable, "-c", KILLED, str(path), *map(str, steps)], check=True)


def segments(path: Path) -> set[str]:
    return {file.name for file in path.parent.glob("*.journal.*")}


def entries(path: Path, name: str = "") -> set[str]:
    """The writers that a document has an entry of."""
    return set(json.loads(Path(f"{path}{name}").read_bytes())["savings_exporter"]["writers"])


def total(path: Path) -> int:
    with SavingsTracker(path) as tracker:
        return tracker.snapshot().lifetime.tokens_saved


def total_of_copy(path: Path, copy: Path, *, with_previous: bool = False) -> int:
    """What a process finds that opens a copy, ``with_previous`` the previous document in the place of the document."""
    shutil.copytree(path.parent, copy)
    try:
        if with_previous and Path(f"{copy / path.name}.previous").exists():
            Path(f"{copy / path.name}.previous").replace(copy / path.name)
        return total(copy / path.name)
    finally:
        shutil.rmtree(copy)


def test_needed_by_previous(path: Path) -> None:
    """A dead writer's segment goes with the second save that covers it."""
    with SavingsTracker(path, save_interval=3600) as tracker:
        assert tracker.record_request(model="m", tokens_saved=1)
        assert tracker.save()
        living = segments(path)
        killed(path, 2)
        (dead,) = segments(path) - living
        assert tracker.save()
        assert dead in segments(path)
        assert tracker.save()
        assert dead not in segments(path)


def test_full_segments(path: Path) -> None:
    """Of a living writer the full ones go, when both documents cover them; the one that is written stays."""
    with SavingsTracker(path, save_interval=3600) as tracker:
        assert tracker.record_request(model="m", tokens_saved=1)
        assert tracker.save()
        for _ in range(3):
            assert tracker.record_many([SavingsRecord(model="m", tokens_saved=1)] * 2000)
        first = min(segments(path))
        assert tracker.save()
        assert first in segments(path)
        assert tracker.save()
        assert first not in segments(path)
        assert segments(path)
        assert tracker.record_request(model="m", tokens_saved=1)
        assert tracker.snapshot().lifetime.tokens_saved == 6002
    assert total(path) == 6002


@pytest.mark.parametrize("step", ["write", "fsync_file", "replace", "fsync_dir"])
def test_failed_save_keeps_all(path: Path, faults: FaultyFileSystem, step: str) -> None:
    killed(path, 1, "save", 2)
    with SavingsTracker(path, save_interval=3600, filesystem=faults) as tracker:
        before = segments(path)
        for number in (5, 28):
            faults.fail(step, number)
            assert not tracker.save()
            assert segments(path) == before
        faults.mend()
        assert tracker.save()
        assert tracker.save()
        assert not segments(path)
    assert total(path) == 3


@pytest.mark.slow
def test_previous_at_any_moment(path: Path, tmp_path: Path) -> None:
    """Whenever a power loss may put the previous document back, it and the journals hold all that is acknowledged."""
    faults, acknowledged, checked = FaultyFileSystem(), 0, 0

    def check(_step: str) -> None:
        nonlocal checked
        if threading.current_thread() is not threading.main_thread():
            return
        for with_previous in (False, True):
            if path.exists() or segments(path):
                # A frame that is written and not acknowledged yet may be in it.
                found = total_of_copy(path, tmp_path / "copy", with_previous=with_previous)
                assert acknowledged <= found <= acknowledged + 1
        checked += 1

    faults.before = check
    for tracked in range(3):
        killed(path, 1, *(["save"] if tracked else []), 1)
        acknowledged += 2
        with SavingsTracker(path, save_interval=3600, filesystem=faults) as tracker:
            for saves in (0, 1, 2, 0):
                assert tracker.record_request(model="m", tokens_saved=1).durable
                acknowledged += 1
                for _ in range(saves):
                    assert tracker.save()
                    check("")
        check("")
    assert checked > 50


def test_segment_comes_back(path: Path, tmp_path: Path) -> None:
    """After a power loss one that was removed can be there again. While its writer has an entry it is not counted."""
    killed(path, 1, 2)
    (segment,) = path.parent.glob("*.journal.*")
    kept = tmp_path / "kept"
    shutil.copy(segment, kept)
    writer = segment.name.split(".")[-2]
    with SavingsTracker(path, save_interval=3600) as tracker:
        assert tracker.record_request(model="m", tokens_saved=4)
        assert tracker.save()
        assert not segment.exists()
        assert writer in entries(path)
        shutil.copy(kept, segment)
        assert total_of_copy(path, tmp_path / "copy") == 7
        assert total_of_copy(path, tmp_path / "copy", with_previous=True) == 7
        assert tracker.save()
        assert tracker.snapshot().lifetime.tokens_saved == 7
        assert not segment.exists()
    assert total(path) == 7


def test_entry_goes_after_a_sync(path: Path, faults: FaultyFileSystem) -> None:
    """Only in a save that begins with a directory fsync that works: then no removed segment can come back."""
    killed(path, 1)
    (writer,) = {name.split(".")[-2] for name in segments(path)}
    with SavingsTracker(path, save_interval=3600, filesystem=faults) as tracker:
        assert tracker.save()
        assert not segments(path)
        assert writer in entries(path)
        faults.calls.clear()
        assert tracker.save()
        assert writer not in entries(path)
        assert faults.calls[0] == "fsync_dir"
        faults.calls.clear()
        assert tracker.save()
        assert writer not in entries(path)
        assert faults.calls[0] == "write"


def test_entry_stays_if_sync_fails(path: Path, faults: FaultyFileSystem) -> None:
    killed(path, 1)
    (writer,) = {name.split(".")[-2] for name in segments(path)}
    with SavingsTracker(path, save_interval=3600, filesystem=faults) as tracker:
        assert tracker.save()
        faults.fail("fsync_dir", 5, times=1)
        assert not tracker.save()
        assert writer in entries(path)
        assert tracker.save()
        assert writer not in entries(path)


@pytest.mark.slow
def test_100_rounds(path: Path) -> None:
    """Processes that start and end leave only the documents, the lock file, and the file of the last one."""
    for number in range(1, 101):
        with SavingsTracker(path) as tracker:
            assert tracker.record_request(model="m", tokens_saved=1).durable
            assert tracker.snapshot().lifetime.requests == number
        names = {file.name.replace(path.name, "") for file in path.parent.iterdir()}
        writers = {name for name in names if name.startswith(".writer.")}
        assert names - writers == {"", ".previous", ".lock"}
        assert len(writers) <= 1
        assert len(entries(path)) <= 3


@pytest.mark.slow
def test_killed_ones(path: Path) -> None:
    """The files of killed processes are removed, too, after a few saves at the latest."""
    for _ in range(8):
        killed(path, 1)
    with SavingsTracker(path, save_interval=3600) as tracker:
        for _ in range(3):
            assert tracker.save()
        assert tracker.snapshot().lifetime.tokens_saved == 8
        names = {file.name.replace(path.name, "") for file in path.parent.iterdir()}
        # The living process's own file is there.
        assert {name for name in names if not name.startswith(".writer.")} == {"", ".previous", ".lock"}
        assert len(names) <= 4
        assert entries(path) == set()
