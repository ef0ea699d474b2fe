"""The status page: one HTML document that loads nothing and needs no JavaScript."""

from __future__ import annotations

from datetime import datetime, timezone
from html import escape

from savings_exporter.model.crowds import AGENT, MODEL, PROJECT, SOURCE
from savings_exporter.model.snapshot import Health, Snapshot
from savings_exporter.service.paths import DOCUMENTS_PATH, SAVINGS_PATH
from savings_exporter.service.views import (
    UNKNOWN_FIGURE,
    bar,
    count,
    dollars_saved,
    moment_and_age,
    outsiders,
    percent,
    ranked,
    requests,
    utc,
)

# The page runs nothing and loads nothing, whatever name a client has made up.
HEADERS = {"Content-Security-Policy": "default-src 'none'; style-src 'unsafe-inline'; frame-ancestors 'none'"}

_MOST_ROWS = 25

_PAGE = """<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta http-equiv="refresh" content="10">
<title>{tokens} tokens saved</title>
<style>
:root {{ color-scheme: light dark; font: 16px/1.5 system-ui, sans-serif; }}
body {{ margin: 2rem auto; max-width: 60rem; padding: 0 1rem; }}
.total {{ font-size: 3rem; font-weight: 600; line-height: 1.1; margin: 0; font-variant-numeric: tabular-nums; }}
.bad {{ background: #b3261e; color: #fff; padding: .5rem 1rem; border-radius: .25rem; }}
table {{ border-collapse: collapse; width: 100%; margin: 0 0 2rem; }}
th, td {{ padding: .25rem .5rem; text-align: right; font-variant-numeric: tabular-nums; }}
th:first-child, td:first-child {{ text-align: left; overflow-wrap: anywhere; }}
td.bar {{ text-align: left; color: #2e7d32; font-family: monospace; white-space: pre; }}
caption {{ text-align: left; font-weight: 600; font-size: 1.2rem; }}
tr + tr {{ border-top: 1px solid #8884; }}
</style>
</head>
<body>
<h1>savings-exporter</h1>
{trouble}
<p class="total">{tokens}</p>
<p>tokens saved by compression in {requests}, {tools} more by deferred tool schemas.
Share of the input: {percent}. US dollars saved: {dollars}.{unpriced} Last saving: {last_record}. {pending}</p>
{models}
{projects}
{agents}
{sources}
<p><small>{path} &middot; {saved}read {read_at} &middot; <a href="{metrics}">metrics</a> &middot;
<a href="{savings}">JSON</a> &middot; <a href="{runbook}">runbook</a></small></p>
</body>
</html>
"""


def render(snapshot: Snapshot, health: Health, storage_path: str, prefix: str, metrics_path: str) -> str:
    """The page for a snapshot. ``prefix`` is the path at which the application is mounted."""
    lifetime, newest = snapshot.lifetime, snapshot.last_record_at
    return _PAGE.format(
        tokens=f"{lifetime.tokens_saved:,}",
        requests=requests(lifetime),
        tools=f"{lifetime.tool_tokens_saved:,}",
        percent=percent(lifetime.savings_percent),
        dollars=escape(dollars_saved(lifetime.savings_usd, lifetime.unpriced_requests)),
        unpriced=f" Requests without a price: {lifetime.unpriced_requests:,}." if lifetime.unpriced_requests else "",
        pending=f"{snapshot.pending_records:,} records are not durable yet." if snapshot.pending_records else "",
        trouble="" if health.healthy else f'<p class="bad" role="alert">{escape(health.reason or "")}</p>',
        models=_table(snapshot, MODEL),
        projects=_table(snapshot, PROJECT),
        agents=_table(snapshot, AGENT),
        sources=_table(snapshot, SOURCE),
        path=escape(storage_path),
        last_record=moment_and_age(newest, datetime.now(timezone.utc)) if newest else UNKNOWN_FIGURE,
        saved=f"saved {utc(snapshot.saved_at)} &middot; " if snapshot.saved_at else "",
        read_at=utc(snapshot.read_at),
        metrics=escape(prefix + metrics_path),
        savings=escape(prefix + SAVINGS_PATH),
        runbook=escape(f"{prefix}{DOCUMENTS_PATH}runbook"),
    )


def _table(snapshot: Snapshot, kind: str) -> str:
    rows = ranked(snapshot.ledger.named(kind).items())
    if not rows:
        return ""
    largest = rows[0][1].tokens_saved
    cells = "".join(
        f"<tr><td>{escape(name)}</td><td>{totals.tokens_saved:,}</td><td>{count(totals.known_tool_tokens_saved)}</td>"
        f"<td>{percent(totals.savings_percent)}</td><td>{totals.requests:,}</td>"
        f"<td>{escape(dollars_saved(totals.savings_usd, totals.unpriced_requests))}</td>"
        f'<td class="bar">{bar(totals.tokens_saved, largest, 20)}</td></tr>'
        for name, totals in rows[:_MOST_ROWS]
    )
    more = f"<p>and {len(rows) - _MOST_ROWS} more</p>" if len(rows) > _MOST_ROWS else ""
    more += "".join(f"<p>{escape(line)}</p>" for line in outsiders(snapshot, kind))
    return (
        f"<table><caption>By {kind}</caption><tr><th>name</th><th>tokens saved</th><th>tool tokens</th>"
        f"<th>of input</th><th>requests</th><th>US dollars</th><th></th></tr>{cells}</table>{more}"
    )
