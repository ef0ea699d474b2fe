"""Folding records into totals with a bounded set of names. Pure: no clock, no disk, no lock."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from datetime import datetime, timedelta, timezone
from typing import Any, TypeVar

import msgspec

from savings_exporter.records import UNKNOWN, SavingsRecord, parse_timestamp

OTHER = "other"
"""The name that everything beyond a bound is counted under."""

HOURLY_POINTS_FOR = timedelta(days=14)
DAILY_POINTS_FOR = timedelta(days=730)

Pair = tuple[str, str]
"""A provider and a model, in this order."""

OTHER_PAIR: Pair = (OTHER, OTHER)

# Money is kept to a billionth of a dollar. Rounding each sum there makes it the exact decimal sum (up to nine
# million dollars), whatever the order of the additions, and keeps 0.1 + 0.2 from being written as 0.30000000000000004.
_USD_DIGITS = 9

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
            sums[name] = round(getattr(self, name) + getattr(other, name), _USD_DIGITS)
        return Totals(**sums, last_activity_at=_later(self.last_activity_at, other.last_activity_at))

    def beyond(self, part: Totals) -> Totals:
        """What these totals hold and ``part`` of them does not; no count below zero."""
        rest = {name: max(getattr(self, name) - getattr(part, name), 0) for name in COUNTS}
        for name in AMOUNTS:
            rest[name] = round(getattr(self, name) - getattr(part, name), _USD_DIGITS)
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
            history=_with_point(self.history, lifetime, delta.newest, now) if delta.newest else self.history,
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
        self.lifetime = Totals()
        self.by_model: dict[str, Totals] = {}
        self.projects: dict[str, Totals] = {}
        self.by_provider_model: dict[Pair, Totals] = {}
        self.newest: datetime | None = None

    def add(self, record: SavingsRecord, ledger: Ledger, limits: Limits) -> None:
        """Count one record in. ``ledger`` says which names are taken already, so that those are kept apart."""
        totals = totals_of(record)
        pair = (record.provider or UNKNOWN, record.model)
        self.records += 1
        self.lifetime += totals
        _add(self.by_model, record.model, totals, ledger.by_model, OTHER, limits.max_models)
        _add(self.by_provider_model, pair, totals, ledger.by_provider_model, OTHER_PAIR, limits.max_models)
        if record.project is not None:
            _add(self.projects, record.project, totals, ledger.projects, OTHER, limits.max_projects)
        if record.timestamp is not None and (self.newest is None or record.timestamp > self.newest):
            self.newest = record.timestamp

    def absorb(self, later: Delta, ledger: Ledger, limits: Limits) -> None:
        """Count another delta's records in, after this one's."""
        self.records += later.records
        self.lifetime += later.lifetime
        for model, totals in later.by_model.items():
            _add(self.by_model, model, totals, ledger.by_model, OTHER, limits.max_models)
        for pair, totals in later.by_provider_model.items():
            _add(self.by_provider_model, pair, totals, ledger.by_provider_model, OTHER_PAIR, limits.max_models)
        for project, totals in later.projects.items():
            _add(self.projects, project, totals, ledger.projects, OTHER, limits.max_projects)
        self.newest = max((moment for moment in (self.newest, later.newest) if moment), default=None)


def totals_of(record: SavingsRecord) -> Totals:
    """What one record adds to every total it belongs to.

    The caller's ``savings_usd`` has no list price beside it, so it counts as its own list price, as
    Headroom counts a request without a cache breakdown.
    """
    savings_usd = record.savings_usd or 0.0
    return Totals(
        requests=1,
        tokens_saved=record.tokens_saved,
        tool_tokens_saved=record.tool_search_saved,
        output_tokens_saved=record.output_tokens_saved,
        cache_read_tokens=record.cache_read_tokens,
        cache_write_tokens=record.cache_write_tokens,
        uncached_input_tokens=record.uncached_input_tokens,
        total_input_tokens=record.input_tokens,
        total_output_tokens=record.output_tokens,
        compression_savings_usd=savings_usd,
        compression_savings_list_usd=savings_usd,
        total_input_cost_usd=record.input_cost_usd or 0.0,
        last_activity_at=iso_utc(record.timestamp) if record.timestamp else None,
    )


def total_of(parts: Iterable[Totals]) -> Totals:
    """The sum of several totals."""
    return sum(parts, Totals())


def iso_utc(moment: datetime) -> str:
    """A moment as documents write it: UTC, whole seconds, ``Z``."""
    return moment.astimezone(timezone.utc).replace(microsecond=0, tzinfo=None).isoformat() + "Z"


def thinned(points: Iterable[Mapping[str, Any]], now: datetime) -> tuple[Mapping[str, Any], ...]:
    """History points in the order of time: the last of each hour for 14 days, of each day for two years."""
    kept: dict[str, Mapping[str, Any]] = {}
    for point in sorted(points, key=lambda point: str(point["timestamp"])):
        stamp = str(point["timestamp"])
        moment = parse_timestamp(stamp)
        if moment is None or now - moment > DAILY_POINTS_FOR:
            continue
        hour = len("2026-01-01T00") if now - moment <= HOURLY_POINTS_FOR else len("2026-01-01")
        kept[stamp[:hour]] = point
    return tuple(kept.values())


def _with_point(
    history: tuple[Mapping[str, Any], ...], lifetime: Totals, newest: datetime, now: datetime
) -> tuple[Mapping[str, Any], ...]:
    """History with a point for the newest record: it replaces the last one when both fall in one hour.

    A point is never older than the one before it (its sums are cumulative) and never in the future: a client
    with a wrong clock must not push everything else out.
    """
    limit = iso_utc(now)
    while history and str(history[-1]["timestamp"]) > limit:
        history = history[:-1]
    stamp = min(iso_utc(newest), limit)
    if history:
        stamp = max(stamp, str(history[-1]["timestamp"]))
    point = {
        "timestamp": stamp,
        "total_tokens_saved": lifetime.tokens_saved,
        "compression_savings_usd": lifetime.compression_savings_usd,
        "cache_read_tokens": lifetime.cache_read_tokens,
        "cache_savings_usd": lifetime.cache_savings_usd,
        "total_input_tokens": lifetime.total_input_tokens,
        "total_input_cost_usd": lifetime.total_input_cost_usd,
        "output_tokens_saved": lifetime.output_tokens_saved,
        "output_savings_usd": lifetime.output_savings_usd,
        "tool_tokens_saved": lifetime.tool_tokens_saved,
        "tool_schema_savings_usd": lifetime.tool_schema_savings_usd,
        "total_output_cost_usd": lifetime.total_output_cost_usd,
    }
    if history and str(history[-1]["timestamp"])[:13] == stamp[:13]:
        return (*history[:-1], point)
    return thinned((*history, point), now)


def _add(
    into: dict[Name, Totals], name: Name, totals: Totals, taken: Mapping[Name, Totals], other: Name, limit: int
) -> None:
    if name not in into and name not in taken and _names(into, taken, other) >= limit:
        name = other
    into[name] = into[name] + totals if name in into else totals


def _names(into: Mapping[Name, Totals], taken: Mapping[Name, Totals], other: Name) -> int:
    new = sum(1 for name in into if name not in taken)
    return len(taken) + new - (other in into or other in taken)


def _merged(old: Mapping[Name, Totals], delta: Mapping[Name, Totals], other: Name, limit: int) -> Mapping[Name, Totals]:
    merged = dict(old)
    for name, totals in delta.items():
        _add(merged, name, totals, {}, other, limit)
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
