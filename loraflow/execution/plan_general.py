"""What the rows of evaluation.general can show, before anything is trained."""

from __future__ import annotations

import math
from collections.abc import Iterator

from loraflow.data.general import KINDS
from loraflow.evaluation.power import rows_for_margin, rows_that_rule_out
from loraflow.execution.cache import look_up
from loraflow.execution.plan import vocabulary_of
from loraflow.execution.workspace import Workspace
from loraflow.stages import CHECK_DATASET, CHECK_GENERAL, VERSION_DATASET


def forgetting_lines(workspace: Workspace) -> list[str]:
    """Return for each score of gate.forgetting how many rows unchanged outputs need to pass, and how many there are.

    Empty if the recipe asks for nothing, or if the general rows are not in the store yet.
    """
    store, gate = workspace.store, workspace.recipe.gate
    dataset = look_up(store, workspace.job(VERSION_DATASET, {})).ref if gate.forgetting else None
    rows = look_up(store, workspace.job(CHECK_DATASET, {"dataset": dataset})).ref if dataset else None
    general = look_up(store, workspace.job(CHECK_GENERAL, {"rows": rows})).ref if rows else None
    return [] if general is None else list(_lines(workspace, store.manifest(general).figures))


def _lines(workspace: Workspace, counts: object) -> Iterator[str]:
    gate = workspace.recipe.gate
    found = counts if isinstance(counts, dict) else {}
    for score, margin in gate.forgetting.items():
        count = found.get(KINDS[score], 0)
        needed: int | None
        if score == "loss":
            needed = rows_that_rule_out(margin, gate.confidence, math.log(vocabulary_of(workspace)))
        else:
            needed = rows_for_margin(margin, gate.confidence, "accuracy")
        enough = isinstance(count, int) and needed is not None and count >= needed
        what = "unchanged outputs pass" if enough else "even unchanged outputs do not pass"
        yield f"  general_{score}: {what}: a margin of {margin:g} needs {needed} rows, you have {count}"
