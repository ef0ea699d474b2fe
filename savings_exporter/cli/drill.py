"""``savings-exporter drill``."""

from __future__ import annotations

from typing import Annotated, Literal

import typer

from savings_exporter.cli.errors import CommandError
from savings_exporter.cli.options import Store
from savings_exporter.service import settings
from savings_exporter.service.drill import KINDS, LONGEST_SECONDS, DrillError, ask
from savings_exporter.tracker import default_path


def drill(
    name: Annotated[
        Literal["dir-fsync", "file-fsync", "journal-fsync", "save-latency"],
        typer.Argument(metavar="|".join(KINDS), help="What is simulated to fail, or with save-latency to be slow."),
    ],
    seconds: Annotated[
        float | None,
        typer.Option(
            "--seconds",
            min=1,
            max=LONGEST_SECONDS,
            help="For how long: longer than Prometheus's scrape interval. Default: until an alert should fire.",
        ),
    ] = None,
    store: Store = None,
) -> None:
    """Simulate failures in a running service, to test alerts. The store is not touched."""
    settings.be_quiet()
    kind, path = KINDS[name], store if store is not None else default_path()
    lasts = kind.usual_seconds if seconds is None else seconds
    try:
        ask(path, name, lasts)
    except DrillError as error:
        raise CommandError(str(error)) from None
    print(f"{path}: drill {name} has begun and lasts {lasts:g} s; {kind.alert} should fire")
