"""``savings-exporter show``."""

from __future__ import annotations

import csv
import os
import shlex
import sys
from collections.abc import Iterator

import click
from rich.text import Text

from savings_exporter.cli.errors import CommandError, WrongUsageError
from savings_exporter.cli.options import json_option, store_option
from savings_exporter.cli.output import print_json, saved
from savings_exporter.cli.tables import stdout_console, table
from savings_exporter.escaping import plain
from savings_exporter.model.crowds import KINDS
from savings_exporter.model.names import UNKNOWN
from savings_exporter.model.snapshot import Snapshot
from savings_exporter.model.totals import Totals
from savings_exporter.service import logs, views
from savings_exporter.storage.repair import is_begun
from savings_exporter.tracker import DOCUMENT_NAME, default_path
from savings_exporter.watched import WatchedFile

_BAR_WIDTH = 16
_LONGEST_NAME = 40


@click.command()
@store_option
@json_option
@click.option("--csv", "as_csv", is_flag=True, help="As CSV.")
def show(
    store: str | None,
    as_json: bool,
    as_csv: bool,
) -> None:
    """Print a store's totals. Only reads; also reads a document that Headroom wrote."""
    logs.be_quiet()
    if as_json and as_csv:
        raise WrongUsageError("give --json or --csv, not both")
    path = store if store is not None else default_path()
    if not is_begun(path):
        given = f" --store {shlex.quote(store)}" if store is not None else ""
        raise CommandError(
            f"{path}: there are no savings yet; record the first with: savings-exporter record --model NAME "
            f"--provider NAME --input-tokens N --tokens-saved N{given}"
        )
    if os.path.isdir(path):
        raise CommandError(
            f"{path}: is a directory; name the document in it: --store {shlex.quote(os.path.join(path, DOCUMENT_NAME))}"
        )
    watched = WatchedFile(path)
    snapshot = watched.snapshot()
    if as_json:
        print_json(views.as_json(snapshot, watched.health(), watched.storage_path))
    elif as_csv:
        rows = list(views.as_rows(snapshot))
        writer = csv.DictWriter(sys.stdout, rows[0].keys(), lineterminator="\n")
        writer.writeheader()
        writer.writerows(map(views.csv_row, rows))
    elif snapshot.lifetime.is_empty:
        print(f"{watched.storage_path}: the store is empty: no savings are recorded yet")
    else:
        _print_tables(snapshot, watched.storage_path)


def _tables_of(snapshot: Snapshot) -> Iterator[tuple[str, list[tuple[str, Totals]]]]:
    """The breakdowns without empty rows. Only one table of models is printed when each model has one provider."""
    found = {kind: [row for row in rows if not row[1].is_empty] for kind, rows in views.breakdowns(snapshot)}
    pairs = {pair: totals for pair, totals in snapshot.by_provider_model.items() if not totals.is_empty}
    by_model = {model: totals for (_, model), totals in pairs.items()}
    if len(by_model) == len(pairs) and by_model == dict(found["model"]):
        has_providers = any(provider != UNKNOWN for provider, _ in pairs)
        del found["model" if has_providers else "provider/model"]
    yield from ((kind, rows) for kind, rows in found.items() if rows)


def _print_tables(snapshot: Snapshot, path: str) -> None:
    console = stdout_console()
    lifetime = snapshot.lifetime
    usage = views.usage_note(snapshot)
    note = f" ({usage})" if usage else ""
    console.print(
        Text(
            f"{views.tokens(lifetime.tokens_saved)} saved in {views.requests(lifetime)}, "
            f"{lifetime.tool_tokens_saved:,} more by deferred tool schemas. "
            f"Share of the input: {views.percent(lifetime.savings_percent)}{note}. "
            f"US dollars saved: {views.dollars_saved(lifetime.savings_usd, lifetime.unpriced_requests)}"
        ),
        soft_wrap=True,
    )
    newest = snapshot.last_record_at
    last = views.moment_and_age(newest, snapshot.read_at) if newest else views.UNKNOWN_FIGURE
    console.print(Text(f"Last saving: {last}"))
    if lifetime.unpriced_requests:
        console.print(Text(f"Requests without a price: {lifetime.unpriced_requests:,}"))
    for kind, rows in _tables_of(snapshot):
        shown = table(kind)
        columns = _columns(rows, ascii_only=console.options.ascii_only)
        # On a narrow terminal columns go from the right, and never the names.
        name_width = min(max(len(plain(name)) for name, _ in rows), _LONGEST_NAME)
        while len(columns) > 1 and name_width + sum(map(_width, columns.items())) > console.width:
            columns.popitem()
        for heading in columns:
            shown.add_column(heading, justify="right" if heading else "left", no_wrap=True)
        for position, (name, _) in enumerate(rows):
            shown.add_row(name, *(cells[position] for cells in columns.values()))
        console.print()
        console.print(shown)
        for line in views.outsiders(snapshot, kind) if kind in KINDS else ():
            console.print(Text(line))
    console.print()
    times = f"{saved(snapshot.saved_at)}, read {views.utc(snapshot.read_at)}"
    console.print(Text(f"{path}{times}", style="dim"), soft_wrap=True)


def _columns(rows: list[tuple[str, Totals]], *, ascii_only: bool) -> dict[str, list[str]]:
    """The figures of a table by their heading, the most important ones first, and a bar."""
    largest = rows[0][1].tokens_saved
    every = [totals for _, totals in rows]
    bars = [views.bar(totals.tokens_saved, largest, _BAR_WIDTH) for totals in every]
    return {
        "tokens saved": [f"{totals.tokens_saved:,}" for totals in every],
        "requests": [f"{totals.requests:,}" for totals in every],
        "US dollars": [views.dollars_saved(totals.savings_usd, totals.unpriced_requests) for totals in every],
        "of input": [views.percent(totals.savings_percent) for totals in every],
        "tool tokens": [views.count(totals.known_tool_tokens_saved) for totals in every],
        "": ["#" * len(bar) if ascii_only else bar for bar in bars],
    }


def _width(column: tuple[str, list[str]]) -> int:
    """The width of a column with the gap before it."""
    heading, cells = column
    return 2 + max(len(heading), *map(len, cells))
