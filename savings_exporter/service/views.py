"""A snapshot as JSON, as CSV rows and as text, for the service and the command line."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from datetime import datetime, timezone
from typing import Any

import msgspec

from savings_exporter.escaping import cell
from savings_exporter.model.crowds import KINDS, Crowd
from savings_exporter.model.history import LARGEST_NUMBER
from savings_exporter.model.snapshot import Health, Snapshot
from savings_exporter.model.totals import AMOUNTS, Totals

UNKNOWN_FIGURE = "–"
"""Stands for a figure that is not known: that is not zero."""

_CLOCK_DIFFERENCE_SECONDS = 5
_UNITS = (("days", 86400), ("h", 3600), ("min", 60), ("s", 1))
_EIGHTHS = "▏▎▍▌▋▊▉█"


def as_json(snapshot: Snapshot, health: Health, storage_path: str) -> dict[str, Any]:
    """The snapshot under the document's names, ready for any JSON encoder."""
    return {
        "storage_path": printable(storage_path),
        "healthy": health.healthy,
        "reason": printable(health.reason) if health.reason else None,
        "sequence": snapshot.sequence,
        "last_record_at": _iso(snapshot.last_record_at),
        "saved_at": _iso(snapshot.saved_at),
        "read_at": _iso(snapshot.read_at),
        "pending_records": snapshot.pending_records,
        "pending_tokens": snapshot.pending_tokens,
        "prices": [msgspec.structs.asdict(basis) for basis in snapshot.price_bases],
        "lifetime": figures(snapshot.lifetime),
        "by_model": {name: figures(totals) for name, totals in ranked(snapshot.by_model.items())},
        "projects": {name: figures(totals) for name, totals in ranked(snapshot.projects.items())},
        "agents": {name: figures(totals) for name, totals in ranked(snapshot.agents.items())},
        "sources": {name: figures(totals) for name, totals in ranked(snapshot.sources.items())},
        "by_provider_model": [
            {"provider": provider, "model": model, **figures(totals)}
            for (provider, model), totals in snapshot.by_provider_model.items()
        ],
        "in_other": {kind: _names_of(snapshot, kind)["in_other"] for kind in KINDS},
        "history": [_point(point) for point in snapshot.history],
    }


def as_rows(snapshot: Snapshot) -> Iterator[dict[str, Any]]:
    """The snapshot as flat rows, all with the same keys: lifetime, then its breakdowns."""
    yield {"kind": "lifetime", "name": "", **figures(snapshot.lifetime)}
    for kind, group in breakdowns(snapshot):
        for name, totals in group:
            yield {"kind": kind, "name": name, **figures(totals)}


def csv_row(row: dict[str, Any]) -> dict[str, Any]:
    """A row with names that neither a terminal nor a spreadsheet takes for something else."""
    return {key: cell(value) if isinstance(value, str) else value for key, value in row.items()}


def breakdowns(snapshot: Snapshot) -> Iterator[tuple[str, list[tuple[str, Totals]]]]:
    """What the totals are broken down by, and how."""
    yield "model", ranked(snapshot.by_model.items())
    yield "provider/model", ranked_pairs(snapshot)
    yield "project", ranked(snapshot.projects.items())
    yield "agent", ranked(snapshot.agents.items())
    yield "source", ranked(snapshot.sources.items())


def outsiders(snapshot: Snapshot, kind: str, most: int = 3) -> Iterator[str]:
    """What is known of the ``most`` largest names in ``other``, as people read it."""
    found = snapshot.ledger.outsiders(kind)
    for name, candidate in found[:most]:
        amount = f"{candidate.least:,}" if not candidate.error else f"{candidate.least:,} to {candidate.most:,}"
        yield f"in other: {name}, which has saved {amount} tokens, more than another {kind} with a place"
    if len(found) > most:
        yield f"and {len(found) - most} more names in other; savings-exporter names lists them"


def names_as_json(snapshot: Snapshot) -> dict[str, Any]:
    """The names of each kind, and the pairs of provider and model, ready for any JSON encoder."""
    pairs = {"named": {name: figures(totals) for name, totals in ranked_pairs(snapshot)}}
    return {**{kind: _names_of(snapshot, kind) for kind in KINDS}, "provider/model": pairs}


def _names_of(snapshot: Snapshot, kind: str) -> dict[str, Any]:
    crowd = snapshot.ledger.crowds.get(kind, Crowd())
    return {
        "named": {name: figures(totals) for name, totals in ranked(snapshot.ledger.named(kind).items())},
        "let_in": sorted(crowd.admitted),
        "folded": sorted(crowd.folded),
        "in_other": [
            {"name": name, "least": candidate.least, "most": candidate.most}
            for name, candidate in snapshot.ledger.outsiders(kind)
        ],
    }


def ranked(group: Iterable[tuple[str, Totals]]) -> list[tuple[str, Totals]]:
    """Names with their totals, the one that saved most first."""
    return sorted(group, key=lambda item: (-item[1].tokens_saved, item[0]))


def ranked_pairs(snapshot: Snapshot) -> list[tuple[str, Totals]]:
    """The pairs of provider and model with their totals, the one that saved most first."""
    pairs = snapshot.by_provider_model.items()
    return ranked((f"{provider}/{model}", totals) for (provider, model), totals in pairs)


def bar(value: int, largest: int, width: int) -> str:
    """A bar of block characters, ``width`` characters long for the largest value."""
    eighths = round(value / largest * width * 8) if largest > 0 else 0
    return "█" * (eighths // 8) + (_EIGHTHS[eighths % 8 - 1] if eighths % 8 else "")


def printable(text: str) -> str:
    """Text that can be written as UTF-8. A lone surrogate becomes its escape sequence in Python.

    Python puts lone surrogates in place of the bytes of a path that are not UTF-8, and JSON may contain them.
    """
    return text.encode("utf-8", "backslashreplace").decode()


def _point(point: Mapping[str, Any]) -> dict[str, Any]:
    """A point of history. Another program may have written values of any type into it."""
    return {printable(key): _plain(value) for key, value in point.items()}


def _plain(value: Any) -> Any:
    """Text, or a number that every JSON reader accepts; any other value becomes null."""
    if isinstance(value, str):
        return printable(value)
    return value if isinstance(value, (int, float)) and abs(value) <= LARGEST_NUMBER else None


def percent(share: float | None) -> str:
    """A share in percent as people read it; a dash when it is not known."""
    if share is None:
        return UNKNOWN_FIGURE
    return "< 0.1 %" if 0 < share < 0.05 else f"{share:.1f} %"  # a small share is not zero


def usage_note(snapshot: Snapshot) -> str:
    """How usage, which comes without requests and savings, counts in the share of the input, as people read it; empty
    if there is none.
    """
    sources = snapshot.sources.values()
    usage = sum(each.total_input_tokens for each in sources if not (each.requests or each.headline_tokens_saved))
    effect = "lowered by" if snapshot.lifetime.savings_percent else "of"
    return f"{effect} {tokens(usage)} of input that were reported as usage" if usage else ""


def tokens(number: int) -> str:
    """How many tokens, as people read it."""
    return f"{number:,} token{'' if number == 1 else 's'}"


def requests(totals: Totals) -> str:
    """How many requests, as people read it."""
    return f"{totals.requests:,} request{'' if totals.requests == 1 else 's'}"


def count(number: int | None) -> str:
    """A count as people read it; a dash when it is not known."""
    return UNKNOWN_FIGURE if number is None else f"{number:,}"


def moment_and_age(moment: datetime, now: datetime) -> str:
    """A time in UTC, and how long ago that was."""
    return f"{utc(moment)} ({_age((now - moment).total_seconds())})"


def utc(moment: datetime) -> str:
    """A time as people read it, to the second."""
    return f"{moment.astimezone(timezone.utc).replace(tzinfo=None).isoformat(' ', 'seconds')} UTC"


def _age(seconds: float) -> str:
    if seconds <= -_CLOCK_DIFFERENCE_SECONDS:
        return "in the future"
    if seconds < _CLOCK_DIFFERENCE_SECONDS:
        return "just now"
    # A unit is used from two of it on: "90 min" is more precise than "1 h".
    name, length = next(unit for unit in _UNITS if seconds >= 2 * unit[1])
    return f"{seconds // length:,.0f} {name} ago"


def _iso(moment: datetime | None) -> str | None:
    return moment.isoformat() if moment else None


def dollars(amount: float | None) -> str:
    """US dollars as people read them; a dash when they are not known."""
    if amount is None:
        return UNKNOWN_FIGURE
    if 0 < abs(amount) < 0.005:  # which is not zero
        return "< 0.01" if amount > 0 else "> -0.01"
    return f"{amount + 0:,.2f}"


def dollars_saved(amount: float | None, unpriced_requests: int) -> str:
    """US dollars saved as people read them. Requests without a price make the amount incomplete."""
    return f"{dollars(amount)} + ?" if unpriced_requests and amount is not None else dollars(amount)


def figures(totals: Totals) -> dict[str, Any]:
    """The figures of totals, under the document's names."""
    # An unknown amount is null. Some of the amounts are rarely given: for these, zero means unknown, too.
    unknown = {name: getattr(totals, name) or None for name in AMOUNTS}
    return {
        **msgspec.structs.asdict(totals),
        **unknown,
        "compression_savings_usd": totals.savings_usd,
        "compression_savings_list_usd": totals.compression_savings_list_usd if totals.priced_requests else None,
        "total_input_cost_usd": totals.input_cost_usd,
        "tool_tokens_saved": totals.known_tool_tokens_saved,
        "headline_tokens_saved": totals.headline_tokens_saved,
        "savings_percent": totals.savings_percent,
    }
