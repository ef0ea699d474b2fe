"""The recording rules."""

from __future__ import annotations

from typing import Any

from savings_exporter.assets.promql import Metrics, indented
from savings_exporter.assets.settings import RuleSettings
from savings_exporter.telemetry.counters import bound_text

BURN_WINDOWS = ("5m", "30m", "1h", "6h", "3d")
"""The windows over which the share of slow commits and saves is recorded."""


def groups(settings: RuleSettings) -> list[dict[str, Any]]:
    """The groups of the recording rules."""
    metrics = Metrics(settings)
    return [
        {"name": "savings-totals", "rules": _totals(metrics)},
        {"name": "savings-failures", "rules": _failures(metrics)},
        {"name": "savings-latency", "rules": _latency(metrics, settings)},
    ]


def _totals(metrics: Metrics) -> list[dict[str, str]]:
    tokens = metrics.of("savings_tokens_saved_total")
    return [
        _rule("instance:savings_tokens_saved:sum", f"sum without (provider, model) ({tokens})"),
        *(
            _rule(f"store:{name}:sum", f"sum by (store) (\n{indented(metrics.by_store(metric))}\n)")
            for name, metric in (
                ("savings_tokens_saved", "savings_tokens_saved_total"),
                ("savings_requests", "savings_requests_total"),
                ("savings_cost_saved_usd", "savings_cost_saved_usd"),
            )
        ),
        _rule(
            "job:savings_tokens_saved:sum",
            "sum by (job) (\n  max by (job, store, provider, model) (\n"
            f"    {metrics.with_store(tokens, 'provider', 'model')}\n  )\n)",
        ),
        # The last value of each store, for a day: an exporter that is down keeps its part of the total.
        _rule("savings:tokens_saved:sum", "sum(last_over_time(store:savings_tokens_saved:sum[1d]))"),
    ]


def _failures(metrics: Metrics) -> list[dict[str, str]]:
    """The failures of the store within a time; no sample if there is none.

    The counters continue across restarts. A value is compared with the smallest one within that time and, for an
    exporter that was not scraped meanwhile, with the last value before, at most a day ago. The first scrape of an
    exporter only sets the base: its failures may be weeks old. ``increase()`` would take a counter that went back,
    after a backup was restored, for one that began at zero.
    """
    return [
        _rule(
            record,
            f"{metrics.of(name)} - min_over_time({metrics.of(name, window=window)}) > 0\n"
            f"or {metrics.of(name)} - last_over_time({metrics.of(name, window=f'1d offset {window}')}) > 0",
        )
        for record, name, window in (
            ("instance_target:savings_fsync_failures:increase5m", "savings_fsync_failures_total", "5m"),
            ("instance_kind:savings_recoveries:increase1h", "savings_recoveries_total", "1h"),
        )
    ]


def _latency(metrics: Metrics, settings: RuleSettings) -> list[dict[str, str]]:
    """The share of commits and saves that took longer than the objective."""
    return [
        _rule(
            f"instance:savings_{what}_slow:ratio_rate{window}",
            f"1 - sum without (le) (rate({metrics.of(f'{name}_bucket', _le(seconds), window)}))\n"
            f"  / (rate({metrics.of(f'{name}_count', window=window)}) > 0)",
        )
        for what, seconds in (("commit", settings.commit_seconds), ("save", settings.save_seconds))
        for name in (f"savings_{what}_duration_seconds",)
        for window in BURN_WINDOWS
    ]


def _le(seconds: float) -> str:
    return f'le="{bound_text(float(seconds))}"'


def _rule(name: str, expression: str) -> dict[str, str]:
    return {"record": name, "expr": expression}
