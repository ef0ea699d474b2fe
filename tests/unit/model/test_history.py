"""History: a point at each record's own time, in any order and grouping, thinned as promised."""

from __future__ import annotations

import json
import math
from datetime import datetime, timedelta, timezone
from random import Random
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from savings_exporter.model.history import (
    DAYS_OF_HOURLY_POINTS,
    DAYS_OF_POINTS,
    POINT_KEYS,
    History,
)
from savings_exporter.model.record import SavingsRecord
from savings_exporter.model.totals import Ledger, Totals
from tests.unit.model.samples import (
    NOW,
    at,
    counted,
    many_records,
    one,
    saved_of,
    split,
    stamps_of,
)

DAY, HOUR = timedelta(days=1), timedelta(hours=1)


def assert_never_falls(ledger: Ledger) -> None:
    stamps = stamps_of(ledger)
    assert stamps == sorted(set(stamps))
    saved = [point["total_tokens_saved"] for point in ledger.history.points]
    assert saved == sorted(saved)


def assert_ends_with_lifetime(ledger: Ledger) -> None:
    last = ledger.history.points[-1]
    assert {key: last[key] for key in POINT_KEYS.values()} == {
        key: getattr(ledger.lifetime, name) for name, key in POINT_KEYS.items()
    }


def days_of(ledger: Ledger) -> set[str]:
    return {stamp[:10] for stamp in stamps_of(ledger)}


@pytest.mark.parametrize("order", [1, -1, 7])
def test_batch_over_30_days(order: int) -> None:
    """Two records a day; the newest 15 days keep both hours, the others the last of the day."""
    moments = [NOW - DAY * day - HOUR * hour for day in range(29, -1, -1) for hour in (8, 0)]
    records = [one(at=moment) for moment in moments]
    if order == 7:
        Random(7).shuffle(records)
    ledger = counted(Ledger(), records[:: 1 if order == 7 else order])
    assert saved_of(ledger) == [
        (at(moment), number + 1) for number, moment in enumerate(moments) if number % 2 or number >= 30
    ]
    assert_ends_with_lifetime(ledger)


def test_records_of_one_hour() -> None:
    ledger = counted(Ledger(), [one(at=NOW - timedelta(minutes=20))])
    ledger = counted(ledger, [one(saved=4)])
    assert saved_of(ledger) == [(at(NOW), 5)]
    ledger = counted(ledger, [one(saved=2, at=NOW - timedelta(minutes=30))])
    assert saved_of(ledger) == [(at(NOW), 7)]
    ledger = counted(ledger, [one(saved=0, at=NOW + timedelta(minutes=20)), one(at=NOW + HOUR)], now=NOW + HOUR)
    assert saved_of(ledger) == [(at(NOW + timedelta(minutes=20)), 7), (at(NOW + HOUR), 8)]


def test_record_out_of_order() -> None:
    ledger = counted(Ledger(), [one(saved=1, at=NOW - 5 * HOUR), one(saved=2)])
    ledger = counted(ledger, [one(saved=10, at=NOW - 3 * HOUR)])
    assert saved_of(ledger) == [(at(NOW - 5 * HOUR), 1), (at(NOW - 3 * HOUR), 11), (at(NOW), 13)]


def test_late_record_raises_its_hour() -> None:
    ledger = counted(Ledger(), [one(saved=1, at=NOW - 5 * HOUR), one(saved=2, at=NOW - HOUR), one(saved=3)])
    later = NOW - HOUR + timedelta(minutes=20)
    ledger = counted(ledger, [one(saved=10, at=later)])
    assert saved_of(ledger) == [(at(NOW - 5 * HOUR), 1), (at(later), 13), (at(NOW), 16)]


def test_late_record_before_all() -> None:
    ledger = counted(Ledger(), [one(saved=1), one(saved=5, at=NOW - 40 * DAY)])
    ledger = counted(ledger, [one(saved=10, at=NOW - 400 * DAY, usd=-0.1)])
    assert saved_of(ledger) == [(at(NOW - 400 * DAY), 10), (at(NOW - 40 * DAY), 15), (at(NOW), 16)]
    assert [point["compression_savings_usd"] for point in ledger.history.points] == [-0.1, -0.1, -0.1]


def test_late_record_on_a_thinned_day() -> None:
    old = NOW - 20 * DAY
    ledger = counted(Ledger(), [one(at=NOW - DAY * day) for day in range(21)])
    before = counted(ledger, [one(saved=100, at=old - 2 * HOUR)])
    assert saved_of(before)[:2] == [(at(old), 101), (at(old + DAY), 102)]
    after = counted(ledger, [one(saved=100, at=old + 2 * HOUR)])
    assert saved_of(after)[:2] == [(at(old + 2 * HOUR), 101), (at(old + DAY), 102)]


@given(many_records, st.lists(st.integers(0, 30)), st.lists(st.booleans()), st.randoms(use_true_random=False))
def test_any_order_grouping_and_reading(
    records: list[SavingsRecord], cuts: list[int], looks: list[bool], random: Random
) -> None:
    at_once = counted(Ledger(), records)
    in_groups, look = Ledger(), iter(looks)
    for group in split(sorted(records, key=lambda _: random.random()), cuts):
        in_groups = counted(in_groups, group)
        if next(look, False):
            assert_ends_with_lifetime(in_groups)
    assert in_groups.history == at_once.history
    if records:
        assert_ends_with_lifetime(at_once)


@given(many_records)
def test_points_are_what_was_saved_by_then(records: list[SavingsRecord]) -> None:
    for stamp, saved in saved_of(counted(Ledger(), records)):
        until = [r for r in records if r.timestamp and at(r.timestamp)[:13] <= stamp[:13]]
        assert saved == sum(record.tokens_saved for record in until)


def test_many_hours_pending() -> None:
    ledger = Ledger()
    for hour in range(200):
        ledger = counted(ledger, [one(at=NOW - HOUR * hour)])
        assert len(ledger.history._pending) <= 100
    assert len(ledger.history) == 200
    assert saved_of(ledger)[0] == (at(NOW - 199 * HOUR), 1)
    assert saved_of(ledger)[-1] == (at(NOW), 200)


def test_addition_changes_no_other_history() -> None:
    ledger = counted(Ledger(), [one()])
    before = ledger.history.points
    counted(ledger, [one(at=NOW - HOUR), one()])
    assert ledger.history.points == before
    other = counted(ledger, [one(saved=3)])
    assert saved_of(other) == [(at(NOW), 4)]


def test_hour_points_then_day_points() -> None:
    ledger = Ledger()
    start = NOW - 760 * DAY
    step, moment = timedelta(hours=8), start
    while moment <= NOW:
        ledger = counted(ledger, [one(at=moment)], now=moment)
        moment += step
    stamps = stamps_of(ledger)
    edge = at(NOW - 14 * DAY)
    recent, old = [stamp for stamp in stamps if stamp >= edge], [stamp for stamp in stamps if stamp < edge]
    assert len(recent) == 14 * 3 + 1
    assert len(old) == len({stamp[:10] for stamp in old})
    assert 730 - 15 <= len(old) <= 730 - 13
    assert stamps[0] >= at(NOW - 730 * DAY)


@given(st.lists(st.tuples(st.integers(-(10**9), 10**9), st.integers(0, 10_000)), max_size=60))
def test_clients_with_wrong_clocks(steps: list[tuple[int, int]]) -> None:
    ledger, now = Ledger(), NOW
    for off_by_seconds, passing_minutes in steps:
        now += timedelta(minutes=passing_minutes)
        ledger = counted(ledger, [one(at=now + timedelta(seconds=off_by_seconds))], now=now)
        assert_never_falls(ledger)
        assert_ends_with_lifetime(ledger)
        assert all(stamp <= at(now) for stamp in stamps_of(ledger))


def test_future_counts_now() -> None:
    ahead = [one(saved=2, at=NOW + timedelta(minutes=10)), one(saved=3, at=datetime(9999, 1, 1, tzinfo=timezone.utc))]
    ledger = counted(Ledger(), [one(), *ahead])
    assert saved_of(ledger) == [(at(NOW), 6)]


@pytest.mark.parametrize("year", [1970, 2099, 9999])
def test_wrong_clock_pushes_nothing_out(year: int) -> None:
    ledger = Ledger()
    for hour in range(48):
        ledger = counted(ledger, [one(at=NOW + HOUR * hour)], now=NOW + HOUR * hour)
    before, now = stamps_of(ledger), NOW + 48 * HOUR
    ledger = counted(ledger, [one(at=datetime(year, 1, 1, tzinfo=timezone.utc))], now=now)
    ledger = counted(ledger, [one(at=now)], now=now)
    assert set(before) <= set(stamps_of(ledger))
    assert ledger.history.points[-1]["total_tokens_saved"] == 50


@pytest.fixture(scope="module")
def two_years() -> Ledger:
    """A ledger with a record a day at noon for two years, and one an hour today until NOW."""
    ledger = Ledger()
    moments = [NOW.replace(hour=12, minute=0) - DAY * day for day in range(729, 0, -1)]
    for moment in moments + [NOW - HOUR * hour for hour in range(12, -1, -1)]:
        ledger = counted(ledger, [one(at=moment)], now=moment)
    assert len(ledger.history) == 729 + 13
    return ledger


@pytest.mark.parametrize("year", [1970, 2025, 2030, 2099])
def test_our_own_clock_is_wrong_for_a_while(year: int, two_years: Ledger) -> None:
    ledger = before = two_years
    wrong = NOW.replace(year=year)
    ledger = counted(ledger, [one(at=wrong)], now=wrong)
    assert days_of(before) <= days_of(ledger)
    for hour in (1, 2):
        right = NOW + HOUR * hour
        ledger = counted(ledger, [one(at=right)], now=right)
        assert at(right) in stamps_of(ledger)
    assert days_of(before) <= days_of(ledger)
    assert_never_falls(ledger)
    assert ledger.history.points[-1]["total_tokens_saved"] == ledger.lifetime.tokens_saved == 742 + 3


def test_points_beyond_731_days(two_years: Ledger) -> None:
    moments = [NOW - DAY * day for day in (730, 731, 5000)]
    ledger = counted(two_years, [one(at=moment, saved=10) for moment in moments])
    assert len(days_of(ledger)) == DAYS_OF_POINTS
    assert saved_of(ledger)[0] == (at(NOW - 730 * DAY), 30)


def test_point_after_now_grows() -> None:
    ledger = counted(Ledger(), [one(saved=5)], now=NOW)
    ahead, hour_later = NOW + 400 * DAY, NOW + HOUR
    ledger = counted(ledger, [one(saved=7, usd=-0.1, at=ahead)], now=ahead)
    ledger = counted(ledger, [one(saved=1, usd=0.3, at=ahead)], now=hour_later)
    assert [
        (*pair, point["compression_savings_usd"])
        for pair, point in zip(saved_of(ledger), ledger.history.points, strict=True)
    ] == [
        (at(NOW), 5, 0.0),
        (at(hour_later), 6, 0.3),
        (at(ahead), 13, 0.2),
    ]


@given(st.lists(st.tuples(st.integers(-(10**8), 10**8), st.integers(0, 5)), max_size=60))
def test_our_own_clock_jumps(jumps: list[tuple[int, int]]) -> None:
    ledger, now = Ledger(), NOW
    for seconds, saved in jumps:
        now = NOW + timedelta(seconds=seconds)
        before = ledger
        ledger = counted(ledger, [one(at=now, saved=saved)], now=now)
        assert days_of(before) <= days_of(ledger)
        assert_never_falls(ledger)
        assert_ends_with_lifetime(ledger)


@pytest.mark.parametrize("value", ["many", None, [5], math.nan, math.inf, 10**400], ids=lambda value: str(value)[:6])
def test_point_that_holds_no_number(value: Any) -> None:
    strange = {"timestamp": at(NOW + DAY), "total_tokens_saved": value, "later": value}
    ledger = counted(Ledger(history=History([strange])), [one(saved=5)])
    assert [point["total_tokens_saved"] for point in ledger.history.points] == [5, 5]
    assert ledger.history.points[-1]["later"] is value


def foreign(*points: tuple[datetime, int]) -> History:
    return History({"timestamp": at(moment), "model": "x", "total_tokens_saved": saved} for moment, saved in points)


def test_foreign_points_keep_their_keys() -> None:
    history = foreign((NOW - 3 * HOUR, 10), (NOW - 2 * HOUR, 20), (NOW - HOUR, 30))
    ledger = counted(Ledger(lifetime=Totals(tokens_saved=30), history=history), [one(saved=5, at=NOW - 2 * HOUR)])
    assert saved_of(ledger) == [(at(NOW - 3 * HOUR), 10), (at(NOW - 2 * HOUR), 25), (at(NOW - HOUR), 35)]
    # The point in the middle no longer belongs to the one request whose model it named.
    assert [point.get("model") for point in ledger.history.points] == ["x", None, "x"]
    assert ledger.history.points[0] == history.points[0]


def test_foreign_history_behind_its_lifetime() -> None:
    start = Ledger(lifetime=Totals(tokens_saved=50), history=foreign((NOW - 9 * HOUR, 10), (NOW - 5 * HOUR, 30)))
    ledger = counted(start, [one(at=NOW - HOUR), one()])
    assert saved_of(ledger) == [
        (at(NOW - 9 * HOUR), 10),
        (at(NOW - 5 * HOUR), 50),
        (at(NOW - HOUR), 51),
        (at(NOW), 52),
    ]
    late = counted(start, [one(at=NOW - 9 * HOUR)])
    assert saved_of(late) == [(at(NOW - 9 * HOUR), 11), (at(NOW - 5 * HOUR), 51)]


def test_no_history_yet_but_a_lifetime() -> None:
    ledger = counted(Ledger(lifetime=Totals(tokens_saved=50)), [one(at=NOW - HOUR), one()])
    assert saved_of(ledger) == [(at(NOW - HOUR), 51), (at(NOW), 52)]


@given(st.floats(1e7, 1e15), st.integers(-(10**10), 10**10))
def test_amounts_beyond_exact_sums(usd: float, nanodollars: int) -> None:
    ledger = counted(Ledger(lifetime=Totals(compression_savings_usd=usd)), [one(usd=nanodollars / 1e9)])
    assert_ends_with_lifetime(ledger)
    assert_ends_with_lifetime(counted(ledger, [one(usd=0.1, at=NOW - HOUR)]))


hours = st.integers(0, 4_000 * 24) | st.integers(3_950 * 24, 4_000 * 24) | st.just(600_000)


@given(st.sets(hours, max_size=200), st.integers(0, 800))
def test_thinned(hours: set[int], days: int) -> None:
    """Some points anywhere, and one a day for some days, in hours since some time."""
    hours = hours | {24 * day + 20 for day in range(4_000 - days, 4_000)}
    stamps = {at(NOW + HOUR * hour) for hour in hours}
    thinned = History({"timestamp": stamp} for stamp in stamps).thinned()
    kept = [str(point["timestamp"]) for point in thinned.points]
    assert kept == sorted(set(kept))
    assert set(kept) <= stamps
    assert len({stamp[:10] for stamp in kept}) <= DAYS_OF_POINTS
    assert len(kept) <= DAYS_OF_POINTS - DAYS_OF_HOURLY_POINTS + 24 * DAYS_OF_HOURLY_POINTS
    newest = NOW + HOUR * max(hours, default=0)
    assert {stamp for stamp in stamps if stamp >= at(newest - 14 * DAY)} <= set(kept)
    recent_days = {stamp[:10]: stamp for stamp in sorted(stamps) if stamp >= at(newest - 730 * DAY)}
    assert set(recent_days.values()) <= set(kept)
    assert thinned.thinned() == thinned


@given(many_records, many_records)
def test_encoded(records: list[SavingsRecord], more: list[SavingsRecord]) -> None:
    ledger = counted(Ledger(), records)
    for history in (ledger.history, counted(ledger, more).history):
        encoded = history.encoded()
        assert tuple(json.loads(encoded)) == history.points
        assert encoded.count(b"\n") == len(history)
        lines = [line.strip(b" ,[]") for line in encoded.split(b"\n")[1:]]
        again = History.of_lines(lines)
        assert again == history
        assert again.encoded() == encoded


def test_encoding_of_closed_points_is_kept() -> None:
    ledger = counted(Ledger(), [one(at=NOW - HOUR * hour) for hour in range(24)])
    before = [point.line for point in ledger.history._all()]
    after = [point.line for point in counted(ledger, [one()]).history._all()]
    assert all(new is old for new, old in zip(after[:-1], before[:-1], strict=True))
    assert after[-1] != before[-1]


def test_timestamp_comes_first() -> None:
    history = History([{"total_tokens_saved": 5, "timestamp": at(NOW)}])
    assert history.encoded() == b'[\n  {"timestamp":"2026-06-15T12:30:00Z","total_tokens_saved":5}]'


def test_line_that_is_no_point() -> None:
    for line in (b"[]", b"5", b'{"total_tokens_saved":5}', b'{"timestamp":5}', b"{"):
        with pytest.raises(ValueError, match=r"\w"):
            History.of_lines([line])
