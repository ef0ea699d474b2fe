"""The totals of each name in the past: from the lifetime totals, and what was saved on each day.

Days and lifetime totals do not always agree on a name. The lifetime totals have a limit for all names, and each day has
one for its combinations of names. Beyond a limit, a record counts as ``other`` in one of the two and under its name in
the other one.
"""

from __future__ import annotations

import operator
from collections.abc import Iterable, Iterator, Mapping
from itertools import accumulate
from typing import NamedTuple

from savings_exporter.model.days import DayRow, grouped
from savings_exporter.model.figures import COUNTS, ZERO, Numbers, Totals, added, numbers_of
from savings_exporter.model.names import OTHER

_COUNTS = range(len(COUNTS))
_AMOUNTS = range(len(COUNTS), len(ZERO))
_REQUESTS = COUNTS.index("requests")

Name = tuple[str, ...]
"""The values of some columns that hold names."""

_Days = dict[str, dict[Name, Numbers]]


class Past(NamedTuple):
    """The totals of a name before the first day, and after each day on which they changed.

    The last of these totals are the lifetime totals.
    """

    before: Totals
    after: list[tuple[str, Totals]]


def past_by(columns: tuple[str, ...], lifetime: Mapping[Name, Totals], rows: Iterable[DayRow]) -> dict[Name, Past]:
    """The past of each name of the lifetime totals.

    The sum over all names is exact on every day. A name is, too, with these exceptions:

    - A name that counts as ``other`` in the lifetime totals is a part of ``other`` on each day.
    - If the days have more of a name than the lifetime totals, as ``other`` has after days with too many combinations
      of names, the first part of it belongs to other names. It is divided among them in proportion to what the days
      lack of their lifetime totals.

    Args:
        columns: the columns of the rows that hold the names.
        lifetime: the lifetime totals by name.
        rows: what was saved on each day. Rows without a name are left out.
    """
    days = _by_day(columns, lifetime, rows)
    totals = {name: numbers_of(of_name) for name, of_name in lifetime.items()}
    _divide_excess(days, totals)
    changes: dict[Name, list[tuple[str, Numbers]]] = {name: [] for name in lifetime}
    for day in sorted(days):
        for name, numbers in days[day].items():
            changes[name].append((day, numbers))
    return {name: _past(lifetime[name], totals[name], changes[name]) for name in lifetime}


def _by_day(columns: tuple[str, ...], lifetime: Mapping[Name, Totals], rows: Iterable[DayRow]) -> _Days:
    """What was saved by day, under names of the lifetime totals, or ``other``."""
    days: _Days = {}
    for (day, *values), numbers in grouped(rows, ("day", *columns)).items():
        name = tuple(value for value in values if value is not None)
        if day is None or len(name) < len(columns):
            continue
        if name not in lifetime:
            name = len(columns) * (OTHER,)
        of_day = days.setdefault(day, {})
        of_day[name] = added(of_day[name], numbers) if name in of_day else numbers
    return days


def _divide_excess(days: _Days, totals: Mapping[Name, Numbers]) -> None:
    """Divide what the days have of a name beyond its lifetime totals among the names of which they lack something."""
    sums: dict[Name, Numbers] = {}
    for of_day in days.values():
        for name, numbers in of_day.items():
            sums[name] = added(sums.get(name, ZERO), numbers)
    lacking = {name: list(map(operator.sub, numbers, sums.get(name, ZERO))) for name, numbers in totals.items()}
    excess = {
        name: [max(there - wanted, 0) for there, wanted in zip(numbers, totals.get(name, ZERO), strict=True)]
        for name, numbers in sums.items()
    }
    excess = {name: rest for name, rest in excess.items() if name not in totals or any(rest[: len(COUNTS)])}
    if not excess:
        return
    takers = {name: numbers for name, numbers in lacking.items() if name not in excess}
    amounts = [place for place in _AMOUNTS if any(numbers[place] for numbers in takers.values())]
    for day in sorted(days):
        taken = ZERO
        for name in excess.keys() & days[day].keys():
            moved = _taken(days[day][name], excess[name], amounts)
            days[day][name] = tuple(map(operator.sub, days[day][name], moved))
            taken = added(taken, moved)
            if name not in totals:
                del days[day][name]
        for name, numbers in _divided(taken, takers):
            days[day][name] = added(days[day].get(name, ZERO), numbers)


def _taken(numbers: Numbers, excess: list[int], amounts: Iterable[int]) -> Numbers:
    """The part of a day's numbers that is in excess. The excess becomes smaller by it. The ``amounts`` are taken in
    proportion to the requests, because they can be negative.
    """
    taken = [0] * len(numbers)
    for place in _COUNTS:
        taken[place] = min(numbers[place], excess[place])
        excess[place] -= taken[place]
    for place in amounts:
        taken[place] = numbers[place] * taken[_REQUESTS] // (numbers[_REQUESTS] or 1)
    return tuple(taken)


def _divided(numbers: Numbers, takers: Mapping[Name, list[int]]) -> Iterator[tuple[Name, Numbers]]:
    """Divide numbers among names. What the names lack becomes less by their shares."""
    shares = {name: [0] * len(numbers) for name in takers}
    for place in (*_COUNTS, *_AMOUNTS):
        weights = {name: abs(lacking[place]) for name, lacking in takers.items() if lacking[place]}
        number = min(numbers[place], sum(weights.values())) if place in _COUNTS else numbers[place]
        for name, share in _in_proportion(number, weights):
            shares[name][place] = share
            if place in _COUNTS:
                takers[name][place] -= share
    return ((name, tuple(share)) for name, share in shares.items() if any(share))


def _in_proportion(number: int, weights: Mapping[Name, int]) -> Iterator[tuple[Name, int]]:
    """Divide a number exactly. If it is not larger than the sum of the weights, no share is larger than its weight."""
    remaining = sum(weights.values())
    for name, weight in weights.items():
        share = number * weight // remaining
        yield name, share
        number, remaining = number - share, remaining - weight


def _past(lifetime: Totals, numbers: Numbers, changes: list[tuple[str, Numbers]]) -> Past:
    before = numbers
    for _, change in changes:
        before = tuple(map(operator.sub, before, change))
    sums = list(accumulate((change for _, change in changes), added, initial=before))
    totals = [Totals().plus(of_day, None) for of_day in sums[:-1]] + [lifetime]
    return Past(totals[0], [(day, of_day) for (day, _), of_day in zip(changes, totals[1:], strict=True)])
