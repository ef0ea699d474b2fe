"""Documents of schema 2 to 6 that another program wrote: Headroom, or one that writes what Headroom reads.

Such a document has no checksum. A figure that cannot be read is damage: counting it as zero would make a total silently
smaller. Entries without a usable name are left out and reported as problems, because other figures hold their sum.
"""

from __future__ import annotations

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
"""The newest schema that is known."""

OLDEST_SCHEMA_VERSION = 2

BLOCK = "savings_exporter"
"""The name of our own block."""

KNOWN_MEMBERS = frozenset({"schema_version", BLOCK, "lifetime", "projects", "by_model", "history"})

TOTALS_FIELDS = frozenset(Totals.__struct_fields__)

# What compression saved can be negative. Headroom takes every other amount as zero or more.
_SIGNED_AMOUNTS = frozenset({"compression_savings_usd", "compression_savings_list_usd"})

_POINT_OF_LIST = (
    "timestamp",
    "total_tokens_saved",
    "compression_savings_usd",
    "total_input_tokens",
    "total_input_cost_usd",
)


class Foreign(NamedTuple):
    """What another program's document says.

    Attributes:
        ledger: its totals.
        kept: its members, and its entries' keys, that are not known.
        problems: what was left out, in words.
    """

    ledger: Ledger
    kept: Mapping[str, Any]
    problems: tuple[str, ...]


def read(raw: Mapping[str, Any]) -> Foreign:
    """Read a document, as parsed JSON, whose ``schema_version`` has been checked.

    Raises:
        CorruptStoreError: a figure cannot be read; ``field`` names it.
    """
    problems: list[str] = []
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
    return Foreign(ledger, kept_of(raw, lifetime_keys, kept_projects, kept_by_model), tuple(problems))


def kept_of(
    members: Mapping[str, Any],
    lifetime: Mapping[str, Any],
    projects: Mapping[str, Any],
    by_model: Mapping[str, Any],
) -> dict[str, Any]:
    """The members that are not known, and the keys that are not known of the other three."""
    kept = {key: value for key, value in members.items() if key not in KNOWN_MEMBERS}
    entries = {"lifetime": lifetime, "projects": projects, "by_model": by_model}
    return kept | {key: value for key, value in entries.items() if value}


def unknown_keys(entry: Any) -> dict[str, Any]:
    """What an entry holds beside totals."""
    return {key: value for key, value in entry.items() if key not in TOTALS_FIELDS} if isinstance(entry, dict) else {}


def _basis(raw: Mapping[str, Any]) -> dict[str, Any]:
    # Until schema 6 every saving was priced at list prices, and nothing in the document said so.
    return {"savings_basis": "list"} if raw["schema_version"] < SCHEMA_VERSION else {}


def _pairs(lifetime: Totals, by_model: Mapping[str, Totals]) -> dict[Pair, Totals]:
    """The lifetime totals by provider and model; what is not broken down by model is unknown."""
    pairs: dict[Pair, Totals] = {(UNKNOWN, model): totals for model, totals in by_model.items()}
    rest = lifetime.beyond(total_of(by_model.values())).with_assumed_records()
    if not rest.is_empty:
        pair = (UNKNOWN, UNKNOWN)
        pairs[pair] = pairs.get(pair, Totals()) + rest
    return pairs


def _without_tools(projects: Mapping[str, Totals], raw: Mapping[str, Any]) -> Mapping[str, Totals]:
    """The totals of projects in a document that counts tokens of deferred tool schemas, but not by project."""
    if any("tool_tokens_saved" in entry for entry in raw.values() if isinstance(entry, dict)):
        return projects
    return {
        name: msgspec.structs.replace(totals, untold_tool_requests=totals.requests) for name, totals in projects.items()
    }


def _lifetime(raw: Mapping[str, Any], models: Totals, point: Mapping[str, Any], problems: list[str]) -> Totals:
    """The lifetime totals, never less than the document's own parts show.

    The last point of history is cumulative and written together with the totals. Headroom trusts the point where it is
    ahead, and so does this. Amounts are taken from it only when a count shows that the totals are behind, because an
    amount may rightly fall.
    """
    block = raw.get("lifetime")
    if block is not None and not isinstance(block, dict):
        raise _damaged("lifetime", block)
    block = block or {}
    lifetime = _totals(block, "lifetime", problems)
    # The figures of points have been checked.
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
    """The newest time at which the document says that something happened. Headroom's totals name none themselves."""
    session, projects = raw.get("display_session"), raw.get("projects")
    entries = [session, *(projects.values() if isinstance(projects, dict) else ())]
    stamps = [entry.get("last_activity_at") for entry in entries if isinstance(entry, dict)]
    moments = [parse_timestamp(stamp) for stamp in stamps if isinstance(stamp, str)]
    named = [iso_utc(moment) for moment in moments if moment is not None]
    return max(filter(None, [*named, lifetime.last_activity_at, point.get("timestamp")]), default=None)


def _totals(entry: Mapping[str, Any], where: str, problems: list[str]) -> Totals:
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
        problems.append(f"{where}.last_activity_at is not a timestamp: {shown(last_activity)}")
    return Totals(**values, last_activity_at=iso_utc(moment) if moment else None)


def _figure(value: Any, kind: Callable[[Any], Any], where: str, *, is_signed: bool) -> Any:
    """A number as Headroom reads it: text that holds a number counts.

    Raises:
        CorruptStoreError: it is not a number, or none that can have been counted.
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
    raw: Any, where: str, cleaned: Callable[[str], str | None], problems: list[str]
) -> tuple[dict[str, Totals], dict[str, dict[str, Any]]]:
    """The totals of each name, and what else each entry holds."""
    named: dict[str, Totals] = {}
    kept: dict[str, dict[str, Any]] = {}
    if not isinstance(raw, dict):
        if raw is not None:
            problems.append(f"{where} is left out, it is not an object: {shown(raw)}")
        return named, kept
    for key, value in raw.items():
        name = cleaned(key)
        if name is None or not isinstance(value, dict):
            problems.append(f"{where}[{shown(key)}] is left out: {shown(value)}")
            continue
        totals = _totals(value, f"{where}[{shown(key)}]", problems).with_assumed_records()
        named[name] = named[name] + totals if name in named else totals
        if unknown := unknown_keys(value):
            kept[name] = kept.get(name, {}) | unknown
    return named, kept


def _model(name: str) -> str:
    return clean_name("model", name) or UNKNOWN


def _points(raw: Any, problems: list[str]) -> Iterator[dict[str, Any]]:
    """The points of history, their figures as numbers. Headroom's first releases wrote points as lists."""
    if not isinstance(raw, list):
        if raw is not None:
            problems.append(f"history is left out, it is not a list: {shown(raw)}")
        return
    for position, value in enumerate(raw):
        point = dict(zip(_POINT_OF_LIST, value, strict=False)) if isinstance(value, list) else value
        stamp = point.get("timestamp") if isinstance(point, dict) else None
        moment = parse_timestamp(stamp) if isinstance(stamp, str) else None
        if moment is None:
            problems.append(f"history[{position}] is left out, it has no timestamp: {shown(value)}")
            continue
        yield {**point, "timestamp": iso_utc(moment), **_figures(point, f"history[{position}]")}


def _figures(point: Mapping[str, Any], where: str) -> dict[str, Any]:
    return {
        key: _figure(point[key], int if name in COUNTS else float, f"{where}.{key}", is_signed=name in _SIGNED_AMOUNTS)
        for name, key in POINT_KEYS.items()
        if key in point
    }


def shown(value: Any) -> str:
    """A value as a message can hold it."""
    text = repr(value)
    return text if len(text) <= 60 else text[:57] + "..."
