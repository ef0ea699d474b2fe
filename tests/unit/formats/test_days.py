"""The file of closed days, and the open days of a document."""

from __future__ import annotations

import re
from datetime import date, timedelta

import pytest
from hypothesis import given
from hypothesis import strategies as st

from savings_exporter.errors import CorruptStoreError
from savings_exporter.formats.days import (
    ClosedDays,
    decode_closed,
    decode_numbers,
    decode_open,
    encode_closed,
    encode_numbers,
    encode_open,
    total,
)
from savings_exporter.model.days import MOST_ROWS, DayRow, Days, Names, rows_of, with_rows
from savings_exporter.model.figures import ZERO, added

STORE = "0123456789abcdef"

optional = st.none() | st.text(max_size=5)
names = st.builds(Names, st.text(max_size=5), st.sampled_from(["m", "\u65e5", 'a"b']), optional, optional, optional)
numbers = st.tuples(*[st.integers(-(2**70), 2**70)] * len(ZERO))
days = st.integers(0, 800).map(lambda n: (date(2025, 1, 1) + timedelta(days=n)).isoformat())
rows = st.lists(st.builds(DayRow, days, names, numbers), max_size=20)


def closed_of(some: Days) -> ClosedDays:
    return ClosedDays({}).with_days(some)


@given(rows)
def test_open_days(some: list[DayRow]) -> None:
    open_days = with_rows({}, some)
    encoded = encode_open(open_days)
    assert encoded.isascii()
    assert decode_open(encoded) == open_days
    assert decode_numbers(encode_numbers(total(open_days.values()))) == total(open_days.values())


@given(rows, rows)
def test_closed_days_add_up(some: list[DayRow], more: list[DayRow]) -> None:
    closed = closed_of(with_rows({}, some)).with_days(with_rows({}, more))
    data = encode_closed(closed, STORE)
    assert data.isascii()
    again = decode_closed(data, STORE)
    assert again.sum() == added(total(with_rows({}, some).values()), total(with_rows({}, more).values()))
    assert {day: again.day(day) for day in again.lines} == {day: closed.day(day) for day in closed.lines}
    assert list(again.lines) == sorted(closed.lines)


@given(rows, st.integers(0, 5))
def test_oldest_days_are_dropped(some: list[DayRow], number: int) -> None:
    closed = closed_of(with_rows({}, some))
    kept, dropped = closed.newest(number)
    assert added(kept.sum(), dropped) == closed.sum()
    assert sorted(kept.lines) == sorted(closed.lines)[max(len(closed.lines) - number, 0) :]


@pytest.mark.parametrize(("tokens", "places"), [(1, MOST_ROWS), (0, MOST_ROWS // 2)], ids=["saved", "not saved"])
def test_names_of_a_day_are_bounded(tokens: int, places: int) -> None:
    """What exceeds the bound counts as other, and a name that has a row keeps it."""
    numbered = [
        DayRow("2026-01-31", Names("p", f"m{n}", "x", None, "s"), (1, tokens, *ZERO[2:]))
        for n in (*range(500), 0, 1000)
    ]
    day = with_rows(with_rows({}, numbered[:500]), numbered[500:])["2026-01-31"]
    assert len(day) == places + 1
    assert day[Names("p", "m0", "x", None, "s")][0] == 2
    assert day[Names("other", "other", "other", None, "other")][0] == 501 - places
    assert sum(row[0] for row in day.values()) == 502
    # Also where they are added to a day that is closed.
    closed = closed_of(with_rows({}, numbered[:150])).with_days(with_rows({}, numbered[150:]))
    assert len(closed.day("2026-01-31")) == places + 1
    assert closed.sum()[0] == 502


DATA = encode_closed(closed_of(with_rows({}, [DayRow("2026-01-31", Names("p", "m", None, None, None), ZERO)])), STORE)


@pytest.mark.parametrize(
    ("data", "said"),
    [
        (b"", "its first line is damaged"),
        (b"{}\n", "its first line is damaged"),
        (DATA[:-3], "its checksum does not match"),
        (DATA.replace(b"2026-01-31", b"2026-01-30"), "its checksum does not match"),
        (DATA.replace(STORE.encode(), b"f" * 16), "belongs to the store ffffffffffffffff"),
        (DATA.replace(b'"format":1', b'"format":2'), "its format is 2, and this program knows up to 1"),
    ],
)
def test_damage(data: bytes, said: str) -> None:
    with pytest.raises(CorruptStoreError, match=re.escape(said)):
        decode_closed(data, STORE)
    assert [row.day for row in rows_of({"2026-01-31": decode_closed(DATA, STORE).day("2026-01-31")})] == ["2026-01-31"]
