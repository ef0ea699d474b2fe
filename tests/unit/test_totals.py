"""Folding records into totals: in any order and grouping the same, and never more names than the limits say."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from datetime import datetime, timedelta, timezone
from decimal import Decimal
from itertools import pairwise
from random import Random
from typing import Any

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from savings_exporter import SavingsRecord
from savings_exporter.totals import (
    AMOUNTS,
    COUNTS,
    DAYS_OF_HOURLY_POINTS,
    DAYS_OF_POINTS,
    OTHER,
    OTHER_PAIR,
    Delta,
    Ledger,
    Limits,
    Totals,
    iso_utc,
    thinned,
    total_of,
)

NOW = datetime(2026, 6, 15, 12, 30, tzinfo=timezone.utc)
ROOMY = Limits(max_models=1000, max_projects=1000)

names = st.sampled_from([OTHER, "unknown", *"abcdefgh"])
tokens = st.integers(0, 10**6)
nanodollars = st.integers(-(10**10), 10**10)
records = st.builds(
    SavingsRecord,
    model=names,
    provider=st.none() | st.sampled_from([OTHER, "anthropic", "openai"]),
    project=st.none() | names,
    tokens_saved=tokens,
    input_tokens=tokens,
    output_tokens=tokens,
    tool_search_saved=tokens,
    cache_read_tokens=tokens,
    savings_usd=nanodollars.map(lambda number: number / 1e9),
    input_cost_usd=nanodollars.map(lambda number: abs(number) / 1e9),
    timestamp=st.integers(0, 10**7).map(lambda seconds: NOW - timedelta(seconds=seconds)),
)
many_records = st.lists(records, max_size=30)


def delta_of(records: Iterable[SavingsRecord], ledger: Ledger, limits: Limits) -> Delta:
    delta = Delta()
    for record in records:
        delta.add(record, ledger, limits)
    return delta


def counted(ledger: Ledger, records: Iterable[SavingsRecord], limits: Limits = ROOMY, now: datetime = NOW) -> Ledger:
    return ledger.plus(delta_of(records, ledger, limits), limits, now)


def without_history(ledger: Ledger) -> Ledger:
    return msgspec.structs.replace(ledger, history=())


def split(records: Sequence[SavingsRecord], cuts: Iterable[int]) -> list[Sequence[SavingsRecord]]:
    edges = sorted({0, len(records), *(cut for cut in cuts if cut < len(records))})
    return [records[start:end] for start, end in pairwise(edges)]


def one(model: str = "m", *, saved: int = 1, at: datetime = NOW, project: str | None = None) -> SavingsRecord:
    return SavingsRecord(model=model, tokens_saved=saved, timestamp=at, project=project, provider="p")


def test_a_record_goes_into_every_total_it_belongs_to() -> None:
    record = SavingsRecord(
        model="m",
        provider="p",
        project="x",
        tokens_saved=1,
        tool_search_saved=2,
        output_tokens_saved=3,
        cache_read_tokens=4,
        cache_write_tokens=5,
        uncached_input_tokens=6,
        input_tokens=7,
        output_tokens=8,
        savings_usd=-0.5,
        input_cost_usd=0.25,
        timestamp=NOW,
    )
    expected = Totals(
        requests=1,
        tokens_saved=1,
        tool_tokens_saved=2,
        output_tokens_saved=3,
        cache_read_tokens=4,
        cache_write_tokens=5,
        uncached_input_tokens=6,
        total_input_tokens=7,
        total_output_tokens=8,
        compression_savings_usd=-0.5,
        compression_savings_list_usd=-0.5,
        total_input_cost_usd=0.25,
        last_activity_at="2026-06-15T12:30:00Z",
    )
    ledger = counted(Ledger(), [record])
    assert ledger.sequence == 1
    assert ledger.lifetime == expected
    assert ledger.by_model == {"m": expected}
    assert ledger.projects == {"x": expected}
    assert ledger.by_provider_model == {("p", "m"): expected}


def test_the_share_saved_counts_tool_schemas_and_what_was_sent() -> None:
    assert Totals(tokens_saved=1, tool_tokens_saved=2, total_input_tokens=9).savings_percent == 25.0
    assert Totals(tokens_saved=1, tool_tokens_saved=2).headline_tokens_saved == 3
    assert Totals().savings_percent == 0.0


@given(many_records, st.lists(st.integers(0, 30)), st.randoms(use_true_random=False))
def test_any_grouping_and_order_gives_the_same_totals(
    records: list[SavingsRecord], cuts: list[int], random: Random
) -> None:
    at_once = counted(Ledger(), records)
    shuffled = sorted(records, key=lambda _: random.random())
    in_groups = Ledger()
    for group in split(shuffled, cuts):
        in_groups = counted(in_groups, group)
    assert without_history(in_groups) == without_history(at_once)


@given(many_records)
def test_money_is_exact_to_a_billionth(records: list[SavingsRecord]) -> None:
    exact = sum((Decimal(str(record.savings_usd)) for record in records), Decimal())
    assert counted(Ledger(), records).lifetime.compression_savings_usd == float(exact)


@given(st.lists(st.integers(-(10**15), 10**15), max_size=8))
def test_money_stays_exact_in_millions_of_dollars(billionths: list[int]) -> None:
    parts = [Totals(compression_savings_usd=number / 1e9) for number in billionths]
    assert total_of(parts).compression_savings_usd == sum(billionths) / 1e9
    whole = total_of([*parts, Totals(compression_savings_usd=0.25)])
    assert whole.beyond(total_of(parts)).compression_savings_usd == 0.25


@given(many_records, st.lists(st.integers(0, 30)), st.integers(1, 6))
def test_deltas_that_join_are_as_one_delta(records: list[SavingsRecord], cuts: list[int], limit: int) -> None:
    limits = Limits(max_models=limit, max_projects=limit)
    ledger = counted(Ledger(), [one("a", project="b")], limits)
    joined = Delta()
    for group in split(records, cuts):
        joined.absorb(delta_of(group, ledger, limits), ledger, limits)
    assert joined.lifetime == delta_of(records, ledger, limits).lifetime
    assert joined.records == len(records)
    assert_bounded(ledger.plus(joined, limits, NOW), limits)


@given(many_records, st.lists(st.integers(0, 30)), st.integers(1, 6), st.integers(1, 6))
def test_names_stay_within_the_limits_and_sums_stay_whole(
    records: list[SavingsRecord], cuts: list[int], max_models: int, max_projects: int
) -> None:
    limits = Limits(max_models=max_models, max_projects=max_projects)
    ledger = Ledger()
    for group in split(records, cuts):
        before = ledger
        ledger = counted(ledger, group, limits)
        assert_bounded(ledger, limits)
        assert_nothing_went_back(before, ledger)
    in_projects = [record for record in records if record.project is not None]
    assert total_of(ledger.projects.values()) == counted(Ledger(), in_projects).lifetime


@given(many_records, st.integers(1, 6))
def test_cutting_a_ledger_down_keeps_the_largest_and_the_sums(records: list[SavingsRecord], limit: int) -> None:
    whole = counted(Ledger(), records)
    cut = whole.bounded(Limits(max_models=limit, max_projects=limit))
    assert_bounded(cut, Limits(max_models=limit, max_projects=limit))
    kept = cut.by_model.keys() - {OTHER}
    dropped = whole.by_model.keys() - kept - {OTHER}
    assert all(cut.by_model[name] == whole.by_model[name] for name in kept)
    assert all(
        whole.by_model[small].tokens_saved <= whole.by_model[large].tokens_saved for small in dropped for large in kept
    )


def assert_bounded(ledger: Ledger, limits: Limits) -> None:
    assert len(ledger.by_model.keys() - {OTHER}) <= limits.max_models
    assert len(ledger.projects.keys() - {OTHER}) <= limits.max_projects
    assert len(ledger.by_provider_model.keys() - {OTHER_PAIR}) <= limits.max_models
    assert total_of(ledger.by_model.values()) == ledger.lifetime
    assert total_of(ledger.by_provider_model.values()) == ledger.lifetime


def assert_nothing_went_back(before: Ledger, after: Ledger) -> None:
    groups: list[tuple[Mapping[Any, Totals], Mapping[Any, Totals]]] = [
        (before.by_model, after.by_model),
        (before.projects, after.projects),
        (before.by_provider_model, after.by_provider_model),
    ]
    for old, new in groups:
        for name, totals in old.items():
            assert all(getattr(new[name], count) >= getattr(totals, count) for count in COUNTS)


@pytest.mark.parametrize("limit", [1, 3, 200])
def test_names_that_are_known_stay_told_apart_in_a_flood_of_new_ones(limit: int) -> None:
    limits = Limits(max_models=limit, max_projects=limit)
    ledger = counted(Ledger(), [one(f"old{n}", project=f"old{n}") for n in range(limit)], limits)
    flood = [one(f"new{n}", project=f"new{n}") for n in range(limit * 3)]
    old = [one(f"old{n}", project=f"old{n}") for n in range(limit)]
    ledger = counted(ledger, flood + old, limits)
    for grouped in (ledger.by_model, ledger.projects):
        assert {name: totals.requests for name, totals in grouped.items()} == {
            **{f"old{n}": 2 for n in range(limit)},
            OTHER: limit * 3,
        }


def test_names_that_another_process_took_meanwhile_are_not_told_apart_beyond_the_limit() -> None:
    limits = Limits(max_models=2, max_projects=2)
    delta = delta_of([one("a")], Ledger(), limits)
    elsewhere = counted(Ledger(), [one("c"), one("d")], limits)
    delta.add(one("e"), elsewhere, limits)
    assert delta.by_model.keys() == {"a", OTHER}
    ledger = elsewhere.plus(delta, limits, NOW)
    assert {name: totals.requests for name, totals in ledger.by_model.items()} == {"c": 1, "d": 1, OTHER: 2}


def test_what_is_beyond_a_part_is_never_below_zero_in_counts() -> None:
    whole, part = Totals(tokens_saved=5, compression_savings_usd=-0.3), Totals(tokens_saved=7, requests=1)
    assert whole.beyond(part) == Totals(compression_savings_usd=-0.3)
    assert set(COUNTS) & set(AMOUNTS) == set()


def test_history_keeps_a_point_an_hour_and_then_one_a_day() -> None:
    ledger = Ledger()
    start = NOW - timedelta(days=760)
    step, moment = timedelta(hours=8), start
    while moment <= NOW:
        ledger = counted(ledger, [one(at=moment)], now=moment)
        moment += step
    stamps = stamps_of(ledger)
    edge = iso_utc(NOW - timedelta(days=14))
    recent, old = [stamp for stamp in stamps if stamp >= edge], [stamp for stamp in stamps if stamp < edge]
    assert len(recent) == 14 * 3 + 1
    assert len(old) == len({stamp[:10] for stamp in old})
    assert 730 - 15 <= len(old) <= 730 - 13
    assert stamps[0] >= iso_utc(NOW - timedelta(days=730))


def test_records_of_one_hour_share_its_point() -> None:
    ledger = counted(Ledger(), [one(at=NOW - timedelta(minutes=20))])
    ledger = counted(ledger, [one(saved=4)])
    assert [point["total_tokens_saved"] for point in ledger.history] == [5]


@given(st.lists(st.tuples(st.integers(-(10**9), 10**9), st.integers(0, 10_000)), max_size=60))
def test_history_never_falls_whatever_clients_clocks_say(steps: list[tuple[int, int]]) -> None:
    ledger, now = Ledger(), NOW
    for off_by_seconds, passing_minutes in steps:
        now += timedelta(minutes=passing_minutes)
        ledger = counted(ledger, [one(at=now + timedelta(seconds=off_by_seconds))], now=now)
        assert_never_falls(ledger)
        assert all(stamp <= iso_utc(now) for stamp in stamps_of(ledger))


@pytest.mark.parametrize("year", [1970, 2099, 9999])
def test_a_client_with_a_wrong_clock_does_not_push_history_out(year: int) -> None:
    ledger = Ledger()
    for hour in range(48):
        ledger = counted(ledger, [one(at=NOW + timedelta(hours=hour))], now=NOW + timedelta(hours=hour))
    before, now = stamps_of(ledger), NOW + timedelta(hours=48)
    ledger = counted(ledger, [one(at=datetime(year, 1, 1, tzinfo=timezone.utc))], now=now)
    ledger = counted(ledger, [one(at=now)], now=now)
    assert stamps_of(ledger)[:48] == before
    assert ledger.history[-1]["total_tokens_saved"] == 50


def two_years() -> Ledger:
    """A ledger with a record a day at noon for two years, and one an hour today until NOW."""
    ledger = Ledger()
    moments = [NOW.replace(hour=12, minute=0) - timedelta(days=day) for day in range(729, 0, -1)]
    for moment in moments + [NOW - timedelta(hours=hour) for hour in range(12, -1, -1)]:
        ledger = counted(ledger, [one(at=moment)], now=moment)
    return ledger


@pytest.mark.parametrize("year", [1970, 2025, 2030, 2099])
def test_a_clock_that_is_wrong_for_a_while_costs_no_point_and_stops_no_history(year: int) -> None:
    ledger = before = two_years()
    assert len(before.history) == 729 + 13
    wrong = NOW.replace(year=year)
    ledger = counted(ledger, [one(at=wrong)], now=wrong)
    assert days_of(before) <= days_of(ledger)
    for hour in (1, 2):
        right = NOW + timedelta(hours=hour)
        ledger = counted(ledger, [one(at=right)], now=right)
        assert iso_utc(right) in stamps_of(ledger)
    assert days_of(before) <= days_of(ledger)
    assert_never_falls(ledger)
    assert ledger.history[-1]["total_tokens_saved"] == ledger.lifetime.tokens_saved == 742 + 3


def test_a_point_after_now_counts_what_is_recorded_before_it() -> None:
    ledger = counted(Ledger(), [one(saved=5)], now=NOW)
    ahead = NOW + timedelta(days=400)
    ledger = counted(ledger, [SavingsRecord(model="m", tokens_saved=7, savings_usd=-0.1, timestamp=ahead)], now=ahead)
    hour_later = NOW + timedelta(hours=1)
    ledger = counted(
        ledger, [SavingsRecord(model="m", tokens_saved=1, savings_usd=0.3, timestamp=ahead)], now=hour_later
    )
    assert [
        (point["timestamp"], point["total_tokens_saved"], point["compression_savings_usd"]) for point in ledger.history
    ] == [(iso_utc(NOW), 5, 0.0), (iso_utc(hour_later), 6, 0.3), (iso_utc(ahead), 13, 0.2)]


@pytest.mark.parametrize("value", ["many", None, [5], math.nan, math.inf, 10**400], ids=lambda value: str(value)[:6])
def test_a_point_after_now_may_hold_what_is_no_number(value: Any) -> None:
    strange = {"timestamp": iso_utc(NOW + timedelta(days=1)), "total_tokens_saved": value, "later": value}
    ledger = counted(Ledger(history=(strange,)), [one(saved=5)])
    assert [point["total_tokens_saved"] for point in ledger.history] == [5, 5]
    assert ledger.history[-1]["later"] is value


@given(st.lists(st.tuples(st.integers(-(10**8), 10**8), st.integers(0, 5)), max_size=60))
def test_history_grows_in_order_whatever_our_own_clock_says(jumps: list[tuple[int, int]]) -> None:
    ledger, now = Ledger(), NOW
    for seconds, saved in jumps:
        now = NOW + timedelta(seconds=seconds)
        before = ledger
        ledger = counted(ledger, [one(at=now, saved=saved)], now=now)
        assert days_of(before) <= days_of(ledger)
        assert_never_falls(ledger)
        assert ledger.history[-1]["total_tokens_saved"] == ledger.lifetime.tokens_saved


moments = st.integers(0, 4_000 * 24) | st.integers(3_950 * 24, 4_000 * 24) | st.just(600_000)


@given(st.sets(moments, max_size=200), st.integers(0, 800))
def test_thinning_keeps_the_last_of_each_hour_and_day_and_no_more(hours: set[int], days: int) -> None:
    """Some points anywhere, and one a day for some days, in hours since some time."""
    hours = hours | {24 * day + 20 for day in range(4_000 - days, 4_000)}
    stamps = {iso_utc(NOW + timedelta(hours=hour)) for hour in hours}
    kept = [str(point["timestamp"]) for point in thinned({"timestamp": stamp} for stamp in stamps)]
    assert kept == sorted(set(kept))
    assert set(kept) <= stamps
    assert len({stamp[:10] for stamp in kept}) <= DAYS_OF_POINTS
    assert len(kept) <= DAYS_OF_POINTS - DAYS_OF_HOURLY_POINTS + 24 * DAYS_OF_HOURLY_POINTS
    newest = NOW + timedelta(hours=max(hours, default=0))
    assert {stamp for stamp in stamps if stamp >= iso_utc(newest - timedelta(days=14))} <= set(kept)
    recent_days = {stamp[:10]: stamp for stamp in sorted(stamps) if stamp >= iso_utc(newest - timedelta(days=730))}
    assert set(recent_days.values()) <= set(kept)
    assert thinned({"timestamp": stamp} for stamp in kept) == tuple({"timestamp": stamp} for stamp in kept)


def assert_never_falls(ledger: Ledger) -> None:
    stamps = stamps_of(ledger)
    assert stamps == sorted(set(stamps))
    saved = [point["total_tokens_saved"] for point in ledger.history]
    assert saved == sorted(saved)


def days_of(ledger: Ledger) -> set[str]:
    return {stamp[:10] for stamp in stamps_of(ledger)}


def stamps_of(ledger: Ledger) -> list[str]:
    return [str(point["timestamp"]) for point in ledger.history]
