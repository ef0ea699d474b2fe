"""A snapshot as JSON, as CSV rows and as bars: what the service and the command line show alike."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import msgspec

from savings_exporter.totals import Totals
from savings_exporter.tracker import Health, Snapshot

_EIGHTHS = "▏▎▍▌▋▊▉█"


def as_json(snapshot: Snapshot, health: Health, storage_path: str) -> dict[str, Any]:
    """The snapshot under the document's names, ready for any JSON encoder."""
    return {
        "storage_path": storage_path,
        "healthy": health.healthy,
        "reason": health.reason,
        "sequence": snapshot.sequence,
        "saved_at": snapshot.saved_at.isoformat() if snapshot.saved_at else None,
        "pending_records": snapshot.pending_records,
        "pending_tokens": snapshot.pending_tokens,
        "lifetime": _entry(snapshot.lifetime),
        "by_model": {name: _entry(totals) for name, totals in ranked(snapshot.by_model)},
        "projects": {name: _entry(totals) for name, totals in ranked(snapshot.projects)},
        "by_provider_model": [
            {"provider": provider, "model": model, **_entry(totals)}
            for (provider, model), totals in snapshot.by_provider_model.items()
        ],
        "history": list(snapshot.history),
    }


def as_rows(snapshot: Snapshot) -> Iterator[dict[str, Any]]:
    """The snapshot as flat rows, all with the same keys: lifetime, then models, then projects."""
    yield {"kind": "lifetime", "name": "", **_entry(snapshot.lifetime)}
    for kind, group in (("model", snapshot.by_model), ("project", snapshot.projects)):
        for name, totals in ranked(group):
            yield {"kind": kind, "name": name, **_entry(totals)}


def ranked(group: Mapping[str, Totals]) -> list[tuple[str, Totals]]:
    """Names with their totals, the one that saved most first."""
    return sorted(group.items(), key=lambda item: (-item[1].tokens_saved, item[0]))


def bar(value: int, largest: int, width: int) -> str:
    """A bar of block characters, ``width`` characters long for the largest value."""
    eighths = round(value / largest * width * 8) if largest > 0 else 0
    return "█" * (eighths // 8) + (_EIGHTHS[eighths % 8 - 1] if eighths % 8 else "")


def _entry(totals: Totals) -> dict[str, Any]:
    return {
        **msgspec.structs.asdict(totals),
        "headline_tokens_saved": totals.headline_tokens_saved,
        "savings_percent": totals.savings_percent,
    }
