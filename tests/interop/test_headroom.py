"""A real Headroom reads our documents, and we read its documents, with the same totals in both directions."""

from __future__ import annotations

import json
import os
import subprocess
from pathlib import Path
from typing import Any

import pytest

from savings_exporter import SavingsTracker, Snapshot
from savings_exporter.model.totals import AMOUNTS, COUNTS, Totals
from tests.support.paths import DATA, HEADROOM_PYTHON
from tests.support.wait import WAIT_SECONDS

pytestmark = pytest.mark.needs("headroom")

HEADROOM_FILES = sorted((DATA / "headroom").glob("*/proxy_savings.json"))

_HEADROOM = """
import json, sys
from headroom.proxy.savings_tracker import SavingsTracker
path, requests = sys.argv[1], json.load(sys.stdin)
tracker = SavingsTracker(path=path)
for request in requests:
    tracker.record_request(**request)
json.dump(tracker.snapshot(), sys.stdout)
"""

AWKWARD: list[dict[str, Any]] = [
    {"model": "claude-sonnet-4-5", "provider": "anthropic", "project": "billing-api", "savings_usd": 0.125},
    {"model": "claude-sonnet-4-5", "provider": "bedrock", "project": "100% %41 %2541", "savings_usd": -0.5},
    {"model": 'quo"te\\%20', "provider": "anthropic", "project": "données/日本", "savings_usd": -0.25},
    {"model": "日本 🦊", "provider": "Größe", "project": " padded ", "input_cost_usd": 0.75},
    {"model": "other", "provider": "other", "project": "other"},
    {"model": "", "project": None},
    {"model": "x" * 500, "project": "%C3%A9" * 200},
]

REQUESTS: list[dict[str, Any]] = [
    {
        "model": model,
        "input_tokens": 1_000 + number,
        "tokens_saved": 100 + number,
        "tool_search_saved": 7,
        "output_tokens_saved": 3,
        "cache_read_tokens": 11,
        "provider": provider,
        "project": project,
        "timestamp": f"2026-06-01T{number:02}:00:00Z",
    }
    for number, (model, provider, project) in enumerate(
        [
            ("claude-sonnet-4-5", "anthropic", "billing-api"),
            ("gpt-4o", "openai", "données"),
            ("a model of nobody's \ud83e\udd8a", "local", "a%20b"),
            ("claude-sonnet-4-5", "bedrock", None),
        ]
    )
]


def headroom(path: Path, *requests: dict[str, Any]) -> dict[str, Any]:
    """Let Headroom open a document and record these requests: its snapshot after that."""
    ran = subprocess.run(
        [str(HEADROOM_PYTHON), "-c", _HEADROOM, str(path)],
        input=json.dumps(requests),
        capture_output=True,
        text=True,
        timeout=WAIT_SECONDS * 4,
        env={**os.environ, "HEADROOM_TELEMETRY": "off", "LITELLM_LOCAL_MODEL_COST_MAP": "True"},
    )
    assert ran.returncode == 0, ran.stderr
    snapshot: dict[str, Any] = json.loads(ran.stdout)
    return snapshot


def recorded(path: Path, records: list[dict[str, Any]]) -> Snapshot:
    """Our snapshot after we recorded these."""
    with SavingsTracker(path) as tracker:
        for number, record in enumerate(records):
            tokens = {"tokens_saved": 1_000 + number, "tool_search_saved": 10, "input_tokens": 5_000}
            tokens |= {"output_tokens_saved": 4, "cache_read_tokens": 3}
            assert tracker.record_request(**{**tokens, **record})
        return tracker.snapshot()


def read(path: Path) -> Snapshot:
    with SavingsTracker(path) as tracker:
        return tracker.snapshot()


def assert_same(ours: Snapshot, theirs: dict[str, Any]) -> None:
    assert_totals(ours.lifetime, theirs["lifetime"])
    for key in ("projects", "by_model"):
        named: dict[str, Totals] = getattr(ours, key)
        assert named.keys() == theirs[key].keys()
        for name, reported in theirs[key].items():
            assert_totals(named[name], reported)


def assert_totals(ours: Totals, theirs: dict[str, Any]) -> None:
    shared = {name: theirs[name] for name in (*COUNTS, *AMOUNTS) if name in theirs}
    assert {"requests", "tokens_saved", "compression_savings_usd", "total_input_tokens"} <= shared.keys()
    # Headroom rounds money to a millionth of a dollar.
    assert {name: round(getattr(ours, name), 6) for name in shared} == shared


def test_headroom_reads_our_store(store_path: Path) -> None:
    ours = recorded(store_path, AWKWARD)
    written = store_path.read_bytes()
    theirs = headroom(store_path)
    assert_same(ours, theirs)
    assert ours.lifetime.compression_savings_usd == -0.625
    assert len(theirs["history"]) == len(ours.history)
    assert store_path.read_bytes() == written, "Headroom rewrote it, so it took it for one that needs mending"


@pytest.mark.parametrize("path", HEADROOM_FILES, ids=lambda path: path.parent.name)
def test_headroom_reads_its_own_file_again(path: Path, store_path: Path) -> None:
    store_path.write_bytes(path.read_bytes())
    ours = recorded(store_path, AWKWARD)
    assert_same(ours, headroom(store_path))


def test_headroom_keeps_fifty_projects(store_path: Path) -> None:
    ours = recorded(store_path, [{"model": "m", "project": f"project {number}"} for number in range(60)])
    theirs = headroom(store_path)
    assert_totals(ours.lifetime, theirs["lifetime"])
    assert theirs["projects"].keys() == {f"project {number}" for number in range(10, 60)}
    for name, reported in theirs["projects"].items():
        assert_totals(ours.projects[name], reported)


def test_we_read_headrooms_file(store_path: Path) -> None:
    theirs = headroom(store_path, *REQUESTS)
    ours = read(store_path)
    assert ours.lifetime.requests == len(REQUESTS)
    assert ours.lifetime.tokens_saved == sum(request["tokens_saved"] for request in REQUESTS)
    assert_same(ours, theirs)
    assert ours.history[-1] == theirs["history"][-1]


def test_store_that_headroom_rewrote(store_path: Path) -> None:
    before = recorded(store_path, AWKWARD)
    theirs = headroom(store_path, *REQUESTS)
    after = read(store_path)
    assert_same(after, theirs)
    assert after.lifetime.requests == before.lifetime.requests + len(REQUESTS)
    saved_there = sum(request["tokens_saved"] for request in REQUESTS)
    assert after.lifetime.tokens_saved == before.lifetime.tokens_saved + saved_there
    for name, totals in before.by_model.items():
        assert after.by_model[name].tokens_saved >= totals.tokens_saved
    assert_same(recorded(store_path, AWKWARD), headroom(store_path))
