"""``savings-exporter drill``."""

from __future__ import annotations

import math

import click

from savings_exporter.cli.errors import CommandError, WrongUsageError
from savings_exporter.cli.options import store_option
from savings_exporter.service import logs
from savings_exporter.service.drill import KINDS, LONGEST_SECONDS, DrillError, ask
from savings_exporter.tracker import default_path


@click.command()
@click.argument("name", metavar="KIND", type=click.Choice(list(KINDS)))
@click.option(
    "--seconds",
    metavar="SECONDS",
    type=click.FloatRange(1, LONGEST_SECONDS),
    help="For how long: longer than Prometheus's scrape interval. Default: until an alert should fire.",
)
@store_option
def drill(
    name: str,
    seconds: float | None,
    store: str | None,
) -> None:
    """Simulate failures in a running service, to test alerts.

    KIND is dir-fsync, file-fsync or journal-fsync, which fail, or save-latency: saves are slow. The store is not
    touched. The service must have been started with --enable-drill.
    """
    logs.be_quiet()
    kind, path = KINDS[name], store if store is not None else default_path()
    lasts = kind.usual_seconds if seconds is None else seconds
    if not math.isfinite(lasts):
        raise WrongUsageError(f"--seconds must be a number of seconds, not {lasts}")
    try:
        ask(path, name, lasts)
    except DrillError as error:
        raise CommandError(str(error)) from None
    print(f"{path}: drill {name} has begun and lasts {lasts:g} s; {kind.alert} should fire")
