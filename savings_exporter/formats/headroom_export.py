"""Encodes the totals of a store as a document for Headroom, with as much as Headroom can hold.

Headroom finds out what a provider, an agent or a model saved from the points of its history: the difference of a point
from the one before belongs to the provider, the agent and the model that the point names. This document therefore has a
point for each combination of these names on each day. Documents of a store do not: their points are hourly, and name
nothing.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

from savings_exporter.formats.headroom import SCHEMA_VERSION
from savings_exporter.model.days import DayRow
from savings_exporter.model.figures import AMOUNTS, COUNTS, Numbers, Totals, added, numbers_of, usd_of
from savings_exporter.model.history import NAMES_OF_POINT, POINT_KEYS
from savings_exporter.model.jsontext import ascii_json
from savings_exporter.model.names import UNKNOWN
from savings_exporter.model.totals import Ledger

MOST_POINTS = 4000
"""How many points are written at most. Headroom keeps 5,000, and needs some for its next requests."""

_LIFETIME = (*POINT_KEYS, "requests", "compression_savings_list_usd")
_OF_MODEL = (
    "requests",
    "tokens_saved",
    "tool_tokens_saved",
    "compression_savings_usd",
    "total_input_tokens",
    "total_input_cost_usd",
)
_OF_PROJECT = (*(name for name in _OF_MODEL if name != "tool_tokens_saved"), "last_activity_at")

_FIGURES = (*COUNTS, *AMOUNTS)
_of_point: Callable[[Numbers], Numbers] = operator.itemgetter(*map(_FIGURES.index, POINT_KEYS))
_NOTHING: Numbers = (0,) * len(POINT_KEYS)
_DAY = len("2026-01-01")
_UNNAMED = (UNKNOWN,) * len(NAMES_OF_POINT)

_PointNames = tuple[str, ...]
_Change = tuple[str, _PointNames, Numbers]
_DaysByNames = dict[str, dict[_PointNames, Numbers]]


def encode_for_headroom(
    ledger: Ledger, rows: Iterable[DayRow], kept: Mapping[str, Any], taken_over: Ledger | None = None
) -> bytes:
    """Encode a document for Headroom, of schema 6.

    Args:
        ledger: all totals.
        rows: what was saved on each day.
        kept: what the store keeps of the last document of Headroom that it took over.
        taken_over: the totals of that document, with all its points; None when it is not known.
    """
    basis = {key: value for key, value in _dict(kept.get("lifetime")).items() if key.startswith("savings_basis")}
    document = {
        "schema_version": SCHEMA_VERSION,
        "lifetime": {**_some(ledger.lifetime, _LIFETIME), **basis},
        "history": list(_points(ledger, list(rows), taken_over)),
        "projects": {name: _some(totals, _OF_PROJECT) for name, totals in ledger.projects.items()},
        "by_model": {name: _some(totals, _OF_MODEL) for name, totals in ledger.by_model.items()},
        "lifetime_metrics": _metrics(ledger, _dict(kept.get("lifetime_metrics"))),
        **({"display_session": kept["display_session"]} if "display_session" in kept else {}),
    }
    return ascii_json(document) + b"\n"


def _some(totals: Totals, names: Iterable[str]) -> dict[str, Any]:
    return {name: getattr(totals, name) for name in names}


def _points(ledger: Ledger, rows: Sequence[DayRow], taken_over: Ledger | None) -> Iterator[Mapping[str, Any]]:
    total = _NOTHING
    for stamp, names, change in _changes_within(ledger, rows, taken_over):
        total = added(total, change)
        figures = zip(POINT_KEYS.items(), total, strict=True)
        yield {
            "timestamp": stamp,
            **dict(zip(NAMES_OF_POINT, names, strict=True)),
            **{key: usd_of(number) if name in AMOUNTS else number for (name, key), number in figures},
        }


def _changes_within(ledger: Ledger, rows: Sequence[DayRow], taken_over: Ledger | None) -> Sequence[_Change]:
    """What was saved, in chronological order, by as many of the names as the number of points allows."""
    changes: list[_Change] = []
    for names in (NAMES_OF_POINT, NAMES_OF_POINT[:1], ()):
        days = _by_day(rows, names)
        if taken_over is not None and _of_point(numbers_of(taken_over.lifetime)) == _of_point(ledger.undated):
            # What belongs to no day is what was taken over. Its document has a point for each request.
            changes = [*_of_points(taken_over), *_of_days(days)]
        else:
            changes = _with_history(ledger, days)
        if len(changes) <= MOST_POINTS:
            break
    return sorted((change for change in changes if any(change[-1])), key=operator.itemgetter(0))


def _by_day(rows: Iterable[DayRow], names: Sequence[str]) -> _DaysByNames:
    days: _DaysByNames = {}
    for day, of_row, numbers in rows:
        key = tuple((getattr(of_row, name) if name in names else None) or UNKNOWN for name in NAMES_OF_POINT)
        of_day = days.setdefault(day, {})
        of_day[key] = added(of_day.get(key, _NOTHING), _of_point(numbers))
    return days


def _of_points(ledger: Ledger) -> Iterator[_Change]:
    """The changes between the points of a history, and what the totals have beyond the last one."""
    before, stamp = _NOTHING, ""
    for point in ledger.history.points:
        total = _of_point(numbers_of(Totals(**{name: point.get(key, 0) for name, key in POINT_KEYS.items()})))
        stamp = str(point["timestamp"])
        yield stamp, tuple(str(point.get(name) or UNKNOWN) for name in NAMES_OF_POINT), _minus(total, before)
        before = total
    if stamp:
        yield stamp, _UNNAMED, _minus(_of_point(numbers_of(ledger.lifetime)), before)


def _of_days(days: _DaysByNames) -> Iterator[_Change]:
    for day, of_day in days.items():
        for place, (names, numbers) in enumerate(of_day.items()):
            yield _stamp(day, place), names, numbers


def _with_history(ledger: Ledger, days: _DaysByNames) -> list[_Change]:
    """The changes of days, and from the history what they do not have. That is without names on days that have some."""
    left = {day: _minus(_NOTHING, *of_day.values()) for day, of_day in days.items()}
    others = []
    for change in _of_points(ledger):
        day = change[0][:_DAY]
        if day in left:
            left[day] = added(left[day], change[-1])
        else:
            others.append(change)
    for day, of_day in days.items():
        of_day[_UNNAMED] = added(of_day.get(_UNNAMED, _NOTHING), left[day])
    return [*others, *_of_days(days)]


def _stamp(day: str, place: int) -> str:
    """A time at the start of a day: requests that Headroom records later on that day must follow."""
    return f"{day}T00:{place // 60:02}:{place % 60:02}Z"


def _minus(numbers: Numbers, *parts: Numbers) -> Numbers:
    for part in parts:
        numbers = tuple(map(operator.sub, numbers, part))
    return numbers


def _metrics(ledger: Ledger, kept: Mapping[str, Any]) -> dict[str, Any]:
    """Headroom's further totals. What this program does not count, such as failed requests, is as it was kept."""
    lifetime, points = ledger.lifetime, ledger.history.points
    requests, cache = _dict(kept.get("requests")), _dict(kept.get("prefix_cache"))
    return {
        **kept,
        "started_at": kept.get("started_at") or (points[0]["timestamp"] if points else None),
        "last_activity_at": lifetime.last_activity_at,
        "requests": {**requests, "total": lifetime.requests, "by_provider": _by_provider(ledger, requests)},
        "tokens": {
            "input": lifetime.total_input_tokens,
            "output": lifetime.total_output_tokens,
            "attempted_input": lifetime.total_input_tokens + lifetime.tokens_saved,
            "saved": lifetime.tokens_saved,
        },
        "prefix_cache": {
            **cache,
            "cache_read_tokens": lifetime.cache_read_tokens,
            "cache_write_tokens": max(lifetime.cache_write_tokens, _count(cache.get("cache_write_tokens"))),
        },
        "cost": {
            **_dict(kept.get("cost")),
            "input_usd": lifetime.total_input_cost_usd,
            "compression_savings_usd": lifetime.compression_savings_usd,
            "compression_savings_list_usd": lifetime.compression_savings_list_usd,
            "cache_savings_usd": lifetime.cache_savings_usd,
        },
        "models": {"tracked": {name: _model(totals) for name, totals in ledger.by_model.items()}},
    }


def _by_provider(ledger: Ledger, kept: Mapping[str, Any]) -> dict[str, int]:
    """Requests by provider. Those of Headroom's time are only in what was kept."""
    counts = {name: _count(value) for name, value in _dict(kept.get("by_provider")).items()}
    found: dict[str, int] = {}
    for (provider, _), totals in ledger.by_provider_model.items():
        found[provider] = found.get(provider, 0) + totals.requests
    return {name: max(counts.get(name, 0), found.get(name, 0)) for name in (*counts, *found)}


def _model(totals: Totals) -> dict[str, Any]:
    return {
        "requests": totals.requests,
        "input_tokens": totals.total_input_tokens,
        "output_tokens": totals.total_output_tokens,
        "attempted_input_tokens": totals.total_input_tokens + totals.tokens_saved,
        "tokens_saved": totals.tokens_saved,
        "last_activity_at": totals.last_activity_at,
    }


def _count(value: Any) -> int:
    return value if isinstance(value, int) else 0


def _dict(value: Any) -> Mapping[str, Any]:
    return value if isinstance(value, dict) else {}
