"""A real Headroom and this program wrote one file: ``verify --repair --merge`` counts what each recorded once."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from savings_exporter import SavingsTracker, Snapshot, StoreError
from savings_exporter.model.totals import AMOUNTS
from tests.support.headroom_tracker import running_headroom
from tests.support.service import run_cli

pytestmark = pytest.mark.needs("headroom")


def ours(number: int, **changed: Any) -> dict[str, Any]:
    """A record of this program."""
    names = {"model": f"model {number % 3}", "provider": "anthropic", "project": "ours"}
    figures = {"tokens_saved": 1_000 + number, "input_tokens": 50, "savings_usd": 0.0000012, "cache_write_tokens": 9}
    return {**names, **figures, "timestamp": f"2026-05-31T22:{number:02}:00Z", **changed}


def theirs(number: int, **changed: Any) -> dict[str, Any]:
    """A request of Headroom. Each saves tokens unless ``changed`` says otherwise."""
    names = {"model": f"model {number % 2}", "provider": "openai", "agent": "codex", "project": "theirs"}
    figures = {"tokens_saved": 20_000 + number, "input_tokens": 700, "tool_search_saved": 3, "cache_read_tokens": 5}
    stamp = f"2026-06-01T00:{number // 60:02}:{number % 60:02}Z"
    return {**names, **figures, "timestamp": stamp, **changed}


def record(tracker: SavingsTracker, *numbers: int) -> None:
    for number in numbers:
        assert tracker.record_request(**ours(number)).durable


def merge(path: Path) -> str:
    done = run_cli("verify", "--repair", "--merge", "--store", str(path))
    assert (done.returncode, done.stderr) == (0, "")
    return done.stdout


def opened(path: Path) -> Snapshot:
    with SavingsTracker(path) as tracker:
        return tracker.snapshot()


def assert_holds(path: Path, our_numbers: range, their_numbers: range, *, silent: int = 0) -> None:
    """The store holds these records of both exactly, in each total; ``silent`` requests of Headroom saved nothing."""
    snapshot = opened(path)
    lifetime, tokens = snapshot.lifetime, sum(1_000 + n for n in our_numbers) + sum(20_000 + n for n in their_numbers)
    assert lifetime.requests == len(our_numbers) + len(their_numbers) + silent
    assert lifetime.tokens_saved == tokens
    assert lifetime.total_input_tokens == 50 * len(our_numbers) + 700 * (len(their_numbers) + silent)
    assert lifetime.cache_write_tokens == 9 * len(our_numbers)
    assert lifetime.cache_read_tokens == 5 * len(their_numbers)
    assert lifetime.tool_tokens_saved == 3 * len(their_numbers)
    for model in range(3):
        expected = [1_000 + n for n in our_numbers if n % 3 == model] + [
            20_000 + n for n in their_numbers if n % 2 == model
        ]
        totals = snapshot.by_model.get(f"model {model}")
        assert (totals.tokens_saved if totals else 0) == sum(expected)
    projects = {name: (totals.requests, totals.tokens_saved) for name, totals in snapshot.projects.items()}
    assert projects.get("ours", (0, 0)) == (len(our_numbers), sum(1_000 + n for n in our_numbers))
    their_tokens = sum(20_000 + n for n in their_numbers)
    assert projects.get("theirs", (0, 0)) == (len(their_numbers) + silent, their_tokens)
    by_model = snapshot.by_model.values()
    assert sum(totals.tokens_saved for totals in by_model) == tokens
    assert sum(totals.tokens_saved for totals in snapshot.by_provider_model.values()) == tokens
    assert run_cli("verify", "--store", str(path)).returncode == 0


def test_headroom_read_the_last_document(store_path: Path) -> None:
    """Headroom started after the last save, and this program recorded on."""
    with SavingsTracker(store_path, save_interval=3600) as tracker:
        record(tracker, 0, 1)
        assert tracker.save()
        record(tracker, 2, 3)
        assert tracker.save()
        with running_headroom(store_path) as headroom:
            record(tracker, 4, 5)
            headroom.record(*map(theirs, range(4)), theirs(4, tokens_saved=0, tool_search_saved=0, cache_read_tokens=0))
        assert not tracker.save()
    assert_refused(store_path, "80006 tokens saved in 5 records", "2009 tokens saved in 2 records")
    text = merge(store_path)
    assert "of these, 80006 tokens saved in 5 records are from the other program's document" in text
    assert_holds(store_path, range(6), range(4), silent=1)


def assert_refused(path: Path, their_more: str, our_more: str) -> None:
    with pytest.raises(StoreError) as refused:
        SavingsTracker(path)
    says = str(refused.value)
    assert f"The other program recorded {their_more} that this store lacks" in says
    assert f"this store holds {our_more} that the document lacks" in says
    assert "verify --repair" in says
    assert "--merge" in says


def test_headroom_read_the_document_before(store_path: Path) -> None:
    with SavingsTracker(store_path, save_interval=3600) as tracker:
        record(tracker, 0, 1)
        assert tracker.save()
        with running_headroom(store_path) as headroom:
            record(tracker, 2, 3)
            assert tracker.save()
            headroom.record(*map(theirs, range(3)))
        record(tracker, 4)
    merge(store_path)
    assert_holds(store_path, range(5), range(3))


def test_headroom_kept_running(store_path: Path) -> None:
    """This program took over Headroom's document and saved several times, while Headroom did not stop."""
    with running_headroom(store_path) as headroom:
        headroom.record(*map(theirs, range(5)))
        with SavingsTracker(store_path, save_interval=3600) as tracker:
            for number in range(4):
                record(tracker, number)
                assert tracker.save()
        headroom.record(*map(theirs, range(5, 9)))
        merge(store_path)
        assert_holds(store_path, range(4), range(9))
        # It still runs, and writes a third time what it had recorded before.
        headroom.record(*map(theirs, range(9, 11)))
        merge(store_path)
        assert_holds(store_path, range(4), range(11))


def test_both_began_without_a_file(store_path: Path) -> None:
    with running_headroom(store_path) as headroom:
        with SavingsTracker(store_path) as tracker:
            record(tracker, 0, 1, 2)
        headroom.record(*map(theirs, range(3)))
    merge(store_path)
    assert_holds(store_path, range(3), range(3))


def test_headroom_read_an_older_document(store_path: Path) -> None:
    """Our documents since then are gone, so it is not known which of our records its document holds."""
    with SavingsTracker(store_path, save_interval=3600) as tracker:
        record(tracker, 0)
        assert tracker.save()
        with running_headroom(store_path) as headroom:
            for number in range(1, 5):
                record(tracker, number)
                assert tracker.save()
            headroom.record(*map(theirs, range(2)))
    before = {file.name: file.read_bytes() for file in store_path.parent.iterdir()}
    done = run_cli("verify", "--repair", "--merge", "--store", str(store_path))
    assert done.returncode == 1
    assert "cannot be merged: " in done.stderr
    assert "cannot be determined which document of this store the other program started from" in done.stderr
    assert {file.name: file.read_bytes() for file in store_path.parent.iterdir()} == before


def test_closed_store_under_a_running_headroom(store_path: Path) -> None:
    """Its document holds more than ours, but none of our records: it is not taken over."""
    with running_headroom(store_path) as headroom:
        headroom.record(*map(theirs, range(5)))
        with SavingsTracker(store_path) as tracker:
            record(tracker, 0)
        headroom.record(*map(theirs, range(5, 9)))
    with pytest.raises(StoreError, match="this store holds 1000 tokens saved in 1 records that the document lacks"):
        SavingsTracker(store_path)
    merge(store_path)
    assert_holds(store_path, range(1), range(9))


def test_days_of_what_is_merged(store_path: Path) -> None:
    with SavingsTracker(store_path) as tracker:
        record(tracker, 0)
    with running_headroom(store_path) as headroom, SavingsTracker(store_path, save_interval=3600) as tracker:
        record(tracker, 1)
        headroom.record(theirs(0), theirs(1, timestamp="2026-06-02T12:00:00Z"))
    merge(store_path)
    rows = json.loads(run_cli("export", "--json", "--by", "day,provider,agent", "--store", str(store_path)).stdout)
    found = {(row["day"], row["provider"], row["agent"]): row["tokens_saved"] for row in rows["rows"]}
    assert found["2026-06-01", "openai", "codex"] == 20_000
    assert found["2026-06-02", "openai", "codex"] == 20_001


def test_amounts_of_what_is_merged(store_path: Path) -> None:
    """To the digit that Headroom writes, with requests that cost more than they saved."""
    with SavingsTracker(store_path, save_interval=3600) as tracker:
        record(tracker, *range(7))
        assert tracker.save()
        before = tracker.snapshot().lifetime
        with running_headroom(store_path) as headroom:
            start = headroom.lifetime()
            lost = {"estimated_savings_usd": {"compression": -0.25, "compression_list": 0.125}}
            headroom.record(theirs(0), theirs(1, **lost), theirs(2))
            end = headroom.lifetime()
        record(tracker, 7)
    merge(store_path)
    after = opened(store_path).lifetime
    for name in AMOUNTS:
        ours_since = 0.0000012 if name.startswith("compression") else 0.0
        more = round(end.get(name, 0.0) - start.get(name, 0.0), 6) + ours_since
        assert round(getattr(after, name) - getattr(before, name) - more, 9) == 0, name
