"""The lifetime totals over time: one cumulative point per hour for the newest days, and one per day before these."""

from __future__ import annotations

import operator
from bisect import bisect_left
from collections.abc import Iterable, Iterator, Mapping, Sequence
from datetime import datetime
from itertools import chain
from typing import Any

from savings_exporter.model.figures import (
    AMOUNTS,
    COUNTS,
    Numbers,
    Part,
    Totals,
    added,
    iso_utc,
    numbers_of,
    units_of,
    usd_of,
)
from savings_exporter.model.jsontext import any_json, ascii_json
from savings_exporter.model.record import parse_timestamp

DAYS_OF_HOURLY_POINTS = 14 + 1
"""How many of the newest days with points have one point per hour: a part of the first day, fourteen whole days and a
part of the last day."""

DAYS_OF_POINTS = 730 + 1
"""How many days have points at all."""

LARGEST_NUMBER = 2**63 - 1
"""A larger number in another program's document is not a count or an amount."""

POINT_KEYS = {
    "tokens_saved": "total_tokens_saved",
    "compression_savings_usd": "compression_savings_usd",
    "cache_read_tokens": "cache_read_tokens",
    "cache_savings_usd": "cache_savings_usd",
    "total_input_tokens": "total_input_tokens",
    "total_input_cost_usd": "total_input_cost_usd",
    "output_tokens_saved": "output_tokens_saved",
    "output_savings_usd": "output_savings_usd",
    "tool_tokens_saved": "tool_tokens_saved",
    "tool_schema_savings_usd": "tool_schema_savings_usd",
    "total_output_cost_usd": "total_output_cost_usd",
}
"""The figures of the lifetime totals that a point has, and their names in a point."""

NAMES_OF_POINT = ("provider", "agent", "model")
"""What Headroom's points name: the request that a point belongs to. Points of this program name nothing."""

# The lengths of a timestamp's prefix up to the day, and up to the hour.
_DAY, _HOUR = len("2026-01-01"), len("2026-01-01T00")

# When the sums of more hours than this are pending, they are merged, so that adding to a history stays cheap.
_MOST_PENDING_HOURS = 64

_FIGURES = (*COUNTS, *AMOUNTS)
_SELECTED = operator.itemgetter(*(_FIGURES.index(name) for name in POINT_KEYS))
_TOTALS_OF_POINT = operator.attrgetter(*POINT_KEYS)
_IS_AMOUNT = tuple(name in AMOUNTS for name in POINT_KEYS)
_NOTHING: Numbers = (0,) * len(POINT_KEYS)

_SEPARATOR = b",\n  "

# This many lines fit into the processor's cache while they are joined and the checksum is computed.
_LINES_OF_PIECE = 200

# Every point that this program writes begins with this text, and its timestamp has a fixed length.
_POINT_START = b'{"timestamp":"'
# Only points of another program have names. The points of this program are not decoded to find that out.
_NAME_MARK = b'"provider"'
_STAMP = slice(len(_POINT_START), len(_POINT_START) + len("2026-01-01T00:00:00Z"))


class History:
    """Cumulative points in chronological order. A history is immutable: an addition returns a new history.

    The newest 15 days that have points keep the last point of each hour. The newest 731 days keep the last point of
    each day. A point holds the totals after all records up to its time, including records that arrive late. A late
    record adds a point for its hour or increases that hour's point, and it increases all later points.

    Additions are kept as sums by hour. They are merged into the points when the points are needed.
    """

    __slots__ = ("_base", "_lifetime", "_merged", "_pending")

    def __init__(self, points: Iterable[Mapping[str, Any]] = ()) -> None:
        self._base = _in_order(map(_Point, points))
        self._pending: Mapping[str, Part] = {}
        self._lifetime: Totals | None = None
        self._merged: tuple[_Point, ...] | None = None

    @classmethod
    def of_lines(cls, lines: Iterable[bytes]) -> History:
        """A history from points that ``encoded`` wrote. Each point is decoded when it is first used.

        Raises:
            ValueError: a line is not a point.
        """
        history = cls()
        history._base = _in_order(map(_Point.of_line, lines))
        return history

    @property
    def points(self) -> tuple[Mapping[str, Any], ...]:
        """All points, oldest first."""
        return tuple(point.fields for point in self._all())

    @property
    def began_at(self) -> datetime | None:
        """The time of the oldest point; None without points, or when it is not a time."""
        points = self._all()
        return parse_timestamp(points[0].stamp) if points else None

    def plus(self, hours: Mapping[str, Part], lifetime: Totals, now: datetime) -> History:
        """This history with more records added.

        Args:
            hours: the sum of each hour's records, by the prefix of a timestamp up to the hour.
            lifetime: the lifetime totals with those records. The last point gets these totals.
            now: hours after this time count at this time, so that a client's wrong clock creates no points in the
                future.
        """
        later = History()
        is_full = self._merged is not None or len(self._pending) > _MOST_PENDING_HOURS
        later._base = self._all() if is_full else self._base
        later._pending = _with_hours({} if is_full else self._pending, hours, iso_utc(now))
        later._lifetime = lifetime
        return later

    def thinned(self) -> History:
        """This history with at most the number of points that it keeps. For points of another program."""
        history = History()
        history._base = _thinned(self._all())
        return history

    def encoded(self) -> bytes:
        """The points as a JSON array in ASCII, one point per line. Only points that changed are encoded again."""
        return b"".join(self.pieces())

    def pieces(self) -> list[bytes]:
        """The result of ``encoded`` in pieces. A caller that joins them with other pieces copies less data."""
        lines = [point.line for point in self._all()]
        groups = range(0, len(lines), _LINES_OF_PIECE)
        pieces = [piece for at in groups for piece in (_SEPARATOR, _SEPARATOR.join(lines[at : at + _LINES_OF_PIECE]))]
        return [b"[\n  ", *pieces[1:], b"]"] if lines else [b"[]"]

    def __len__(self) -> int:
        return len(self._all())

    def __eq__(self, other: object) -> bool:
        return isinstance(other, History) and self.points == other.points

    __hash__ = None  # type: ignore[assignment]  # points are mappings

    def __repr__(self) -> str:
        return f"History({self.points!r})"

    def _all(self) -> tuple[_Point, ...]:
        if self._merged is None:
            # Two threads may both compute this, with the same result.
            self._merged = _merged(self._base, self._pending, self._lifetime) if self._lifetime else self._base
        return self._merged


class _Point:
    """One point, and its line of the document. Each is computed from the other when it is first needed."""

    __slots__ = ("_fields", "_line", "stamp")

    def __init__(self, fields: Mapping[str, Any]) -> None:
        self.stamp = str(fields["timestamp"])
        self._fields: Mapping[str, Any] | None = fields
        self._line: bytes | None = None

    @classmethod
    def of_line(cls, line: bytes) -> _Point:
        stamp = line[_STAMP]
        if not (line.startswith(_POINT_START) and stamp.endswith(b"Z") and line[_STAMP.stop : _STAMP.stop + 1] == b'"'):
            return cls(_checked_point(any_json(line)))
        point = cls.__new__(cls)
        point.stamp, point._fields, point._line = stamp.decode("ascii"), None, line
        return point

    @property
    def fields(self) -> Mapping[str, Any]:
        if self._fields is None:
            self._fields = any_json(self._line or b"")
        return self._fields

    @property
    def line(self) -> bytes:
        if self._line is None:
            fields = self.fields
            is_first = next(iter(fields)) == "timestamp"
            self._line = ascii_json(fields if is_first else {"timestamp": self.stamp, **fields})
        return self._line

    @property
    def numbers(self) -> Numbers:
        """The point's figures. In a point of another program, a value that is not a number counts as zero."""
        values = zip(map(self.fields.get, POINT_KEYS.values()), _IS_AMOUNT, strict=True)
        return tuple((units_of if is_usd else int)(_number_or_zero(value)) for value, is_usd in values)

    @property
    def hour(self) -> str:
        return self.stamp[:_HOUR]

    def grown(self, numbers: Numbers, stamp: str = "") -> _Point:
        """This point with more records added that precede it, or that lie in its hour up to ``stamp``.

        With records of its hour, a point of another program belongs to more than the one request that it names.
        """
        if not any(numbers) and stamp <= self.stamp:
            return self
        fields = {key: value for key, value in self.fields.items() if not stamp or key not in NAMES_OF_POINT}
        return _point_of({**fields, "timestamp": max(self.stamp, stamp)}, added(self.numbers, numbers))

    def instead_of(self, point: _Point | None) -> _Point:
        """This point, which also stands for an earlier one that is dropped. It keeps the names that both have."""
        if point is None or _NAME_MARK not in self.line:
            return self
        differing = {name for name in NAMES_OF_POINT if self.fields.get(name) != point.fields.get(name)}
        if differing.isdisjoint(self.fields):
            return self
        return _Point({key: value for key, value in self.fields.items() if key not in differing})

    def with_totals(self, totals: Totals) -> _Point:
        """This point with the figures of these totals."""
        return _Point({**self.fields, **dict(zip(POINT_KEYS.values(), _TOTALS_OF_POINT(totals), strict=True))})


def _point_of(fields: Mapping[str, Any], numbers: Numbers) -> _Point:
    values = (usd_of(number) if is_usd else number for number, is_usd in zip(numbers, _IS_AMOUNT, strict=True))
    return _Point({**fields, **dict(zip(POINT_KEYS.values(), values, strict=True))})


def _with_hours(pending: Mapping[str, Part], hours: Mapping[str, Part], limit: str) -> Mapping[str, Part]:
    """The sums of both, with only the figures that a point has. Hours after ``limit`` count at ``limit``."""
    sums = dict(pending)
    for hour, (numbers, newest) in hours.items():
        part = Part(_SELECTED(numbers), min(newest, limit))
        hour = min(hour, limit[:_HOUR])
        sums[hour] = sums[hour].plus(part) if hour in sums else part
    return sums


def _merged(points: tuple[_Point, ...], hours: Mapping[str, Part], lifetime: Totals) -> tuple[_Point, ...]:
    """The points with the records of some hours added. The last point gets the figures of ``lifetime``."""
    if not hours:
        return points
    before = _SELECTED(numbers_of(lifetime))
    for part in hours.values():
        before = tuple(map(operator.sub, before, part.numbers))
    points = _ending_with(before, points)
    position = bisect_left(points, min(hours), key=operator.attrgetter("stamp"))
    merged, grown, is_longer = list(points[:position]), _NOTHING, False
    for hour, part in sorted(hours.items()):
        end = bisect_left(points, hour + "~", lo=position, key=operator.attrgetter("stamp"))
        merged += [point.grown(grown) for point in points[position:end]]
        position = end
        grown = added(grown, part.numbers)
        if merged and merged[-1].hour == hour:
            merged[-1] = merged[-1].grown(part.numbers, part.newest)
        else:
            start = merged[-1].numbers if merged else (_NOTHING if points else before)
            merged.append(_point_of({"timestamp": part.newest}, added(start, part.numbers)))
            is_longer = True
    merged += [point.grown(grown) for point in points[position:]]
    merged[-1] = merged[-1].with_totals(lifetime)
    return _thinned(merged) if is_longer else tuple(merged)


def _ending_with(numbers: Numbers, points: tuple[_Point, ...]) -> tuple[_Point, ...]:
    """The points, with these figures in the last one. Another program's last point can be lower than its own lifetime
    totals.
    """
    if not points or points[-1].numbers == numbers:
        return points
    return (*points[:-1], _point_of(points[-1].fields, numbers))


def _thinned(points: Iterable[_Point]) -> tuple[_Point, ...]:
    """The last point of each hour for the newest 15 days that have points, and of each day for the newest 731 days.

    This does not use the clock. A clock that was wrong for some time leaves points at wrong times. Each such day
    displaces at most the oldest day. No point is dropped because it is far from the other points or from the current
    time.
    """
    days: dict[str, dict[str, _Point]] = {}
    for point in points:
        hours = days.setdefault(point.stamp[:_DAY], {})
        hours[point.hour] = point.instead_of(hours.get(point.hour))
    kept = [tuple(hours.values()) for hours in days.values()][-DAYS_OF_POINTS:]
    edge = max(len(kept) - DAYS_OF_HOURLY_POINTS, 0)
    return (*map(_last_of, kept[:edge]), *chain.from_iterable(kept[edge:]))


def _last_of(hours: Sequence[_Point]) -> _Point:
    """The last point of a day, instead of all of them."""
    last = hours[-1]
    for point in hours[:-1]:
        last = last.instead_of(point)
    return last


def _in_order(points: Iterator[_Point]) -> tuple[_Point, ...]:
    return tuple(sorted(points, key=operator.attrgetter("stamp")))


def _checked_point(value: Any) -> Mapping[str, Any]:
    if not isinstance(value, dict) or not isinstance(value.get("timestamp"), str):
        raise ValueError(f"history: not a point: {str(value)[:60]}")
    return value


def _number_or_zero(value: Any) -> Any:
    return value if isinstance(value, (int, float)) and abs(value) <= LARGEST_NUMBER else 0
