"""``savings-exporter import``."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import click
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

from savings_exporter.cli import standard_streams
from savings_exporter.cli.errors import CommandError, WrongUsageError
from savings_exporter.cli.options import NAMED_PATH, prices_option, store_option, sync_method_option
from savings_exporter.cli.sources import most_rtk_tokens_option, print_summaries
from savings_exporter.escaping import plain
from savings_exporter.model.cursors import Cursors
from savings_exporter.prices import Prices, load_prices
from savings_exporter.service import logs
from savings_exporter.sources.building import kept_out_of, let_in
from savings_exporter.sources.discovery import source_of
from savings_exporter.sources.fields import parse_mapping
from savings_exporter.sources.importing import Importing, Summary, preview
from savings_exporter.sources.source import Note, Source, SourceError
from savings_exporter.sources.table import Table
from savings_exporter.storage.repair import is_begun
from savings_exporter.storage.segment import SyncMethod
from savings_exporter.tracker import SavingsTracker, default_path
from savings_exporter.tracking.importing import Importer
from savings_exporter.watched import WatchedFile


@click.command(name="import")
@click.argument("paths", metavar="PATH...", type=NAMED_PATH, nargs=-1, required=True)
@store_option
@sync_method_option
@most_rtk_tokens_option
@click.option(
    "--map",
    "columns",
    metavar="FIELD=COLUMN",
    multiple=True,
    help="The column of a field, for CSV and JSON lines. Can be repeated.",
)
@click.option("--set", "constants", metavar="FIELD=VALUE", multiple=True, help="A field that is the same in all lines.")
@click.option("--source", metavar="NAME", help="The layer that saved, for CSV and JSON lines.")
@prices_option
@click.option("--dry-run", is_flag=True, help="Say what an import would add, and change nothing.")
@click.option(
    "--let-in",
    "let_in_names",
    metavar="NAME",
    multiple=True,
    help="Count records that were kept out: a reason, such as jump, or the name of one record. Can be repeated.",
)
def import_(
    paths: Sequence[str],
    store: str | None,
    sync_method: SyncMethod,
    most_rtk_tokens: int,
    columns: Sequence[str],
    constants: Sequence[str],
    source: str | None,
    prices: str | None,
    dry_run: bool,
    let_in_names: Sequence[str],
) -> None:
    """Import what other programs have saved.

    PATH is Headroom's proxy_savings.json or savings_events.jsonl, RTK's history.db, or with --map any CSV file or file
    of JSON lines. What was imported before is not imported again.
    """
    logs.be_quiet()
    if columns or constants:
        sources = _tables(paths, columns, constants, source or "", load_prices(prices))
    else:
        sources = [_source(path, most_rtk_tokens) for path in paths]
    if dry_run:
        cursors = cursors_of(store)
        print_summaries([(each, _previewed(each, cursors)) for each in sources], "would add")
        return
    with SavingsTracker(store, sync_method=sync_method) as tracker:
        with tracker.importing() as importer:
            done = [(each, _imported(importer, each, let_in_names)) for each in sources]
        health = tracker.health()
    if not health.healthy:
        raise CommandError(f"{health.reason}. Import again when the disk works: nothing is counted twice")
    print_summaries(done, "added")


def cursors_of(store: str | None) -> Cursors:
    """The cursors of a store that is only read; none when it does not exist yet."""
    path = store if store is not None else default_path()
    return WatchedFile(path).snapshot().cursors if is_begun(path) else {}


def _tables(
    paths: Sequence[str], columns: Sequence[str], constants: Sequence[str], source: str, prices: Prices | None
) -> list[Source]:
    try:
        fields = parse_mapping(columns, constants)
    except ValueError as error:
        raise WrongUsageError(str(error)) from None
    return [Table(os.path.expanduser(path), fields, source, prices) for path in paths]


def _source(path: str, most_rtk_tokens: int) -> Source:
    try:
        return source_of(os.path.expanduser(path), most_rtk_tokens=most_rtk_tokens)
    except SourceError as error:
        raise CommandError(str(error)) from None


def _previewed(source: Source, cursors: Cursors) -> Summary:
    try:
        with _progress(source) as note:
            return preview(source, cursors, note)
    except SourceError as error:
        raise CommandError(str(error)) from None


def _imported(importer: Importer, source: Source, names: Sequence[str]) -> Summary:
    summary, importing = Summary(), Importing(importer, source)
    try:
        with _progress(source) as note:
            for step in importing.steps(is_complete=True):
                summary.add(step)
                note(step.progress)
    except SourceError as error:
        raise CommandError(str(error)) from None
    if names:
        chosen = let_in(importing.state, names) if importing.state is not None else None
        if chosen is None:
            known = ", ".join(kept.id for kept in kept_out_of(importing.state)) or "none"
            raise CommandError(f"{source.path}: no record named {', '.join(names)} is kept out; known are: {known}")
        importing.add(chosen)
        summary.add(chosen)
    return summary


@contextmanager
def _progress(source: Source) -> Iterator[Note]:
    """A progress bar, if standard error is a terminal."""
    console = Console(file=standard_streams.styled(sys.stderr))
    columns = (TextColumn("{task.description}"), BarColumn(), TextColumn("{task.percentage:>3.0f} %"))
    is_hidden = not console.is_terminal
    with Progress(*columns, TimeRemainingColumn(), console=console, transient=True, disable=is_hidden) as bar:
        task = bar.add_task(plain(os.path.basename(source.path)), total=None)
        yield lambda progress: bar.update(task, completed=progress.done, total=progress.total)
