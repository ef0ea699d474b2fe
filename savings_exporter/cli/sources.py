"""What commands that read sources share: an option, and what they print."""

from __future__ import annotations

import sys
from collections.abc import Sequence

import click

from savings_exporter.cli.options import option
from savings_exporter.escaping import plain
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


def print_summaries(summaries: Sequence[tuple[Source, Summary]], verb: str) -> None:
    """Print a line for each source, and to standard error what was kept out."""
    for source, summary in summaries:
        print(plain(f"{source.path} ({source.kind}): {_described(summary, verb)}"))
    for source, summary in summaries:
        for problem in summary.problems:
            print(plain(f"{source.path}: {problem}"), file=sys.stderr)
        left = summary.rejected.total() - len(summary.problems)
        if left > 0:
            print(plain(f"{source.path}: {left:,} more records are kept out"), file=sys.stderr)


def _described(summary: Summary, verb: str) -> str:
    totals, kept_out = Totals().plus(summary.numbers, None), summary.rejected.total()
    parts = []
    if totals.requests:
        parts.append(f"{verb} {views.tokens(totals.tokens_saved)} saved in {views.requests(totals)}")
        if totals.tool_tokens_saved:
            parts.append(f"{totals.tool_tokens_saved:,} more by deferred tool schemas")
        parts.append(f"US dollars: {views.dollars_saved(totals.savings_usd, totals.unpriced_requests)}")
        days = {summary.first, summary.last} - {""}
        parts.append(" to ".join(sorted(days)) if summary.first else "without days")
    if kept_out:
        parts.append(f"{kept_out:,} kept out")
    return ", ".join(parts) or "nothing new"
