"""A loss curve as an image inside markdown: an SVG in a data URI, which both of Prefect's UIs show (inline SVG neither)."""

from __future__ import annotations

import base64

WIDTH, HEIGHT = 640, 240
LEFT, RIGHT, TOP, BOTTOM = 56, 16, 16, 36  # margins, in pixels
MOST = 400  # points; more than the image has room for


def image(points: list[tuple[float, float]], title: str) -> str:
    """Return markdown with the curve of (step, loss) points."""
    return f"![{title}](data:image/svg+xml;base64,{base64.b64encode(svg(points, title).encode()).decode()})"


def svg(points: list[tuple[float, float]], title: str) -> str:
    """Draw (step, loss) points as a curve with its axes."""
    points = [points[i * (len(points) - 1) // (MOST - 1)] for i in range(MOST)] if len(points) > MOST else points
    xs, ys = [x for x, _ in points], [y for _, y in points]
    x0, x1, y0, y1 = min(xs), max(xs), min(ys), max(ys)

    def place(x: float, y: float) -> tuple[float, float]:
        across = (x - x0) / (x1 - x0) if x1 > x0 else 0.5
        up = (y - y0) / (y1 - y0) if y1 > y0 else 0.5
        return LEFT + across * (WIDTH - LEFT - RIGHT), HEIGHT - BOTTOM - up * (HEIGHT - TOP - BOTTOM)

    marks = []
    for share in (0.0, 0.25, 0.5, 0.75, 1.0):
        level = y0 + share * (y1 - y0)
        _, y = place(x0, level)
        marks.append(f'<line x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{y:.1f}" y2="{y:.1f}" stroke="#e2e2e2"/>')
        marks.append(f'<text x="{LEFT - 6}" y="{y + 4:.1f}" text-anchor="end">{level:.3g}</text>')
        step = x0 + share * (x1 - x0)
        x, _ = place(step, y0)
        marks.append(f'<text x="{x:.1f}" y="{HEIGHT - BOTTOM + 16}" text-anchor="middle">{step:.0f}</text>')
    line = " ".join(f"{x:.1f},{y:.1f}" for x, y in (place(*point) for point in points))
    dot = "".join(f'<circle cx="{x:.1f}" cy="{y:.1f}" r="3" fill="#1860f2"/>' for x, y in (place(*points[-1]),))
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{WIDTH}" height="{HEIGHT}" viewBox="0 0 {WIDTH} {HEIGHT}"'
        ' font-family="sans-serif" font-size="11" fill="#444">'
        f'<title>{title}</title><rect width="{WIDTH}" height="{HEIGHT}" fill="white"/>{"".join(marks)}'
        f'<text x="{WIDTH / 2}" y="{HEIGHT - 4}" text-anchor="middle">step</text>'
        f'<polyline points="{line}" fill="none" stroke="#1860f2" stroke-width="2"/>{dot}</svg>'
    )
