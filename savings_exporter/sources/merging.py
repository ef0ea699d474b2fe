"""What another program recorded in a document that it made from a document of ours: for ``verify --repair --merge``."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from datetime import datetime
from typing import Any

from savings_exporter.model.figures import AMOUNTS, COUNTS, Totals, numbers_of
from savings_exporter.model.history import POINT_KEYS
from savings_exporter.model.jsontext import any_json
from savings_exporter.model.totals import Ledger
from savings_exporter.sources.headroom_document import Seen, change_of, read
from savings_exporter.storage.repair import Merging

# Figures that no other program writes.
_DERIVED = (
    "compared_tokens_saved",
    "priced_requests",
    "costed_requests",
    "untold_tool_requests",
    "unpriced_requests",
)

# Headroom writes amounts with this many digits after the point. Only what compression saved can be negative.
_DIGITS = 6
_COUNTS = tuple(name for name in COUNTS if name not in _DERIVED)
_SIGNED = ("compression_savings_usd", "compression_savings_list_usd")


def difference(path: str, data: bytes, base: Ledger, now: datetime) -> Merging:
    """What a document holds that the document that it was made from does not.

    Args:
        path: the document's path, for messages.
        data: all bytes of the document.
        base: the totals of the document that it was made from; empty when it was made from none.
        now: the time of savings whose time the document does not contain.

    Raises:
        SourceError: the document cannot be read.
    """
    seen = None if base == Ledger() else _seen(base, any_json(data))
    change = change_of(seen, read(path, data), (), now)
    return Merging(change.rows, change.projects)


def _seen(base: Ledger, raw: Mapping[str, Any]) -> Seen:
    """The totals as the other program read them: it keeps only some figures, and rounds amounts."""
    points = base.history.points
    last = points[-1] if points else {}
    of_last = Totals(**{name: last[key] for name, key in POINT_KEYS.items() if key in last})
    models, projects = _figures_in(raw.get("by_model")), _figures_in(raw.get("projects"))
    return Seen(
        lifetime=_kept(base.lifetime, raw.get("lifetime", {})),
        models={name: _kept(totals, models) for name, totals in base.by_model.items()},
        projects={name: _kept(totals, projects) for name, totals in base.projects.items()},
        stamp=last.get("timestamp", ""),
        total=_kept(of_last, POINT_KEYS),
    )


def _figures_in(entries: Any) -> set[str]:
    """The figures that a document has for each name."""
    values = entries.values() if isinstance(entries, dict) else ()
    return {key for entry in values if isinstance(entry, dict) for key in entry}


def _kept(totals: Totals, figures: Collection[str]) -> list[int]:
    """Some figures of totals as integers, without the zeros at the end. The others are zero."""
    kept = {name: _rounded(name, getattr(totals, name)) for name in (*_COUNTS, *AMOUNTS) if name in figures}
    numbers = list(numbers_of(Totals(**kept)))
    while numbers and not numbers[-1]:
        numbers.pop()
    return numbers


def _rounded(name: str, figure: Any) -> Any:
    if name not in AMOUNTS:
        return figure
    return round(figure if name in _SIGNED else max(figure, 0.0), _DIGITS)
