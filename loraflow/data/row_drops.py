"""Drop duplicated rows, and training rows whose prompt or group is held out."""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from loraflow.data.chat_table import ChatTable, Columns, Rows
from loraflow.data.near import is_repeated
from loraflow.data.placement import Split

Drop = Callable[[int, str, str, str], None]  # a row, its set, the reason, and a sentence


def drop_duplicates(
    table: ChatTable, columns: Columns, splits: dict[Split, Rows], policy: Literal["drop", "keep"], drop: Drop
) -> None:
    """Drop duplicates within a split. Held-out duplicates are always dropped: ids join the scores of two models.

    Chats with other marks are not duplicates.
    """
    for split, rows in splits.items():
        if policy == "keep" and split != "heldout":
            continue
        # Of a held-out row, marks are not used; training rows that are held out are in the gate's set.
        marks = np.zeros(len(rows), np.uint64) if split == "heldout" else columns.marks[rows]
        sets = np.maximum(columns.sets[rows], 1)
        first = _first(columns.ids[rows], marks, sets)
        duplicates = first != np.arange(len(rows))
        for position in np.flatnonzero(duplicates).tolist():
            number, same = int(rows[position]), int(rows[first[position]])
            drop(number, table.set_of(number, split), "duplicate", f"same as {table.place(same)}")
        splits[split] = rows[~duplicates]


def _first(keys: NDArray[np.uint64], *others: NDArray[np.integer]) -> NDArray[np.int64]:
    """Return for each row [rows] the first row with the same key and the same values in the other columns."""
    first = np.arange(len(keys))
    some = np.flatnonzero(is_repeated(keys))
    columns = (keys, *others)
    order = some[np.lexsort([column[some] for column in columns])]
    begins = np.ones(len(order), bool)
    begins[1:] = np.any([column[order[1:]] != column[order[:-1]] for column in columns], axis=0)
    first[order] = order[np.flatnonzero(begins)][np.cumsum(begins) - 1]  # lexsort is stable: the first of equal rows
    return first


def drop_leaks(table: ChatTable, columns: Columns, splits: dict[Split, Rows], drop: Drop) -> None:
    """Drop training and validation rows whose prompt is held out: scores must not come from rows that were learned."""
    heldout = splits["heldout"]
    held = columns.keys[heldout]
    order = np.argsort(held, kind="stable")
    names: tuple[Split, ...] = ("train", "validation")
    for split in names:
        rows = splits[split]
        leaks = np.isin(columns.keys[rows], held)
        last = np.searchsorted(held[order], columns.keys[rows[leaks]], side="right") - 1
        for number, other in zip(rows[leaks].tolist(), heldout[order[last]].tolist(), strict=True):
            drop(number, split, "leak", f"its prompt is held out ({table.place(other)})")
        splits[split] = rows[~leaks]


def heldout_groups(columns: Columns, rows: Rows) -> dict[int, int]:
    """Return {number of a group: its first row} of held-out rows."""
    groups = columns.groups[rows]
    numbers, first = np.unique(groups, return_index=True)
    return {group: int(rows[n]) for group, n in zip(numbers.tolist(), first.tolist(), strict=True) if group >= 0}


def drop_group_leaks(
    table: ChatTable,
    columns: Columns,
    splits: dict[Split, Rows],
    heldout: dict[int, int],
    drop: Callable[[int, str, str, str], None],
) -> None:
    """Drop training and validation rows of a group that is held out. A seeded split has kept groups together already.

    Args:
        table: all rows.
        columns: what is known of them.
        splits: the rows of each split; changed in place.
        heldout: {group: row}, also of held-out rows that were dropped as duplicates: their content is held out.
        drop: is called with each dropped row, its split, the reason, and a sentence.
    """
    names: tuple[Split, ...] = ("train", "validation") if heldout else ()
    for name in names:
        leaks = np.isin(columns.groups[splits[name]], list(heldout))
        for number in splits[name][leaks].tolist():
            place = table.place(heldout[int(columns.groups[number])])
            drop(number, name, "group_leak", f"a row of its group is held out ({place})")
        splits[name] = splits[name][~leaks]
