"""Tables for a terminal or a file."""

from __future__ import annotations

import sys

from rich.console import Console
from rich.table import Table


def stdout_console() -> Console:
    """Standard output."""
    # Not a terminal: wide enough for names, whatever the file or pipe is for.
    return Console(highlight=False, width=None if sys.stdout.isatty() else 120)


def table(first: str, *headings: str) -> Table:
    """A table of names, in the column ``first``, and figures."""
    made = Table(box=None, pad_edge=False, header_style="bold")
    made.add_column(first, overflow="fold", min_width=16)
    for heading in headings:
        made.add_column(heading, justify="right", no_wrap=True)
    return made
