"""Reads documents of schemas 2 to 6 from another program: Headroom, or a program that writes Headroom's format.

Such a document has no checksum. A figure that cannot be read is treated as damage, because counting it as zero would
silently reduce a total. Entries without a usable name are left out and reported as problems. This loses nothing,
because other figures include their values.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterator, Mapping
from typing import Any, NamedTuple

import msgspec

from savings_exporter.errors import CorruptStoreError
from savings_exporter.model.history import LARGEST_NUMBER, POINT_KEYS, History
from savings_exporter.model.names import UNKNOWN, clean_name, clean_project
from savings_exporter.model.record import parse_timestamp
from savings_exporter.model.totals import AMOUNTS, COUNTS, Ledger, Pair, Totals, iso_utc, total_of

SCHEMA_VERSION = 6
"""The newest known schema."""

OLDEST_SCHEMA_VERSION = 2

BLOCK = "savings_exporter"
"""The name of our own block."""

MOST_BYTES = 32 * 1024 * 1024
"""The largest document that is read for its owner. Decoding takes up to seven times as much memory. Headroom's own has
about a megabyte.
"""

KNOWN_MEMBERS = frozenset({"schema_version", BLOCK, "lifetime", "projects", "by_model", "history"})

TOTALS_FIELDS = frozenset(Totals.__struct_fields__)

# The savings of compression can be negative. In Headroom, every other amount is zero or more.
_SIGNED_AMOUNTS = frozenset({"compression_savings_usd", "compression_savings_list_usd"})

# How many problems are described, and how long a value in a description is.
_MOST_PROBLEMS = 20
_MOST_SHOWN = 60

_POINT_OF_LIST = (
    "timestamp",
    "total_tokens_saved",
    "compression_savings_usd",
    "total_input_tokens",
    "total_input_cost_usd",
)


class Foreign(NamedTuple):
    """The content of another program's document.

    Attributes:
        ledger: its totals.
        kept: unknown members, and unknown keys of entries.
        problems: descriptions of what was left out.
    """

    ledger: Ledger
    kept: Mapping[str, Any]
    problems: tuple[str, ...]


def read(raw: Mapping[str, Any]) -> Foreign:
    """Read a document from parsed JSON. The caller has checked its ``schema_version``.

    Raises:
        CorruptStoreError: a figure cannot be read; ``field`` names it.
    """
    problems = _Problems()
    points = sorted(_points(raw.get("history"), problems), key=lambda point: str(point["timestamp"]))
    by_model, kept_by_model = _named(raw.get("by_model"), "by_model", _model, problems)
    projects, kept_projects = _named(raw.get("projects"), "projects", clean_project, problems)
    lifetime = _lifetime(raw, total_of(by_model.values()), points[-1] if points else {}, problems)
    pairs = _pairs(lifetime, by_model)
    ledger = Ledger(
        records=lifetime.requests,
        lifetime=lifetime.with_records_of(total_of(pairs.values())),
        by_model=by_model,
        projects=_without_tools(projects, raw["projects"]) if projects and lifetime.tool_tokens_saved else projects,
        by_provider_model=pairs,
        history=History(points),
    )
    lifetime_keys = _basis(raw) | unknown_keys(raw.get("lifetime"))
    return Foreign(ledger, kept_of(raw, lifetime_keys, kept_projects, kept_by_model), problems.told())


class _Problems:
    """Descriptions of what is left out. There can be one for each entry of a large document."""

    def __init__(self) -> None:
        self._first: list[str] = []
        self._more = 0

    def add(self, problem: str) -> None:
        """Describe another one."""
        if len(self._first) < _MOST_PROBLEMS:
            self._first.append(problem)
        else:
            self._more += 1

    def told(self) -> tuple[str, ...]:
        """The first ones, and how many more there are."""
        more = (f"there are {self._more:,} more problems like these",) if self._more else ()
        return (*self._first, *more)


def kept_of(
    members: Mapping[str, Any],
    lifetime: Mapping[str, Any],
    projects: Mapping[str, Any],
    by_model: Mapping[str, Any],
) -> dict[str, Any]:
    """The unknown members, and the unknown keys of ``lifetime``, ``projects`` and ``by_model``."""
    kept = {key: value for key, value in members.items() if key not in KNOWN_MEMBERS}
    entries = {"lifetime": lifetime, "projects": projects, "by_model": by_model}
    return kept | {key: value for key, value in entries.items() if value}


def unknown_keys(entry: Any) -> dict[str, Any]:
    """The keys of an entry that are not fields of ``Totals``."""
    return {key: value for key, value in entry.items() if key not in TOTALS_FIELDS} if isinstance(entry, dict) else {}


def _basis(raw: Mapping[str, Any]) -> dict[str, Any]:
    # Before schema 6, all savings were calculated at list prices, and the document did not state this.
    return {"savings_basis": "list"} if raw["schema_version"] < SCHEMA_VERSION else {}


def _pairs(lifetime: Totals, by_model: Mapping[str, Totals]) -> dict[Pair, Totals]:
    """The lifetime totals by provider and model. Totals without a model count as ``unknown``."""
    pairs: dict[Pair, Totals] = {(UNKNOWN, model): totals for model, totals in by_model.items()}
    rest = lifetime.beyond(total_of(by_model.values())).with_assumed_records()
    if not rest.is_empty:
        pair = (UNKNOWN, UNKNOWN)
        pairs[pair] = pairs.get(pair, Totals()) + rest
    return pairs


def _without_tools(projects: Mapping[str, Totals], raw: Mapping[str, Any]) -> Mapping[str, Totals]:
    """The projects' totals. If the document does not count tokens of deferred tool schemas by project, their share is
    marked as unknown.
    """
    if any("tool_tokens_saved" in entry for entry in raw.values() if isinstance(entry, dict)):
        return projects
    return {
        name: msgspec.structs.replace(totals, untold_tool_requests=totals.requests) for name, totals in projects.items()
    }


def _lifetime(raw: Mapping[str, Any], models: Totals, point: Mapping[str, Any], problems: _Problems) -> Totals:
    """The lifetime totals. They are never lower than other parts of the document show.

    The last point of the history is cumulative and is written together with the totals. If the point is higher than the
    totals, Headroom uses the point, and so does this function. The savings of compression can decrease. They are taken
    from the point only when the totals lack them, or when a count shows that the totals are outdated.
    """
    block = raw.get("lifetime")
    if block is not None and not isinstance(block, dict):
        raise _damaged("lifetime", block)
    block = block or {}
    lifetime = _totals(block, "lifetime", problems)
    # The figures of points were checked when the points were read.
    checkpoint = Totals(**{name: point[key] for name, key in POINT_KEYS.items() if key in point})
    is_behind = "compression_savings_usd" not in block or any(
        getattr(lifetime, name) < getattr(checkpoint, name) for name in COUNTS
    )
    values = msgspec.structs.asdict(lifetime)
    for name in COUNTS:
        values[name] = max(values[name], getattr(checkpoint, name), getattr(models, name))
    for name in AMOUNTS:
        if name not in _SIGNED_AMOUNTS:
            values[name] = max(values[name], getattr(checkpoint, name))
    if is_behind and point:
        values["compression_savings_usd"] = checkpoint.compression_savings_usd
    if "compression_savings_list_usd" not in block:
        values["compression_savings_list_usd"] = values["compression_savings_usd"]
    values["last_activity_at"] = _last_activity(raw, lifetime, point)
    return Totals(**values)


def _last_activity(raw: Mapping[str, Any], lifetime: Totals, point: Mapping[str, Any]) -> str | None:
    """The newest activity time in the document. Headroom's totals do not contain a time themselves."""
    session, projects = raw.get("display_session"), raw.get("projects")
    entries = [session, *(projects.values() if isinstance(projects, dict) else ())]
    stamps = [entry.get("last_activity_at") for entry in entries if isinstance(entry, dict)]
    moments = [parse_timestamp(stamp) for stamp in stamps if isinstance(stamp, str)]
    named = [iso_utc(moment) for moment in moments if moment is not None]
    return max(filter(None, [*named, lifetime.last_activity_at, point.get("timestamp")]), default=None)


def _totals(entry: Mapping[str, Any], where: str, problems: _Problems) -> Totals:
    values: dict[str, Any] = {}
    for name in COUNTS:
        if name in entry:
            values[name] = _figure(entry[name], int, f"{where}.{name}", is_signed=False)
    for name in AMOUNTS:
        if name in entry:
            values[name] = _figure(entry[name], float, f"{where}.{name}", is_signed=name in _SIGNED_AMOUNTS)
    last_activity = entry.get("last_activity_at")
    moment = parse_timestamp(last_activity) if isinstance(last_activity, str) else None
    if moment is None and last_activity is not None:
        problems.add(f"{where}.last_activity_at is not a timestamp: {shown(last_activity)}")
    return Totals(**values, last_activity_at=iso_utc(moment) if moment else None)


def _figure(value: Any, kind: Callable[[Any], Any], where: str, *, is_signed: bool) -> Any:
    """Read a number as Headroom does: a string that contains a number is accepted.

    Raises:
        CorruptStoreError: the value is not a number, or is outside of the valid range.
    """
    try:
        number = kind(value)
    except (TypeError, ValueError, OverflowError):
        number = math.nan
    if not (-LARGEST_NUMBER if is_signed else 0) <= number <= LARGEST_NUMBER:
        raise _damaged(where, value)
    return number


def _damaged(field: str, value: Any) -> CorruptStoreError:
    return CorruptStoreError(f"{field} cannot be read: {shown(value)}", field=field)


def _named(
    raw: Any, where: str, cleaned: Callable[[str], str | None], problems: _Problems
) -> tuple[dict[str, Totals], dict[str, dict[str, Any]]]:
    """The totals by name, and the unknown keys of each entry."""
    named: dict[str, Totals] = {}
    kept: dict[str, dict[str, Any]] = {}
    if not isinstance(raw, dict):
        if raw is not None:
            problems.add(f"{where} is left out because it is not an object: {shown(raw)}")
        return named, kept
    for key, value in raw.items():
        name = cleaned(key)
        if name is None or not isinstance(value, dict):
            problems.add(f"{where}[{shown(key)}] is left out: {shown(value)}")
            continue
        totals = _totals(value, f"{where}[{shown(key)}]", problems).with_assumed_records()
        named[name] = named[name] + totals if name in named else totals
        if unknown := unknown_keys(value):
            kept[name] = kept.get(name, {}) | unknown
    return named, kept


def _model(name: str) -> str:
    return clean_name("model", name) or UNKNOWN


def _points(raw: Any, problems: _Problems) -> Iterator[dict[str, Any]]:
    """The points of the history, with their figures as numbers. Headroom's first releases wrote points as lists."""
    if not isinstance(raw, list):
        if raw is not None:
            problems.add(f"history is left out because it is not a list: {shown(raw)}")
        return
    for position, value in enumerate(raw):
        point = dict(zip(_POINT_OF_LIST, value, strict=False)) if isinstance(value, list) else value
        stamp = point.get("timestamp") if isinstance(point, dict) else None
        moment = parse_timestamp(stamp) if isinstance(stamp, str) else None
        if moment is None:
            problems.add(f"history[{position}] is left out because it has no timestamp: {shown(value)}")
            continue
        yield {**point, "timestamp": iso_utc(moment), **_figures(point, f"history[{position}]")}


def _figures(point: Mapping[str, Any], where: str) -> dict[str, Any]:
    return {
        key: _figure(point[key], int if name in COUNTS else float, f"{where}.{key}", is_signed=name in _SIGNED_AMOUNTS)
        for name, key in POINT_KEYS.items()
        if key in point
    }


def shown(value: Any) -> str:
    """A short text of a value, for a message."""
    # No more of a large value is made into text than what is shown.
    if isinstance(value, (str, list)):
        value = value[:_MOST_SHOWN]
    elif isinstance(value, dict):
        value = dict(itertools.islice(value.items(), _MOST_SHOWN))
    text = repr(value)
    return text if len(text) <= _MOST_SHOWN else text[: _MOST_SHOWN - 3] + "..."
