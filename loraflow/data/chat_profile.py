"""What the training rows look like, for people and for comparing two versions of a dataset."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from loraflow.data.chat_table import Columns, Rows
from loraflow.data.check_report import Profile, Spread
from loraflow.data.row_segment import HAS_SYSTEM


def profile(columns: Columns, rows: Rows) -> Profile | None:
    """Return the profile of training rows; None if there are none."""
    if len(rows) == 0:
        return None
    turns, chats = np.unique(columns.turns[rows], return_counts=True)
    return Profile(
        turns=dict(sorted(zip(map(str, turns.tolist()), chats.tolist(), strict=True))),
        with_system=int(columns.has(HAS_SYSTEM)[rows].sum()) / len(rows),
        prompt_characters=_spread(columns.prompt_characters[rows]),
        answer_characters=_spread(columns.answer_characters[rows]),
    )


def _spread(lengths: NDArray[np.int32]) -> Spread:
    ordered = np.sort(lengths)
    return Spread(median=int(ordered[len(ordered) // 2]), max=int(ordered[-1]))
