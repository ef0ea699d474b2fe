"""What has changed between two versions of Headroom's document, as sums with names and times.

The document has lifetime totals, totals by model and totals by project, but not which project used which model. Its
history has a cumulative point for each request that saved something, with provider, agent, model and time. Of a change,
the lifetime totals are the measure: no other part of the document can make the change larger. Points give it times and
names, as far as they go. What is left belongs to a model, or to no known model.
"""

from __future__ import annotations

import operator
from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping, Sequence
from datetime import datetime, timedelta
from typing import Any, NamedTuple

import msgspec

from savings_exporter.errors import CorruptStoreError
from savings_exporter.formats import headroom
from savings_exporter.formats.headroom import BLOCK, SCHEMA_VERSION
from savings_exporter.model.figures import AMOUNTS, COUNTS, ZERO, Numbers, Totals, added, iso_utc, numbers_of, units_of
from savings_exporter.model.history import POINT_KEYS
from savings_exporter.model.jsontext import any_json
from savings_exporter.model.names import UNKNOWN, clean_name
from savings_exporter.model.record import parse_timestamp
from savings_exporter.model.totals import Ledger, Row
from savings_exporter.sources.source import SourceError

KIND = "headroom"

MOST_POINTS = 5000
"""How many points Headroom keeps."""

_MOST_PROJECTS = 200
_LONGEST_MODEL = 120
_MOST_TOKENS_OF_REQUEST = 2_000_000

# Headroom removes points that are older than 365 days.
_CLOCK_DIFFERENCE = timedelta(days=1)
_AGE_OF_POINTS = timedelta(days=364)

_NAMES = (*COUNTS, *AMOUNTS)
_REQUESTS, _TOKENS = _NAMES.index("requests"), _NAMES.index("tokens_saved")
_TOOLS = _NAMES.index("tool_tokens_saved")
# The figures of a row that are not in the document. They are derived from the others.
_UNTOLD, _PRICED, _UNPRICED = map(_NAMES.index, ("untold_tool_requests", "priced_requests", "unpriced_requests"))
_DERIVED = (_UNTOLD, _PRICED, _UNPRICED, *map(_NAMES.index, ("compared_tokens_saved", "costed_requests")))
_USD, _LIST_USD = map(_NAMES.index, ("compression_savings_usd", "compression_savings_list_usd"))
_SIGNED = frozenset((_USD, _LIST_USD))


class Event(msgspec.Struct, frozen=True, array_like=True, order=True):
    """A request of the proxy that saved tokens, as the ledger and the history both contain it.

    Attributes:
        second: the time such as ``2026-01-31T12:00:00``.
        model: the model as Headroom names it.
        saved: tokens saved by compression.
        tools: tokens saved by deferred tool schemas.
    """

    second: str
    model: str
    saved: int
    tools: int

    @property
    def kind(self) -> tuple[str, int, int]:
        """What it has in common with its counterpart."""
        return self.model, self.saved, self.tools


def event_of(second: str, model: str, saved: int, tools: int) -> Event:
    """An event. Of the model's name, at most as much is kept as Headroom keeps in its history."""
    return Event(second, model[:_LONGEST_MODEL], saved, tools)


class Point(NamedTuple):
    """A point of the history, and by how much it exceeds the point before."""

    stamp: str
    provider: str
    agent: str | None
    model: str
    total: Numbers
    change: Numbers

    @property
    def event(self) -> Event:
        """The request that the point belongs to."""
        return event_of(self.stamp[:-1], self.model, self.change[_TOKENS], self.change[_TOOLS])


class Seen(msgspec.Struct, frozen=True, omit_defaults=True):
    """What a document held when it was last read. All figures are ``Numbers`` without the zeros at their end.

    Attributes:
        lifetime: its lifetime totals.
        models, projects: its totals by name. Names that it no longer has are kept.
        stamp, total: the time and the figures of its last point.
        newest: the time of the newest point that any version had. Points up to it have been counted.
    """

    lifetime: list[int] = []
    models: dict[str, list[int]] = {}
    projects: dict[str, list[int]] = {}
    stamp: str = ""
    total: list[int] = []
    newest: str = ""


class Version(NamedTuple):
    """A document as it was read."""

    ledger: Ledger
    points: Sequence[Point]

    def seen(self, before: Seen, newest: str, now: datetime) -> Seen:
        """What to compare the next version with.

        Args:
            before: the version that this one continues. Figures of names never become lower.
            newest: as in ``Seen``, without this version.
            now: the current time. A point far in the future comes from a wrong clock, and does not hide later ones.
        """
        limit = iso_utc(now + _CLOCK_DIFFERENCE)
        last = self.points[-1] if self.points else None
        return Seen(
            lifetime=_short(numbers_of(self.ledger.lifetime)),
            models=_highest(before.models, self.ledger.by_model),
            projects=_newest(before.projects, self.ledger.projects),
            stamp=last.stamp if last is not None else before.stamp,
            total=_short(last.total) if last is not None else before.total,
            newest=max([newest, *(point.stamp for point in self.points if point.stamp <= limit)]),
        )


class Change(NamedTuple):
    """What a version has more than the one that was seen before.

    Attributes:
        rows: its sums.
        projects: sums that count only by project.
        events: the events of the points that are new and were not counted before.
        counted: the events that were counted before, and that the version now contains.
        seen: what to compare the next version with.
    """

    rows: Sequence[Row]
    projects: Sequence[Row]
    events: Sequence[Event]
    counted: Sequence[Event]
    seen: Seen


def read(path: str, data: bytes) -> Version:
    """Read a document of schema 0 to 6.

    Raises:
        SourceError: it cannot be read, or is not Headroom's.
    """
    try:
        raw = any_json(data)
    except (ValueError, RecursionError) as error:
        raise SourceError(f"{path}: is not JSON: {error}", path=path) from None
    if not isinstance(raw, dict) or not {"lifetime", "history"} & raw.keys():
        raise SourceError(
            f"{path}: holds no savings of Headroom; name the columns of another program's file with --map", path=path
        )
    if BLOCK in raw:
        raise SourceError(
            f"{path}: is a store of savings-exporter; use it with --store, and do not import it", path=path
        )
    schema = raw.get("schema_version")
    if not isinstance(schema, int) or isinstance(schema, bool):
        schema = 0
    if schema > SCHEMA_VERSION:
        raise SourceError(
            f"{path}: schema_version is {schema}, and this program knows up to {SCHEMA_VERSION}; update it", path=path
        )
    try:
        ledger = headroom.read({**raw, "schema_version": schema}).ledger
    except CorruptStoreError as error:
        raise SourceError(f"{path}: is damaged: {error}", path=path) from None
    return Version(ledger, _points(ledger))


def change_of(seen: Seen | None, version: Version, counted: Iterable[Event], now: datetime) -> Change:
    """What has been saved since a version was seen.

    Args:
        seen: the version that was seen before; None for the first one, whose savings are all new.
        version: the new version.
        counted: events of new points that have been counted already, from the ledger.
        now: the time of savings whose time the document does not contain.
    """
    base, new, before = seen or Seen(), version.points, seen or Seen()
    if seen is not None and _is_continuation(seen, version):
        new = _points_after(seen, version)
    elif seen is not None:
        base, new = _replaced(seen, version)
        before = Seen()
    left = _difference(numbers_of(version.ledger.lifetime), _long(base.lifetime))
    models = {
        name: _difference(numbers_of(totals), _long(base.models.get(name, [])))
        for name, totals in version.ledger.by_model.items()
    }
    splitting = _Splitting(left, models, _without_prices(version))
    waiting: defaultdict[tuple[str, int, int], list[Event]] = defaultdict(list)
    for event in counted:
        waiting[event.kind].append(event)
    events, found = [], []
    for point in new:
        known = waiting[point.event.kind]
        is_counted = bool(known)
        if is_counted:
            found.append(known.pop(0))
            splitting.drop(point.event)
        else:
            events.append(point.event)
        splitting.take(point, is_counted=is_counted)
    first = parse_timestamp(version.points[0].stamp) if version.points else None
    last = parse_timestamp(version.ledger.lifetime.last_activity_at or "") or now
    splitting.finish(first or last if seen is None else last, version.points, is_undated=seen is None)
    projects = _project_rows(base.projects, version, now)
    return Change(splitting.rows, projects, events, found, version.seen(before, (seen or Seen()).newest, now))


class _Splitting:
    """Splits a difference of lifetime totals into rows. Each figure is given away at most once."""

    def __init__(self, lifetime: Numbers, models: Mapping[str, Numbers], unpriced: frozenset[str]) -> None:
        self.rows: list[Row] = []
        self._unpriced = unpriced
        self._lifetime = list(lifetime)
        self._models = {name: list(numbers) for name, numbers in models.items()}

    def drop(self, event: Event) -> None:
        """Leave out an event that was counted before."""
        for place, number in ((_REQUESTS, 1), (_TOKENS, event.saved), (_TOOLS, event.tools)):
            self._lifetime[place] = max(self._lifetime[place] - number, 0)
            of_model = self._models.get(_model(event.model))
            if of_model is not None:
                of_model[place] = max(of_model[place] - number, 0)

    def take(self, point: Point, *, is_counted: bool) -> None:
        """A row for a point. ``is_counted`` says that its request and its tokens were counted before."""
        wanted = list(point.change)
        wanted[_REQUESTS] = 1
        if is_counted:
            wanted[_REQUESTS] = wanted[_TOKENS] = wanted[_TOOLS] = 0
        moment = parse_timestamp(point.stamp)
        assert moment is not None
        numbers = self._given(_model(point.model), _with_list_prices(wanted))
        self._add(point.provider, _model(point.model), point.agent, moment, numbers, is_undated=False)

    def finish(self, moment: datetime, points: Sequence[Point], *, is_undated: bool) -> None:
        """Rows for what is left, by model, and then for what belongs to no known model."""
        providers = _providers(points)
        for model, left in self._models.items():
            numbers = self._given(model, _with_list_prices(left))
            self._add(providers.get(model, UNKNOWN), model, None, moment, numbers, is_undated=is_undated)
        rest = tuple(self._lifetime)
        if self.rows and not any(rest[: len(COUNTS)]):
            # The document does not say which model the amount belongs to. It is not worth a row of its own.
            *others, row = self.rows
            units = added(row.units, rest[len(COUNTS) :])
            self.rows = [*others, msgspec.structs.replace(row, units=units)]
        else:
            self._add(UNKNOWN, UNKNOWN, None, moment, rest, is_undated=is_undated)

    def _given(self, model: str, wanted: Sequence[int]) -> Numbers:
        """What of some wanted figures is left, which is then taken away."""
        of_model = self._models.get(model)
        given = [
            _part(number, left, of_model[place] if of_model is not None and place in _OF_MODEL else left)
            for place, (number, left) in enumerate(zip(wanted, self._lifetime, strict=True))
        ]
        self._lifetime = list(map(operator.sub, self._lifetime, given))
        if of_model is not None:
            self._models[model] = [
                left - number if place in _OF_MODEL else left
                for place, (left, number) in enumerate(zip(of_model, given, strict=True))
            ]
        return tuple(given)

    def _add(
        self, provider: str, model: str, agent: str | None, moment: datetime, numbers: Numbers, *, is_undated: bool
    ) -> None:
        if any(numbers):
            is_priced = model not in self._unpriced
            row = _row(numbers, moment, provider, model, agent=agent, is_undated=is_undated, is_priced=is_priced)
            self.rows.append(row)


# The figures that Headroom keeps by model.
_OF_MODEL = frozenset(
    map(
        _NAMES.index,
        (
            "requests",
            "tokens_saved",
            "tool_tokens_saved",
            "compression_savings_usd",
            "total_input_tokens",
            "total_input_cost_usd",
        ),
    )
)


def _part(wanted: int, left: int, of_model: int) -> int:
    """How much of a wanted figure can be given. Amounts of compression can be negative, and are then not limited."""
    if wanted < 0 or left < 0 or of_model < 0:
        return wanted if left or of_model else 0
    return min(wanted, left, of_model)


def _is_continuation(base: Seen, version: Version) -> bool:
    """Whether a version was made from the one seen before: no count is lower, and it has that one's last point, unless
    Headroom has removed old points since. After an older copy, nothing is a continuation until there are newer points.
    """
    if base.stamp < base.newest:
        return False
    lifetime = numbers_of(version.ledger.lifetime)
    if any(map(operator.lt, lifetime[: len(COUNTS)], _long(base.lifetime))):
        return False
    if not base.stamp or not version.points:
        return True
    has_point = any(point.stamp == base.stamp and _short(point.total) == base.total for point in version.points)
    return has_point or (version.points[0].stamp > base.stamp and len(version.points) >= MOST_POINTS)


def _points_after(base: Seen, version: Version) -> list[Point]:
    """The points that follow the last one that was seen."""
    for position in range(len(version.points) - 1, -1, -1):
        point = version.points[position]
        if point.stamp == base.stamp and _short(point.total) == base.total:
            return list(version.points[position + 1 :])
    return [point for point in version.points if point.stamp > base.stamp]


def _replaced(seen: Seen, version: Version) -> tuple[Seen, Sequence[Point]]:
    """What to compare with a document that was not made from the one seen before: an older copy, or a new beginning.

    Only what its points show as newer counts. If all points are newer, Headroom has begun again from zero, and the
    whole document is new.
    """
    new = [point for point in version.points if point.stamp > seen.newest]
    if new and len(new) == len(version.points) < MOST_POINTS:
        return Seen(), new
    change = ZERO
    models: dict[str, Numbers] = {}
    for point in new:
        one = list(point.change)
        one[_REQUESTS] = 1
        change = added(change, tuple(one))
        models[_model(point.model)] = added(models.get(_model(point.model), ZERO), tuple(one))
    lifetime = _minus(numbers_of(version.ledger.lifetime), change)
    by_model = {
        name: _short(_minus(numbers_of(totals), models.get(name, ZERO)))
        for name, totals in version.ledger.by_model.items()
    }
    projects = {name: _short(numbers_of(totals)) for name, totals in version.ledger.projects.items()}
    return Seen(lifetime=_short(lifetime), models=by_model, projects=projects), new


def _project_rows(before: Mapping[str, Sequence[int]], version: Version, now: datetime) -> list[Row]:
    rows = []
    for name, totals in version.ledger.projects.items():
        numbers, known = numbers_of(totals), _long(before.get(name, []))
        if numbers[_REQUESTS] < known[_REQUESTS]:
            # Headroom forgets the project that was not used for the longest time. It begins again from zero.
            known = ZERO
        difference = _difference(numbers, known)
        if totals.untold_tool_requests:
            difference = (*difference[:_UNTOLD], difference[_REQUESTS], *difference[_UNTOLD + 1 :])
        if any(difference):
            moment = parse_timestamp(totals.last_activity_at or "") or now
            rows.append(_row(difference, moment, UNKNOWN, UNKNOWN, project=name))
    return rows


def _row(
    numbers: Numbers,
    moment: datetime,
    provider: str,
    model: str,
    *,
    agent: str | None = None,
    project: str | None = None,
    is_undated: bool = False,
    is_priced: bool = True,
) -> Row:
    whole = numbers_of(Totals().plus(numbers, None).with_assumed_records())
    values = [*whole[: len(COUNTS)], *numbers[len(COUNTS) :]]
    if numbers[_USD] and not values[_PRICED]:
        # The request was counted before, without the amount.
        values[_PRICED] = 1
    if is_priced:
        # What saved without an amount, such as deferred tool schemas, has one elsewhere.
        values[_UNPRICED] = 0
    return Row(
        provider=provider,
        model=model,
        agent=agent,
        project=project,
        source=KIND,
        newest=moment,
        undated=is_undated,
        requests=values[0],
        counts=tuple(values[1 : len(COUNTS)]),
        units=tuple(values[len(COUNTS) :]),
    )


def _without_prices(version: Version) -> frozenset[str]:
    """The models whose savings have no amount."""
    amounts: Counter[str] = Counter()
    for point in version.points:
        amounts[_model(point.model)] += point.change[_USD]
    for name, totals in version.ledger.by_model.items():
        amounts[name] = units_of(totals.compression_savings_usd)
    unpriced = {name for name, amount in amounts.items() if not amount}
    is_unknown = not version.ledger.lifetime.compression_savings_usd
    return frozenset({*unpriced, UNKNOWN} if is_unknown else unpriced - {UNKNOWN})


def _points(ledger: Ledger) -> list[Point]:
    """The points with their changes. The first one has none if points before it may have been removed."""
    points: list[Point] = []
    is_whole = _has_first_point(ledger.history.points)
    for fields in ledger.history.points:
        values = {name: fields.get(key, 0) for name, key in POINT_KEYS.items()}
        total = numbers_of(Totals(**values))
        before = points[-1].total if points else ZERO if is_whole else total
        agent = clean_name("agent", _text(fields.get("agent")))
        points.append(
            Point(
                stamp=str(fields["timestamp"]),
                provider=clean_name("provider", _text(fields.get("provider"))) or UNKNOWN,
                agent=agent if agent != UNKNOWN and agent else None,
                model=_text(fields.get("model")) or UNKNOWN,
                total=total,
                change=_difference(total, before),
            )
        )
    return points


def _has_first_point(points: Sequence[Mapping[str, Any]]) -> bool:
    """Whether the first point is that of the first request that saved something."""
    if not 0 < len(points) < MOST_POINTS:
        return False
    first, last = (parse_timestamp(str(point["timestamp"])) for point in (points[0], points[-1]))
    saved = points[0].get("total_tokens_saved", 0) + points[0].get("tool_tokens_saved", 0)
    is_recent = first is not None and last is not None and last - first < _AGE_OF_POINTS
    return is_recent and saved <= _MOST_TOKENS_OF_REQUEST


def _with_list_prices(numbers: Sequence[int]) -> list[int]:
    """The figures with the savings at list prices, which neither models nor points have, as far as they are known."""
    return [numbers[_USD] if place == _LIST_USD else number for place, number in enumerate(numbers)]


def _providers(points: Sequence[Point]) -> Mapping[str, str]:
    """The provider of each model that has only one."""
    found: dict[str, set[str]] = {}
    for point in points:
        found.setdefault(_model(point.model), set()).add(point.provider)
    return {model: providers.pop() for model, providers in found.items() if len(providers) == 1}


def _difference(numbers: Numbers, before: Numbers) -> Numbers:
    """By how much figures have grown. Only amounts of compression can become lower."""
    changes = map(operator.sub, numbers, before)
    return tuple(
        0 if place in _DERIVED else change if place in _SIGNED else max(change, 0)
        for place, change in enumerate(changes)
    )


def _minus(numbers: Numbers, part: Numbers) -> Numbers:
    return tuple(map(operator.sub, numbers, part))


def _highest(before: Mapping[str, Sequence[int]], totals: Mapping[str, Totals]) -> dict[str, list[int]]:
    highest = {name: list(numbers) for name, numbers in before.items()}
    for name, of_name in totals.items():
        highest[name] = _short(tuple(map(max, numbers_of(of_name), _long(highest.get(name, [])))))
    return highest


def _newest(before: Mapping[str, Sequence[int]], totals: Mapping[str, Totals]) -> dict[str, list[int]]:
    newest = {name: list(numbers) for name, numbers in before.items() if name not in totals}
    newest |= {name: _short(numbers_of(of_name)) for name, of_name in totals.items()}
    return dict(list(newest.items())[-_MOST_PROJECTS:])


def _short(numbers: Sequence[int]) -> list[int]:
    """Numbers without the zeros at their end."""
    end = len(numbers)
    while end and not numbers[end - 1]:
        end -= 1
    return list(numbers[:end])


def _long(numbers: Sequence[int]) -> Numbers:
    return (*numbers, *ZERO[len(numbers) :])


def _model(name: str) -> str:
    return clean_name("model", name) or UNKNOWN


def _text(value: Any) -> str:
    return value if isinstance(value, str) else ""
