"""Headroom's document and ledger as a source: every saving counts once, whatever happens to the files."""

from __future__ import annotations

import json
import random
import re
from collections.abc import Mapping
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest

from savings_exporter import SavingsTracker
from savings_exporter.model.cursors import DAMAGED, JUMP, SAVED_MORE_THAN_INPUT
from savings_exporter.model.totals import Totals
from savings_exporter.sources.building import kept_out_of, let_in
from savings_exporter.sources.discovery import source_of, usual_sources
from savings_exporter.sources.headroom import Headroom, HeadroomLedger
from savings_exporter.sources.importing import Importing
from savings_exporter.sources.source import SourceError
from savings_exporter.storage.repair import inspect
from tests.support.headroom_files import HeadroomFiles
from tests.support.paths import DATA
from tests.support.sources import imported

DOCUMENTS = sorted((DATA / "headroom").glob("*/proxy_savings.json"))
LEDGER = DATA / "headroom" / "savings_events.jsonl"


def assert_totals(ours: Totals, theirs: Mapping[str, Any], tolerance: float) -> None:
    figures = {name: value for name, value in theirs.items() if isinstance(value, (int, float)) and hasattr(ours, name)}
    figures.pop("savings_percent", None)  # of our own rounding
    figures.pop("headline_tokens_saved", None)
    assert "tokens_saved" in figures
    for name, value in figures.items():
        assert getattr(ours, name) == (value if isinstance(value, int) else pytest.approx(value, abs=tolerance)), name


@pytest.mark.parametrize("path", DOCUMENTS, ids=lambda path: path.parent.name)
def test_imported_document_has_the_totals_that_headroom_reports(path: Path, store_path: Path) -> None:
    expected = json.loads((path.parent / "expected.json").read_text())
    with SavingsTracker(store_path) as tracker:
        imported(tracker, Headroom(str(path)))
        snapshot = tracker.snapshot()
        assert_totals(snapshot.lifetime, expected["lifetime"], 1e-9)
        # Headroom rounds each model's amount to a millionth at each request, so that they differ from the sum.
        for name, totals in (expected["by_model"] or {}).items():
            assert_totals(snapshot.by_model[name], totals, 5e-6)
        for name, totals in (expected["projects"] or {}).items():
            assert_totals(snapshot.projects[name], totals, 1e-9)
        assert snapshot.sources.keys() == {"headroom"}
        days = tracker.days()
        saved = sum(row.numbers[1] for row in days.rows)
        assert saved + days.undated[1] == snapshot.lifetime.tokens_saved
        assert len({row.day for row in days.rows}) > 5
    assert inspect(str(store_path)).problems == ()


@pytest.mark.parametrize("path", [*DOCUMENTS, LEDGER], ids=lambda path: path.parent.name)
def test_same_file_twice_adds_nothing(path: Path, store_path: Path) -> None:
    with SavingsTracker(store_path) as tracker:
        imported(tracker, source_of(str(path)))
        once = tracker.snapshot().ledger
        imported(tracker, source_of(str(path)))
    with SavingsTracker(store_path) as tracker:
        imported(tracker, source_of(str(path)))
        assert tracker.snapshot().ledger == once


def test_ledger_alone_counts_each_line(store_path: Path) -> None:
    lines = [json.loads(line) for line in LEDGER.read_text().splitlines()]
    with SavingsTracker(store_path) as tracker:
        imported(tracker, HeadroomLedger(str(LEDGER)))
        snapshot, days = tracker.snapshot(), tracker.days()
    assert snapshot.lifetime.requests == len(lines)
    assert snapshot.lifetime.tokens_saved == sum(line["saved"] for line in lines)
    assert snapshot.lifetime.compression_savings_usd == pytest.approx(sum(line["cost_usd"] for line in lines), abs=1e-9)
    for model in {line["model"] for line in lines}:
        of_model = [line for line in lines if line["model"] == model]
        assert snapshot.by_model[model].tokens_saved == sum(line["saved"] for line in of_model)
    assert {row.day for row in days.rows} == {line["ts"][:10] for line in lines}


@pytest.mark.parametrize("schema", [None, 0, 1, "2", True])
def test_document_without_a_schema_that_is_known(schema: Any, tmp_path: Path, store_path: Path) -> None:
    document = tmp_path / "old.json"
    history = [["2026-01-01T00:00:00Z", 70], ["2026-01-02T00:00:00Z", 100]]
    document.write_text(json.dumps({"schema_version": schema, "lifetime": {"tokens_saved": 90}, "history": history}))
    with SavingsTracker(store_path) as tracker:
        imported(tracker, Headroom(str(document)))
        assert tracker.snapshot().lifetime.tokens_saved == 100
        assert [(row.day, row.numbers[1]) for row in tracker.days().rows] == [("2026-01-01", 70), ("2026-01-02", 30)]


@pytest.mark.parametrize(
    ("content", "problem"),
    [
        ("{", "is not JSON"),
        ("[]", "holds no savings"),
        ('{"lifetime": {}, "schema_version": 7}', "knows up to 6"),
        ('{"lifetime": {"tokens_saved": NaN}, "history": [], "schema_version": 6}', "lifetime.tokens_saved"),
    ],
)
def test_document_that_cannot_be_read(content: str, problem: str, tmp_path: Path, store_path: Path) -> None:
    document = tmp_path / "headroom.json"
    document.write_text(content)
    with SavingsTracker(store_path) as tracker:
        with pytest.raises(SourceError, match=problem):
            imported(tracker, Headroom(str(document)))
        assert tracker.snapshot().lifetime == Totals()


def test_own_store_is_not_a_source(store_path: Path, tmp_path: Path) -> None:
    with SavingsTracker(store_path) as tracker:
        tracker.record_request(model="m", tokens_saved=1)
        tracker.save()
        with pytest.raises(SourceError, match="is a store of savings-exporter"):
            imported(tracker, Headroom(str(store_path)))


def test_newest_savings_count_before_headroom_saves_them(tmp_path: Path, store_path: Path) -> None:
    files = HeadroomFiles(tmp_path)
    for _ in range(25):
        files.request(100, project="billing")
    with SavingsTracker(store_path) as tracker:
        source = Headroom(str(files.document))
        imported(tracker, source)
        for _ in range(10):
            files.request(100, tools=5, project="billing")
        imported(tracker, source)
        assert tracker.snapshot().lifetime.tokens_saved == files.saved == 3500
        assert tracker.snapshot().lifetime.tool_tokens_saved == files.tools == 50
        files.flush()
        imported(tracker, source)
        snapshot = tracker.snapshot()
        assert snapshot.lifetime.tokens_saved == 3500
        assert snapshot.lifetime.requests == files.requests == 35
        assert snapshot.lifetime.compression_savings_usd == pytest.approx(3550 * 3 / 1e6)
        assert snapshot.projects["billing"].tokens_saved == 3500


def test_what_a_crash_of_headroom_loses_stays_counted(tmp_path: Path, store_path: Path) -> None:
    files = HeadroomFiles(tmp_path)
    for number in range(40):
        files.request(100 + number)
    with SavingsTracker(store_path) as tracker:
        source = Headroom(str(files.document))
        imported(tracker, source)
        files.crash()
        for number in range(60):
            files.request(100 + number, seconds=1)
            imported(tracker, source)
            assert tracker.snapshot().lifetime.tokens_saved == files.saved
        lost = json.loads(files.document.read_text())["lifetime"]["tokens_saved"]
        assert lost < files.saved


@pytest.mark.parametrize("seed", range(60))
def test_totals_are_exact_whatever_happens_to_the_files(seed: int, tmp_path: Path) -> None:
    """Records, crashes of Headroom, delayed lines, compaction, a removed document, an older copy, a new beginning, and
    a reader that is killed between two steps, in any order.
    """
    chance, files = random.Random(seed), HeadroomFiles(tmp_path)
    reader = Reader(files, chance)
    copy = None
    for _ in range(400):
        match chance.choices(range(9), (300, 20, 60, 4, 2, 2, 2, 2, 2))[0]:
            case 0:
                files.request(
                    chance.choice([0, 10, 10, 50, chance.randrange(1000)]),
                    tools=chance.choice([0, 0, 5]),
                    model=chance.choice("ab"),
                    project=chance.choice([None, "p"]),
                    seconds=chance.choice([0.01, 0.3, 2]),
                    is_delayed=chance.random() < 0.1,
                )
            case 1:
                files.mcp_call(chance.randrange(100))
            case 2:
                reader.read(is_killed=chance.random() < 0.3)
            case 3 if reader.state is not None:
                reader.read()
                files.crash()
            case 4:
                files.compact(files.now - timedelta(minutes=chance.choice([5, 20])))
            case 5:
                files.document.unlink(missing_ok=True)
            case 6 if files.document.exists():
                copy = files.document.read_bytes()
            case 7 if copy is not None:
                reader.read_all()
                newest = files.document.read_bytes()
                files.document.write_bytes(copy)
                if chance.random() < 0.3:
                    reader.read()
                    files.document.write_bytes(newest)
                files.restart()
            case 8 if files.requests > 50:
                reader.read_all()
                files.document.unlink()
                files.ledger.unlink(missing_ok=True)
                files.restart()
        # Headroom needs more than a second to start.
        files.now += timedelta(seconds=2 if chance.random() < 0.05 else 0)
        assert reader.saved <= files.saved
    reader.read_all()
    assert (reader.saved, reader.tools) == (files.saved, files.tools)


class Reader:
    """Reads a Headroom, and keeps the state of each step that is durable."""

    def __init__(self, files: HeadroomFiles, chance: random.Random) -> None:
        self.state: Mapping[str, Any] | None = None
        self.saved = self.tools = 0
        self._files = files
        self._chance = chance
        self._source = Headroom(str(files.document))

    def read(self, *, is_killed: bool = False) -> None:
        """Read what is new. If the reader is killed, a step of which nothing is durable may be the last one."""
        if not self._files.document.exists() and self.state is None:
            with pytest.raises(SourceError, match="No such file"):
                list(self._source.steps(None, is_complete=False))
            return
        for step in self._source.steps(self.state, is_complete=False):
            if is_killed and self._chance.random() < 0.5:
                self._source = Headroom(str(self._files.document))
                return
            self.state = json.loads(json.dumps(step.state))
            assert len(json.dumps(self.state)) < 200_000
            assert not step.rejected
            for row in step.rows:
                assert min(row.requests, *row.counts) >= 0
                self.saved += row.counts[0]
                self.tools += row.counts[1]

    def read_all(self) -> None:
        """Read everything, after Headroom was stopped."""
        self._files.write_lines()
        self._files.flush()
        self.read()
        self._files.now += timedelta(seconds=2)


def test_damaged_and_implausible_lines_are_named(tmp_path: Path, store_path: Path) -> None:
    ledger = tmp_path / "events.jsonl"
    good = (
        '{"v":2,"ts":"2026-11-01T00:00:00.500000+00:00","before":100,"after":60,"saved":40,"cost_usd":0.5,"model":"m"}'
    )
    lines = [
        good,
        "{",
        good.replace('"saved":40', '"saved":400'),
        good.replace("2026-11-01T", "not a time "),
        good.replace('"saved":40', '"saved":-4'),
        good.replace("100", "90000000").replace('"saved":40', '"saved":80000000'),
        "",
        good,
    ]
    ledger.write_text("\n".join(lines) + "\n")
    with SavingsTracker(store_path) as tracker:
        source = source_of(str(ledger))
        summary = imported(tracker, source)
        assert tracker.snapshot().lifetime.tokens_saved == 80
        assert summary.rejected == {DAMAGED: 3, SAVED_MORE_THAN_INPUT: 1, JUMP: 1}
        assert [problem.partition(":")[0] for problem in summary.problems] == [f"line {n}" for n in (2, 3, 4, 5, 6)]
        state = tracker.snapshot().cursors[source.name].state
        assert [(kept.id, kept.reason) for kept in kept_out_of(state)] == [
            ("line 3", SAVED_MORE_THAN_INPUT),
            ("line 6", JUMP),
        ]
        step = let_in(state, ["line 6"])
        assert step is not None
        with tracker.importing() as importer:
            assert Importing(importer, source).add(step)
        assert tracker.snapshot().lifetime.tokens_saved == 80 + 80_000_000
        assert let_in(tracker.snapshot().cursors[source.name].state, ["line 6"]) is None


def test_deeply_nested_line_is_damaged(tmp_path: Path, store_path: Path) -> None:
    ledger = tmp_path / "events.jsonl"
    good = '{"ts":"2026-11-01T00:00:00.500000+00:00","before":100,"after":60,"saved":40,"model":"m"'
    ledger.write_text(good + "}\n" + good + ',"x":' + "[" * 100_000 + "\n" + good + "}\n")
    with SavingsTracker(store_path) as tracker:
        assert imported(tracker, HeadroomLedger(str(ledger))).rejected == {DAMAGED: 1}
        assert tracker.snapshot().lifetime.tokens_saved == 80


def test_jump_of_the_document_is_kept_out(tmp_path: Path, store_path: Path) -> None:
    files = HeadroomFiles(tmp_path)
    for _ in range(25):
        files.request(100)
    with SavingsTracker(store_path) as tracker:
        source = Headroom(str(files.document))
        imported(tracker, source)
        files.ledger.unlink()
        files.request(2500 * 184_000, seconds=5)
        files.ledger.unlink()
        files.flush()
        assert imported(tracker, source).rejected == {JUMP: 1}
        assert tracker.snapshot().lifetime.tokens_saved == 2500
        files.request(100)
        files.flush()
        imported(tracker, source)
        assert tracker.snapshot().lifetime.tokens_saved == 2600


def test_usual_places(tmp_path: Path) -> None:
    files = HeadroomFiles(tmp_path)
    assert usual_sources({"HEADROOM_WORKSPACE_DIR": str(files.directory)}) == []
    files.flush()
    (source,) = usual_sources({"HEADROOM_WORKSPACE_DIR": str(files.directory)})
    assert source.path == str(files.document)
    (source,) = usual_sources({"HEADROOM_SAVINGS_PATH": f" {files.document} ", "HEADROOM_WORKSPACE_DIR": "/nowhere"})
    assert source.path == str(files.document)


def test_half_migrated_document(tmp_path: Path, store_path: Path) -> None:
    """A migration that stops halfway leaves out parts, which come back later."""
    files = HeadroomFiles(tmp_path)
    for number in range(50):
        files.request(100 + number, tools=5, project="p", model="ab"[number % 2])
    whole = json.loads(files.document.read_text())
    with SavingsTracker(store_path) as tracker:
        source = Headroom(str(files.document))
        imported(tracker, source)
        before = tracker.snapshot().ledger
        assert before.lifetime.tokens_saved == files.saved
        for missing in ("by_model", "projects", "lifetime", "history"):
            half = {key: value for key, value in whole.items() if key != missing}
            files.document.write_text(json.dumps({**half, "schema_version": 5}))
            imported(tracker, source)
            files.document.write_text(json.dumps(whole))
            imported(tracker, source)
            assert tracker.snapshot().ledger == before, missing
        for _ in range(25):
            files.request(10, project="p", model="a", seconds=2)
        imported(tracker, source)
        snapshot = tracker.snapshot()
        assert snapshot.lifetime.tokens_saved == files.saved
        assert snapshot.lifetime.requests == files.requests == 75
        assert snapshot.by_model["a"].tokens_saved == before.by_model["a"].tokens_saved + 250
        assert snapshot.projects["p"].tokens_saved == files.saved


def test_other_lines_are_no_ledger(tmp_path: Path) -> None:
    log = tmp_path / "log.jsonl"
    log.write_text('{"ts":"2026-11-01T00:00:00Z","usage":{"saved":100},"model":"gpt-5"}\n')
    with pytest.raises(SourceError, match="--map"):
        source_of(str(log))


def test_models_without_amounts_are_unpriced(store_path: Path) -> None:
    with SavingsTracker(store_path) as tracker:
        imported(tracker, Headroom(str(DATA / "headroom" / "v3" / "proxy_savings.json")))
        snapshot = tracker.snapshot()
    assert snapshot.by_model["claude-opus-4-1"].savings_usd is None
    assert snapshot.by_model["claude-opus-4-1"].unpriced_requests
    assert snapshot.lifetime.unpriced_requests


@pytest.mark.parametrize("stamp", ["0001-01-01T00:00:00Z", "0999-01-01T00:00:00Z", "9999-12-31T23:59:59Z"])
def test_times_at_the_ends_of_the_calendar(tmp_path: Path, stamp: str) -> None:
    """They come from a wrong clock, and the rest of the file counts."""
    document = (DATA / "headroom" / "v6-latest" / "proxy_savings.json").read_text(encoding="utf-8")
    path = tmp_path / "proxy_savings.json"
    path.write_text(re.sub(r'"20\d\d-\d\d-\d\dT[^"]*"', f'"{stamp}"', document))
    with SavingsTracker(tmp_path / "store.json") as tracker:
        imported(tracker, Headroom(str(path)))
        assert tracker.snapshot().lifetime.tokens_saved == 2_672_322
        path.write_text(path.read_text(encoding="utf-8") + " ")
        imported(tracker, Headroom(str(path)))
        assert tracker.snapshot().lifetime.tokens_saved == 2_672_322
