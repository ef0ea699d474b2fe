"""Our tracker in place of Headroom's own: the same calls give the same totals, and Headroom's proxy works with it."""

from __future__ import annotations

import csv
import json
import os
import subprocess
from pathlib import Path
from typing import Any

import pytest

from savings_exporter.watched import WatchedFile
from tests.support.headroom import MESSAGES, SETTINGS, run_with_headroom
from tests.support.paths import HEADROOM_PYTHON
from tests.support.provider import FAILING_MODEL, provider
from tests.support.wait import WAIT_SECONDS

pytestmark = pytest.mark.needs("headroom")

_BOTH = """
import inspect, json, sys
from headroom.proxy.savings_tracker import SavingsTracker as Theirs
from savings_exporter import SavingsTracker
from savings_exporter.sources.headroom_tracker import HeadroomTracker
store, file, calls = sys.argv[1], sys.argv[2], json.load(open(sys.argv[3]))
tracker = SavingsTracker(store)
ours, theirs = HeadroomTracker(tracker), Theirs(path=file)
returned = [[getattr(each, name)(**arguments) for each in (ours, theirs)] for name, arguments in calls]
assert tracker.flush()
json.dump({"returned": returned, "ours": ours.snapshot(), "theirs": theirs.snapshot()}, sys.stdout)
"""


def both(directory: Path, calls: list[tuple[str, dict[str, Any]]]) -> dict[str, Any]:
    """Make the same calls to our tracker and to Headroom's own: what they returned, and their snapshots."""
    (directory / "calls.json").write_text(json.dumps(calls))
    paths = (directory / "ours.json", directory / "theirs.json", directory / "calls.json")
    found: dict[str, Any] = json.loads(run_with_headroom(_BOTH, *map(str, paths)))
    assert all(ours == theirs for ours, theirs in found["returned"])
    return found


def compared(entry: dict[str, Any], *left_out: str) -> dict[str, Any]:
    """The figures that both keep, which are those of ``KEPT``."""
    return {name: round(entry[name], 6) for name in KEPT if name in entry and name not in left_out}


KEPT = (
    "requests",
    "tokens_saved",
    "tool_tokens_saved",
    "output_tokens_saved",
    "cache_read_tokens",
    "cache_savings_usd",
    "total_input_tokens",
    "compression_savings_usd",
)

CALLS: list[tuple[str, dict[str, Any]]] = [
    (
        "record_request",
        {
            "model": ("gpt-4o", "claude-sonnet-4-5", "", "a model")[number % 4],
            "provider": ("openai", "anthropic", None, "local")[number % 4],
            "agent": ("codex", None)[number % 2],
            "project": ("billing-api", None, "a%20b")[number % 3],
            "input_tokens": 1_000 + number,
            "tokens_saved": 50 * number,
            "tool_search_saved": 7 * (number % 2),
            "output_tokens_saved": number,
            "output_tokens": 20,
            "cache_read_tokens": 100 * number,
            "cache_write_tokens": 10,
            "uncached_input_tokens": 5,
            "total_input_tokens": 500,
            "total_input_cost_usd": 0.01,
            "estimated_savings_usd": {
                "compression": 0.0125 * number,
                "compression_list": 0.02 * number,
                "tool_schema": -0.001 if number == 3 else 0.002,
                "output_shaping": 0.5,
                "provider_cache": -0.1 if number == 4 else 0.003,
                "basis": "catalog",
            },
            "timestamp": f"2026-06-01T{number:02}:30:00Z",
        },
    )
    for number in range(1, 13)
]


def test_same_totals_as_headroom(tmp_path: Path) -> None:
    found = both(tmp_path, CALLS)
    ours, theirs = found["ours"], found["theirs"]
    assert compared(ours["lifetime"]) == compared(theirs["lifetime"])
    assert ours["lifetime"]["tokens_saved"] == sum(50 * number for number in range(1, 13))
    for group in ("by_model", "projects"):
        assert ours[group].keys() == theirs[group].keys()
        for name, entry in theirs[group].items():
            # Headroom does not count deferred tool schemas by project.
            assert compared(entry).items() <= compared(ours[group][name]).items()
    assert [point["timestamp"] for point in ours["history"]] == [point["timestamp"] for point in theirs["history"]]
    for ours_at, theirs_at in zip(ours["history"], theirs["history"], strict=True):
        for name in ("total_tokens_saved", "total_input_tokens", "compression_savings_usd", "cache_read_tokens"):
            assert round(ours_at[name], 6) == theirs_at[name]


def test_same_totals_for_wrong_arguments(tmp_path: Path) -> None:
    wrong = {
        "input_tokens": "many",
        "tokens_saved": -5,
        "output_tokens_saved": None,
        "cache_read_tokens": 12.9,
        "provider": 5,
        "project": "  ",
        "timestamp": "yesterday",
        "estimated_savings_usd": {"compression": "much", "tool_schema": None},
    }
    found = both(tmp_path, [("record_request", {"model": "gpt-4o", **wrong})])
    assert compared(found["ours"]["lifetime"]) == compared(found["theirs"]["lifetime"])
    assert compared(found["ours"]["lifetime"])["cache_read_tokens"] == 12


def test_compression_alone(tmp_path: Path) -> None:
    """Each call counts as a request, and its price is unknown."""
    calls = [("record_compression_savings", {"model": "gpt-4o", "tokens_saved": tokens}) for tokens in (0, 40, 2, -1)]
    found = both(tmp_path, calls)
    ours, theirs = found["ours"]["lifetime"], found["theirs"]["lifetime"]
    left_out = ("requests", "compression_savings_usd")
    assert compared(ours, *left_out) == compared(theirs, *left_out)
    assert (ours["tokens_saved"], ours["requests"], theirs["requests"]) == (42, 2, 0)


def test_request_counts_once(tmp_path: Path) -> None:
    """Headroom's proxy calls both methods for each request."""
    metrics = {"model": "gpt-4o", "provider": "openai", "input_tokens": 900, "output_tokens": 5, "tokens_saved": 100}
    metrics |= {"stack": None, "attempted_input_tokens": 1_000, "cached": False}
    request = {"model": "gpt-4o", "input_tokens": 900, "tokens_saved": 100}
    calls = [("record_lifetime_request", {"persist": False, **metrics}), ("record_request", request)]
    found = both(tmp_path, calls)
    left_out = ("compression_savings_usd",)  # unknown without estimated_savings_usd
    assert compared(found["ours"]["lifetime"], *left_out) == compared(found["theirs"]["lifetime"], *left_out)


_SIGNATURES = """
import inspect
from headroom.proxy.savings_tracker import SavingsTracker as Theirs
from savings_exporter.sources.headroom_tracker import HeadroomTracker as Ours
for name, method in vars(Theirs).items():
    if not name.startswith("_") and callable(method):
        ours = inspect.signature(getattr(Ours, name)).parameters
        theirs = inspect.signature(method).parameters
        described = [[(p.name, p.kind, p.default) for p in each.values()] for each in (ours, theirs)]
        assert described[0] == described[1], name
        print(name)
"""


def test_same_methods_as_headroom() -> None:
    assert {"record_request", "snapshot", "flush", "export_csv"} <= set(run_with_headroom(_SIGNATURES).split())


_IN_THE_PROXY = """
import asyncio, csv, io, json, sys
from starlette.testclient import TestClient
from headroom.proxy.models import ProxyConfig
from headroom.proxy.server import create_app
from headroom.proxy.prometheus_metrics import PrometheusMetrics
from savings_exporter import SavingsTracker
from savings_exporter.sources.headroom_tracker import HeadroomTracker

tracker = SavingsTracker(sys.argv[1])
app = create_app(ProxyConfig(openai_api_url=sys.argv[2]))
app.state.proxy.metrics.savings_tracker = HeadroomTracker(tracker)
headers = {"Authorization": "Bearer key", "X-Headroom-Project": "billing-api"}
request = json.load(sys.stdin)
answers = {}
with TestClient(app, client=("127.0.0.1", 50000), base_url="http://127.0.0.1:8787") as client:
    for path in ("/v1/chat/completions", "/v1/compress"):
        client.post(path, json=request, headers=headers).raise_for_status()
    failed = client.post("/v1/chat/completions", json={**request, "model": sys.argv[3]}, headers=headers)
    assert failed.status_code == 400
    assert tracker.flush()
    for path in ("/stats", "/stats-lifetime", "/stats-history"):
        answers[path] = client.get(path).raise_for_status().json()
    answers["csv"] = client.get("/stats-history?format=csv&series=daily").raise_for_status().text
    answers["metrics"] = client.get("/metrics").raise_for_status().text
tracker.close()
json.dump(answers, sys.stdout)
"""


@pytest.mark.slow
def test_tracker_in_the_proxy(tmp_path: Path, store_path: Path) -> None:
    """Headroom's proxy serves its pages from our tracker."""
    with provider() as url:
        ran = subprocess.run(
            [str(HEADROOM_PYTHON), "-c", _IN_THE_PROXY, str(store_path), url, FAILING_MODEL],
            input=json.dumps({"model": "gpt-4o", "messages": MESSAGES}),
            capture_output=True,
            text=True,
            timeout=WAIT_SECONDS * 4,
            env={**os.environ, **SETTINGS, "HOME": str(tmp_path), "HEADROOM_SAVINGS_PATH": str(tmp_path / "theirs")},
        )
    assert ran.returncode == 0, ran.stderr
    answers = json.loads(ran.stdout.splitlines()[-1])
    snapshot = WatchedFile(store_path).snapshot()
    saved = snapshot.lifetime.tokens_saved
    assert saved > 0
    assert snapshot.lifetime.requests == snapshot.projects["billing-api"].requests == 2
    assert snapshot.lifetime.compression_savings_usd > 0
    for answer in (answers["/stats"]["persistent_savings"], answers["/stats-history"]):
        assert (answer["lifetime"]["requests"], answer["lifetime"]["tokens_saved"]) == (2, saved)
        assert answer["projects"]["billing-api"]["tokens_saved"] == saved
    assert answers["/stats-lifetime"]["tokens"]["saved"] == saved
    assert answers["/stats-lifetime"]["requests"]["by_provider"] == {"openai": 1, "compress": 1}
    (day,) = csv.DictReader(answers["csv"].splitlines())
    assert (int(day["tokens_saved"]), int(day["total_tokens_saved"])) == (saved, saved)
    assert not (tmp_path / "theirs").exists()
