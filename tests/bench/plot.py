"""Plots as SVG, by hand: lines with ranges over a numeric or a named axis, in panels beside each other. Pure.

A plot of ten points needs no plotting library in the lock file; text in the picture stays text, and a new measurement is a
small change in a diff. Drawn on white, so that it is readable on any background.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from xml.sax.saxutils import escape

COLOURS = ("#1b6ca8", "#d1495b", "#7bb6e0", "#2e933c", "#8d6a9f", "#e08e00", "#5c5c5c")  # One for each series, by its place.
WIDTH, HEIGHT = 420, 300
LEFT, RIGHT, TOP, BOTTOM = 58, 22, 34, 56
LEGEND_LINE = 16
TICKS = 5


@dataclass(frozen=True, slots=True)
class Point:
    """``low`` to ``high``: its range; nothing is drawn where it is the value itself."""

    x: float
    y: float
    low: float = math.nan
    high: float = math.nan


@dataclass(frozen=True, slots=True)
class Series:
    """``colour``: its number, where it is to be the same in several panels; else that of its place."""

    name: str
    points: Sequence[Point]
    line: bool = True
    colour: int = -1


@dataclass(frozen=True, slots=True)
class Panel:
    """``names``: of x = 0, 1, 2, … where the axis has words. ``logarithmic``: for x that doubles from point to point."""

    title: str
    x_label: str
    y_label: str
    series: Sequence[Series]
    names: Sequence[str] = ()
    logarithmic: bool = False
    from_zero: bool = True
    most: float = math.nan  # Of y, where the axis has a natural end.
    marks: Sequence[tuple[float, str]] = field(default=())  # A line at a value of y: a target, a limit.


def picture(panels: Sequence[Panel], columns: int = 2) -> str:
    shown = [panel for panel in panels if any(one.points for one in panel.series)]
    columns = max(1, min(columns, len(shown)))
    heights = [HEIGHT + LEGEND_LINE * len(panel.series) for panel in shown]
    rows = [max(heights[n : n + columns]) for n in range(0, len(shown), columns)]
    body = []
    for number, panel in enumerate(shown):
        x, y = WIDTH * (number % columns), sum(rows[: number // columns])
        body.append(f'<g transform="translate({x},{y})">\n{_panel(panel)}</g>\n')
    width, height = WIDTH * columns, sum(rows)
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" width="{width}" height="{height}" '
        f'font-family="sans-serif" font-size="12">\n'
        f'<rect width="{width}" height="{height}" fill="white"/>\n{"".join(body)}</svg>\n'
    )


def ticks(least: float, most: float) -> list[float]:
    """A few round values that cover the range."""
    span = most - least
    if span <= 0:
        return [least, least + 1]
    rough = span / TICKS
    magnitude: float = 10.0 ** math.floor(math.log10(rough))
    step = next(m * magnitude for m in (1, 2, 2.5, 5, 10) if m * magnitude >= rough * 0.999)
    first = math.floor(least / step + 1e-9)
    last = math.ceil(most / step - 1e-9)
    return [n * step for n in range(first, last + 1)]


def _panel(panel: Panel) -> str:
    points = [point for one in panel.series for point in one.points]
    lows = [_known(p.low, p.y) for p in points] + [value for value, _ in panel.marks]
    highs = [_known(p.high, p.y) for p in points] + [value for value, _ in panel.marks]
    top = _known(panel.most, max(highs))
    levels = ticks(0.0 if panel.from_zero else min(lows), top)
    if not math.isnan(panel.most):
        levels = [level for level in levels if level <= panel.most]
    y_from, y_to = levels[0], max(levels[-1], top if not math.isnan(panel.most) else levels[-1])
    xs = sorted({point.x for point in points})
    x_from, x_to = (-0.5, len(panel.names) - 0.5) if panel.names else (xs[0], xs[-1])
    if not panel.names and not panel.logarithmic:
        x_from = min(0.0, x_from)

    def across(x: float) -> float:
        at, least, most = (math.log2(v) if panel.logarithmic else v for v in (x, x_from, x_to))
        share = 0.5 if most == least else (at - least) / (most - least)
        return LEFT + share * (WIDTH - LEFT - RIGHT)

    def up(y: float) -> float:
        return HEIGHT - BOTTOM - (y - y_from) / (y_to - y_from) * (HEIGHT - TOP - BOTTOM)

    out = [_text(LEFT, 18, panel.title, weight="bold")]
    for level in levels:
        out.append(_line(LEFT, up(level), WIDTH - RIGHT, up(level), "#dddddd"))
        out.append(_text(LEFT - 6, up(level) + 4, f"{level:g}", anchor="end"))
    shown_x = (
        list(range(len(panel.names)))
        if panel.names
        else xs
        if panel.logarithmic
        else [t for t in ticks(x_from, x_to) if t <= x_to]
    )
    for x in shown_x:
        name = panel.names[int(x)] if panel.names else f"{x:g}"
        out.append(_line(across(x), HEIGHT - BOTTOM, across(x), HEIGHT - BOTTOM + 4, "#444444"))
        out.append(_text(across(x), HEIGHT - BOTTOM + 18, name, anchor="middle"))
    out.append(_line(LEFT, HEIGHT - BOTTOM, WIDTH - RIGHT, HEIGHT - BOTTOM, "#444444"))
    out.append(_line(LEFT, TOP, LEFT, HEIGHT - BOTTOM, "#444444"))
    out.append(_text((LEFT + WIDTH - RIGHT) / 2, HEIGHT - 20, panel.x_label, anchor="middle"))
    middle = (TOP + HEIGHT - BOTTOM) / 2
    out.append(f'<g transform="translate(13,{middle:g}) rotate(-90)">{_text(0, 0, panel.y_label, anchor="middle")}</g>')
    for value, what in panel.marks:
        out.append(_line(LEFT, up(value), WIDTH - RIGHT, up(value), "#444444", dashed=True))
        out.append(_text(WIDTH - RIGHT - 4, up(value) - 4, what, anchor="end"))
    for number, one in enumerate(panel.series):
        colour = COLOURS[(one.colour if one.colour >= 0 else number) % len(COLOURS)]
        # Named places have room: beside each other, or ranges would hide each other.
        shift = (number - (len(panel.series) - 1) / 2) * 9 if panel.names else 0.0
        places = [(across(p.x) + shift, p) for p in one.points]
        if one.line and len(places) > 1:
            path = " ".join(f"{x:.1f},{up(p.y):.1f}" for x, p in places)
            out.append(f'<polyline points="{path}" fill="none" stroke="{colour}" stroke-width="1.5"/>')
        for x, p in places:
            low, high = _known(p.low, p.y), _known(p.high, p.y)
            if high > low:
                out.append(_line(x, up(low), x, up(high), colour))
            out.append(f'<circle cx="{x:.1f}" cy="{up(p.y):.1f}" r="3.5" fill="{colour}"/>')
        y = HEIGHT + LEGEND_LINE * number
        out.append(f'<circle cx="{LEFT + 5}" cy="{y - 4}" r="4" fill="{colour}"/>')
        out.append(_text(LEFT + 16, y, one.name))
    return "\n".join(out) + "\n"


def _known(value: float, otherwise: float) -> float:
    return otherwise if math.isnan(value) else value


def _line(x: float, y: float, x2: float, y2: float, colour: str, *, dashed: bool = False) -> str:
    dash = ' stroke-dasharray="5,4"' if dashed else ""
    return f'<line x1="{x:.1f}" y1="{y:.1f}" x2="{x2:.1f}" y2="{y2:.1f}" stroke="{colour}"{dash}/>'


def _text(x: float, y: float, text: str, *, anchor: str = "start", weight: str = "normal") -> str:
    return f'<text x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}" font-weight="{weight}" fill="#222222">{escape(text)}</text>'
