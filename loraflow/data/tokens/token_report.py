"""What tokenize reports about the training rows for people: their lengths, the longest ones, and samples with the mask."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from heapq import nlargest
from typing import TYPE_CHECKING, Literal

from loraflow.frozen import StoredModel

if TYPE_CHECKING:
    import numpy as np

LONGEST = 10  # rows that are named
BARS = 24  # of the histogram, about


class LongRow(StoredModel):
    """A long row: its place in the files, and its length."""

    place: str
    tokens: int


class Lengths(StoredModel):
    """How many training rows have which length, before rows are left out or cut.

    A bar counts the rows of `width` lengths. `max_length` is the last length of a bar, so no bar is on both sides of it.
    """

    max_length: int  # training_config.max_length, in tokens
    too_long: Literal["error", "drop", "truncate"]  # data.too_long
    width: int  # tokens
    first: int  # the last length that the first bar counts
    rows: list[int]  # of each bar
    beyond: int  # rows that are longer than the last bar's; the last bar does not count them
    too_long_rows: int
    longest: list[LongRow]  # the longest first

    @classmethod
    def of(
        cls,
        lengths: np.ndarray,
        longest: Iterable[LongRow],
        *,
        max_length: int,
        too_long: Literal["error", "drop", "truncate"],
    ) -> Lengths:
        """Return the lengths of rows.

        Args:
            longest: the rows with the most tokens, or more rows than these.
        """
        import numpy as np  # not above: who only reads reports does without it

        # One very long row must not press all others into one bar.
        end = int(min(lengths.max(initial=1), 2 * max_length))
        width = max(1, -(-end // BARS))
        end = max_length - (max_length - end) // width * width  # up to the end of its bar
        bars = -((max_length - lengths[lengths <= end].astype(np.int64)) // width)  # 0: the bar that ends at max_length
        low = int(bars.min()) if len(bars) else 0
        return cls(
            max_length=max_length,
            too_long=too_long,
            width=width,
            first=max_length + low * width,
            rows=np.bincount(bars - low, minlength=1).tolist(),
            beyond=int((lengths > end).sum()),
            too_long_rows=int((lengths > max_length).sum()),
            longest=longest_of(longest),
        )


class SampleRow(StoredModel):
    """A training row as the model reads it. Long parts are shortened in their middle."""

    place: str
    tokens: int
    learned_tokens: int
    parts: list[tuple[str, float]]  # text, and its weight in the loss: 0 is not learned
    more_parts: int = 0  # that are not shown
    left_out: str | None = None  # why the row is left out, or cut


class TokenReport(StoredModel):
    """The part of tokenize's report for people. Reports of earlier versions have neither lengths nor samples."""

    lengths: Lengths | None = None
    samples: list[SampleRow] = []


def longest_of(rows: Iterable[LongRow]) -> list[LongRow]:
    """Return the longest rows, the longest first; of equally long rows, the first ones."""
    return nlargest(LONGEST, rows, key=lambda row: row.tokens)


def long_rows(place_of: Callable[[int], str], lengths: Sequence[int]) -> list[LongRow]:
    """Return the longest of some rows."""
    numbers = nlargest(LONGEST, range(len(lengths)), key=lengths.__getitem__)
    return [LongRow(place=place_of(n), tokens=lengths[n]) for n in numbers]
