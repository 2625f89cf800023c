"""Choose the few lengths of concatenated micro-batches, so that little of them is padding."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

MAX_LENGTHS = 16


def choose_lengths(used: NDArray[np.integer], cost: float) -> tuple[int, ...]:
    """Return the lengths for which padding and the cost of the lengths are least, together.

    Args:
        used: tokens of each micro-batch; the largest number is always one of the lengths.
        cost: the cost of one more length, in tokens of padding. Compiling or recording for a length takes as long.

    Returns:
        at most `MAX_LENGTHS` of the values of `used`, ascending.
    """
    values, counts = np.unique(used, return_counts=True)
    number, total = np.cumsum(counts), np.cumsum(counts * values)
    # padding[i, j]: of the values from i to j, if all of them get the length of value j
    before, tokens_before = np.concatenate([[0], number[:-1]]), np.concatenate([[0], total[:-1]])
    padding = values[None, :] * (number[None, :] - before[:, None]) - (total[None, :] - tokens_before[:, None])
    padding = np.where(
        np.arange(len(values))[:, None] <= np.arange(len(values))[None, :], padding.astype(float), np.inf
    )
    best = padding[0]  # least padding of the values up to j with one length
    first_of_last: list[NDArray[np.int64]] = [np.zeros(len(values), np.int64)]
    totals = [best[-1] + cost]
    for lengths in range(2, min(MAX_LENGTHS, len(values)) + 1):
        ways = np.concatenate([[np.inf], best[:-1]])[:, None] + padding  # the last length covers the values from i to j
        first_of_last.append(ways.argmin(0))
        best = ways.min(0)
        totals.append(best[-1] + cost * lengths)
    chosen: list[int] = []
    last = len(values) - 1
    for firsts in reversed(first_of_last[: int(np.argmin(totals)) + 1]):
        chosen.append(int(values[last]))
        last = int(firsts[last]) - 1
    return tuple(reversed(chosen))
