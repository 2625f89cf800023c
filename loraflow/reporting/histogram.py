"""The lengths of training rows as an image in markdown, with max_length as a line."""

from __future__ import annotations

from loraflow.data.token_report import Lengths
from loraflow.reporting.chart import BOTTOM, HEIGHT, LEFT, RIGHT, TOP, WIDTH, embedded, round_numbers

LABEL_ROOM = 14  # pixels above the bars, for the label of max_length
INSIDE, OVER, LIMIT = "#1860f2", "#d9822b", "#b00020"  # colours: bars up to max_length, bars beyond it, and its line


def image(lengths: Lengths, title: str) -> str:
    """Return markdown with the histogram."""
    return embedded(svg(lengths, title), title)


def svg(lengths: Lengths, title: str) -> str:
    """Draw a bar for each range of lengths, in another colour beyond max_length."""
    last = lengths.first + lengths.width * (len(lengths.rows) - 1)
    shows_limit = lengths.max_length <= 2 * last  # far to the right of all bars, it would press them together
    end = max(last, lengths.max_length) if shows_limit else last
    most = max(lengths.rows, default=0) or 1
    base, height = HEIGHT - BOTTOM, HEIGHT - TOP - BOTTOM - LABEL_ROOM

    def across(tokens: float) -> float:
        return LEFT + tokens / end * (WIDTH - LEFT - RIGHT)

    drawn = []
    for count in round_numbers(0, most, at_least=1):
        y = base - count / most * height
        drawn.append(f'<line x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{y:.1f}" y2="{y:.1f}" stroke="#e2e2e2"/>')
        drawn.append(f'<text x="{LEFT - 6}" y="{y + 4:.1f}" text-anchor="end">{count:,.0f}</text>')
    for tokens in round_numbers(0, end, at_least=1):
        x, y = across(tokens), base + 16
        drawn.append(f'<text x="{x:.1f}" y="{y}" text-anchor="middle">{tokens:g}</text>')
    for number, count in enumerate(lengths.rows):
        to = lengths.first + number * lengths.width
        left, right, tall = across(max(0, to - lengths.width)), across(to), count / most * height
        size = f'width="{max(1.0, right - left - 1):.1f}" height="{tall:.1f}"'
        colour = INSIDE if to <= lengths.max_length else OVER
        drawn.append(f'<rect x="{left:.1f}" y="{base - tall:.1f}" {size} fill="{colour}"/>')
    drawn.append(_limit(across(lengths.max_length) if shows_limit else None, lengths.max_length))
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{WIDTH}" height="{HEIGHT}" viewBox="0 0 {WIDTH} {HEIGHT}"'
        ' font-family="sans-serif" font-size="11" fill="#444">'
        f'<title>{title}</title><rect width="{WIDTH}" height="{HEIGHT}" fill="white"/>{"".join(drawn)}'
        f'<text x="{WIDTH / 2}" y="{HEIGHT - 4}" text-anchor="middle">tokens of a row</text></svg>'
    )


def _limit(x: float | None, max_length: int) -> str:
    if x is None:
        return (
            f'<text x="{WIDTH - RIGHT}" y="{TOP + 2}" text-anchor="end" fill="{LIMIT}">max_length {max_length} →</text>'
        )
    is_right = x > WIDTH / 2
    anchor, at = ("end", x - 4) if is_right else ("start", x + 4)
    return (
        f'<line x1="{x:.1f}" x2="{x:.1f}" y1="{TOP - 8}" y2="{HEIGHT - BOTTOM}" stroke="{LIMIT}" stroke-dasharray="4 3"/>'
        f'<text x="{at:.1f}" y="{TOP + 2}" text-anchor="{anchor}" fill="{LIMIT}">max_length {max_length}</text>'
    )
