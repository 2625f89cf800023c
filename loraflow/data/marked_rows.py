"""Which marks left rows out, for people: the text `30 by decision: rejected`."""

from __future__ import annotations

from collections.abc import Mapping

from loraflow.data.mark_names import HELD_OUT_FLAGS, SPLITS, normal_name

MAX_SHOWN = 5


def named_marks(marks: Mapping[str, int]) -> str:
    """Return how many rows each mark left out, the most frequent first; empty without marks.

    Args:
        marks: key and value of a mark, such as `is_correct: False` → rows.
    """
    most = sorted(marks.items(), key=lambda item: -item[1])
    names = [f"{count} by {mark}" for mark, count in most[:MAX_SHOWN]]
    return ", ".join(names) + (f" and {len(most) - MAX_SHOWN} more marks" if len(most) > MAX_SHOWN else "")


def split_hint(marks: Mapping[str, int]) -> str:
    """Return how rows are scored that a column such as `split` keeps for tests; empty if marks name none.

    Args:
        marks: as in named_marks.
    """
    keys = {normal_name(mark.partition(": ")[0].rpartition(".")[2]) for mark in marks}
    if not keys & (SPLITS | HELD_OUT_FLAGS):
        return ""
    return "; to score the rows that a split keeps for tests, put them into a file of data.heldout"


def without_marks(unread: Mapping[str, int], marks: Mapping[str, int]) -> dict[str, int]:
    """Return the keys that were not read, without those that left rows out: they were read as marks."""
    keys = {mark.partition(": ")[0] for mark in marks}
    columns = keys | {key.partition(".")[0] for key in keys}
    return {key: count for key, count in unread.items() if key not in columns}
