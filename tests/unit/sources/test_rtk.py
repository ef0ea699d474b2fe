"""RTK's database as a source. The databases have the schema that RTK 1.1.0 writes; RTK itself is a Rust program that
no package index of this project's languages has, so no test runs it.
"""

from __future__ import annotations

import os
import signal
import sqlite3
import subprocess
import sys
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path

import pytest

from savings_exporter import SavingsTracker
from savings_exporter.model.cursors import DAMAGED, OVERSIZED
from savings_exporter.sources import rtk
from savings_exporter.sources.building import let_in
from savings_exporter.sources.discovery import source_of, usual_sources
from savings_exporter.sources.importing import Importing
from savings_exporter.sources.rtk import RtkDatabase
from savings_exporter.sources.source import SourceError
from tests.support.rtk_files import INSERT, Rtk
from tests.support.sources import imported

# RTK's own process, which is killed with a row in the write-ahead log.
_KILLED = """
import os, signal, sqlite3, sys
db = sqlite3.connect(sys.argv[1])
db.execute("PRAGMA journal_mode=WAL")
db.execute(sys.argv[2], ("2026-11-02T00:00:00.123456789+00:00", 500, 100, 400, "/p/x"))
db.commit()
os.kill(os.getpid(), signal.SIGKILL)
"""


@pytest.fixture
def history(tmp_path: Path) -> Rtk:
    directory = tmp_path / "rtk"
    directory.mkdir()
    return Rtk(directory / "history.db")


@pytest.fixture
def tracker(store_path: Path) -> Iterator[SavingsTracker]:
    with SavingsTracker(store_path) as tracker:
        yield tracker


def saved(tracker: SavingsTracker) -> int:
    return tracker.snapshot().lifetime.tokens_saved


def test_counts_what_rtk_gain_counts(history: Rtk, tracker: SavingsTracker) -> None:
    history.command(2900, 1800)
    history.command(1, 12)  # rtk gain counts a negative saving as none
    history.command(0, 0, "")  # a command that RTK only passed through
    history.command(7500, 100, "C:\\work\\engine\\")
    history.command(7501, 100)
    summary = imported(tracker, source_of(str(history.path)))
    snapshot = tracker.snapshot()
    assert snapshot.lifetime.tokens_saved == 1100 + 7400
    assert snapshot.lifetime.requests == 4
    assert snapshot.lifetime.total_input_tokens == 1800 + 12 + 100
    assert {name: totals.tokens_saved for name, totals in snapshot.projects.items()} == {
        "billing-api": 1100,
        "engine": 7400,
    }
    assert snapshot.sources["rtk"].tokens_saved == 8500
    assert summary.rejected == {OVERSIZED: 1}
    assert [row.day for row in tracker.days().rows] == ["2026-11-01"] * 3


def test_bound_can_be_changed_and_rows_let_in(history: Rtk, tracker: SavingsTracker) -> None:
    history.command(9000, 100)
    history.command(20_000, 100)
    source = RtkDatabase(str(history.path), most_input_tokens=10_000)
    imported(tracker, source)
    assert saved(tracker) == 8900
    history.change("DELETE FROM commands")
    step = let_in(tracker.snapshot().cursors[source.name].state, ["row 2"])
    assert step is not None
    with tracker.importing() as importer:
        Importing(importer, source).add(step)
    assert saved(tracker) == 8900 + 19_900


def test_rows_vanish_and_ids_begin_again(history: Rtk, tracker: SavingsTracker) -> None:
    source = RtkDatabase(str(history.path))
    for number in range(10):
        history.command(1000 + number, 100)
    imported(tracker, source)
    history.change("DELETE FROM commands WHERE id <= 7")
    history.command(3000, 100)
    imported(tracker, source)
    assert saved(tracker) == history.saved
    # rtk gain --reset, and so many new rows that there is a row with the last id again.
    history.change("DELETE FROM commands")
    for number in range(20):
        history.command(2000 + number, 100)
    imported(tracker, source)
    imported(tracker, RtkDatabase(str(history.path)))
    assert saved(tracker) == history.saved
    history.change("DELETE FROM commands")
    imported(tracker, source)
    history.command(4000, 100)
    imported(tracker, source)
    assert saved(tracker) == history.saved


def test_older_copy_comes_back(history: Rtk, tracker: SavingsTracker) -> None:
    source = RtkDatabase(str(history.path))
    history.command(1000, 100)
    copy = history.path.read_bytes()
    history.command(2000, 100)
    imported(tracker, source)
    history.path.write_bytes(copy)
    imported(tracker, source)
    history.command(3000, 100)
    imported(tracker, source)
    history.command(4000, 100)
    imported(tracker, source)
    assert saved(tracker) == history.saved


def test_more_rows_than_a_step_has(history: Rtk, tracker: SavingsTracker) -> None:
    with closing(sqlite3.connect(history.path)) as db:
        for number in range(5000):
            db.execute(INSERT, (f"2026-11-01T{number // 250:02}:00:00.500+00:00", 1000 + number % 7, 100, 900, ""))
        db.commit()
    source = RtkDatabase(str(history.path))
    steps = list(source.steps(None, is_complete=True))
    assert [sum(row.requests for row in step.rows) for step in steps] == [2000, 2000, 1000]
    imported(tracker, source)
    assert tracker.snapshot().lifetime.requests == 5000
    assert not list(source.steps(steps[-1].state, is_complete=True))


def test_nothing_is_left_in_its_directory(history: Rtk, tracker: SavingsTracker) -> None:
    history.command(1000, 100)
    files = set(history.path.parent.iterdir())
    assert files == {history.path}
    status = history.path.stat()
    imported(tracker, RtkDatabase(str(history.path)))
    assert set(history.path.parent.iterdir()) == files
    assert history.path.stat().st_mtime_ns == status.st_mtime_ns
    assert saved(tracker) == history.saved


def test_read_while_rtk_has_it_open(history: Rtk, tracker: SavingsTracker) -> None:
    source = RtkDatabase(str(history.path))
    with closing(sqlite3.connect(history.path)) as other:
        other.execute("SELECT * FROM commands").fetchall()
        history.command(1000, 100)
        assert history.path.with_name("history.db-wal").stat().st_size
        files = set(history.path.parent.iterdir())
        imported(tracker, source)
        assert set(history.path.parent.iterdir()) == files
        assert saved(tracker) == history.saved
        other.execute("BEGIN EXCLUSIVE")
        imported(tracker, source)
        other.execute("COMMIT")
        history.command(2000, 100)
        imported(tracker, source)
    assert saved(tracker) == history.saved


@pytest.mark.parametrize("without_shm", [False, True])
def test_killed_rtk_left_its_log(history: Rtk, tracker: SavingsTracker, without_shm: bool) -> None:
    ran = subprocess.run([sys.executable, "-c", _KILLED, str(history.path), INSERT], check=False)
    assert ran.returncode == -signal.SIGKILL
    shm = history.path.with_name("history.db-shm")
    assert shm.exists()
    if without_shm:
        shm.unlink()
    files = set(history.path.parent.iterdir())
    imported(tracker, RtkDatabase(str(history.path)))
    assert saved(tracker) == 400
    assert set(history.path.parent.iterdir()) == files


@pytest.mark.needs("root", "linux")
def test_directory_that_cannot_be_written(history: Rtk, tmp_path: Path) -> None:
    """Another user, without any right to write, reads it."""
    history.command(1000, 100)
    history.path.parent.chmod(0o555)
    history.path.chmod(0o444)
    for directory in (tmp_path, *tmp_path.parents):
        if directory.stat().st_uid == os.geteuid() and directory != Path("/"):
            directory.chmod(directory.stat().st_mode | 0o011)
    pid = os.fork()
    if not pid:
        os.setuid(65534)
        steps = list(RtkDatabase(str(history.path)).steps(None, is_complete=True))
        os._exit(0 if [sum(row.counts[0] for row in step.rows) for step in steps] == [900] else 1)
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0


def test_locked_in_rollback_mode(history: Rtk, tracker: SavingsTracker) -> None:
    history.change("PRAGMA journal_mode=DELETE")
    history.command(1000, 100)
    source = RtkDatabase(str(history.path))
    with closing(sqlite3.connect(history.path)) as other:
        other.execute("BEGIN EXCLUSIVE")
        other.execute("UPDATE commands SET saved_tokens = 0")
        with pytest.raises(SourceError, match="is being changed"):
            imported(tracker, source)
        other.rollback()
    imported(tracker, source)
    assert saved(tracker) == history.saved


def test_damaged_database_keeps_what_was_imported(history: Rtk, tracker: SavingsTracker) -> None:
    source = RtkDatabase(str(history.path))
    for number in range(200):
        history.command(1000 + number, 100)
    imported(tracker, source)
    good = history.path.read_bytes()
    history.path.write_bytes(good[:4096] + b"\xff" * 4096 + good[8192:])
    with pytest.raises(SourceError, match=r"cannot be read: .*malformed"):
        imported(tracker, source)
    history.path.write_bytes(b"SQLite format 3\0" + b"\xff" * 200)
    with pytest.raises(SourceError, match="cannot be read"):
        imported(tracker, source)
    history.path.unlink()
    with pytest.raises(SourceError, match="No such file"):
        imported(tracker, source)
    history.path.write_bytes(good)
    history.command(2000, 100)
    imported(tracker, source)
    assert saved(tracker) == history.saved


def test_rows_without_sense(history: Rtk, tracker: SavingsTracker) -> None:
    history.change(INSERT, "yesterday", 10, 1, 9, "")
    history.change(INSERT, "2026-11-01T00:00:00Z", "many", 1, 9, "")
    history.change(INSERT, "2026-11-01T00:00:00Z", 100, 1, 99, "\x1b[31m\x00/new\nline")
    summary = imported(tracker, RtkDatabase(str(history.path)))
    assert summary.rejected == {DAMAGED: 2}
    assert [problem.partition(":")[0] for problem in summary.problems] == ["row 1", "row 2"]
    assert saved(tracker) == 99
    assert tracker.snapshot().projects.keys() == {"newline"}


def test_usual_places(history: Rtk, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    found = usual_sources({"RTK_DB_PATH": str(history.path), "HEADROOM_WORKSPACE_DIR": "/nowhere"})
    assert [source.path for source in found] == [str(history.path)]
    monkeypatch.setenv("XDG_DATA_HOME", str(tmp_path / "data"))
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path / "config"))
    assert rtk.usual_paths({}) == [str(tmp_path / "data" / "rtk" / "history.db")]
    config = tmp_path / "config" / "rtk" / "config.toml"
    config.parent.mkdir(parents=True)
    config.write_text(f'[tracking]\nenabled = true\ndatabase_path = "{history.path}"\n')
    assert rtk.usual_paths({}) == [str(history.path)]
    config.write_text("[tracking")
    assert rtk.usual_paths({}) == [str(tmp_path / "data" / "rtk" / "history.db")]
