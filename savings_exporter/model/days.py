"""What was saved on each day (UTC), by provider, model, project, agent and source.

The newest additions are kept as *open days* in the ledger, and with it in the document. A save moves them to a file of
their own, so that the cost of a save does not grow with the number of days.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from datetime import datetime, timedelta
from typing import NamedTuple

from savings_exporter.model.crowds import tokens_of
from savings_exporter.model.figures import Numbers, added, iso_utc
from savings_exporter.model.names import OTHER

DAYS_KEPT = 731
"""How many days the store keeps: two years."""

MOST_ROWS = 200
"""How many different combinations of names a day holds. Further ones count as ``other``. Half of the places are kept
for combinations that have saved something.
"""

LAST_DAY = "9999-12-31"
"""The last day that there is: a range up to it has no end."""

# The length of a timestamp's prefix up to the day.
_DAY = len("2026-01-01")


class Names(NamedTuple):
    """The names of a row. The last three are None when the records do not name one."""

    provider: str
    model: str
    project: str | None
    agent: str | None
    source: str | None


class DayRow(NamedTuple):
    """What was saved on a day under some names. ``day`` is such as ``2026-01-31``, in UTC."""

    day: str
    names: Names
    numbers: Numbers


class Dated(NamedTuple):
    """Rows of some days, oldest first, and what belongs to no day."""

    rows: Sequence[DayRow]
    undated: Numbers


COLUMNS = ("day", *Names._fields)
"""What rows can be grouped by."""

Group = tuple[str | None, ...]
"""The day and the names of a group, as far as rows are grouped by them."""

Day = Mapping[Names, Numbers]
Days = Mapping[str, Day]
"""Rows by day."""


def day_of(stamp: str, now: datetime) -> str:
    """The day on which a record counts. One with a time in the future counts today."""
    return min(stamp[:_DAY], iso_utc(now)[:_DAY])


def oldest_kept(now: datetime) -> str:
    """The oldest day that is kept. What was saved before has no day."""
    return iso_utc(now - timedelta(days=DAYS_KEPT))[:_DAY]


def with_rows(days: Days, rows: Iterable[DayRow]) -> Days:
    """The days with more rows added."""
    changed: dict[str, dict[Names, Numbers]] = {}
    for day, names, numbers in rows:
        there = changed.get(day)
        if there is None:
            there = changed[day] = dict(days.get(day, ()))
        if names not in there and len(there) >= (MOST_ROWS if tokens_of(numbers) > 0 else MOST_ROWS // 2):
            names = _folded(names)
        before = there.get(names)
        there[names] = numbers if before is None else added(before, numbers)
    return {**days, **changed} if changed else days


def rows_of(days: Days) -> Iterator[DayRow]:
    """All rows, by day, oldest first."""
    for day in sorted(days):
        for names, numbers in days[day].items():
            yield DayRow(day, names, numbers)


def grouped(rows: Iterable[DayRow], by: Sequence[str]) -> dict[Group, Numbers]:
    """The sums of the rows that agree in some of ``COLUMNS``, in the order of the rows."""
    places = [COLUMNS.index(column) for column in by]
    groups: dict[Group, Numbers] = {}
    for day, names, numbers in rows:
        values = (day, *names)
        group = tuple(values[place] for place in places)
        groups[group] = added(groups[group], numbers) if group in groups else numbers
    return groups


def _folded(names: Names) -> Names:
    _, _, *further = names
    return Names(OTHER, OTHER, *(name and OTHER for name in further))
