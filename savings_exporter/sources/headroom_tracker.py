"""``HeadroomTracker``: has the methods of Headroom's own tracker, and keeps the totals in a store."""

from __future__ import annotations

import csv
import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from datetime import datetime, timedelta, timezone
from io import StringIO
from itertools import groupby
from typing import Any

import msgspec

from savings_exporter.formats.headroom import SCHEMA_VERSION
from savings_exporter.model.figures import Totals, iso_utc
from savings_exporter.model.history import POINT_KEYS
from savings_exporter.model.names import UNKNOWN
from savings_exporter.model.record import MAX_TOKENS, MAX_USD, parse_timestamp
from savings_exporter.model.snapshot import Snapshot
from savings_exporter.sources.headroom_extension import SOURCE
from savings_exporter.tracker import SavingsTracker

_PERIODS: Mapping[str, Callable[[datetime], datetime]] = {
    "hourly": lambda at: at.replace(minute=0, second=0),
    "daily": lambda at: at.replace(hour=0, minute=0, second=0),
    "weekly": lambda at: at.replace(hour=0, minute=0, second=0) - timedelta(days=at.weekday()),
    "monthly": lambda at: at.replace(day=1, hour=0, minute=0, second=0),
}


class HeadroomTracker:
    """A ``SavingsTracker`` with the methods that Headroom's proxy calls on its own tracker. It can replace that one:
    ``proxy.metrics.savings_tracker = HeadroomTracker(tracker)``.

    Record calls return at once, and the records become durable later. The figures are those of the durable records, so
    they lag behind by some milliseconds, and they include the records of other processes. Reading them reads the files
    of the store. Wrong arguments count as not given, as in Headroom.

    The store does not keep everything that Headroom's tracker keeps. These figures do not grow, or are missing in what
    the methods return: amounts at list prices and how they were computed, the price of deferred tool schemas apart from
    that of compression, what shorter output saved, what input and output cost, failed and limited requests, cache
    misses, and the display session.

    Args:
        tracker: the tracker to record with. The caller closes it.
    """

    def __init__(self, tracker: SavingsTracker) -> None:
        self._tracker = tracker

    @property
    def storage_path(self) -> str:
        """The document's path."""
        return self._tracker.storage_path

    # Recording.

    def record_request(
        self,
        *,
        model: str,
        input_tokens: int,
        tokens_saved: int,
        tool_search_saved: int = 0,
        output_tokens_saved: int = 0,
        output_tokens: int = 0,
        provider: str | None = None,
        agent: str | None = None,
        project: str | None = None,
        cache_read_tokens: int = 0,
        cache_write_tokens: int = 0,
        uncached_input_tokens: int = 0,
        total_input_tokens: int | None = None,  # noqa: ARG002
        total_input_cost_usd: float | None = None,  # noqa: ARG002
        estimated_savings_usd: Mapping[str, Any] | None = None,
        timestamp: datetime | str | None = None,
    ) -> bool:
        """Record one request. Returns True.

        ``total_input_tokens`` and ``total_input_cost_usd`` are the sums of one process, and are not used: the store
        adds up ``input_tokens`` of all processes. ``estimated_savings_usd`` gives the price of what compression and
        deferring tool schemas saved together, and of what the provider's cache saved. Without it, both are unknown.
        """
        priced = estimated_savings_usd
        self._tracker.record_request(
            model=_name(model) or "",
            input_tokens=_count(input_tokens),
            tokens_saved=_count(tokens_saved),
            tool_search_saved=_count(tool_search_saved),
            output_tokens_saved=_count(output_tokens_saved),
            output_tokens=_count(output_tokens),
            provider=_name(provider),
            agent=_name(agent),
            project=_name(project),
            source=SOURCE,
            cache_read_tokens=_count(cache_read_tokens),
            cache_write_tokens=_count(cache_write_tokens),
            uncached_input_tokens=_count(uncached_input_tokens),
            savings_usd=None if priced is None else _usd(priced.get("compression")) + _usd(priced.get("tool_schema")),
            cache_savings_usd=None if priced is None else max(_usd(priced.get("provider_cache")), 0.0),
            timestamp=_time(timestamp),
            wait=False,
        )
        return True

    def record_compression_savings(
        self,
        *,
        model: str,
        tokens_saved: int,
        provider: str | None = None,
        agent: str | None = None,
        total_input_tokens: int | None = None,
        total_input_cost_usd: float | None = None,
        timestamp: datetime | str | None = None,
    ) -> bool:
        """Record tokens that compression saved, if there are any. Returns whether there are.

        Unlike in Headroom, this counts as a request, and the price is unknown.
        """
        return _count(tokens_saved) > 0 and self.record_request(
            model=model,
            input_tokens=0,
            tokens_saved=tokens_saved,
            provider=provider,
            agent=agent,
            total_input_tokens=total_input_tokens,
            total_input_cost_usd=total_input_cost_usd,
            timestamp=timestamp,
        )

    def record_lifetime_request(self, *, persist: bool = True, **metrics: Any) -> None:
        """Do nothing: Headroom passes the same request to ``record_request``, too."""

    def record_lifetime_stack(self, stack: str | None) -> None:
        """Do nothing: the store does not keep stacks."""

    def record_lifetime_failed(self, *, provider: str | None = None, model: str | None = None) -> None:
        """Do nothing: a failed request saves nothing."""

    def record_lifetime_rate_limited(
        self, *, provider: str | None = None, model: str | None = None, source: str = "headroom"
    ) -> None:
        """Do nothing: a refused request saves nothing."""

    def record_lifetime_cache_bust(self, *, tokens_lost: int) -> None:
        """Do nothing: the store keeps savings only."""

    def record_lifetime_cache_miss(self, *, provider: str | None, reason: str | None) -> None:
        """Do nothing: the store keeps savings only."""

    def flush(self) -> None:
        """Commit the records and save the document."""
        self._tracker.save()

    # Reading.

    def snapshot(self) -> dict[str, Any]:
        """The totals, in Headroom's format."""
        return self._shown(self._tracker.snapshot())

    def stats_preview(self, recent_points: int = 20, model: str = "") -> dict[str, Any]:  # noqa: ARG002
        """The totals and the newest points of the history, for Headroom's ``/stats``."""
        shown = self.snapshot()
        history = shown.pop("history")
        return {**shown, "history_points": len(history), "recent_history": history[-recent_points:]}

    def history_response(self, history_mode: str = "compact") -> dict[str, Any]:
        """The totals and their history by hour, day, week and month, for Headroom's ``/stats-history``. The history of
        a store is compact already; with the mode ``none``, only the periods are given.
        """
        shown = self.snapshot()
        stored = shown["history"]
        history = [] if history_mode == "none" else stored
        return {
            **shown,
            "generated_at": iso_utc(datetime.now(timezone.utc)),
            "history": history,
            "series": {series: list(_rollup(stored, start)) for series, start in _PERIODS.items()},
            "history_summary": {
                "mode": history_mode,
                "stored_points": len(stored),
                "returned_points": len(history),
                "compacted": len(history) < len(stored),
            },
        }

    def export_rows(self, series: str = "history") -> list[dict[str, Any]]:
        """The points of the history, or the rows of ``hourly``, ``daily``, ``weekly`` or ``monthly``."""
        response = self.history_response()
        rows: list[dict[str, Any]] = response["history"] if series == "history" else response["series"].get(series, [])
        return rows

    def export_csv(self, series: str = "history") -> str:
        """``export_rows`` as CSV."""
        differences = () if series == "history" else _ROW_KEYS
        text = StringIO()
        columns = ("timestamp", *differences, *POINT_KEYS.values())
        writer = csv.DictWriter(text, columns, restval="", extrasaction="ignore")
        writer.writeheader()
        writer.writerows(self.export_rows(series))
        return text.getvalue()

    def lifetime_response(self) -> dict[str, Any]:
        """The totals for Headroom's ``/stats-lifetime``. Figures that the store does not keep are missing."""
        snapshot, health = self._tracker.snapshot(), self._tracker.health()
        lifetime = snapshot.lifetime
        by_provider: dict[str, int] = {}
        for (provider, _model), totals in snapshot.by_provider_model.items():
            by_provider[provider] = by_provider.get(provider, 0) + totals.requests
        return {
            "scope": "lifetime",
            "generated_at": iso_utc(datetime.now(timezone.utc)),
            "started_at": _iso(snapshot.created_at),
            "last_activity_at": _iso(snapshot.last_record_at),
            "requests": {"total": lifetime.requests, "by_provider": by_provider},
            "tokens": {
                "input": lifetime.total_input_tokens,
                "output": lifetime.total_output_tokens,
                "saved": lifetime.tokens_saved,
                "token_savings_percent": lifetime.savings_percent,
            },
            "prefix_cache": {
                "cache_read_tokens": lifetime.cache_read_tokens,
                "cache_write_tokens": lifetime.cache_write_tokens,
                "uncached_input_tokens": lifetime.uncached_input_tokens,
            },
            "cost": {
                "compression_savings_usd": lifetime.compression_savings_usd,
                "cache_savings_usd": lifetime.cache_savings_usd,
            },
            "by_model": {
                model: {
                    "requests": totals.requests,
                    "input_tokens": totals.total_input_tokens,
                    "output_tokens": totals.total_output_tokens,
                    "tokens_saved": totals.tokens_saved,
                }
                for model, totals in snapshot.by_model.items()
            },
            "persistence": {
                "enabled": True,
                "healthy": health.healthy,
                "error": health.reason,
                "pending_records": health.pending_records,
                "last_saved_at": _iso(snapshot.saved_at),
            },
            "projects": _ranked(snapshot.projects),
        }

    def _shown(self, snapshot: Snapshot) -> dict[str, Any]:
        return {
            "schema_version": SCHEMA_VERSION,
            "storage_path": self.storage_path,
            "lifetime": {**_entry(snapshot.lifetime), "savings_basis": UNKNOWN},
            "display_session": {},
            "display_session_policy": {},
            "history": [dict(point) for point in snapshot.history],
            "retention": {},
            "projects": _ranked(snapshot.projects),
            "by_model": _ranked(snapshot.by_model),
        }


_ROW_KEYS = {"tokens_saved": "total_tokens_saved"} | {
    f"{key}_delta": key for name, key in POINT_KEYS.items() if name != "tokens_saved"
}
"""The differences in a row of a series, and the cumulative figures of which they are the differences."""


def _rollup(points: Iterable[Mapping[str, Any]], start: Callable[[datetime], datetime]) -> Iterator[dict[str, Any]]:
    """For each period, the figures at its end and what it added to them."""
    dated = ((moment, point) for point in points if (moment := parse_timestamp(str(point.get("timestamp")))))
    before: Mapping[str, Any] = {}
    for period, group in groupby(dated, key=lambda pair: start(pair[0].replace(microsecond=0))):
        *_, (_moment, last) = group
        row = {"timestamp": iso_utc(period), **{key: last.get(key, 0) for key in POINT_KEYS.values()}}
        for delta, key in _ROW_KEYS.items():
            row[delta] = round(last.get(key, 0) - before.get(key, 0), 9)
        yield row
        before = last


def _ranked(named: Mapping[str, Totals]) -> dict[str, dict[str, Any]]:
    """Entries in Headroom's format, the one that saved most first."""
    ranked = sorted(named.items(), key=lambda pair: pair[1].headline_tokens_saved, reverse=True)
    return {name: _entry(totals) for name, totals in ranked}


def _entry(totals: Totals) -> dict[str, Any]:
    return {
        **msgspec.structs.asdict(totals),
        "headline_tokens_saved": totals.headline_tokens_saved,
        "savings_percent": totals.savings_percent or 0.0,
    }


def _name(value: Any) -> str | None:
    return value if isinstance(value, str) else None


def _count(value: Any) -> int:
    try:
        return min(max(int(value), 0), MAX_TOKENS)
    except (TypeError, ValueError, OverflowError):
        return 0


def _usd(value: Any) -> float:
    try:
        amount = float(value)
    except (TypeError, ValueError, OverflowError):
        return 0.0
    return amount if math.isfinite(amount) and abs(amount) <= MAX_USD / 2 else 0.0


def _time(value: Any) -> datetime | None:
    if isinstance(value, datetime):
        return value.astimezone(timezone.utc)
    return parse_timestamp(value) if isinstance(value, str) else None


def _iso(moment: datetime | None) -> str | None:
    return iso_utc(moment) if moment is not None else None
