"""``savings-exporter export``."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from typing import Any

import click

from savings_exporter.cli import standard_streams
from savings_exporter.cli.errors import CommandError, WrongUsageError
from savings_exporter.cli.options import NAMED_PATH, json_option, store_option
from savings_exporter.cli.tables import stdout_console, table
from savings_exporter.errors import StoreError
from savings_exporter.formats.headroom_export import encode_for_headroom
from savings_exporter.service import history, logs, views
from savings_exporter.storage.atomic_file import write_new_file
from savings_exporter.storage.repair import is_begun
from savings_exporter.tracker import default_path
from savings_exporter.watched import WatchedFile

_DEFAULT_BY = "day,model"

_FIGURES: dict[str, Callable[[dict[str, Any]], str]] = {
    "tokens saved": lambda row: f"{row['tokens_saved']:,}",
    "requests": lambda row: f"{row['requests']:,}",
    "US dollars": lambda row: views.dollars_saved(row["compression_savings_usd"], row["unpriced_requests"]),
    "of input": lambda row: views.percent(row["savings_percent"]),
    "tool tokens": lambda row: views.count(row["tool_tokens_saved"]),
}


@click.command()
@store_option
@click.option(
    "--from", "first", metavar="DAY", default="", show_default=False, help="The first day, such as 2026-01-31, in UTC."
)
@click.option("--to", "last", metavar="DAY", default="", show_default=False, help="The last day.")
@click.option(
    "--by",
    metavar="COLUMNS",
    default=_DEFAULT_BY,
    help="Some of day, provider, model, project, agent and source, with commas.",
)
@json_option
@click.option("--csv", "as_csv", is_flag=True, help="As CSV.")
@click.option(
    "--headroom",
    "for_headroom",
    metavar="FILE",
    type=NAMED_PATH,
    help="Write everything to a new file, as a proxy_savings.json for Headroom.",
)
def export(
    store: str | None, first: str, last: str, by: str, as_json: bool, as_csv: bool, for_headroom: str | None
) -> None:
    """Print what was saved on each day. Only reads."""
    logs.be_quiet()
    if as_json and as_csv:
        raise WrongUsageError("give --json or --csv, not both")
    if for_headroom is not None and (first or last or as_json or as_csv or by != _DEFAULT_BY):
        raise WrongUsageError("--headroom writes everything; give it without --from, --to, --by, --json and --csv")
    try:
        query = history.Query(first, last, by)
    except history.WrongQueryError as error:
        raise WrongUsageError(f"--{error}") from None
    path = store if store is not None else default_path()
    if not is_begun(path):
        raise CommandError(f"{path}: there are no savings yet; savings-exporter show says how to record the first")
    watched = WatchedFile(path)
    try:
        if for_headroom is not None:
            _write_for_headroom(watched, os.path.expanduser(for_headroom))
            return
        dated = watched.days(*query.days)
    except StoreError as error:
        raise CommandError(str(error)) from None
    rows = query.rows(dated)
    if as_json or as_csv:
        standard_streams.write_text((history.as_csv if as_csv else history.as_json)(query, rows))
    else:
        _print_table(query.by, list(rows))


def _write_for_headroom(watched: WatchedFile, file: str) -> None:
    snapshot, dated = watched.snapshot_and_days()
    if snapshot.writers:
        raise CommandError(
            f"{watched.storage_path}: a process still records into this store; stop it first, because Headroom's "
            "document would lack what it records from now on"
        )
    try:
        data = encode_for_headroom(snapshot.ledger, dated.rows, watched.kept(), watched.included())
        write_new_file(file, data)
    except FileExistsError:
        raise CommandError(f"{file}: exists already and is left as it is; move it away first") from None
    except OSError as error:
        raise CommandError(f"{file}: cannot be written: {error.strerror}") from None
    lifetime = snapshot.lifetime
    print(f"{file}: holds {lifetime.tokens_saved} tokens saved in {lifetime.requests} records, for Headroom")


def _print_table(by: Sequence[str], rows: Sequence[dict[str, Any]]) -> None:
    console = stdout_console()
    shown = table(by[0])
    for name in by[1:]:
        shown.add_column(name, overflow="fold")
    for heading in _FIGURES:
        shown.add_column(heading, justify="right", no_wrap=True)
    for row in rows:
        names = [row[name] or ("before" if name == "day" else views.UNKNOWN_FIGURE) for name in by]
        shown.add_row(*names, *(figure(row) for figure in _FIGURES.values()))
    console.print(shown)
