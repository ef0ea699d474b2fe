"""Tables for a terminal or a file. What they print is plain text, whatever names and paths hold."""

from __future__ import annotations

import sys
from collections.abc import Iterable
from typing import Any

from rich.console import Console, ConsoleOptions, RenderableType
from rich.segment import Segment
from rich.table import Table
from rich.text import Text

from savings_exporter.cli import standard_streams
from savings_exporter.escaping import plain

# Wider than any line: in a file or a pipe, nothing is cut, and no line is broken.
_UNLIMITED = 100_000


class _PlainConsole(Console):
    def render(self, renderable: RenderableType, options: ConsoleOptions | None = None) -> Iterable[Segment]:
        """The segments of a text or a table; the library's own control sequences are segments of their own."""
        for text, style, control in super().render(renderable, options):
            yield Segment(text if control else plain(text, keep="\n"), style, control)


class _PlainTable(Table):
    def add_row(self, *cells: RenderableType | None, **named: Any) -> None:
        """Add a row. Names are made plain before the columns are measured."""
        super().add_row(*(Text(plain(str(cell))) for cell in cells), **named)


def stdout_console() -> Console:
    """Standard output."""
    width = None if sys.stdout.isatty() else _UNLIMITED
    return _PlainConsole(file=standard_streams.styled(sys.stdout), highlight=False, width=width)


def table(first: str, *headings: str) -> Table:
    """A table of names, in the column ``first``, and figures."""
    made = _PlainTable(box=None, pad_edge=False, header_style="bold")
    made.add_column(first, overflow="fold", min_width=16)
    for heading in headings:
        made.add_column(heading, justify="right", no_wrap=True)
    return made
