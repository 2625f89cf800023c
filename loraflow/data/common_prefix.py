"""What token sequences have in common at their beginning: a system prompt that all chats share, most often."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray


def common_prefix_length(rows: Sequence[Sequence[int] | NDArray[np.integer]], longest: int | None = None) -> int:
    """Return how many ids all rows begin with, at most `longest`; 0 without rows."""
    if not len(rows):
        return 0
    shortest = min(map(len, rows))
    length = shortest if longest is None else max(0, min(longest, shortest))
    heads = np.stack([np.asarray(row[:length]) for row in rows])
    differs = (heads != heads[0]).any(axis=0)
    return int(differs.argmax()) if differs.any() else length
