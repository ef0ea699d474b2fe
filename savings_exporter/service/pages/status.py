"""The status page: what was saved, and whether it is durable. It is readable without JavaScript."""

from __future__ import annotations

import time
from collections.abc import Iterable, Mapping, Sequence
from datetime import date, datetime, timedelta, timezone
from html import escape
from pathlib import Path
from typing import NamedTuple

from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from savings_exporter.errors import StoreError
from savings_exporter.model.crowds import KINDS
from savings_exporter.model.days import Dated, grouped
from savings_exporter.model.figures import ZERO, Numbers, added
from savings_exporter.model.snapshot import Health, Snapshot
from savings_exporter.model.totals import Totals, total_of
from savings_exporter.service.pages import chart
from savings_exporter.service.paths import DOCUMENTS_PATH, ICON_PATH, OPENAPI_PATH, SAVINGS_PATH
from savings_exporter.service.views import (
    UNKNOWN_FIGURE,
    count,
    dollars,
    dollars_saved,
    moment_and_age,
    outsiders,
    percent,
    ranked,
    tokens,
    usage_note,
    utc,
)
from savings_exporter.storage.operation import APPEND, FSYNC_DIR, FSYNC_FILE, FSYNC_JOURNAL, REPLACE, WRITE
from savings_exporter.telemetry.counters import RECOVERIES
from savings_exporter.telemetry.recent import RecentOperations, RecentSave
from savings_exporter.tracker import SavingsTracker
from savings_exporter.version import VERSION
from savings_exporter.watched import WatchedFile

HEADERS = {
    "Content-Security-Policy": "default-src 'none'; style-src 'self'; script-src 'self'; connect-src 'self'; "
    "img-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'",
    "Cache-Control": "no-store",
}

GROUPS = ("model", "source", "project", "provider")
"""What the chart can be stacked by."""

_STYLE_PATH, _SCRIPT_PATH = "/status.css", "/status.js"
_DAYS = 30
_MOST_ROWS = 10
_DAYS_SECONDS = 5.0

_STEPS = (
    (APPEND, "Journal: write"),
    (FSYNC_JOURNAL, "Journal: sync"),
    (WRITE, "Document: write"),
    (FSYNC_FILE, "Document: file fsync"),
    (REPLACE, "Document: rename"),
    (FSYNC_DIR, "Directory fsync"),
)
_STEP_NAMES = dict(_STEPS)

_PAGE = """<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>{title}</title>
<link rel="icon" href="{prefix}{icon}">
<link rel="stylesheet" href="{prefix}{style}">
<script src="{prefix}{script}" defer></script>
</head>
<body>
<p class="banner bad" id="lost" role="alert" hidden>The service does not answer. The figures below are old.</p>
<header id="top"><h1>savings-exporter</h1>{state}</header>
<main id="content">
{content}
</main>
<footer id="bottom">
{footer}
</footer>
</body>
</html>
"""


class Shown(NamedTuple):
    """What the page shows. ``dated`` is what was saved on the last days; None if that cannot be read."""

    snapshot: Snapshot
    health: Health
    dated: Dated | None
    drills: frozenset[str]
    at: datetime


class StatusPage:
    """Builds the page for a source of totals.

    Args:
        source: the tracker of this service, or the file that it watches.
        metrics_path: where the metrics are.
        takes_savings: whether savings can be sent to this service.
        is_demo: whether the savings are made up.
    """

    def __init__(
        self, source: SavingsTracker | WatchedFile, metrics_path: str, *, takes_savings: bool, is_demo: bool
    ) -> None:
        self._source = source
        self._metrics_path = metrics_path
        self._takes_savings = takes_savings
        self._is_demo = is_demo
        self._began = datetime.now(timezone.utc)
        self._last: Shown | None = None
        self._dated: Dated | None = None
        self._dated_for: tuple[int, str] = (-1, "")
        self._dated_at = float("-inf")
        folder = Path(__file__).parent
        self._files = {
            _STYLE_PATH: ((folder / "status.css").read_bytes(), "text/css"),
            _SCRIPT_PATH: ((folder / "status.js").read_bytes(), "text/javascript"),
            ICON_PATH: ((folder / "icon.svg").read_bytes(), "image/svg+xml"),
        }

    def routes(self) -> list[Route]:
        """The routes of the page's style, script and icon."""
        return [Route(path, self._file) for path in self._files]

    async def _file(self, request: Request) -> Response:
        name = "/" + request.url.path.rpartition("/")[2]
        content, kind = self._files[name]
        return Response(content, media_type=kind, headers={"Cache-Control": "no-cache"})

    def render(self, prefix: str, by: str) -> bytes:
        """The page. This may take as long as the disk takes.

        Args:
            prefix: the path at which the application is mounted.
            by: what the chart is stacked by.
        """
        snapshot = self._source.snapshot()
        if self._read_days(snapshot):
            # Taken after the days: what is recorded in between must not make a day larger than the lifetime.
            snapshot = self._source.snapshot()
        counters = self._source.counters if isinstance(self._source, SavingsTracker) else None
        shown = self._last = Shown(
            snapshot,
            self._source.health(),
            self._dated,
            counters.active_drills if counters is not None else frozenset(),
            datetime.now(timezone.utc),
        )
        return self._page(shown, prefix, by)

    def render_late(self, prefix: str, by: str) -> bytes:
        """The page while the store does not answer, with what was last read."""
        if self._last is None:
            late = "The store does not answer. Nothing has been read of it since the service began."
            content = f'<p class="banner bad" role="alert">{late}</p>'
            state = '<p class="state bad">The store does not answer</p>'
            return self._filled("The store does not answer", state, content, prefix, None)
        late = f"The store does not answer. The figures below are those of {utc(self._last.at)}."
        return self._page(self._last, prefix, by, late)

    def _read_days(self, snapshot: Snapshot) -> bool:
        """Read what was saved in the last days and as many days before, if it may have changed. Returns whether it was
        read.
        """
        today = datetime.now(timezone.utc).date()
        wanted, now = (snapshot.sequence, today.isoformat()), time.monotonic()
        if wanted == self._dated_for or (now < self._dated_at + _DAYS_SECONDS and self._dated is not None):
            return False
        try:
            self._dated = self._source.days((today - timedelta(days=2 * _DAYS - 1)).isoformat())
        except StoreError:
            self._dated = None
        self._dated_for = wanted
        # Reading many days takes long: then they are read every few seconds only.
        self._dated_at = time.monotonic() if time.monotonic() - now > _DAYS_SECONDS / 100 else float("-inf")
        return True

    def _page(self, shown: Shown, prefix: str, by: str, late: str = "") -> bytes:
        snapshot, health = shown.snapshot, shown.health
        banners = [(late, "bad")] if late else []
        if not health.healthy:
            banners.append((health.reason or "The store is degraded.", "bad"))
        if shown.drills:
            names = ", ".join(sorted(shown.drills))
            banners.append((f"A fire drill runs ({names}): its failures are simulated, and nothing is lost.", ""))
        if self._is_demo:
            banners.append(("These savings are made up: the service runs with --demo.", ""))
        shown_banners = "".join(
            f'<p class="banner {kind}"{" role=alert" if kind else ""}>{escape(text)}</p>' for text, kind in banners
        )
        # In an element that is always there, so that the script does not replace what follows.
        content = f'<div id="banners">{shown_banners}</div>'
        content += _figures(snapshot)
        if not snapshot.sequence and snapshot.lifetime.is_empty:
            content += _first_saving(prefix, takes_savings=self._takes_savings)
        else:
            content += _periods(shown, by) + _shares(snapshot)
        recent = self._source.recent if isinstance(self._source, SavingsTracker) else None
        content += _durability(shown, recent)
        is_good = health.healthy and not late
        word = "healthy" if is_good else "degraded"
        state = f'<p class="state {"good" if is_good else "bad"}">{word}</p>'
        return self._filled(f"{snapshot.lifetime.tokens_saved:,} tokens saved", state, content, prefix, snapshot)

    def _filled(self, title: str, state: str, content: str, prefix: str, snapshot: Snapshot | None) -> bytes:
        links = (
            (f"{DOCUMENTS_PATH}runbook", "runbook"),
            (DOCUMENTS_PATH, "documents"),
            (self._metrics_path, "metrics"),
            (SAVINGS_PATH, "JSON"),
            (OPENAPI_PATH, "API"),
        )
        nav = "".join(f'<a href="{escape(prefix + path)}">{name}</a>' for path, name in links)
        up = moment_and_age(self._began, datetime.now(timezone.utc)).partition(" (")[2].rstrip(")")
        saved = f", saved {utc(snapshot.saved_at)}" if snapshot is not None and snapshot.saved_at else ""
        if snapshot is not None:
            saved += f", read {utc(snapshot.read_at)}"
        footer = (
            f'<nav aria-label="More">{nav}</nav>\n<p>savings-exporter {VERSION}, started {up} &middot; '
            f"{escape(self._source.storage_path)}{saved}</p>"
        )
        page = _PAGE.format(
            title=escape(title),
            prefix=escape(prefix),
            icon=ICON_PATH,
            style=_STYLE_PATH,
            script=_SCRIPT_PATH,
            state=state,
            content=content,
            footer=footer,
        )
        return page.encode("utf-8", "backslashreplace")


def _figures(snapshot: Snapshot) -> str:
    lifetime, newest = snapshot.lifetime, snapshot.last_record_at
    unpriced = lifetime.unpriced_requests
    usd = dollars_saved(lifetime.savings_usd, unpriced)
    if lifetime.savings_usd is None:
        price = "no request has a price" if lifetime.requests else ""
    else:
        price = f"{requests_without(unpriced)}" if unpriced else "of all requests"
    last = moment_and_age(newest, datetime.now(timezone.utc)) if newest else UNKNOWN_FIGURE
    cards = (
        ("US dollars saved", usd, price),
        ("Requests", f"{lifetime.requests:,}", f"last: {last}"),
        ("Share of the input saved", percent(lifetime.savings_percent), usage_note(snapshot)),
        ("Deferred tool schemas", count(lifetime.known_tool_tokens_saved), "more tokens of input saved"),
        ("Output", f"{lifetime.output_tokens_saved:,}", "tokens of output saved"),
        (
            "Prompt cache",
            f"{lifetime.cache_read_tokens:,}",
            "tokens read"
            + (f", {dollars(lifetime.cache_savings_usd)} US dollars saved" if lifetime.cache_savings_usd else ""),
        ),
    )
    return (
        '<section aria-labelledby="lifetime"><h2 id="lifetime">Lifetime tokens saved</h2>'
        f'<p class="total">{lifetime.tokens_saved:,}</p>{_cards(cards)}</section>'
    )


def requests_without(unpriced: int) -> str:
    """How many requests have no price, as people read it."""
    return f"{unpriced:,} request{'' if unpriced == 1 else 's'} without a price"


def _cards(cards: Iterable[tuple[str, str, str]]) -> str:
    made = (
        f"<div><dt>{escape(name)}</dt><dd>{escape(figure)}<small>{escape(more)}</small></dd></div>"
        for name, figure, more in cards
    )
    return f'<dl class="cards">{"".join(made)}</dl>'


def _first_saving(prefix: str, *, takes_savings: bool) -> str:
    if not takes_savings:
        documents = escape(f"{prefix}{DOCUMENTS_PATH}")
        return (
            "<section><h2>No savings yet</h2><p>The program that keeps this store has recorded none. "
            f'<a href="{documents}embedding">How a program records savings</a></p></section>'
        )
    body = '{"model": "claude-sonnet-4-5", "provider": "anthropic", "input_tokens": 12000, "tokens_saved": 4096}'
    command = f"curl -H 'Content-Type: application/json' -d '{body}' http://ADDRESS{prefix}{SAVINGS_PATH}"
    documents = escape(f"{prefix}{DOCUMENTS_PATH}")
    return (
        '<section aria-labelledby="first"><h2 id="first">No savings yet</h2>'
        "<p>Send the first one, with the address of this page in place of ADDRESS:</p>"
        f"<pre>{escape(command)}</pre>"
        f'<p>A proxy sends each saving like this, or <a href="{documents}embedding">embeds the tracker</a>. '
        f'<a href="{documents}sources">Savings of other programs</a> can be imported.</p></section>'
    )


def _periods(shown: Shown, by: str) -> str:
    if shown.dated is None:
        return "<section><h2>Last 30 days</h2><p>The days cannot be read now.</p></section>"
    today = shown.at.date()
    by_day = {str(day): numbers for (day,), numbers in grouped(shown.dated.rows, ("day",)).items()}
    cards = []
    for name, length in (("Today", 1), ("7 days", 7), ("30 days", _DAYS)):
        now = _sum(by_day, today, length)
        before = _sum(by_day, today - timedelta(days=length), length)
        usd = dollars_saved(now.savings_usd, now.unpriced_requests)
        past = "yesterday" if length == 1 else f"the {length} days before"
        cards.append((name, tokens(now.tokens_saved), f"{usd} US dollars; {_compared(now, before, past)}"))
    days = [(today - timedelta(days=_DAYS - 1 - place)).isoformat() for place in range(_DAYS)]
    places = {day: place for place, day in enumerate(days)}
    by_name: dict[str, list[int]] = {}
    for (day_of_name, name_of_day), numbers in grouped(shown.dated.rows, ("day", by)).items():
        place = places.get(day_of_name or "")
        if place is not None:
            by_name.setdefault(name_of_day or "not given", [0] * _DAYS)[place] += (
                Totals().plus(numbers, None).tokens_saved
            )
    series = chart.stacked(by_name)
    switch = " &middot; ".join(
        f'<a href="?by={group}"{" aria-current=true" if group == by else ""}>{group}</a>' for group in GROUPS
    )
    key = "".join(
        f'<li><svg viewBox="0 0 1 1" aria-hidden="true"><rect class="c{color}" width="1" height="1"/></svg>'
        f"{escape(each.name)}</li>"
        for color, each in enumerate(series)
    )
    head = "".join(f'<th scope="col">{escape(each.name)}</th>' for each in series)
    rows = "".join(
        f'<tr><th scope="row">{day}</th>{"".join(f"<td>{each.tokens[place]:,}</td>" for each in series)}</tr>'
        for place, day in enumerate(days)
        if any(each.tokens[place] for each in series)
    )
    return (
        f'<section aria-labelledby="days"><h2 id="days">Last 30 days</h2>{_cards(cards)}'
        f"<p class=faint>Tokens saved each day (UTC), by {switch}</p>"
        f"{chart.svg(days, series, f'Tokens saved on each of the last {_DAYS} days, by {by}')}"
        f'<ul class="key">{key}</ul>'
        f'<details id="days-table"><summary>The same as a table</summary><div class="wide"><table><thead><tr>'
        f'<th scope="col">day</th>{head}</tr></thead><tbody>{rows}</tbody></table></div></details></section>'
    )


def _sum(by_day: Mapping[str, Numbers], last: date, length: int) -> Totals:
    numbers = ZERO
    for back in range(length):
        numbers = added(numbers, by_day.get((last - timedelta(days=back)).isoformat(), ZERO))
    return Totals().plus(numbers, None)


def _compared(now: Totals, before: Totals, past: str) -> str:
    if not before.tokens_saved:
        return "none yesterday" if past == "yesterday" else f"none in {past}"
    change = (now.tokens_saved - before.tokens_saved) / before.tokens_saved * 100
    return f"{change:+,.0f} % against {past}"


def _shares(snapshot: Snapshot) -> str:
    providers: dict[str, list[Totals]] = {}
    for (provider, _), totals in snapshot.by_provider_model.items():
        providers.setdefault(provider, []).append(totals)
    groups: list[tuple[str, Mapping[str, Totals]]] = [(kind, snapshot.ledger.named(kind)) for kind in KINDS]
    groups.append(("provider", {name: total_of(parts) for name, parts in providers.items()}))
    made = "".join(_share_table(snapshot, kind, named) for kind, named in groups)
    return f'<div class="columns">{made}</div>'


def _share_table(snapshot: Snapshot, kind: str, named: Mapping[str, Totals]) -> str:
    # Who only reports usage has saved nothing.
    rows = [row for row in ranked(named.items()) if row[1].tokens_saved or row[1].requests]
    if not rows:
        return ""
    whole = sum(totals.tokens_saved for totals in named.values())
    cells = "".join(
        f'<tr><th scope="row">{escape(name)}{_bar(totals.tokens_saved, whole)}</th><td>{totals.tokens_saved:,}</td>'
        f"<td>{_percent_of(totals.tokens_saved, whole)}</td><td class=rare>{totals.requests:,}</td>"
        f"<td>{escape(dollars_saved(totals.savings_usd, totals.unpriced_requests))}</td></tr>"
        for name, totals in rows[:_MOST_ROWS]
    )
    more = f"<p class=faint>and {len(rows) - _MOST_ROWS:,} more</p>" if len(rows) > _MOST_ROWS else ""
    more += "".join(f"<p class=faint>{escape(line)}</p>" for line in outsiders(snapshot, kind)) if kind in KINDS else ""
    return (
        f'<section><div class="wide"><table><caption>By {kind}</caption><thead><tr>'
        '<th scope="col">name</th><th scope="col">tokens</th><th scope="col">share</th>'
        '<th scope="col" class=rare>requests</th><th scope="col">US dollars</th></tr></thead>'
        f"<tbody>{cells}</tbody></table></div>{more}</section>"
    )


def _bar(value: int, whole: int) -> str:
    width = max(value, 0) / whole * 100 if whole > 0 else 0
    return (
        '<svg class="share" viewBox="0 0 100 1" preserveAspectRatio="none" aria-hidden="true">'
        f'<rect width="{width:.1f}" height="1"/></svg>'
    )


def _percent_of(value: int, whole: int) -> str:
    return percent(value / whole * 100 if whole > 0 else None)


def _durability(shown: Shown, recent: RecentOperations | None) -> str:
    health, snapshot = shown.health, shown.snapshot
    if health.healthy and recent is None:
        sentence = '<p><span class="state good">Healthy</span>: the file can be read.</p>'
    elif health.healthy:
        sentence = '<p><span class="state good">Healthy</span>: what was acknowledged survives a power loss.</p>'
    else:
        sentence = f'<p><span class="state bad">Degraded</span>: {escape(health.reason or "saving fails")}</p>'
    if recent is None:
        sentence += "<p>Another program writes it. Whether its saves survive a power loss is not known here.</p>"
        return f'<section aria-labelledby="durability"><h2 id="durability">Durability</h2>{sentence}</section>'
    pending = f"{health.pending_records:,} record{'' if health.pending_records == 1 else 's'}"
    waits = f"the oldest since {moment_and_age(health.pending_since, shown.at)}" if health.pending_since else ""
    recovered = {
        name.partition("/")[2].replace("_", " "): int(number)
        for name, number in snapshot.operations.counts.items()
        if name.startswith(f"{RECOVERIES}/")
    }
    kinds = ", ".join(f"{name}: {number:,}" for name, number in sorted(recovered.items()))
    cards = (
        ("Pending", pending, waits or "all records are durable"),
        ("Recoveries", f"{sum(recovered.values()):,}", kinds or "no damage was repaired"),
        (
            "Journals",
            f"{snapshot.journal_bytes:,}",
            f"bytes, {snapshot.writers:,} open tracker{'' if snapshot.writers == 1 else 's'}",
        ),
    )
    return (
        f'<section aria-labelledby="durability"><h2 id="durability">Durability</h2>{sentence}{_cards(cards)}'
        f"{_steps(recent)}{_saves(recent.saves())}</section>"
    )


def _steps(recent: RecentOperations) -> str:
    rows = []
    for name, label in _STEPS:
        step = recent.step(name)
        failed = UNKNOWN_FIGURE
        if step.last_failure is not None:
            drill = ", drill" if step.last_failure.is_drill else ""
            failed = f"{_at(step.last_failure.at)} ({step.last_failure.error}{drill})"
        kind = ' class="bad"' if step.last_failure is not None else ""
        rows.append(
            f'<tr><th scope="row">{label}</th><td>{_at(step.last_success)}</td><td{kind}>{escape(failed)}</td>'
            f"<td>{_milliseconds(step.p50)}</td><td>{_milliseconds(step.p99)}</td></tr>"
        )
    return (
        '<div class="wide"><table class="steps"><caption>Steps</caption><thead><tr>'
        '<th scope="col">step</th><th scope="col">last success</th><th scope="col">last failure</th>'
        f'<th scope="col">p50</th><th scope="col">p99</th></tr></thead><tbody>{"".join(rows)}</tbody></table></div>'
        "<p class=faint>Of this process since its start; times in UTC, durations of the last 1,000 of each step.</p>"
    )


def _saves(saves: Sequence[RecentSave]) -> str:
    if not saves:
        return ""
    longest = max((save.duration for save in saves), default=0.0) or 1.0
    rows = "".join(
        f'<tr><th scope="row">{_at(save.at)}{" (drill)" if save.is_drill else ""}</th>'
        f"<td>{escape(save.error) or 'saved'}</td><td>{_milliseconds(save.duration)}</td>"
        f"<td>{_waterfall(save, longest)}</td></tr>"
        for save in saves
    )
    colors = [name for name, _ in _STEPS if name in (WRITE, FSYNC_FILE, REPLACE, FSYNC_DIR)]
    key = "".join(
        f'<li><svg viewBox="0 0 1 1" aria-hidden="true"><rect class="c{color}" width="1" height="1"/></svg>'
        f"{_STEP_NAMES[name]}</li>"
        for color, name in enumerate(colors)
    )
    return (
        '<div class="wide"><table class="saves"><caption>Last saves of the document</caption><thead><tr>'
        '<th scope="col">time</th><th scope="col">result</th><th scope="col">duration</th>'
        f'<th scope="col">steps</th></tr></thead><tbody>{rows}</tbody></table></div><ul class="key">{key}</ul>'
    )


def _waterfall(save: RecentSave, longest: float) -> str:
    colors = {name: place for place, name in enumerate((WRITE, FSYNC_FILE, REPLACE, FSYNC_DIR))}
    told, bars = [], []
    for step in save.steps:
        told.append(f"{_STEP_NAMES.get(step.name, step.name)} {_milliseconds(step.duration)} {step.error}".strip())
        x, width = step.offset / longest * 100, max(step.duration / longest * 100, 0.4)
        kind = "failed" if step.error else f"c{colors.get(step.name, 5)}"
        bars.append(f'<rect class="{kind}" x="{x:.2f}" width="{width:.2f}" height="1"/>')
    label = escape(", ".join(told))
    return (
        f'<svg class="waterfall" viewBox="0 0 100 1" preserveAspectRatio="none" role="img" aria-label="{label}">'
        f"<title>{label}</title>{''.join(bars)}</svg>"
    )


def _at(seconds: float | None) -> str:
    if seconds is None:
        return UNKNOWN_FIGURE
    return f"{datetime.fromtimestamp(seconds, timezone.utc):%Y-%m-%d %H:%M:%S}"


def _milliseconds(seconds: float | None) -> str:
    return UNKNOWN_FIGURE if seconds is None else f"{seconds * 1e3:,.3g} ms" if seconds < 10 else f"{seconds:,.0f} s"
