"""Moving from a real Headroom and back: ``export --headroom`` writes what Headroom's dashboard can show."""

from __future__ import annotations

import json
from datetime import datetime, timedelta, timezone
from pathlib import Path
from typing import Any

import pytest

from savings_exporter import SavingsRecord, SavingsTracker
from savings_exporter.model.totals import AMOUNTS, COUNTS
from tests.support.headroom_tracker import running_headroom
from tests.support.service import run_cli

pytestmark = pytest.mark.needs("headroom")

TODAY = datetime.now(timezone.utc).replace(hour=0, minute=0, second=0, microsecond=0)

NAMES: list[dict[str, Any]] = [
    {"provider": "anthropic", "agent": "claude-code", "model": "claude-sonnet-4-5", "project": "billing"},
    {"provider": "openai", "agent": "codex", "model": "gpt-5", "project": "search"},
    {"provider": "openai", "agent": None, "model": "gpt-5-mini", "project": None},
]


def on(days_ago: int) -> datetime:
    return TODAY - timedelta(days=days_ago)


def records(*days_ago: int) -> list[SavingsRecord]:
    """A record for each day and each of ``NAMES``."""
    figures: dict[str, Any] = {
        "input_tokens": 900,
        "output_tokens": 20,
        "tool_search_saved": 7,
        "cache_read_tokens": 11,
    }
    priced: dict[str, Any] = {"savings_usd": 0.25, "cache_savings_usd": 0.5, "input_cost_usd": 1.5}
    return [
        SavingsRecord(**names, **figures, **priced, tokens_saved=1_000 * (days + 1) + place, timestamp=on(days))
        for days in days_ago
        for place, names in enumerate(NAMES)
    ]


def recorded(path: Path, made: list[SavingsRecord]) -> None:
    with SavingsTracker(path) as tracker:
        for at in range(0, len(made), 1_000):
            assert tracker.record_many(made[at : at + 1_000]).durable


def exported(store: Path) -> Path:
    """The document for Headroom."""
    file = store.parent / "headroom" / "proxy_savings.json"
    file.parent.mkdir()
    done = run_cli("export", "--headroom", str(file), "--store", str(store))
    assert (done.returncode, done.stderr) == (0, "")
    return file


def by(row: dict[str, Any], name: str) -> dict[str, int]:
    """The tokens of a row of Headroom's by provider, agent or model."""
    return {key: part["tokens_saved"] for key, part in row[f"by_{name}"].items()}


def test_move_back(store_path: Path) -> None:
    """Headroom has all totals, and for each day the same providers, agents and models as this program."""
    recorded(store_path, records(40, 3, 1, 0))
    with SavingsTracker(store_path) as tracker:
        ours = tracker.snapshot()
    with running_headroom(exported(store_path)) as headroom:
        theirs, daily, metrics = headroom.snapshot(), headroom.series("daily"), headroom.metrics()
    for name in (*COUNTS, *AMOUNTS):
        if name in theirs["lifetime"]:
            assert theirs["lifetime"][name] == pytest.approx(getattr(ours.lifetime, name)), name
    for key in ("by_model", "projects"):
        found = {name: (totals["requests"], totals["tokens_saved"]) for name, totals in theirs[key].items()}
        assert found == {name: (totals.requests, totals.tokens_saved) for name, totals in getattr(ours, key).items()}
    assert [row["timestamp"][:10] for row in daily] == [f"{on(days):%Y-%m-%d}" for days in (40, 3, 1, 0)]
    for days, row in zip((40, 3, 1, 0), daily, strict=True):
        first = 1_000 * (days + 1)
        assert by(row, "provider") == {"anthropic": first, "openai": 2 * first + 3}
        assert by(row, "agent") == {"claude-code": first, "codex": first + 1, "unknown": first + 2}
        assert by(row, "model") == {"claude-sonnet-4-5": first, "gpt-5": first + 1, "gpt-5-mini": first + 2}
        assert row["tool_tokens_saved_delta"] == 21
        assert row["compression_savings_usd_delta"] == 0.75
    assert metrics["requests"]["total"] == 12
    assert metrics["requests"]["by_provider"] == {"anthropic": 4, "openai": 8}
    assert metrics["tokens"] | {"token_savings_percent": 0} == {
        "input": 12 * 900,
        "output": 12 * 20,
        "attempted_input": 12 * 900 + ours.lifetime.tokens_saved,
        "saved": ours.lifetime.tokens_saved,
        "token_savings_percent": 0,
    }
    assert metrics["by_model"]["gpt-5"]["requests"] == 4


def test_there_and_back(store_path: Path, tmp_path: Path) -> None:
    """What Headroom recorded before keeps its times, providers, agents and models, and it goes on from there."""
    request = {"input_tokens": 10, "tokens_saved": 50, "provider": "google", "agent": "gemini", "model": "gemini-2"}
    with running_headroom(store_path) as headroom:
        headroom.record({**request, "timestamp": f"{on(10):%Y-%m-%d}T10:00:00Z"})
        headroom.record({**request, "timestamp": f"{on(10):%Y-%m-%d}T11:00:00Z", "provider": "openai"})
    recorded(store_path, records(2, 0))
    file = exported(store_path)
    with running_headroom(file) as headroom:
        now = datetime.now(timezone.utc).isoformat()
        headroom.record({**request, "timestamp": now})
        daily, hourly, lifetime = headroom.series("daily"), headroom.series("hourly"), headroom.lifetime()
    assert lifetime["requests"] == 2 + 6 + 1
    assert by(daily[0], "provider") == {"google": 50, "openai": 50}
    assert by(daily[0], "model") == {"gemini-2": 100}
    assert [row["timestamp"][11:13] for row in hourly][:2] == ["10", "11"]
    assert by(daily[-1], "provider") == {"anthropic": 1_000, "openai": 2_003, "google": 50}
    # Headroom reads it again as it was, and this program takes it over.
    with running_headroom(file) as headroom:
        assert headroom.series("daily") == daily
    with SavingsTracker(file) as tracker:
        assert tracker.snapshot().lifetime.tokens_saved == lifetime["tokens_saved"]


def test_our_document_as_it_is(store_path: Path) -> None:
    """Without the export, Headroom has the totals, and no providers, agents and models of days."""
    recorded(store_path, records(3, 0))
    with running_headroom(store_path) as headroom:
        assert headroom.lifetime()["requests"] == 6
        assert [by(row, "provider").keys() for row in headroom.series("daily")] == [{"unknown"}, {"unknown"}]


def test_many_names(store_path: Path) -> None:
    """As many names as Headroom's number of points allows; days remain."""
    made = [
        SavingsRecord(model=f"m{model}", provider=f"p{model % 2}", tokens_saved=1, timestamp=on(days))
        for days in range(100)
        for model in range(50)
    ]
    recorded(store_path, made)
    with running_headroom(exported(store_path)) as headroom:
        daily = headroom.series("daily")
    assert [by(row, "provider") for row in daily] == [{"p0": 25, "p1": 25}] * 100
    assert [by(row, "model") for row in daily] == [{"unknown": 50}] * 100


def test_existing_file_is_left(store_path: Path) -> None:
    recorded(store_path, records(0))
    file = exported(store_path)
    file.write_text("mine")
    done = run_cli("export", "--headroom", str(file), "--store", str(store_path))
    assert (done.returncode, done.stdout) == (1, "")
    assert f"{file}: exists already and is left as it is" in done.stderr
    assert file.read_text() == "mine"
    assert list(file.parent.iterdir()) == [file]


def test_store_in_use(store_path: Path) -> None:
    with SavingsTracker(store_path) as tracker:
        assert tracker.record_request(model="m", tokens_saved=1).durable
        done = run_cli("export", "--headroom", str(store_path.with_name("new")), "--store", str(store_path))
    assert done.returncode == 1
    assert "a process still records into this store; stop it first" in done.stderr
    assert not store_path.with_name("new").exists()


def test_wrong_options(store_path: Path) -> None:
    for more in (["--json"], ["--from", "2026-01-01"], ["--by", "model"]):
        done = run_cli("export", "--headroom", "x", "--store", str(store_path), *more)
        assert (done.returncode, "--headroom writes everything" in done.stderr) == (2, True)


def test_state_that_headroom_kept(store_path: Path) -> None:
    """Its counts that this program does not have are not lost on the way."""
    with running_headroom(store_path) as headroom:
        headroom.record({"model": "m", "input_tokens": 10, "tokens_saved": 50})
    document = json.loads(store_path.read_bytes())
    document["lifetime_metrics"]["requests"]["failed"] = 7
    document["lifetime_metrics"]["waste_signals"] = {"base64": 3}
    store_path.write_text(json.dumps(document))
    recorded(store_path, records(0))
    with running_headroom(exported(store_path)) as headroom:
        metrics, lifetime = headroom.metrics(), headroom.lifetime()
    assert (metrics["requests"]["failed"], metrics["waste_signals"]) == (7, {"base64": 3})
    assert (metrics["requests"]["total"], lifetime["savings_basis"]) == (4, "list")
