"""Adds up records, with a limited number of names."""

from __future__ import annotations

import operator
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from datetime import datetime, timezone
from typing import Any, TypeVar

import msgspec

from savings_exporter.model.crowds import AGENT, MODEL, PROJECT, SOURCE, Crowd, Crowds, Outsider, tokens_of
from savings_exporter.model.days import DayRow, Days, Names, day_of, oldest_kept, with_rows
from savings_exporter.model.figures import (
    AMOUNTS,
    COUNTS,
    ZERO,
    Numbers,
    Part,
    Totals,
    added,
    iso_utc,
    numbers_of,
    total_of,
    units_of,
)
from savings_exporter.model.history import History
from savings_exporter.model.names import OTHER, UNKNOWN
from savings_exporter.model.pricing import PriceBasis, merged_bases
from savings_exporter.model.record import SavingsRecord

__all__ = [
    "AMOUNTS",
    "COUNTS",
    "OTHER_PAIR",
    "Ledger",
    "Limits",
    "Pair",
    "Row",
    "Sums",
    "Totals",
    "iso_utc",
    "total_of",
]

Pair = tuple[str, str]
"""A provider and a model, in this order."""

OTHER_PAIR: Pair = (OTHER, OTHER)

Name = TypeVar("Name", str, Pair)

_Key = tuple[str, str, str | None, str | None, str | None, int, bool]
_FEW_COUNTS = len(COUNTS) - 1
# How many of the last counts are missing in rows of earlier versions.
_LATER_COUNTS = (1, 5)


class Limits(msgspec.Struct, frozen=True, kw_only=True):
    """How many different names a ledger holds before it counts new names under ``other``.

    ``max_models`` limits both the models and the pairs of provider and model.
    """

    max_models: int = 200
    max_projects: int = 200
    max_agents: int = 50
    max_sources: int = 50


class Row(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True, forbid_unknown_fields=False):
    """The sum of records with the same names and the same hour. A frame can hold rows.

    Attributes:
        provider, model: as in a record.
        project: None when the records belong to no project.
        agent: None when it is unknown.
        source: None when it is not given.
        newest: the newest record's timestamp, in UTC. All records are from the same hour.
        undated: whether the records are older than ``newest`` and it is not known how much. They belong to no day.
        requests: how many records there are.
        counts: their counts, in the order of ``COUNTS`` without ``requests``. An earlier version wrote fewer.
        units: their amounts in billionths of a dollar, in the order of ``AMOUNTS``.
    """

    provider: str
    model: str
    project: str | None = None
    agent: str | None = None
    source: str | None = None
    newest: datetime
    undated: bool = False
    requests: int
    counts: tuple[int, ...]
    units: tuple[int, ...]


class Sums:
    """Records added up by their names and hour.

    Args:
        most_rows: the limit for rows; None means no limit. Beyond this number, records that have no row yet are added
            up under ``other``, by hour. Beyond twice this number, records of further hours share a row, so that the
            number of rows is limited for any timestamps that clients send.

    Attributes:
        requests: how many records there are.
        tokens_saved: how many tokens compression saved in them.
        newest: the newest record's timestamp; None without records.
        bases: the prices that were used for the records.
    """

    def __init__(self, most_rows: int | None = None) -> None:
        self.requests = 0
        self.tokens_saved = 0
        self.newest: datetime | None = None
        self.bases: tuple[PriceBasis, ...] = ()
        self._most_rows = most_rows
        self._sums: dict[_Key, _Sum] = {}
        self._projects: dict[str, Part] = {}
        self._last_folded: dict[tuple[bool, bool, bool], _Key] = {}

    def add_all(self, records: Iterable[SavingsRecord]) -> None:
        """Add records."""
        groups: dict[tuple[str | None, str, str | None, str | None, str | None], list[SavingsRecord]] = {}
        for record in records:
            groups.setdefault(_NAMES(record), []).append(record)
        for (provider, model, project, agent, source), group in groups.items():
            known_agent = None if agent == UNKNOWN else agent
            for hour, of_hour in _by_hour(group).items():
                key = (provider or UNKNOWN, model, project, known_agent, source, hour, False)
                self._add(key, _numbers_of_all(of_hour), max(map(_TIMESTAMP, of_hour)))

    def add_rows(self, rows: Iterable[Row]) -> None:
        """Add sums of records.

        Raises:
            ValueError: the numbers of counts and amounts in a row do not match ``COUNTS`` and ``AMOUNTS``.
        """
        for row in rows:
            newest = row.newest.astimezone(timezone.utc)
            key = (row.provider, row.model, row.project, row.agent, row.source, _hour_of(newest), row.undated)
            self._add(key, _numbers_of_row(row), newest)

    def add_projects(self, rows: Iterable[Row]) -> None:
        """Add sums of records that count only in the totals by project.

        Raises:
            ValueError: as in ``add_rows``.
        """
        for row in rows:
            if row.project is not None:
                _gather(self._projects, row.project, Part(_numbers_of_row(row), iso_utc(row.newest)))

    def add_bases(self, bases: Iterable[PriceBasis]) -> None:
        """Add prices that were used for the records."""
        # Nearly every frame of a journal has those of the frame before.
        new = [basis for basis in bases if basis not in self.bases]
        if new:
            self.bases = merged_bases(self.bases, new)

    def rows(self) -> list[Row]:
        """The sums as rows, one for each combination of names and hour."""
        return [
            Row(
                provider=provider,
                model=model,
                project=project,
                agent=agent,
                source=source,
                newest=part.newest,
                undated=undated,
                requests=part.numbers[0],
                counts=part.numbers[1 : len(COUNTS)],
                units=part.numbers[len(COUNTS) :],
            )
            for (provider, model, project, agent, source, _, undated), part in self._sums.items()
        ]

    def parts(self) -> Iterator[tuple[Names, Part, bool]]:
        """The names and the sums of each row, and whether the row belongs to a day."""
        for (provider, model, project, agent, source, _, undated), found in self._sums.items():
            names = Names(provider, model, project, agent, source)
            yield names, Part(found.numbers, iso_utc(found.newest)), not undated

    def projects(self) -> Mapping[str, Part]:
        """What was added with ``add_projects``."""
        return self._projects

    def __len__(self) -> int:
        return len(self._sums) + len(self._projects)

    def _add(self, key: _Key, numbers: Numbers, newest: datetime) -> None:
        found = self._sums.get(key) or self._sums.get(key := self._key_within_limit(key))
        if found is None:
            self._sums[key] = _Sum(numbers, newest)
        else:
            found.numbers, found.newest = added(found.numbers, numbers), max(found.newest, newest)
        self.requests += numbers[0]
        self.tokens_saved += numbers[1]
        self.newest = max(self.newest or newest, newest)

    def _key_within_limit(self, key: _Key) -> _Key:
        if self._most_rows is None or len(self._sums) < self._most_rows:
            return key
        _, _, project, agent, source, hour, undated = key
        folded = (OTHER, OTHER, project and OTHER, agent and OTHER, source and OTHER, hour, undated)
        kind = (project is None, agent is None, source is None)
        if len(self._sums) >= 2 * self._most_rows and folded not in self._sums:
            return self._last_folded.setdefault(kind, folded)
        self._last_folded[kind] = folded
        return folded


class _Sum:
    __slots__ = ("newest", "numbers")

    def __init__(self, numbers: Numbers, newest: datetime) -> None:
        self.numbers = numbers
        self.newest = newest


class Ledger(msgspec.Struct, frozen=True, kw_only=True):
    """All totals of a store. A ledger is immutable: an addition returns a new ledger.

    ``by_provider_model`` adds up to ``lifetime``. ``by_model`` does too, except for totals that an older document did
    not break down by model. ``projects``, ``agents`` and ``sources`` include only records that name one.

    Attributes:
        records: how many records are counted. For another program's document, this is its number of lifetime requests.
        days: the open days: what was saved on each day and is not in the file of closed days yet.
        undated: the part of ``lifetime`` that belongs to no day: it is older than the days, or than two years. The
            lifetime is the sum of this, of the closed days and of the open ones.
        bases: the prices that were used for records without ``savings_usd``.
        crowds: which names an operator let in or folded, and the largest names in ``other``.
    """

    records: int = 0
    lifetime: Totals = Totals()
    by_model: Mapping[str, Totals] = {}
    projects: Mapping[str, Totals] = {}
    agents: Mapping[str, Totals] = {}
    sources: Mapping[str, Totals] = {}
    by_provider_model: Mapping[Pair, Totals] = {}
    history: History = History()
    days: Days = {}
    undated: Numbers = ZERO
    bases: tuple[PriceBasis, ...] = ()
    crowds: Crowds = {}

    @property
    def newest(self) -> str | None:
        """The newest record's timestamp in UTC, ISO 8601; None without records."""
        return self.lifetime.last_activity_at

    def plus(self, sums: Sums, limits: Limits, now: datetime) -> Ledger:
        """This ledger with more records added. Names beyond the limits count under ``other``. Names that have saved
        nothing yet take at most half of the places.

        Args:
            sums: the sums of the records.
            limits: the maximum numbers of different names.
            now: the current time. In ``history`` and ``days``, records with a later timestamp count at this time.
        """
        if not sums:
            return self
        oldest, undated, rows = oldest_kept(now), self.undated, []
        models: dict[str, Part] = {}
        projects = dict(sums.projects())
        agents: dict[str, Part] = {}
        sources: dict[str, Part] = {}
        pairs: dict[Pair, Part] = {}
        hours: dict[str, Part] = {}
        for names, part, is_dated in sums.parts():
            pair, project, agent, source = (names.provider, names.model), names.project, names.agent, names.source
            _gather(pairs, pair, part)
            _gather(models, pair[1], part)
            _gather(hours, part.newest[:_HOUR], part)
            day = day_of(part.newest, now)
            if day < oldest or not is_dated:
                undated = added(undated, part.numbers)
            else:
                rows.append(DayRow(day, names, part.numbers))
            for named, name in ((projects, project), (agents, agent), (sources, source)):
                if name is not None:
                    _gather(named, name, part)
        lifetime = self.lifetime
        for part in hours.values():
            lifetime = lifetime.plus(*part)
        merging = _Merging(self.crowds)
        return Ledger(
            records=self.records + sums.requests,
            lifetime=lifetime,
            by_model=merging.merged(MODEL, self.by_model, models, limits.max_models),
            projects=merging.merged(PROJECT, self.projects, projects, limits.max_projects),
            agents=merging.merged(AGENT, self.agents, agents, limits.max_agents),
            sources=merging.merged(SOURCE, self.sources, sources, limits.max_sources),
            by_provider_model=merging.merged_pairs(self.by_provider_model, pairs, limits.max_models),
            history=self.history.plus(hours, lifetime, now),
            days=with_rows(self.days, rows),
            undated=undated,
            bases=merged_bases(self.bases, sums.bases) if sums.bases else self.bases,
            crowds=merging.crowds,
        )

    def named(self, kind: str) -> Mapping[str, Totals]:
        """The totals by the names of a kind."""
        return {MODEL: self.by_model, PROJECT: self.projects, AGENT: self.agents, SOURCE: self.sources}[kind]

    def letting_in(self, kind: str, name: str) -> Ledger:
        """This ledger with a place for a name. What it has saved so far stays in ``other``.

        Raises:
            ValueError: the name has a place, or too many names were let in.
        """
        crowd = _crowd_of(self.crowds, kind, self.named(kind))
        if name in self.named(kind) or name in crowd.admitted or name == OTHER:
            raise ValueError("has a place already")
        return msgspec.structs.replace(self, crowds={**self.crowds, kind: crowd.with_place_for(name)})

    def folding(self, kind: str, name: str) -> Ledger:
        """This ledger with a name's totals moved to ``other``. The sums stay the same.

        Raises:
            ValueError: the name has no place, or too many names were folded.
        """
        named = self.named(kind)
        crowd = _crowd_of(self.crowds, kind, named)
        if name == OTHER or (name not in named and name not in crowd.admitted):
            raise ValueError("has no place that could be given up")
        crowd = crowd.without_place_for(name)
        changes: dict[str, Any] = {_FIELDS[kind]: _folded(named, {name}, OTHER)}
        if kind == MODEL:
            pairs = {pair for pair in self.by_provider_model if pair[1] == name}
            changes["by_provider_model"] = _folded(self.by_provider_model, pairs, OTHER_PAIR)
        return msgspec.structs.replace(self, crowds={**self.crowds, kind: crowd}, **changes)

    def outsiders(self, kind: str) -> list[Outsider]:
        """The names in ``other`` that have surely saved more than the least of those with a place, largest first."""
        named = [tokens_of(numbers_of(totals)) for name, totals in self.named(kind).items() if name != OTHER]
        least = min(named, default=0)
        candidates = self.crowds.get(kind, Crowd()).candidates
        found = [Outsider(name, candidate) for name, candidate in candidates.items() if candidate.least > least]
        return sorted(found, key=lambda outsider: (-outsider.candidate.least, outsider.name))

    def with_assumed_records(self) -> Ledger:
        """This ledger with assumed numbers of records that have a figure (see ``Totals.with_assumed_records``)."""
        pairs = _assumed(self.by_provider_model)
        return msgspec.structs.replace(
            self,
            lifetime=self.lifetime.with_records_of(total_of(pairs.values())),
            by_model=_assumed(self.by_model),
            projects=_assumed(self.projects),
            agents=_assumed(self.agents),
            sources=_assumed(self.sources),
            by_provider_model=pairs,
        )

    def bounded(self, limits: Limits) -> Ledger:
        """This ledger within the limits: the names with the lowest savings count as ``other``, and the history is
        thinned.
        """
        return msgspec.structs.replace(
            self,
            history=self.history.thinned(),
            by_model=_largest(self.by_model, OTHER, limits.max_models),
            projects=_largest(self.projects, OTHER, limits.max_projects),
            agents=_largest(self.agents, OTHER, limits.max_agents),
            sources=_largest(self.sources, OTHER, limits.max_sources),
            by_provider_model=_largest(self.by_provider_model, OTHER_PAIR, limits.max_models),
        )


# The length of a timestamp's prefix up to the hour.
_HOUR = len("2026-01-01T00")

# Each getter reads several fields in one call. This saves time, because every record is added up.
_NAMES: Callable[[SavingsRecord], tuple[str | None, str, str | None, str | None, str | None]] = operator.attrgetter(
    "provider", "model", "project", "agent", "source"
)
_TIMESTAMP: Callable[[SavingsRecord], datetime] = operator.attrgetter("timestamp")
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


def _by_hour(records: list[SavingsRecord]) -> dict[int, list[SavingsRecord]]:
    first, last = (_hour_of(edge(map(_TIMESTAMP, records))) for edge in (min, max))
    if first == last:
        return {first: records}
    hours: dict[int, list[SavingsRecord]] = {}
    for record in records:
        hours.setdefault(_hour_of(_TIMESTAMP(record)), []).append(record)
    return hours


def _numbers_of_row(row: Row) -> Numbers:
    missing = _FEW_COUNTS - len(row.counts)
    if missing not in (0, *_LATER_COUNTS) or len(row.units) != len(AMOUNTS):
        raise ValueError(f"a row with {len(row.counts)} counts and {len(row.units)} amounts")
    return (row.requests, *row.counts, *(missing * (0,)), *row.units)


def _hour_of(moment: datetime) -> int:
    """The hour of a UTC time, counted from year 1."""
    return moment.toordinal() * 24 + moment.hour


def _numbers_of_all(records: Sequence[SavingsRecord]) -> Numbers:
    """The numbers of some records' sum.

    A caller gives no list price besides ``savings_usd``, so ``savings_usd`` also counts as the savings at list prices.
    Headroom does the same for a request without a cache breakdown.
    """
    saved = [units_of(record.savings_usd) for record in records if record.savings_usd is not None]
    cached = [units_of(record.cache_savings_usd) for record in records if record.cache_savings_usd is not None]
    cost = [units_of(record.input_cost_usd) for record in records if record.input_cost_usd is not None]
    compared = sum([record.tokens_saved + record.tool_search_saved for record in records if record.input_tokens])
    without = [record for record in records if record.savings_usd is None]
    unpriced = sum([1 for record in without if record.tokens_saved or record.tool_search_saved])
    tokens = map(sum, zip(*map(_TOKENS, records), strict=True))
    counts = (len(records), *tokens, compared, len(saved), len(cost), 0, unpriced)
    return (*counts, *_amounts(sum(saved), sum(cached), sum(cost)))


def _amounts(saved: int, cached: int, cost: int) -> Numbers:
    """The amounts of some records in billionths of a dollar, in the order of ``AMOUNTS``."""
    return (
        saved,  # compression_savings_usd
        saved,  # compression_savings_list_usd
        0,  # tool_schema_savings_usd
        cached,  # cache_savings_usd
        0,  # output_savings_usd
        cost,  # total_input_cost_usd
        0,  # total_output_cost_usd
    )


def _assumed(totals: Mapping[Name, Totals]) -> Mapping[Name, Totals]:
    return {name: of_name.with_assumed_records() for name, of_name in totals.items()}


def _gather(parts: dict[Name, Part], name: Name, part: Part) -> None:
    parts[name] = parts[name].plus(part) if name in parts else part


class _Places:
    """The places of a kind of names. Names that have saved nothing take at most half of them, so that made-up names
    without savings leave the other half.

    Args:
        limit: how many places there are.
        taken: the totals of the names that have one.
    """

    def __init__(self, limit: int, taken: Sequence[Totals]) -> None:
        self._free = limit - len(taken)
        self._for_unsaved = limit // 2
        self._taken = taken
        self._unsaved: int | None = None

    def take(self, tokens: int) -> bool:
        """Take a place for a name that has saved so many tokens. Returns whether there is one."""
        if self._free <= 0 or (tokens <= 0 and not self._take_unsaved()):
            return False
        self._free -= 1
        return True

    def _take_unsaved(self) -> bool:
        if self._unsaved is None:
            # Counted only when it is needed, because new names without savings are rare.
            self._unsaved = sum(tokens_of(numbers_of(totals)) <= 0 for totals in self._taken)
        if self._unsaved >= self._for_unsaved:
            return False
        self._unsaved += 1
        return True


class _Merging:
    """Adds parts to totals by name, and finds out which names have a place."""

    def __init__(self, crowds: Crowds) -> None:
        self.crowds = crowds

    def merged(
        self, kind: str, old: Mapping[str, Totals], parts: Mapping[str, Part], limit: int
    ) -> Mapping[str, Totals]:
        """The totals with the parts added."""
        if not parts:
            return old
        crowd, merged = _crowd_of(self.crowds, kind, old), dict(old)
        outside: dict[str, int] = {}
        places = _Places(
            limit, [totals for name, totals in old.items() if name != OTHER and name not in crowd.admitted]
        )
        for name, part in parts.items():
            target = name
            if name not in merged and name != OTHER and name not in crowd.admitted:
                tokens = tokens_of(part.numbers)
                if name in crowd.folded:
                    target = OTHER
                elif not places.take(tokens):
                    target = OTHER
                    if tokens > 0:
                        outside[name] = tokens
            merged[target] = merged.get(target, _NOTHING).plus(*part)
        changed = crowd.without_candidates(merged.keys() - old.keys()).with_saved(outside)
        if changed is not crowd:
            self.crowds = {**self.crowds, kind: changed}
        return merged

    def merged_pairs(self, old: Mapping[Pair, Totals], parts: Mapping[Pair, Part], limit: int) -> Mapping[Pair, Totals]:
        """The totals with the parts added. A pair is let in and folded with its model."""
        if not parts:
            return old
        crowd, merged = self.crowds.get(MODEL, _NO_CROWD), dict(old)
        admitted = Counter(model for _, model in merged if model in crowd.admitted)
        places = _Places(
            limit, [totals for pair, totals in old.items() if pair != OTHER_PAIR and pair[1] not in crowd.admitted]
        )
        for pair, part in parts.items():
            target, model = pair, pair[1]
            if pair not in merged and pair != OTHER_PAIR:
                if model in crowd.folded:
                    target = OTHER_PAIR
                elif model in crowd.admitted and admitted[model] < _MOST_PROVIDERS:
                    admitted[model] += 1
                elif not places.take(tokens_of(part.numbers)):
                    target = OTHER_PAIR
            merged[target] = merged.get(target, _NOTHING).plus(*part)
        return merged


def _crowd_of(crowds: Crowds, kind: str, named: Mapping[str, Totals]) -> Crowd:
    """What is known about the names of a kind. At first, each name can have saved all that is in ``other``."""
    return crowds.get(kind) or Crowd(unseen=tokens_of(numbers_of(named.get(OTHER, _NOTHING))))


def _folded(named: Mapping[Name, Totals], names: set[Name], other: Name) -> Mapping[Name, Totals]:
    """The totals with those of some names moved to ``other``."""
    moving = names & named.keys()
    if not moving:
        return named
    moved = total_of(named[name] for name in moving)
    kept = {name: totals for name, totals in named.items() if name not in moving}
    return {**kept, other: kept.get(other, _NOTHING) + moved}


def _largest(totals: Mapping[Name, Totals], other: Name, limit: int) -> Mapping[Name, Totals]:
    if len(totals) - (other in totals) <= limit:
        return totals
    named = sorted((name for name in totals if name != other), key=lambda name: -totals[name].tokens_saved)
    kept = {name: totals[name] for name in named[:limit]}
    kept[other] = total_of([totals[name] for name in named[limit:]] + ([totals[other]] if other in totals else []))
    return kept


_NOTHING = Totals()
_NO_CROWD = Crowd()
_FIELDS = {MODEL: "by_model", PROJECT: "projects", AGENT: "agents", SOURCE: "sources"}

# With how many providers a model that was let in has a place.
_MOST_PROVIDERS = 10
