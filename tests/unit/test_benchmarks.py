"""The benchmarks run, their peer does the work that we do, and falling short is said."""

from __future__ import annotations

import json
import sqlite3
import subprocess
import sys
from contextlib import closing
from pathlib import Path

import pytest

from benchmarks.__main__ import as_json, table
from benchmarks.measuring import Bound, Result, Setup
from benchmarks.peers import make_database, sqlite, sqlite_many
from benchmarks.workload import REQUESTS
from benchmarks.works import WORKS
from savings_exporter import SavingsRecord, SavingsTracker
from tests.support.paths import ROOT
from tests.support.wait import WAIT_SECONDS


@pytest.mark.parametrize("work", ["one-thread-sqlite", "processes", "batches", "tracing", "scrape"])
def test_a_work_gives_a_figure_a_run_of_either_side(work: str, tmp_path: Path) -> None:
    result = WORKS[work](Setup(directory=tmp_path, repeat=2, scale=0.001))
    assert len(result.ours) == len(result.theirs) == 2
    assert min(*result.ours, *result.theirs) > 0
    assert not list(tmp_path.iterdir()), "it left something behind"


def test_a_scrape_is_compared_with_one_of_as_many_samples(tmp_path: Path) -> None:
    (note,) = WORKS["scrape"](Setup(directory=tmp_path, repeat=1, scale=0.001)).notes
    ours, theirs = note.removesuffix(" samples").replace(" samples", "").split(" against ")
    assert ours == theirs


def test_sqlite_keeps_the_totals_that_we_keep(store_path: Path) -> None:
    database_path = store_path.with_name("peer.db")
    make_database(database_path)
    with sqlite(database_path) as record:
        for fields in REQUESTS:
            record(fields)
    with sqlite_many(database_path, REQUESTS) as record:
        record({})
    with SavingsTracker(store_path) as tracker:
        tracker.record_many(SavingsRecord(**fields) for fields in (*REQUESTS, *REQUESTS))
        ours = tracker.snapshot()

    def sums(table: str, keys: str) -> dict[tuple[str | int, ...], tuple[int, int]]:
        with closing(sqlite3.connect(database_path)) as database:
            rows = database.execute(f"SELECT requests, tokens_saved, {keys} FROM {table}").fetchall()
        return {tuple(names): (requests, tokens) for requests, tokens, *names in rows}

    for table_name, keys, totals in (
        ("lifetime", "id", {(1,): ours.lifetime}),
        ("by_model", "model", {(name,): totals for name, totals in ours.by_model.items()}),
        ("by_project", "project", {(name,): totals for name, totals in ours.projects.items()}),
        ("by_provider_model", "provider, model", ours.by_provider_model),
    ):
        assert sums(table_name, keys) == {name: (total.requests, total.tokens_saved) for name, total in totals.items()}
    with closing(sqlite3.connect(database_path)) as database:
        assert database.execute("SELECT count(*) FROM records").fetchone() == (len(REQUESTS) * 2,)


@pytest.mark.parametrize(
    ("bound", "figure", "met"),
    [
        (Bound(5, at_least=True), 4.0, False),
        (Bound(4, at_least=True), 4.0, True),
        (Bound(3, at_least=False), 4.0, False),
        (Bound(5, at_least=False), 4.0, True),
        (Bound(29, at_least=False, is_difference=True), 30.0, False),
        (Bound(30, at_least=False, is_difference=True), 30.0, True),
    ],
)
def test_medians_are_compared_and_falling_short_is_said(bound: Bound, figure: float, met: bool) -> None:
    result = Result("ours", "theirs", "MB", ours=[40, 1, 90], theirs=[500, 10, 10], bound=bound, notes=["by the way"])
    shown = json.loads(json.dumps(as_json(result)))
    assert (shown["figure"], shown["met"], shown["runs"]["ours"]) == (figure, met, [40, 1, 90])
    _, _, row, _, note = table([result]).splitlines()
    assert row.endswith("| yes |" if met else "| no  |")
    assert "by the way" in note


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["nothing"], "there is no work 'nothing'"),
        (["--repeat", "0"], "--repeat must be at least 1"),
        (["--directory", "nowhere"], "nowhere is not a directory"),
    ],
)
def test_a_mistake_is_said_in_a_line(arguments: list[str], said: str) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "benchmarks", *arguments], cwd=ROOT, capture_output=True, text=True, timeout=WAIT_SECONDS
    )
    assert done.returncode == 2
    assert said in done.stderr.splitlines()[-1]
