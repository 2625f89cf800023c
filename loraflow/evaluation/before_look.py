"""What is known before a look at the held-out rows: a comparison that cannot promote, whatever the scores are.

Only numbers of rows count here. A reason that depends on scores or answers, such as a check
of behaviour that fails, uses a look: if only comparisons that may still promote did, their promotions would be wrong more
often than `gate.error` says.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from loraflow.evaluation.groups import group_labels
from loraflow.evaluation.power import MINIMUM_ROWS

if TYPE_CHECKING:
    import pandas as pd

    from loraflow.evaluation.forgetting import GeneralGuard
    from loraflow.evaluation.slice_guards import SliceGuard


def why_not_promoted(
    table: pd.DataFrame,
    parts: Sequence[SliceGuard],
    general: Sequence[GeneralGuard],
    unscored: Sequence[str],
) -> list[str]:
    """Return why no scores of these rows can promote the challenger; nothing if some can.

    Args:
        table: the challenger's scores of the held-out rows.
        parts: guards for parts of these rows.
        general: guards on general rows.
        unscored: parts of which no row was scored.
    """
    tables = {"held-out rows": table}
    tables |= {f"rows of {guard.part}": table[table["id"].isin(guard.part.ids)] for guard in parts}
    tables |= {f"rows of {guard.name}": guard.challenger for guard in general}
    independent = {name: len(set(group_labels(rows))) for name, rows in tables.items()}
    few = [
        f"{name}: {count} independent, and {MINIMUM_ROWS} are needed"
        for name, count in independent.items()
        if count < MINIMUM_ROWS
    ]
    return [*few, *(f"no row of {part} was scored" for part in unscored)]
