"""What the guards of gate.slices need, for `loraflow plan`: parts of the held-out rows that are too small to compare."""

from __future__ import annotations

import json

from loraflow.data.chats import GATE_SET
from loraflow.data.heldout_fields import FILE, parse_field_values
from loraflow.execution.cache import look_up
from loraflow.execution.workspace import Workspace
from loraflow.registry.looks import row_key
from loraflow.stages import CHECK_DATASET, VERSION_DATASET


def slice_power_lines(workspace: Workspace) -> list[str]:
    """Return which guards of parts even an unchanged model does not pass; none if the rows are not in the store yet.

    Lengths are those of the references' characters, because nothing is tokenized yet.
    """
    recipe, store = workspace.recipe, workspace.store
    rules = recipe.gate.slices
    dataset = look_up(store, workspace.job(VERSION_DATASET, {})).ref if rules else None
    rows = look_up(store, workspace.job(CHECK_DATASET, {"dataset": dataset})).ref if dataset else None
    if rows is None:
        return []
    import pandas as pd

    from loraflow.evaluation.score import sampled_rows
    from loraflow.evaluation.slice_guards import power_lines
    from loraflow.evaluation.slices import divide

    fields = parse_field_values(store.read(rows, FILE)) if recipe.slice_fields else {}
    lines = store.read(rows, "heldout.jsonl").decode().removesuffix("\n").split("\n")
    sampled, _ = sampled_rows(filter(None, lines), recipe.evaluation.max_rows, recipe.evaluation.seed)
    compared = [row for row in sampled if row.set == GATE_SET]
    if not compared:
        return []
    prompts = [json.dumps(row.messages[:-1], ensure_ascii=False) for row in compared]
    keys = {row.id: row_key(prompt) for row, prompt in zip(compared, prompts, strict=True)}
    table = pd.DataFrame(
        {
            "id": [row.id for row in compared],
            "prompt": prompts,
            "reference": [row.messages[-1]["content"] or "" for row in compared],
            "reference_tokens": 0,
        }
    )
    found: list[str] = []
    for by, margins in rules.items():
        parts = {str(part): len({keys[row] for row in part.ids}) for part in divide(table, by, fields)}
        found += power_lines(parts, margins, recipe.gate.confidence)
    return found
