"""The document for Headroom. ``tests/interop/test_moving.py`` has a real Headroom read it."""

from __future__ import annotations

import json
from collections import defaultdict
from datetime import datetime, timezone
from typing import Any

from hypothesis import given
from hypothesis import strategies as st

from savings_exporter.formats.document import decode
from savings_exporter.formats.headroom_export import encode_for_headroom
from savings_exporter.model.days import rows_of
from savings_exporter.model.history import POINT_KEYS
from savings_exporter.model.record import SavingsRecord
from savings_exporter.model.totals import Ledger, Limits, Sums
from tests.support.paths import DATA

FOREIGN = (DATA / "headroom" / "v6-latest" / "proxy_savings.json").read_bytes()
NOW = datetime(2026, 6, 20, tzinfo=timezone.utc)


def with_records(ledger: Ledger, *records: SavingsRecord) -> Ledger:
    sums = Sums()
    sums.add_all(records)
    return ledger.plus(sums, Limits(), NOW)


def document(ledger: Ledger, taken_over: Ledger | None = None) -> dict[str, Any]:
    written: dict[str, Any] = json.loads(encode_for_headroom(ledger, rows_of(ledger.days), {}, taken_over))
    return written


def saved_on_days(points: list[dict[str, Any]]) -> dict[str, dict[str, int]]:
    """The tokens of each day by provider, as Headroom computes them from points."""
    found: dict[str, dict[str, int]] = defaultdict(lambda: defaultdict(int))
    before = 0
    for point in sorted(points, key=lambda point: point["timestamp"]):
        found[point["timestamp"][:10]][point["provider"]] += point["total_tokens_saved"] - before
        before = point["total_tokens_saved"]
    return {day: dict(of_day) for day, of_day in found.items()}


def one(day: int, tokens: int, provider: str = "google") -> SavingsRecord:
    at = datetime(2026, 6, day, 13, 5, tzinfo=timezone.utc)
    return SavingsRecord(model="gemini", provider=provider, tokens_saved=tokens, timestamp=at)


def test_late_record_on_a_day_of_headroom() -> None:
    """Each day keeps the providers that Headroom's own document has."""
    start = decode(FOREIGN).ledger
    before = saved_on_days(json.loads(FOREIGN)["history"])
    ledger = with_records(start.bounded(Limits()), one(7, 30), one(15, 4))
    after = saved_on_days(document(ledger, start)["history"])
    assert after.pop("2026-06-15") == {"google": 4}
    before["2026-06-07"]["google"] = before["2026-06-07"].get("google", 0) + 30
    assert after == before
    assert any(len(of_day) > 2 for of_day in after.values())


def test_points_that_stand_for_several_requests() -> None:
    """Without Headroom's own document, a provider is named only where all requests had it. The days are the same."""
    start = decode(FOREIGN).ledger
    before = saved_on_days(json.loads(FOREIGN)["history"])
    ledger = with_records(start.bounded(Limits()), one(7, 30))
    after = saved_on_days(document(ledger)["history"])
    before["2026-06-07"]["google"] = before["2026-06-07"].get("google", 0) + 30
    assert {day: sum(of_day.values()) for day, of_day in after.items()} == {
        day: sum(of_day.values()) for day, of_day in before.items()
    }
    for day, of_day in after.items():
        for provider, tokens in of_day.items():
            assert provider == "unknown" or tokens <= before[day][provider]


def test_last_point_is_the_lifetime() -> None:
    start = decode(FOREIGN).ledger
    ledger = with_records(start, one(20, 30))
    written = document(ledger)
    last = written["history"][-1]
    assert {name: last[key] for name, key in POINT_KEYS.items()} == {
        name: getattr(ledger.lifetime, name) for name in POINT_KEYS
    }


@given(st.lists(st.tuples(st.integers(1, 19), st.integers(0, 500), st.sampled_from(["google", "openai"]))))
def test_days_by_provider(saved: list[tuple[int, int, str]]) -> None:
    ledger = with_records(Ledger(), *(one(*each) for each in saved))
    expected: dict[str, dict[str, int]] = defaultdict(lambda: defaultdict(int))
    for day, tokens, provider in saved:
        if tokens:
            expected[f"2026-06-{day:02}"][provider] += tokens
    written = document(ledger)
    assert saved_on_days(written["history"]) == {day: dict(of_day) for day, of_day in expected.items()}
    assert decode(json.dumps(written).encode()).ledger.lifetime.tokens_saved == sum(tokens for _, tokens, _ in saved)
