"""``savings-exporter names``."""

from __future__ import annotations

import shlex
import sys
from collections.abc import Callable

import click
from rich.text import Text

from savings_exporter.cli.errors import CommandError
from savings_exporter.cli.options import json_option, store_option
from savings_exporter.cli.output import print_json
from savings_exporter.cli.tables import stdout_console, table
from savings_exporter.escaping import plain
from savings_exporter.model.crowds import KINDS, MOST_CANDIDATES, Crowd
from savings_exporter.model.snapshot import Snapshot
from savings_exporter.model.totals import Totals
from savings_exporter.service import logs, views
from savings_exporter.storage.repair import is_begun
from savings_exporter.tracker import SavingsTracker, default_path
from savings_exporter.watched import WatchedFile

_COUNTERS = {
    "model": ("savings_tokens_saved_total", "savings_requests_total"),
    "project": ("savings_project_tokens_saved_total", "savings_project_requests_total"),
    "agent": ("savings_agent_tokens_saved_total", "savings_agent_requests_total"),
    "source": ("savings_source_tokens_saved_total", "savings_source_requests_total"),
}

_kind_argument = click.argument("kind", type=click.Choice(KINDS))
_name_argument = click.argument("name", metavar="NAME")


@click.group(invoke_without_command=True)
@store_option
@json_option
@click.pass_context
def names(context: click.Context, store: str | None, as_json: bool) -> None:
    """List the names in the totals, and those in other.

    The names are those of models, projects, agents and sources. Each kind has a limited number of names.
    Further ones count as other.
    """
    logs.be_quiet()
    context.obj = store
    if context.invoked_subcommand is None:
        snapshot = WatchedFile(_begun(store)).snapshot()
        if as_json:
            print_json(views.names_as_json(snapshot))
        else:
            _print_tables(snapshot)


@names.command("let-in")
@_kind_argument
@_name_argument
@store_option
@click.pass_obj
def let_in(given: str | None, kind: str, name: str, store: str | None) -> None:
    """Give a name a place of its own, even if all places are used. What it has saved so far stays in other."""
    _changed(store or given, kind, name, lambda tracker: tracker.let_in(kind, name))
    print(plain(f"{kind} {name}: has a place from now on; what it has saved so far stays in other"))


@names.command()
@_kind_argument
@_name_argument
@store_option
@click.pass_obj
def fold(given: str | None, kind: str, name: str, store: str | None) -> None:
    """Move the totals of a name to other.

    This holds in all processes that use the store. The counters of the name disappear.
    """
    moved = _changed(store or given, kind, name, lambda tracker: tracker.fold(kind, name))
    assert moved is not None
    counters = " and ".join(f"{counter}{{{kind}={name!r}}}" for counter in _COUNTERS[kind])
    print(
        plain(
            f"{kind} {name}: its {views.tokens(moved.tokens_saved)} and {views.requests(moved)} are in other from now "
            f"on. {counters} and the other metrics of this name disappear, and those of other grow by the same amounts"
        )
    )


def _changed(
    store: str | None, kind: str, name: str, change: Callable[[SavingsTracker], Totals | None]
) -> Totals | None:
    path = _begun(store)
    with SavingsTracker(path) as tracker:
        try:
            return change(tracker)
        except ValueError as error:
            listing = f"savings-exporter names --store {shlex.quote(path)}"
            raise CommandError(f"the {kind} {name} {error}; {listing} lists the names") from None


def _begun(store: str | None) -> str:
    """The path of a store that holds something."""
    path = store if store is not None else default_path()
    if not is_begun(path):
        raise CommandError(f"{path}: there are no savings yet")
    return path


def _print_tables(snapshot: Snapshot) -> None:
    console = stdout_console()
    for kind, named in views.breakdowns(snapshot):
        crowd = snapshot.ledger.crowds.get(kind, Crowd())
        shown = table(kind, "tokens saved", "requests")
        shown.add_column("")
        for name, totals in named:
            note = "let in" if name in crowd.admitted else ""
            shown.add_row(name, f"{totals.tokens_saved:,}", f"{totals.requests:,}", note)
        for name in sorted(crowd.admitted - dict(named).keys()):
            shown.add_row(name, "0", "0", "let in")
        for name in sorted(crowd.folded):
            shown.add_row(name, views.UNKNOWN_FIGURE, views.UNKNOWN_FIGURE, "folded")
        if shown.row_count:
            console.print(shown)
            for line in views.outsiders(snapshot, kind, MOST_CANDIDATES) if kind in KINDS else ():
                console.print(Text(line))
            console.print()
    sys.stdout.flush()
