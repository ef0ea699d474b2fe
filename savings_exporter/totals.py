"""Folding records into totals with a bounded set of names. Pure: no clock, no disk, no lock."""

from __future__ import annotations

import operator
from collections.abc import Callable, Iterable, Mapping, Sequence
from datetime import datetime, timezone
from typing import Any, Generic, TypeVar

import msgspec

from savings_exporter.records import UNKNOWN, SavingsRecord

OTHER = "other"
"""The name that everything beyond a bound is counted under."""

DAYS_OF_HOURLY_POINTS = 14 + 1
"""History keeps the points of each hour on so many days: a part of the first, fourteen, and a part of the last."""

DAYS_OF_POINTS = 730 + 1
"""On how many days history keeps any point."""

LARGEST_NUMBER = 2**63 - 1
"""Beyond this no number of another program's is a count or an amount, and sums would leave the range of a float."""

Pair = tuple[str, str]
"""A provider and a model, in this order."""

OTHER_PAIR: Pair = (OTHER, OTHER)

# Money is kept to a billionth of a dollar and added in whole billionths: the sum is the exact decimal sum (up to nine
# million dollars, where a float's digits end), whatever the order, and 0.1 + 0.2 is not written as 0.30000000000000004.
_USD_UNITS = 10**9

Name = TypeVar("Name", str, Pair)


class Totals(msgspec.Struct, frozen=True, kw_only=True):
    """Sums over a set of records, under the names that the document gives them.

    Tokens are counts, ``*_usd`` are US dollars (``compression_savings_usd`` can be negative).
    ``last_activity_at`` is the newest record's timestamp in UTC, ISO 8601, None when there was none.
    """

    requests: int = 0
    tokens_saved: int = 0
    tool_tokens_saved: int = 0
    output_tokens_saved: int = 0
    cache_read_tokens: int = 0
    cache_write_tokens: int = 0
    uncached_input_tokens: int = 0
    total_input_tokens: int = 0
    total_output_tokens: int = 0
    compression_savings_usd: float = 0.0
    compression_savings_list_usd: float = 0.0
    tool_schema_savings_usd: float = 0.0
    cache_savings_usd: float = 0.0
    output_savings_usd: float = 0.0
    total_input_cost_usd: float = 0.0
    total_output_cost_usd: float = 0.0
    last_activity_at: str | None = None

    def __add__(self, other: Totals) -> Totals:
        sums = {name: getattr(self, name) + getattr(other, name) for name in COUNTS}
        for name in AMOUNTS:
            sums[name] = (_units(getattr(self, name)) + _units(getattr(other, name))) / _USD_UNITS
        return Totals(**sums, last_activity_at=_later(self.last_activity_at, other.last_activity_at))

    def beyond(self, part: Totals) -> Totals:
        """What these totals hold and ``part`` of them does not; no count below zero."""
        rest = {name: max(getattr(self, name) - getattr(part, name), 0) for name in COUNTS}
        for name in AMOUNTS:
            rest[name] = (_units(getattr(self, name)) - _units(getattr(part, name))) / _USD_UNITS
        return Totals(**rest, last_activity_at=self.last_activity_at)

    @property
    def headline_tokens_saved(self) -> int:
        """Input tokens that were never sent: compression and deferred tool schemas together."""
        return self.tokens_saved + self.tool_tokens_saved

    @property
    def savings_percent(self) -> float:
        """The share of the input that was saved, in percent, rounded to two digits."""
        before = self.headline_tokens_saved + self.total_input_tokens
        return round(self.headline_tokens_saved / before * 100, 2) if before > 0 else 0.0


COUNTS = tuple(field.name for field in msgspec.structs.fields(Totals) if field.type is int)
AMOUNTS = tuple(field.name for field in msgspec.structs.fields(Totals) if field.type is float)


# What a point of history calls the counts and amounts of the lifetime totals.
POINT_KEYS = {
    "tokens_saved": "total_tokens_saved",
    **{
        name: name
        for name in (
            "compression_savings_usd",
            "cache_read_tokens",
            "cache_savings_usd",
            "total_input_tokens",
            "total_input_cost_usd",
            "output_tokens_saved",
            "output_savings_usd",
            "tool_tokens_saved",
            "tool_schema_savings_usd",
            "total_output_cost_usd",
        )
    },
}

# How much of a timestamp tells its day, and its hour.
_DAY, _HOUR = len("2026-01-01"), len("2026-01-01T00")


class Limits(msgspec.Struct, frozen=True, kw_only=True):
    """How many different names a ledger takes before it counts new ones under ``other``."""

    max_models: int = 200
    max_projects: int = 200


class Ledger(msgspec.Struct, frozen=True, kw_only=True):
    """All totals of a store after its first ``sequence`` records. Never changed: an addition gives a new one.

    ``by_provider_model`` adds up to ``lifetime``, and ``by_model`` too except for what an older document
    did not break down. ``projects`` holds only what was recorded for a project.
    """

    sequence: int = 0
    lifetime: Totals = Totals()
    by_model: Mapping[str, Totals] = {}
    projects: Mapping[str, Totals] = {}
    by_provider_model: Mapping[Pair, Totals] = {}
    history: tuple[Mapping[str, Any], ...] = ()

    def plus(self, delta: Delta, limits: Limits, now: datetime) -> Ledger:
        """This ledger with a delta's records counted in."""
        lifetime = self.lifetime + delta.lifetime
        return Ledger(
            sequence=self.sequence + delta.records,
            lifetime=lifetime,
            by_model=_merged(self.by_model, delta.by_model, OTHER, limits.max_models),
            projects=_merged(self.projects, delta.projects, OTHER, limits.max_projects),
            by_provider_model=_merged(self.by_provider_model, delta.by_provider_model, OTHER_PAIR, limits.max_models),
            history=_with_point(self.history, lifetime, delta.lifetime, delta.newest, now)
            if delta.newest
            else self.history,
        )

    def bounded(self, limits: Limits) -> Ledger:
        """This ledger with the smallest names beyond the limits counted under ``other``."""
        return msgspec.structs.replace(
            self,
            by_model=_largest(self.by_model, OTHER, limits.max_models),
            projects=_largest(self.projects, OTHER, limits.max_projects),
            by_provider_model=_largest(self.by_provider_model, OTHER_PAIR, limits.max_models),
        )


class Delta:
    """Records folded together, waiting to be counted into a ledger. Its size does not grow with their number."""

    def __init__(self) -> None:
        self.records = 0
        self._lifetime = _Sum()
        self._models = _Group(OTHER)
        self._projects = _Group(OTHER)
        self._pairs = _Group(OTHER_PAIR)

    @property
    def lifetime(self) -> Totals:
        """The totals of all records."""
        return self._lifetime.totals()

    @property
    def by_model(self) -> dict[str, Totals]:
        """The totals of each model."""
        return self._models.totals()

    @property
    def projects(self) -> dict[str, Totals]:
        """The totals of each project."""
        return self._projects.totals()

    @property
    def by_provider_model(self) -> dict[Pair, Totals]:
        """The totals of each provider and model."""
        return self._pairs.totals()

    @property
    def newest(self) -> datetime | None:
        """The newest record's timestamp."""
        return self._lifetime.newest

    def add(self, record: SavingsRecord, ledger: Ledger, limits: Limits) -> None:
        """Count one record in. ``ledger`` says which names are taken already, so that those are kept apart."""
        provider, model, project = _NAMES(record)
        self.records += 1
        self._count(provider or UNKNOWN, model, project, _numbers_of(record), record.timestamp, ledger, limits)

    def add_all(self, records: Iterable[SavingsRecord], ledger: Ledger, limits: Limits) -> None:
        """Count many records in, as ``add`` does with each in turn, in a fraction of the time."""
        groups: dict[tuple[str | None, str, str | None], list[SavingsRecord]] = {}
        for record in records:
            groups.setdefault(_NAMES(record), []).append(record)
        for (provider, model, project), group in groups.items():
            numbers = _numbers_of_all(group)
            moment = max(moment for record in group if (moment := record.timestamp))
            self.records += len(group)
            self._count(provider or UNKNOWN, model, project, numbers, moment, ledger, limits)

    def absorb(self, later: Delta, ledger: Ledger, limits: Limits) -> None:
        """Count another delta's records in, after this one's."""
        self.records += later.records
        self._lifetime.add(later._lifetime.numbers, later._lifetime.newest)
        self._models.absorb(later._models, ledger.by_model, limits.max_models)
        self._pairs.absorb(later._pairs, ledger.by_provider_model, limits.max_models)
        self._projects.absorb(later._projects, ledger.projects, limits.max_projects)

    def _count(
        self,
        provider: str,
        model: str,
        project: str | None,
        numbers: Iterable[int],
        moment: datetime | None,
        ledger: Ledger,
        limits: Limits,
    ) -> None:
        self._lifetime.add(numbers, moment)
        self._models.sum_of(model, ledger.by_model, limits.max_models).add(numbers, moment)
        pair = (provider, model)
        self._pairs.sum_of(pair, ledger.by_provider_model, limits.max_models).add(numbers, moment)
        if project is not None:
            self._projects.sum_of(project, ledger.projects, limits.max_projects).add(numbers, moment)


class _Sum:
    """Totals that grow in place, because a new ``Totals`` for every record and name costs ten times as much.

    ``numbers`` are the counts, then the amounts in billionths of a dollar: whole numbers, so that the sum is exact.
    """

    __slots__ = ("newest", "numbers")

    def __init__(self) -> None:
        self.numbers = [0] * (len(COUNTS) + len(AMOUNTS))
        self.newest: datetime | None = None

    def add(self, numbers: Iterable[int], moment: datetime | None) -> None:
        self.numbers = list(map(operator.add, self.numbers, numbers))
        if moment is not None and (self.newest is None or moment > self.newest):
            self.newest = moment

    def totals(self) -> Totals:
        values: dict[str, Any] = dict(zip(COUNTS, self.numbers, strict=False))
        for name, units in zip(AMOUNTS, self.numbers[len(COUNTS) :], strict=True):
            values[name] = units / _USD_UNITS
        return Totals(**values, last_activity_at=iso_utc(self.newest) if self.newest else None)


class _Group(Generic[Name]):
    """Sums by name, with a bound on the names that these and the ledger's make together."""

    def __init__(self, other: Name) -> None:
        self._other: Name = other
        self._sums: dict[Name, _Sum] = {}
        self._taken: Mapping[Name, Totals] = {}
        self._names = 0

    def sum_of(self, name: Name, taken: Mapping[Name, Totals], limit: int) -> _Sum:
        """The sum that a record of this name belongs to."""
        if taken is not self._taken:
            self._taken = taken
            self._names = len((taken.keys() | self._sums.keys()) - {self._other})
        found = self._sums.get(name)
        if found is not None:
            return found
        if name not in taken and name != self._other:
            if self._names >= limit:
                return self.sum_of(self._other, taken, limit)
            self._names += 1
        self._sums[name] = found = _Sum()
        return found

    def absorb(self, later: _Group[Name], taken: Mapping[Name, Totals], limit: int) -> None:
        for name, part in later._sums.items():
            self.sum_of(name, taken, limit).add(part.numbers, part.newest)

    def totals(self) -> dict[Name, Totals]:
        return {name: part.totals() for name, part in self._sums.items()}


def total_of(parts: Iterable[Totals]) -> Totals:
    """The sum of several totals."""
    return sum(parts, Totals())


def iso_utc(moment: datetime) -> str:
    """A moment as documents write it: UTC, whole seconds, ``Z``."""
    return moment.astimezone(timezone.utc).replace(microsecond=0, tzinfo=None).isoformat() + "Z"


def thinned(points: Iterable[Mapping[str, Any]]) -> tuple[Mapping[str, Any], ...]:
    """History points in the order of time: the last of each day on the newest 731 days that have any, and on the newest
    15 of those the last of each hour.

    No clock is asked: one that was wrong for a while leaves points at a wrong time, each day of them takes the place of
    the oldest day at most, and no point is dropped for being far from the others or from now.
    """
    days: dict[str, dict[str, Mapping[str, Any]]] = {}
    for point in sorted(points, key=_stamp):
        days.setdefault(_stamp(point)[:_DAY], {})[_stamp(point)[:_HOUR]] = point
    # Of the newest days all hours, of those before them the last point, of the others none.
    kept = [tuple(hours.values()) for hours in days.values()][-DAYS_OF_POINTS:]
    edge = max(len(kept) - DAYS_OF_HOURLY_POINTS, 0)
    return (*(hours[-1] for hours in kept[:edge]), *(point for hours in kept[edge:] for point in hours))


def _with_point(
    history: tuple[Mapping[str, Any], ...], lifetime: Totals, part: Totals, newest: datetime, now: datetime
) -> tuple[Mapping[str, Any], ...]:
    """History with a point for the newest record: it replaces the one before it when both fall in one hour.

    A point is never older than those before it (its sums are cumulative) and never in the future: a client with a wrong
    clock must not make points far off. Points that lie after now are another matter: our own clock was ahead then, or
    is behind now, and nobody can tell which. They stay, the new point goes before them, and as their sums are
    cumulative ``part``, what is new in ``lifetime``, is added to each.
    """
    limit = iso_utc(now)
    ahead = len(history)
    while ahead and _stamp(history[ahead - 1]) > limit:
        ahead -= 1
    before, after = history[:ahead], history[ahead:]
    stamp = min(iso_utc(newest), limit)
    if before:
        stamp = max(stamp, _stamp(before[-1]))
    sums = _sums_of(before[-1] if before else {}) + part if after else lifetime
    point = {"timestamp": stamp, **_as_point(sums)}
    later = [{**each, **_as_point(_sums_of(each) + part)} for each in after]
    if before and _stamp(before[-1])[:_HOUR] == stamp[:_HOUR]:
        return (*before[:-1], point, *later)
    return thinned((*before, point, *later))


def _as_point(sums: Totals) -> dict[str, Any]:
    return {key: getattr(sums, name) for name, key in POINT_KEYS.items()}


def _sums_of(point: Mapping[str, Any]) -> Totals:
    """What a point says. What is no number in it, in another program's document, counts as zero."""
    return Totals(**{name: _number_or_zero(point.get(key)) for name, key in POINT_KEYS.items()})


def _number_or_zero(value: Any) -> Any:
    return value if isinstance(value, (int, float)) and abs(value) <= LARGEST_NUMBER else 0


def _stamp(point: Mapping[str, Any]) -> str:
    return str(point["timestamp"])


# Read in one call each: a record is folded on every request.
_NAMES: Callable[[SavingsRecord], tuple[str | None, str, str | None]] = operator.attrgetter(
    "provider", "model", "project"
)
_TOKENS: Callable[[SavingsRecord], tuple[int, ...]] = operator.attrgetter(
    "tokens_saved",
    "tool_search_saved",
    "output_tokens_saved",
    "cache_read_tokens",
    "cache_write_tokens",
    "uncached_input_tokens",
    "input_tokens",
    "output_tokens",
)


def _numbers_of(record: SavingsRecord) -> tuple[int, ...]:
    """One record as the numbers of a sum.

    The caller's ``savings_usd`` has no list price beside it, so it counts as its own list price, as
    Headroom counts a request without a cache breakdown.
    """
    saved = _units(record.savings_usd) if record.savings_usd else 0
    cost = _units(record.input_cost_usd) if record.input_cost_usd else 0
    return (1, *_TOKENS(record), *_amounts(saved, cost))


def _numbers_of_all(records: Sequence[SavingsRecord]) -> tuple[int, ...]:
    saved = sum(_units(record.savings_usd) for record in records if record.savings_usd)
    cost = sum(_units(record.input_cost_usd) for record in records if record.input_cost_usd)
    return (len(records), *map(sum, zip(*map(_TOKENS, records), strict=True)), *_amounts(saved, cost))


def _amounts(saved: int, cost: int) -> tuple[int, ...]:
    """What a record is worth in billionths of a dollar, in the order of ``AMOUNTS``."""
    return (
        saved,  # compression_savings_usd
        saved,  # compression_savings_list_usd
        0,  # tool_schema_savings_usd
        0,  # cache_savings_usd
        0,  # output_savings_usd
        cost,  # total_input_cost_usd
        0,  # total_output_cost_usd
    )


def _units(usd: float) -> int:
    return round(usd * _USD_UNITS)


def _merged(old: Mapping[Name, Totals], delta: Mapping[Name, Totals], other: Name, limit: int) -> Mapping[Name, Totals]:
    merged = dict(old)
    for new_name, totals in delta.items():
        is_beyond = new_name not in merged and len(merged) - (other in merged) >= limit
        name = other if is_beyond else new_name
        merged[name] = merged[name] + totals if name in merged else totals
    return merged


def _largest(totals: Mapping[Name, Totals], other: Name, limit: int) -> Mapping[Name, Totals]:
    if len(totals) - (other in totals) <= limit:
        return totals
    named = sorted((name for name in totals if name != other), key=lambda name: -totals[name].tokens_saved)
    kept = {name: totals[name] for name in named[:limit]}
    kept[other] = total_of([totals[name] for name in named[limit:]] + ([totals[other]] if other in totals else []))
    return kept


def _later(one: str | None, another: str | None) -> str | None:
    return max(one or "", another or "") or None
