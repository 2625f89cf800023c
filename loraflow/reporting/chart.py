"""A loss curve as an image in markdown: an SVG in a data URI. Both UIs of Prefect show it, and neither shows inline SVG."""

from __future__ import annotations

import base64
import math
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape

WIDTH, HEIGHT = 640, 240
LEFT, RIGHT, TOP, BOTTOM = 56, 16, 16, 36  # margins, in pixels
MAX_POINTS = 400  # the image is not wide enough for more
MAX_TICKS = 7  # on an axis


def embedded(drawing: str, title: str) -> str:
    """Return markdown with an SVG in a data URI."""
    return f"![{title}](data:image/svg+xml;base64,{base64.b64encode(drawing.encode()).decode()})"


def svg(points: Sequence[tuple[float, float]], title: str) -> str:
    """Draw (step, loss) points as a curve with its axes."""
    points = _thin(points)
    axes = _Axes.around(points)
    style = 'stroke="#1860f2" stroke-width="2"'
    return frame(title, "step", axes.ticks() + _polyline(axes, points, style, "#1860f2"))


def frame(title: str, across: str, drawing: str, height: int = HEIGHT) -> str:
    """Return an SVG with a title, and the name of what is drawn from left to right."""
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{WIDTH}" height="{height}" viewBox="0 0 {WIDTH} {height}"'
        ' font-family="sans-serif" font-size="11" fill="#444">'
        f'<title>{escape(title)}</title><rect width="{WIDTH}" height="{height}" fill="white"/>{drawing}'
        f'<text x="{WIDTH / 2}" y="{HEIGHT - 4}" text-anchor="middle">{across}</text></svg>'
    )


def level_line(y: float, text: str) -> str:
    """Return a horizontal line with its label on the left."""
    return (
        f'<line x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{y:.1f}" y2="{y:.1f}" stroke="#e2e2e2"/>'
        f'<text x="{LEFT - 6}" y="{y + 4:.1f}" text-anchor="end">{text}</text>'
    )


def _polyline(axes: _Axes, points: Sequence[tuple[float, float]], style: str, colour: str) -> str:
    """Return a curve with a dot at its end."""
    pixels = [axes.pixel(*point) for point in points]
    line = " ".join(f"{x:.1f},{y:.1f}" for x, y in pixels)
    x, y = pixels[-1]
    return f'<polyline points="{line}" fill="none" {style}/><circle cx="{x:.1f}" cy="{y:.1f}" r="3" fill="{colour}"/>'


def _thin(points: Sequence[tuple[float, float]]) -> Sequence[tuple[float, float]]:
    if len(points) <= MAX_POINTS:
        return points
    return [points[i * (len(points) - 1) // (MAX_POINTS - 1)] for i in range(MAX_POINTS)]


@dataclass(frozen=True)
class _Axes:
    """The ranges of steps and losses that fill the image."""

    first: float
    last: float
    low: float
    high: float

    @classmethod
    def around(cls, points: Sequence[tuple[float, float]]) -> _Axes:
        steps, losses = [step for step, _ in points], [loss for _, loss in points]
        return cls(min(steps), max(steps), min(losses), max(losses))

    def pixel(self, step: float, loss: float) -> tuple[float, float]:
        across = (step - self.first) / (self.last - self.first) if self.last > self.first else 0.5
        up = (loss - self.low) / (self.high - self.low) if self.high > self.low else 0.5
        return LEFT + across * (WIDTH - LEFT - RIGHT), HEIGHT - BOTTOM - up * (HEIGHT - TOP - BOTTOM)

    def ticks(self) -> str:
        marks = []
        for level in round_numbers(self.low, self.high):
            marks.append(level_line(self.pixel(self.first, level)[1], f"{level:g}"))
        for step in round_numbers(self.first, self.last, at_least=1):
            x, _ = self.pixel(step, self.low)
            marks.append(f'<text x="{x:.1f}" y="{HEIGHT - BOTTOM + 16}" text-anchor="middle">{step:g}</text>')
        return "".join(marks)


def round_numbers(low: float, high: float, *, at_least: float = 0.0) -> list[float]:
    """Return at most `MAX_TICKS` numbers from low to high: multiples of 1, 2 or 5 times a power of ten.

    `at_least` is the smallest distance between two of them.
    """
    if high <= low:
        return [low]
    power = 10.0 ** math.floor(math.log10(max((high - low) / MAX_TICKS, at_least)))
    every = next(
        power * factor
        for factor in (1, 2, 5, 10, 20)
        if math.floor(high / (power * factor)) - math.ceil(low / (power * factor)) < MAX_TICKS
    )
    return [every * count for count in range(math.ceil(low / every), math.floor(high / every) + 1)]


@dataclass(frozen=True)
class Curve:
    """One of several curves in an image."""

    label: str
    points: Sequence[tuple[float, float]]
    is_main: bool = False  # drawn thicker, over the others


COLOURS = ("#1860f2", "#d1495b", "#2e933c", "#e0a030", "#7b4fa3", "#1f9ea8", "#8c5a2b", "#777777")
LEGEND_LINE = 16  # pixels
MAX_LABEL = 90  # characters that fit into the width


def curves_image(curves: Sequence[Curve], title: str, across: str = "step") -> str:
    """Return markdown with several curves in one image, with common axes and a legend.

    Each curve needs a point; `across` names what the first numbers are.
    """
    axes = _Axes.around([point for curve in curves for point in curve.points])
    height = HEIGHT + LEGEND_LINE * len(curves) + 8
    lines, legend = [], []
    for number, curve in enumerate(curves):
        colour, width = COLOURS[number % len(COLOURS)], 3 if curve.is_main else 1.2
        dashes = ' stroke-dasharray="5 3"' if number >= len(COLOURS) else ""
        style = f'stroke="{colour}" stroke-width="{width}"{dashes}'
        lines.append((curve.is_main, _polyline(axes, _thin(curve.points), style, colour)))
        top = HEIGHT + 8 + LEGEND_LINE * number
        weight = ' font-weight="bold"' if curve.is_main else ""
        legend.append(
            f'<line x1="{LEFT}" x2="{LEFT + 24}" y1="{top}" y2="{top}" {style}/>'
            f'<text x="{LEFT + 32}" y="{top + 4}"{weight}>{escape(curve.label[:MAX_LABEL])}</text>'
        )
    drawn = [line for _, line in sorted(lines, key=lambda item: item[0])]
    return embedded(frame(title, across, "".join([axes.ticks(), *drawn, *legend]), height), title)


_BARS = "▁▂▃▄▅▆▇█"


def sparkline(values: Sequence[float]) -> str:
    """Draw values as a line of bars, for terminals."""
    if not values:
        return ""
    low, high = min(values), max(values)
    step = (high - low) / (len(_BARS) - 1) or 1.0
    return "".join(_BARS[round((value - low) / step)] for value in values)
