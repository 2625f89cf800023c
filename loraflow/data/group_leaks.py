"""Drop training rows whose group (`data.group`) has a row in a held-out file: such rows are not independent."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from loraflow.data.chat_table import ChatTable, Columns, Rows
from loraflow.data.placement import Split


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
