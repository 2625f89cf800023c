"""The part of a run's report about what is learned: shares, lengths against max_length, and samples with the mask."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass

from pydantic import JsonValue

from loraflow.data.token_report import Lengths, SampleRow, TokenReport
from loraflow.reporting import histogram


@dataclass(frozen=True)
class Learned:
    """What tokenize says about the training rows."""

    figures: Mapping[str, JsonValue]  # the figures of tokenize's report
    report: TokenReport


def learned_lines(learned: Learned, sparkline: Callable[[Sequence[float]], str], *, image: bool) -> Iterator[str]:
    """Yield the part of the report, as markdown.

    Args:
        learned: what tokenize says.
        sparkline: draws numbers as a line of bars, for terminals.
        image: draw the lengths as an image.
    """
    tokens, supervised, without = (
        _figure(learned.figures, name) for name in ("train_tokens", "supervised_tokens", "rows_nothing_to_learn")
    )
    if not tokens:
        return
    yield from ("## What is learned", "")
    yield f"- {supervised:,} of {tokens:,} tokens of the training rows are learned ({supervised / tokens:.1%})"
    yield f"- rows without a token to learn: {without:,}" + (", left out" if without else "")
    yield ""
    if lengths := learned.report.lengths:
        yield from _lengths(lengths, sparkline, image=image)
    for number, row in enumerate(learned.report.samples):
        if not number:
            yield from ("The first training rows as the model reads them. What is learned is in ⟦ ⟧:", "")
        yield from _sample(row)


def _figure(figures: Mapping[str, JsonValue], name: str) -> int:
    found = figures.get(name, 0)
    return int(found) if isinstance(found, int | float) else 0


def _lengths(lengths: Lengths, sparkline: Callable[[Sequence[float]], str], *, image: bool) -> Iterator[str]:
    title = "lengths of the training rows"
    last = lengths.first + lengths.width * (len(lengths.rows) - 1)
    start = max(1, lengths.first - lengths.width + 1)
    yield from ("### Lengths", "")
    yield histogram.image(lengths, title) if image else f"`{sparkline([0, *lengths.rows])[1:]}`"
    yield ""
    fate = "cut there" if lengths.too_long == "truncate" else "left out"
    over = f"{lengths.too_long_rows:,} rows are longer than max_length ({lengths.max_length} tokens)"
    yield f"Rows by their tokens, {start} to {last}, before rows are left out or cut. {over}" + (
        f", and {fate} (data.too_long: {lengths.too_long})." if lengths.too_long_rows else "."
    )
    if lengths.beyond:
        yield f"Not drawn: {lengths.beyond:,} rows of more than {last} tokens."
    yield from ("", "| longest rows | tokens |", "|---|---:|")
    for row in lengths.longest:
        place = row.place.replace("|", "\\|")
        yield f"| {place} | {row.tokens:,}{' (too long)' if row.tokens > lengths.max_length else ''} |"
    yield ""


def _sample(row: SampleRow) -> Iterator[str]:
    text = "".join(map(_marked, row.parts)) + (f"\n[{row.more_parts} more parts]" if row.more_parts else "")
    longest = max(map(len, re.findall("`+", text)), default=0)
    fence = "`" * max(3, longest + 1)  # a text may hold code blocks itself
    yield f"{row.place}: {row.tokens:,} tokens, {row.learned_tokens:,} learned" + (
        f"; {row.left_out}" if row.left_out else ""
    )
    yield from ("", fence, text, fence, "")


def _marked(part: tuple[str, float]) -> str:
    text, weight = part
    if not weight:
        return text
    return f"⟦{text}⟧" + ("" if weight == 1 else f"×{weight:g}")
