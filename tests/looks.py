"""Looks at held-out rows, for tests of the record of looks and of the error that it spends."""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence, Set

from loraflow.registry import Entry
from loraflow.registry.budget import Look, next_look
from loraflow.registry.looks import LookRecord

ROWS = {f"row{i}" for i in range(50)}


def take(
    record: LookRecord,
    key: str,
    rows: Set[str] = ROWS,
    promotions: Sequence[Entry] = (),
    challenger: str = "c",
    error: float = 0.05,
    horizon: int = 365,
) -> Look:
    """Record a look at some rows."""
    return record.take(
        key, challenger=challenger, rows=rows, error=error, horizon=horizon, promotions=promotions, actor="me"
    )


def nights_on_fresh_rows(
    nights: int,
    horizon: int,
    near: Callable[[int], bool],
    of_earlier_version: Collection[int] = (),
    independent: Callable[[int], bool] = lambda seq: True,
) -> list[Look]:
    """Return the looks of nights on new rows; `near` says which of them nearly showed a gain.

    `independent` says which nights have gate.independent_rows.
    """
    looks, sets = [], {}
    for seq in range(1, nights + 1):
        row, nearly = f"night{seq}", {look.seq for look in looks[-5:] if near(look.seq)} if independent(seq) else None
        found = next_look(
            looks, sets, {row}, error=0.05, horizon=horizon, assumed=0, promotions=(), nearly=nearly
        )._asdict()
        if seq in of_earlier_version:
            found |= {"spent": 0.025 / (horizon - 1), "level": 0.025 / (horizon - 1)}
        fixed = {"seq": seq, "before": None, "model": "m", "key": "", "challenger": "c", "rows": row}
        looks.append(Look(**fixed, **found, horizon=horizon, error=0.05, actor="", time=""))
        sets[row] = {row}
    return looks
