"""A chart of what was saved on each day, as an SVG, stacked by name."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from html import escape
from typing import NamedTuple

MOST_SERIES = 5
"""How many names have a color of their own. The others are one more."""

OTHERS = "all others"

_WIDTH, _HEIGHT = 720, 220
_LEFT, _BOTTOM, _TOP = 64, 24, 12
_GAP = 0.2


class Series(NamedTuple):
    """The tokens of one name, for each day."""

    name: str
    tokens: Sequence[int]


def stacked(by_name: Mapping[str, Sequence[int]]) -> list[Series]:
    """The names that saved most, and all others as one."""
    ranked = sorted(((name, tokens) for name, tokens in by_name.items() if any(tokens)), key=lambda item: -sum(item[1]))
    series = [Series(name, tokens) for name, tokens in ranked[:MOST_SERIES]]
    if rest := [tokens for _, tokens in ranked[MOST_SERIES:]]:
        series.append(Series(OTHERS, [sum(of_day) for of_day in zip(*rest, strict=True)]))
    return series


def svg(days: Sequence[str], series: Sequence[Series], title: str) -> str:
    """The chart. Its table, which says the same, is for those who do not see it."""
    totals = [sum(of_day) for of_day in zip(*(each.tokens for each in series), strict=True)] or [0] * len(days)
    top = _round_up(max(totals, default=0))
    width = (_WIDTH - _LEFT) / max(len(days), 1)
    height = _HEIGHT - _BOTTOM - _TOP
    parts = []
    for share in (0.0, 0.5, 1.0):
        y = _TOP + height * (1 - share)
        parts.append(
            f'<line class="grid" x1="{_LEFT}" x2="{_WIDTH}" y1="{y:.1f}" y2="{y:.1f}"/>'
            f'<text x="{_LEFT - 8}" y="{y + 4:.1f}" text-anchor="end">{short(top * share)}</text>'
        )
    for place, day in enumerate(days):
        x, y = _LEFT + place * width, float(_TOP + height)
        bars = []
        for color, each in enumerate(series):
            size = height * each.tokens[place] / top
            y -= size
            if size:
                bars.append(
                    f'<rect class="c{color}" x="{x + width * _GAP / 2:.1f}" y="{y:.1f}" '
                    f'width="{width * (1 - _GAP):.1f}" height="{size:.1f}"/>'
                )
        parts.append(f"<g><title>{escape(day)}: {totals[place]:,} tokens</title>{''.join(bars)}</g>")
        if place in (0, len(days) // 2, len(days) - 1):
            anchor = ("start", "middle", "end")[(place > 0) + (place == len(days) - 1)]
            center = x + width * (0, 0.5, 1)[(place > 0) + (place == len(days) - 1)]
            parts.append(f'<text x="{center:.1f}" y="{_HEIGHT - 6}" text-anchor="{anchor}">{escape(day)}</text>')
    return (
        f'<svg class="chart" viewBox="0 0 {_WIDTH} {_HEIGHT}" role="img" aria-label="{escape(title)}">'
        f"{''.join(parts)}</svg>"
    )


def short(number: float) -> str:
    """A number with few digits, such as 1.5 M."""
    for unit, name in ((1e12, " T"), (1e9, " G"), (1e6, " M"), (1e3, " k")):
        if number >= unit:
            return f"{number / unit:.3g}{name}" if number < 1e15 else f"{number / unit:,.0f}{name}"
    return f"{number:.3g}"


def _round_up(number: int) -> float:
    """The next number of one digit, 1 or an even one, and zeros. Its half is as short."""
    number = max(number, 2)  # its half is labelled, and there are no half tokens
    power = 10.0 ** (len(str(number)) - 1)
    return next(power * step for step in (1, 2, 4, 6, 8, 10) if power * step >= number)
