"""Drop training rows whose group (`data.group`) has a row in a held-out file: such rows are not independent."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping

from loraflow.data.chats import ChatRecord
from loraflow.data.placement import Split
from loraflow.data.similar import CheckedRow


def heldout_groups(rows: Iterable[CheckedRow]) -> dict[str, str]:
    """Return {group: place of its first row} of held-out rows."""
    groups: dict[str, str] = {}
    for row in rows:
        if "group" in row.record:
            groups.setdefault(row.record["group"], row.record["place"])
    return groups


def drop_group_leaks(
    splits: dict[Split, list[CheckedRow]],
    heldout: Mapping[str, str],
    drop: Callable[[ChatRecord, str, str, str], None],
) -> None:
    """Drop training and validation rows of a group that is held out. A seeded split has kept groups together already.

    Args:
        splits: the rows of each split; changed in place.
        heldout: {group: place}, also of held-out rows that were dropped as duplicates: their content is held out.
        drop: is called with each dropped row, its split, the reason, and a sentence.
    """
    names: tuple[Split, ...] = ("train", "validation") if heldout else ()
    for name in names:
        remaining: list[CheckedRow] = []
        for row in splits[name]:
            place = heldout.get(row.record.get("group", ""))
            if place is None:
                remaining.append(row)
            else:
                drop(row.record, name, "group_leak", f"a row of its group is held out ({place})")
        splits[name] = remaining
