"""``savings-exporter discover``."""

from __future__ import annotations

import os
import signal
import sys
import threading

import click

from savings_exporter.cli.errors import CommandError
from savings_exporter.cli.import_ import cursors_of
from savings_exporter.cli.options import (
    log_format_option,
    log_level_option,
    store_option,
    sync_method_option,
)
from savings_exporter.cli.output import announce
from savings_exporter.cli.sources import most_rtk_tokens_option, print_summaries
from savings_exporter.escaping import plain
from savings_exporter.service import logs
from savings_exporter.sources.discovery import usual_sources
from savings_exporter.sources.following import Following
from savings_exporter.sources.importing import preview
from savings_exporter.sources.source import SourceError
from savings_exporter.storage.segment import SyncMethod
from savings_exporter.tracker import SavingsTracker


@click.command()
@store_option
@sync_method_option
@most_rtk_tokens_option
@click.option("--watch", is_flag=True, help="Import what is found, and follow it until Ctrl-C.")
@log_level_option
@log_format_option
def discover(
    store: str | None, sync_method: SyncMethod, most_rtk_tokens: int, watch: bool, log_level: str, log_format: str
) -> None:
    """Look for other programs' savings in their usual places.

    It looks for Headroom and RTK, and says what an import would add.
    """
    if watch:
        logs.configure(log_level, log_format)
        _watch(store, sync_method, most_rtk_tokens)
        return
    logs.be_quiet()
    sources = usual_sources(os.environ, most_rtk_tokens=most_rtk_tokens)
    if not sources:
        raise CommandError("no savings of another program are in the usual places; import PATH takes a file elsewhere")
    cursors, done = cursors_of(store), []
    for source in sources:
        try:
            done.append((source, preview(source, cursors)))
        except SourceError as error:
            print(plain(str(error)), file=sys.stderr)
    print_summaries(done, "would add")


def _watch(store: str | None, sync_method: SyncMethod, most_rtk_tokens: int) -> None:
    ended = threading.Event()
    for name in ("SIGINT", "SIGTERM", "SIGHUP"):
        number = getattr(signal, name, None)
        if number is not None and signal.getsignal(number) != signal.SIG_IGN:
            signal.signal(number, lambda _number, _frame: ended.set())
    with SavingsTracker(store, sync_method=sync_method) as tracker:
        with Following(tracker, lambda: usual_sources(os.environ, most_rtk_tokens=most_rtk_tokens)):
            announce(f"savings-exporter follows other programs' savings for {tracker.storage_path}; Ctrl-C ends it")
            ended.wait()
        is_saved = tracker.close()
    if not is_saved:
        raise CommandError(f"stopped, but {tracker.health().reason}")
