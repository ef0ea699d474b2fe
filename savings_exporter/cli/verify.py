"""``savings-exporter verify``."""

from __future__ import annotations

import click

from savings_exporter.cli.errors import CommandError, WrongUsageError
from savings_exporter.cli.options import store_option
from savings_exporter.cli.output import saved
from savings_exporter.service import logs
from savings_exporter.sources.merging import difference
from savings_exporter.storage.observers import Observers
from savings_exporter.storage.repair import inspect, repair
from savings_exporter.tracker import default_path


@click.command()
@store_option
@click.option(
    "--repair",
    "repair_store",
    is_flag=True,
    help="Save what is whole, keep damaged files aside, and report what is lost. Exits with 0 when the store can be "
    "opened again, with 1 when it left out records that another program's document holds.",
)
@click.option(
    "--merge",
    is_flag=True,
    help="With --repair: when another program rewrote the document, add what that program recorded.",
)
def verify(store: str | None, repair_store: bool, merge: bool) -> None:
    """Check a store. Exits with 1 when something has to be done."""
    logs.be_quiet()
    if merge and not repair_store:
        raise WrongUsageError("--merge changes the store; give it with --repair")
    path = store if store is not None else default_path()
    if repair_store:
        repaired = repair(path, Observers(), difference=difference if merge else None)
        if repaired.leaves_out:
            raise CommandError(repaired.text)
        print(repaired.text)
        return
    found = inspect(path)
    if found.ledger is not None:
        lifetime = found.ledger.lifetime
        held = f"{lifetime.tokens_saved} tokens saved in {lifetime.requests} records"
        print(f"{path}: {'the store is empty' if lifetime.is_empty else held}{saved(found.saved_at)}")
    for note in found.notes:
        print(note)
    if found.problems:
        raise CommandError("; ".join(found.problems))
