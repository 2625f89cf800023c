"""Divide rows into batches: sorted by length, and with LongRoPE by the side of its switch that they lie on.

A LongRoPE model has other angles for rows that are longer than its switch, and transformers chooses them for a whole batch.
So a batch has rows of one side only. An answer that passes the switch is generated in a batch of its own, as transformers
does it: when the row passes the switch, all of it is computed again with the angles of long rows.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from loraflow.base.longrope import Side, longrope_modules
from loraflow.data.positions import Positions

if TYPE_CHECKING:
    from transformers import PreTrainedModel


@dataclass(frozen=True)
class RowGroup:
    """Rows that can share a batch."""

    rows: tuple[int, ...]  # indices, longest first
    batch_size: int
    side: Side = "unchanged"
    switch: int = 0

    def batches(self) -> Iterator[list[int]]:
        """Yield the indices of each batch's rows."""
        for first in range(0, len(self.rows), self.batch_size):
            yield list(self.rows[first : first + self.batch_size])


def group_rows(
    lengths: Sequence[int], batch_size: int, switch: int | None = None, new_tokens: int = 0, *, fixable: bool = True
) -> list[RowGroup]:
    """Return the rows in groups, longest rows first, so that little is padded.

    Args:
        lengths: tokens of each row.
        batch_size: the number of rows of a batch.
        switch: longer rows have other angles; None for models without one.
        new_tokens: the number of tokens that may be added to each row.
        fixable: the model's angles are computed by transformers' own code, so that they can be fixed.
    """
    order = sorted(range(len(lengths)), key=lambda i: (-lengths[i], i))
    if switch is None:
        return [RowGroup(tuple(order), batch_size)] if order else []
    above = tuple(i for i in order if lengths[i] > switch)
    below = tuple(i for i in order if lengths[i] + new_tokens <= switch)
    passing = tuple(i for i in order if lengths[i] <= switch < lengths[i] + new_tokens)
    groups = [
        RowGroup(above, batch_size if fixable else 1, "long" if fixable else "unchanged", switch),
        RowGroup(passing, 1, "unchanged", switch),
        RowGroup(below, batch_size, "short" if fixable else "unchanged", switch),
    ]
    return [group for group in groups if group.rows]


def groups_of(model: PreTrainedModel, lengths: Sequence[int], batch_size: int, new_tokens: int = 0) -> list[RowGroup]:
    """Return the rows of a model in groups; see `group_rows`."""
    switch = Positions.of(model.config.to_dict()).switch
    return group_rows(lengths, batch_size, switch, new_tokens, fixable=bool(longrope_modules(model)))
