"""What the guards of gate.slices need, for `loraflow plan`: parts of the held-out rows that are too small to compare."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from typing import TYPE_CHECKING

from loraflow.data.heldout_fields import FILE, parse_field_values
from loraflow.execution.look_rows import checked_rows, compared_rows, rows_of_a_look
from loraflow.execution.plan import vocabulary_of
from loraflow.execution.workspace import Workspace

if TYPE_CHECKING:
    import pandas as pd

    from loraflow.evaluation.score import HeldoutRow


def slice_power_lines(workspace: Workspace) -> list[str]:
    """Return which guards of parts even an unchanged model does not pass; none if the rows are not in the store yet.

    Lengths are those of the references' characters, because nothing is tokenized yet.
    """
    recipe, store = workspace.recipe, workspace.store
    rules = recipe.gate.slices
    rows = checked_rows(workspace) if rules else None
    compared = rows_of_a_look(workspace, rows) if rows else []
    if rows is None or not compared:
        return []
    from loraflow.evaluation.power import largest_differences
    from loraflow.evaluation.slice_guards import power_lines, unscored_parts
    from loraflow.evaluation.slices import divide

    fields = parse_field_values(store.read(rows, FILE)) if recipe.slice_fields else {}
    keys = {row.id: key for key, row in compared}
    table = _table([row for _, row in compared])
    everything = _table([row for _, row in compared_rows(store.read(rows, "heldout.jsonl"), None, 0)])
    reaches = largest_differences(math.log(vocabulary_of(workspace)), recipe.gate.score_ranges)
    found: list[str] = []
    for by, margins in rules.items():
        parts = {str(part): len({keys[row] for row in part.ids}) for part in divide(table, by, fields)}
        found += power_lines(parts, margins, recipe.gate.confidence, reaches)
    unscored = unscored_parts(everything, keys.keys(), rules, fields)
    return [*found, *(f"  {part}: no row is scored, so no model is promoted (gate.slices)" for part in unscored)]


def _table(rows: Sequence[HeldoutRow]) -> pd.DataFrame:
    """Return rows as a score table without scores."""
    import pandas as pd

    return pd.DataFrame(
        {
            "id": [row.id for row in rows],
            "prompt": [json.dumps(row.messages[:-1], ensure_ascii=False) for row in rows],
            "reference": [row.messages[-1]["content"] or "" for row in rows],
            "reference_tokens": 0,
        }
    )
