"""The tracker with the methods of Headroom's own. Its totals are compared with Headroom's in tests/interop."""

from __future__ import annotations

import csv
import errno
from typing import Any

import pytest

from savings_exporter import SavingsTracker
from savings_exporter.sources.headroom_tracker import HeadroomTracker
from tests.support.faults import FaultyFileSystem
from tests.support.wait import eventually

HOURS = ("2026-02-27T10", "2026-02-27T11", "2026-02-28T09", "2026-03-01T09", "2026-03-02T00")


@pytest.fixture
def headroom(tracker: SavingsTracker) -> HeadroomTracker:
    return HeadroomTracker(tracker)


@pytest.fixture
def filled(headroom: HeadroomTracker, tracker: SavingsTracker) -> HeadroomTracker:
    """A tracker with one request in each of ``HOURS``. They saved 1, 10, 100 tokens and so on."""
    for power, hour in enumerate(HOURS):
        saving: dict[str, Any] = {"tokens_saved": 10**power, "estimated_savings_usd": {"compression": 0.001}}
        headroom.record_request(model="gpt-4o", input_tokens=100, timestamp=f"{hour}:30:00Z", **saving)
    assert tracker.flush()
    return headroom


@pytest.mark.parametrize(
    ("series", "rows"),
    [
        ("hourly", {f"{hour}:00:00Z": 10**power for power, hour in enumerate(HOURS)}),
        (
            "daily",
            {
                "2026-02-27T00:00:00Z": 11,
                "2026-02-28T00:00:00Z": 100,
                "2026-03-01T00:00:00Z": 1_000,
                "2026-03-02T00:00:00Z": 10_000,
            },
        ),
        ("weekly", {"2026-02-23T00:00:00Z": 1_111, "2026-03-02T00:00:00Z": 10_000}),
        ("monthly", {"2026-02-01T00:00:00Z": 111, "2026-03-01T00:00:00Z": 11_000}),
    ],
)
def test_series(filled: HeadroomTracker, series: str, rows: dict[str, int]) -> None:
    found = filled.history_response()["series"][series]
    assert {row["timestamp"]: row["tokens_saved"] for row in found} == rows
    assert found[-1]["total_tokens_saved"] == 11_111
    assert sum(row["total_input_tokens_delta"] for row in found) == 500
    assert round(sum(row["compression_savings_usd_delta"] for row in found), 6) == 0.005
    read = list(csv.DictReader(filled.export_csv(series).splitlines()))
    assert {row["timestamp"]: int(row["tokens_saved"]) for row in read} == rows


def test_history(filled: HeadroomTracker) -> None:
    full, none = filled.history_response("full"), filled.history_response("none")
    assert [point["total_tokens_saved"] for point in full["history"]] == [1, 11, 111, 1_111, 11_111]
    assert (none["history"], none["series"]) == ([], full["series"])
    assert filled.export_rows() == full["history"]
    assert filled.export_rows("yearly") == []
    (*_, last) = csv.DictReader(filled.export_csv().splitlines())
    assert (last["timestamp"], last["total_tokens_saved"]) == ("2026-03-02T00:30:00Z", "11111")


def test_preview_of_newest_points(filled: HeadroomTracker) -> None:
    preview = filled.stats_preview(recent_points=2)
    assert preview["history_points"] == 5
    assert [point["total_tokens_saved"] for point in preview["recent_history"]] == [1_111, 11_111]
    assert preview["lifetime"]["requests"] == preview["by_model"]["gpt-4o"]["requests"] == 5


def test_empty_store(headroom: HeadroomTracker) -> None:
    assert headroom.snapshot()["lifetime"]["requests"] == 0
    assert headroom.history_response()["series"] == {"hourly": [], "daily": [], "weekly": [], "monthly": []}
    assert headroom.lifetime_response()["tokens"]["saved"] == 0


def test_price_of_both_layers(headroom: HeadroomTracker, tracker: SavingsTracker) -> None:
    priced = {"compression": 0.5, "tool_schema": -0.75, "provider_cache": 0.25, "output_shaping": 9.0}
    headroom.record_request(model="m", input_tokens=1, tokens_saved=1, estimated_savings_usd=priced)
    headroom.record_request(model="m", input_tokens=1, tokens_saved=1)
    assert tracker.flush()
    totals = tracker.snapshot().lifetime
    assert (totals.compression_savings_usd, totals.cache_savings_usd) == (-0.25, 0.25)
    assert (totals.priced_requests, totals.requests) == (1, 2)


def test_failing_disk(headroom: HeadroomTracker, tracker: SavingsTracker, faults: FaultyFileSystem) -> None:
    for step in ("append", "fsync_journal"):
        faults.fail(step, errno.EIO)
    assert headroom.record_request(model="m", input_tokens=1, tokens_saved=5)
    eventually(lambda: not tracker.health().healthy, "the failure")
    persistence = headroom.lifetime_response()["persistence"]
    assert (persistence["healthy"], persistence["pending_records"]) == (False, 1)
    assert "EIO" in persistence["error"] or "Input/output" in persistence["error"]
    faults.mend()
    headroom.flush()
    assert headroom.lifetime_response()["tokens"]["saved"] == 5
