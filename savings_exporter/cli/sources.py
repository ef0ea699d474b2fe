"""What commands that read sources share: an option, and what they print."""

from __future__ import annotations

import sys
from collections.abc import Sequence

import click
from rich.text import Text

from savings_exporter.cli.options import option
from savings_exporter.cli.tables import stdout_console, table
from savings_exporter.cli.text import plain
from savings_exporter.model.totals import Totals
from savings_exporter.service import views
from savings_exporter.sources.importing import Summary
from savings_exporter.sources.rtk import MOST_INPUT_TOKENS
from savings_exporter.sources.source import Source

most_rtk_tokens_option = option(
    "--rtk.most-input-tokens",
    "most_rtk_tokens",
    metavar="N",
    type=click.IntRange(min=0),
    default=MOST_INPUT_TOKENS,
    variable="RTK_MOST_INPUT_TOKENS",
    help="Commands of RTK with more input tokens are kept out.",
)


def print_summaries(summaries: Sequence[tuple[Source, Summary]], what: str) -> None:
    """Print what was read from each source as a table, and to standard error what was kept out."""
    console = stdout_console()
    shown = table("source")
    shown.add_column("file", overflow="fold")
    for heading in (f"tokens {what}", "requests", "US dollars", "tool tokens"):
        shown.add_column(heading, justify="right", no_wrap=True)
    shown.add_column("days", no_wrap=True)
    shown.add_column("kept out", justify="right", no_wrap=True)
    for source, summary in summaries:
        totals = Totals().plus(summary.numbers, None)
        days = f"{summary.first or 'before'} to {summary.last}" if summary.last else views.UNKNOWN_FIGURE
        cells = (
            plain(source.path),
            f"{totals.tokens_saved:,}",
            f"{totals.requests:,}",
            views.dollars(totals.savings_usd),
            f"{totals.tool_tokens_saved:,}",
            days,
            f"{summary.rejected.total():,}",
        )
        shown.add_row(Text(source.kind), *map(Text, cells))
    console.print(shown)
    for source, summary in summaries:
        for problem in summary.problems:
            print(plain(f"{source.path}: {problem}"), file=sys.stderr)
        left = summary.rejected.total() - len(summary.problems)
        if left > 0:
            print(plain(f"{source.path}: {left:,} more records are kept out"), file=sys.stderr)
