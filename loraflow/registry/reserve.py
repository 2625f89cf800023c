"""Which held-out rows a look is dealt, so that each model is scored on rows that no model was scored on. No store here.

With `data.heldout_reserve`, a look does not use all held-out rows. The first look is dealt as many rows as the reserve
leaves out, and each later one as many of the others. Rows of a group, and rows with the same prompt, are dealt together.
The order is a seeded random one, so the rows of a look are a random sample of those that are fresh.

When too few fresh rows are left for a look, it uses the rows that were used before, as without a reserve. The fresh ones
wait for more: held-out rows that are collected later join them.
"""

import json
from collections.abc import Iterable, Sequence, Set
from typing import NamedTuple

from loraflow.data.chats import GATE_SET
from loraflow.data.checks.split import chat_key, draw
from loraflow.failures import BadConfig
from loraflow.frozen import StoredModel

_ENOUGH = 0.9  # share of a look's rows: where groups stay together, looks differ a little in size


class ReserveRow(NamedTuple):
    """A held-out row of the gate's set."""

    key: str  # identifies the row in the record of looks (`row_key`)
    group: str | None = None


class Dealt(NamedTuple):
    """The rows of a look."""

    keys: frozenset[str]
    is_fresh: bool  # none of them was scored before; otherwise the reserve is used up


class ReserveState(StoredModel):
    """How many rows are left that no model was scored on."""

    rows: int  # held-out rows of the gate's set
    fresh: int  # rows that no model was scored on
    size: int  # rows of a look
    looks: int  # how many looks the fresh rows are enough for
    is_fresh: bool = True  # whether the rows of this run's look were dealt from the reserve

    def __str__(self) -> str:
        left = f"{self.fresh} of {self.rows} held-out rows were never scored"
        if self.looks:
            return f"{left}: enough for {self.looks} more look{'s' if self.looks > 1 else ''} of {self.size} rows"
        return (
            f"{left}, and a look takes {self.size}: the reserve is used up. Until held-out rows are added, looks use rows "
            "that were scored before"
        )


def read_rows(lines: bytes) -> list[ReserveRow]:
    """Return the rows of the gate's set in a heldout.jsonl."""
    values = (json.loads(line) for line in lines.splitlines())
    return [ReserveRow(chat_key(row["messages"]), row.get("group")) for row in values if row["set"] == GATE_SET]


def rows_of_a_look(reserve: float, rows: int) -> int:
    """Return how many rows are not in the reserve: the size of a look.

    Args:
        reserve: data.heldout_reserve, a share of the rows below 1, or their number.

    Raises:
        BadConfig: no row is left for a look.
    """
    left = rows - (reserve if isinstance(reserve, int) else round(reserve * rows))
    if left < 1:
        raise BadConfig(
            "All held-out rows are kept in reserve, so no row is left for a look.",
            where="data.heldout_reserve",
            expected=f"less than all of the {rows} held-out rows",
            got=f"{reserve:g}",
            next_step="make the reserve smaller, or add held-out rows",
        )
    return left


def deal(rows: Sequence[ReserveRow], used: Set[str], size: int, seed: int) -> Dealt:
    """Return the rows of the next look.

    Args:
        used: keys of rows that were scored, or dealt to a model that may have been scored on them.
    """
    fresh = _fresh_units(rows, used, seed)
    if not _is_enough(_count(fresh), size):
        waiting = {row.key for unit in fresh for row in unit}
        old = [row for row in rows if row.key not in waiting]
        taken = old if len(old) >= size else rows
        return Dealt(frozenset(row.key for row in taken), is_fresh=False)
    dealt: list[ReserveRow] = []
    for unit in fresh:
        # The unit that passes the size is left to the next look, if that is closer to the size.
        if dealt and len(dealt) + len(unit) - size > size - len(dealt):
            break
        dealt += unit
        if len(dealt) >= size:
            break
    return Dealt(frozenset(row.key for row in dealt), is_fresh=True)


def state(rows: Sequence[ReserveRow], used: Set[str], size: int, *, is_fresh: bool = True) -> ReserveState:
    """Return how many rows are left; `used` as for `deal`."""
    fresh = _count(_fresh_units(rows, used, 0))
    looks = fresh // size + (1 if fresh % size and _is_enough(fresh % size, size) else 0)
    return ReserveState(rows=len(rows), fresh=fresh, size=size, looks=looks, is_fresh=is_fresh)


def _is_enough(fresh: int, size: int) -> bool:
    return fresh >= max(_ENOUGH * size, 1)


def _count(units: Iterable[Sequence[ReserveRow]]) -> int:
    return sum(map(len, units))


def _fresh_units(rows: Sequence[ReserveRow], used: Set[str], seed: int) -> list[list[ReserveRow]]:
    """Return the rows that stay together, of which none was used, in their seeded order."""
    units = [unit for unit in together(rows) if not any(row.key in used for row in unit)]
    return sorted(units, key=lambda unit: min((draw(row.key, seed, "reserve"), row.key) for row in unit))


def together(rows: Sequence[ReserveRow]) -> list[list[ReserveRow]]:
    """Return the rows in parts: rows with a common group or a common key, also through other rows, are in one part."""
    parent: dict[tuple[str, str], tuple[str, str]] = {}

    def root(name: tuple[str, str]) -> tuple[str, str]:
        while (above := parent.setdefault(name, name)) != name:
            parent[name] = name = parent[above]
        return name

    for row in rows:
        if row.group:
            parent[root(("key", row.key))] = root(("group", row.group))
    units: dict[tuple[str, str], list[ReserveRow]] = {}
    for row in rows:
        units.setdefault(root(("key", row.key)), []).append(row)
    return list(units.values())
