"""``savings-exporter show``."""

from __future__ import annotations

import csv
import sys
from collections.abc import Iterator

import click
from rich.text import Text

from savings_exporter.cli.errors import CommandError, WrongUsageError
from savings_exporter.cli.options import json_option, store_option
from savings_exporter.cli.output import print_json, saved
from savings_exporter.cli.tables import stdout_console, table
from savings_exporter.model.names import UNKNOWN
from savings_exporter.model.snapshot import Snapshot
from savings_exporter.model.totals import Totals
from savings_exporter.service import settings, views
from savings_exporter.storage.repair import is_begun
from savings_exporter.tracker import default_path
from savings_exporter.watched import WatchedFile

_BAR_WIDTH = 16


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
    settings.be_quiet()
    if as_json and as_csv:
        raise WrongUsageError("give --json or --csv, not both")
    path = store if store is not None else default_path()
    if not is_begun(path):
        given = f" --store {store}" if store is not None else ""
        raise CommandError(
            f"{path}: there are no savings yet; record the first with: savings-exporter record --model NAME "
            f"--provider NAME --input-tokens N --tokens-saved N{given}"
        )
    watched = WatchedFile(path)
    snapshot = watched.snapshot()
    if as_json:
        print_json(views.as_json(snapshot, watched.health(), watched.storage_path))
    elif as_csv:
        rows = list(views.as_rows(snapshot))
        writer = csv.DictWriter(sys.stdout, rows[0].keys(), lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)
    elif snapshot.lifetime.is_empty:
        print(f"{watched.storage_path}: the store is empty: no savings are recorded yet")
    else:
        _print_tables(snapshot, watched.storage_path)


def _tables_of(snapshot: Snapshot) -> Iterator[tuple[str, list[tuple[str, Totals]]]]:
    """The breakdowns without empty rows. Only one table of models is printed when each model has one provider."""
    found = {kind: [row for row in rows if not row[1].is_empty] for kind, rows in views.breakdowns(snapshot)}
    models, pairs = found["model"], found["provider/model"]
    if [totals for _, totals in models] == [totals for _, totals in pairs]:
        has_providers = any(not name.startswith(f"{UNKNOWN}/") for name, _ in pairs)
        del found["model" if has_providers else "provider/model"]
    yield from ((kind, rows) for kind, rows in found.items() if rows)


def _print_tables(snapshot: Snapshot, path: str) -> None:
    console = stdout_console()
    lifetime = snapshot.lifetime
    console.print(
        Text(
            f"{lifetime.tokens_saved:,} tokens saved in {views.requests(lifetime)}, "
            f"{lifetime.tool_tokens_saved:,} more by deferred tool schemas. "
            f"Share of the input: {views.percent(lifetime.savings_percent)}. "
            f"US dollars saved: {views.dollars(lifetime.savings_usd)}"
        )
    )
    newest = snapshot.last_record_at
    last = views.moment_and_age(newest, snapshot.read_at) if newest else views.UNKNOWN_FIGURE
    console.print(Text(f"Last saving: {last}"))
    for kind, rows in _tables_of(snapshot):
        largest = rows[0][1].tokens_saved
        shown = table(kind, "tokens saved", "tool tokens", "of input", "requests", "US dollars")
        shown.add_column("", no_wrap=True, width=_BAR_WIDTH)
        for name, totals in rows:
            bar = views.bar(totals.tokens_saved, largest, _BAR_WIDTH)
            shown.add_row(
                Text(name),
                f"{totals.tokens_saved:,}",
                views.count(totals.known_tool_tokens_saved),
                views.percent(totals.savings_percent),
                f"{totals.requests:,}",
                views.dollars(totals.savings_usd),
                Text("#" * len(bar) if console.options.ascii_only else bar, style="green"),
            )
        console.print()
        console.print(shown)
    console.print()
    times = f"{saved(snapshot.saved_at)}, read {views.utc(snapshot.read_at)}"
    console.print(Text(f"{path}{times}", style="dim"), soft_wrap=True)
