"""``savings-exporter doctor``."""

from __future__ import annotations

import sys

import click
from rich.console import Console
from rich.markup import escape
from rich.text import Text

from savings_exporter.cli import standard_streams
from savings_exporter.cli.options import json_option, option, store_path
from savings_exporter.cli.output import print_json
from savings_exporter.cli.tables import stdout_console, table
from savings_exporter.doctor import Report, directory_of, examine, readable
from savings_exporter.escaping import plain
from savings_exporter.service import logs


@click.command()
@option(
    "--store",
    metavar="PATH",
    type=click.Path(),
    variable="STORE",
    callback=store_path,
    help="A store's document, or a directory. Default: the default store.",
)
@json_option
def doctor(
    store: str | None,
    as_json: bool,
) -> None:
    """Measure a disk, and check that it suits a store.

    This takes some seconds.
    """
    logs.be_quiet()
    directory = directory_of(store)
    with Console(file=standard_streams.styled(sys.stderr)).status(f"measuring {escape(plain(directory))}"):
        report = examine(directory)
    if as_json:
        print_json(report)
    else:
        _print_report(report)


def _print_report(report: Report) -> None:
    console = stdout_console()
    found = report.filesystem
    where = f", mounted on {found.mount_point} from {found.device}" if found.mount_point else ""
    network = ", a network filesystem" if found.is_network else ""
    console.print(Text(f"{report.directory}: {found.type}{network}{where}"), soft_wrap=True)
    steps = table("step", "median", "worst", "runs")
    for name, timing in report.steps.items():
        if timing is None:
            steps.add_row(name, "not supported")
        else:
            median, worst = readable(timing.median_seconds), readable(timing.worst_seconds)
            steps.add_row(name, median, worst, f"{timing.runs:,}")
    commits = table("threads", "savings a second")
    for threads, rate in report.commits_per_second.items():
        commits.add_row(str(threads), f"{rate:,.0f}")
    for part in (steps, commits):
        console.print()
        console.print(part)
    console.print()
    console.print(Text(report.verdict))
    for warning in report.warnings:
        console.print(Text(f"Warning: {warning}", style="yellow"))
