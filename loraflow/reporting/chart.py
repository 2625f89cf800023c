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


def image(points: Sequence[tuple[float, float]], title: str) -> str:
    """Return markdown with the curve of (step, loss) points."""
    return embedded(svg(points, title), title)


def embedded(drawing: str, title: str) -> str:
    """Return markdown with an SVG in a data URI."""
    return f"![{title}](data:image/svg+xml;base64,{base64.b64encode(drawing.encode()).decode()})"


def svg(points: Sequence[tuple[float, float]], title: str) -> str:
    """Draw (step, loss) points as a curve with its axes."""
    points = _thin(points)
    axes = _Axes.around(points)
    line = " ".join(f"{x:.1f},{y:.1f}" for x, y in (axes.pixel(*point) for point in points))
    x, y = axes.pixel(*points[-1])
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{WIDTH}" height="{HEIGHT}" viewBox="0 0 {WIDTH} {HEIGHT}"'
        ' font-family="sans-serif" font-size="11" fill="#444">'
        f'<title>{title}</title><rect width="{WIDTH}" height="{HEIGHT}" fill="white"/>{axes.ticks()}'
        f'<text x="{WIDTH / 2}" y="{HEIGHT - 4}" text-anchor="middle">step</text>'
        f'<polyline points="{line}" fill="none" stroke="#1860f2" stroke-width="2"/>'
        f'<circle cx="{x:.1f}" cy="{y:.1f}" r="3" fill="#1860f2"/></svg>'
    )


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
            _, y = self.pixel(self.first, level)
            marks.append(f'<line x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{y:.1f}" y2="{y:.1f}" stroke="#e2e2e2"/>')
            marks.append(f'<text x="{LEFT - 6}" y="{y + 4:.1f}" text-anchor="end">{level:g}</text>')
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
    """Return markdown with several curves in one image. Each needs a point; `across` names what the first numbers are."""
    return embedded(curves_svg(curves, title, across), title)


def curves_svg(curves: Sequence[Curve], title: str, across: str = "step") -> str:
    """Draw several curves with common axes, and a legend below them."""
    axes = _Axes.around([point for curve in curves for point in curve.points])
    height = HEIGHT + LEGEND_LINE * len(curves) + 8
    lines, legend = [], []
    for number, curve in enumerate(curves):
        colour, width = COLOURS[number % len(COLOURS)], 3 if curve.is_main else 1.2
        pixels = [axes.pixel(*point) for point in _thin(curve.points)]
        line = " ".join(f"{x:.1f},{y:.1f}" for x, y in pixels)
        dashes = ' stroke-dasharray="5 3"' if number >= len(COLOURS) else ""
        style = f'stroke="{colour}" stroke-width="{width}"{dashes}'
        x, y = pixels[-1]
        drawn = (
            f'<polyline points="{line}" fill="none" {style}/><circle cx="{x:.1f}" cy="{y:.1f}" r="3" fill="{colour}"/>'
        )
        lines.append((curve.is_main, drawn))
        top = HEIGHT + 8 + LEGEND_LINE * number
        weight = ' font-weight="bold"' if curve.is_main else ""
        legend.append(
            f'<line x1="{LEFT}" x2="{LEFT + 24}" y1="{top}" y2="{top}" {style}/>'
            f'<text x="{LEFT + 32}" y="{top + 4}"{weight}>{escape(curve.label[:MAX_LABEL])}</text>'
        )
    drawn_lines = "".join(drawn for _, drawn in sorted(lines, key=lambda item: item[0]))
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{WIDTH}" height="{height}" viewBox="0 0 {WIDTH} {height}"'
        ' font-family="sans-serif" font-size="11" fill="#444">'
        f'<title>{escape(title)}</title><rect width="{WIDTH}" height="{height}" fill="white"/>{axes.ticks()}'
        f'<text x="{WIDTH / 2}" y="{HEIGHT - 4}" text-anchor="middle">{across}</text>'
        f"{drawn_lines}{''.join(legend)}</svg>"
    )
