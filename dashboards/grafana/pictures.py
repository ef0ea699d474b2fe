"""Draw a picture of a dashboard's layout for the documentation, from the positions of its panels."""

from __future__ import annotations

from collections.abc import Mapping
from html import escape
from textwrap import wrap
from typing import Any

_COLUMN, _LINE, _GAP = 40, 15, 4
_COLUMNS = 24
_FONT = "system-ui, sans-serif"
# The number of letters of a title that fit into one column, at the font's size.
_LETTERS_PER_COLUMN = 5.2


def picture(dashboard: Mapping[str, Any]) -> str:
    """Return the layout as SVG: a box for each panel with its title and type, and a line for each row."""
    panels = dashboard["panels"]
    height = max(panel["gridPos"]["y"] + panel["gridPos"]["h"] for panel in panels) * _LINE + 2 * _GAP
    width = _COLUMNS * _COLUMN + 2 * _GAP
    return "\n".join(
        (
            f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" font-family="{_FONT}" role="img">',
            f"<title>Layout of the dashboard {escape(dashboard['title'])}</title>",
            f'<rect width="{width}" height="{height}" fill="#f4f5f5"/>',
            *(_row(panel) if panel["type"] == "row" else _box(panel) for panel in panels),
            "</svg>\n",
        )
    )


def _row(row: Mapping[str, Any]) -> str:
    _, top, _, height = _pixels(row)
    return _text(row["title"], _GAP * 2, top + height, 'font-size="13" font-weight="bold" fill="#24292e"')


def _box(panel: Mapping[str, Any]) -> str:
    left, top, width, height = _pixels(panel)
    lines = wrap(panel["title"], int(panel["gridPos"]["w"] * _LETTERS_PER_COLUMN))
    return "\n".join(
        (
            f'<rect x="{left}" y="{top}" width="{width}" height="{height}" rx="3" fill="#fff" stroke="#c7d0d9"/>',
            *(
                _text(line, left + 8, top + 20 + 17 * number, 'font-size="13" fill="#24292e"')
                for number, line in enumerate(lines)
            ),
            _text(panel["type"], left + 8, top + height - 9, 'font-size="11" fill="#6e7b8b"'),
        )
    )


def _pixels(panel: Mapping[str, Any]) -> tuple[int, int, int, int]:
    place = panel["gridPos"]
    return (
        *(place["x"] * _COLUMN + _GAP * 3 // 2, place["y"] * _LINE + _GAP * 3 // 2),
        *(place["w"] * _COLUMN - _GAP, place["h"] * _LINE - _GAP),
    )


def _text(text: str, x: int, y: int, style: str) -> str:
    return f'<text x="{x}" y="{y}" {style}>{escape(text)}</text>'
