"""What the guards of a run compare: parts of the held-out rows with their scores, and the scores on general rows."""

from __future__ import annotations

import json
import logging
from collections.abc import Sequence, Set
from typing import TYPE_CHECKING

from loraflow.evaluation.values import Slice
from loraflow.execution.deal import compared_rows
from loraflow.execution.workspace import PipelineResult, Workspace
from loraflow.failures import BadData, CorruptArtifact
from loraflow.store import Ref, read_intact, read_table

if TYPE_CHECKING:
    import pandas as pd

    from loraflow.data.checks.heldout_fields import FieldValues
    from loraflow.evaluation.guards import GeneralGuard


log = logging.getLogger("loraflow")


def read_field_values(workspace: Workspace, result: PipelineResult) -> FieldValues:
    """Return the values of the held-out rows' fields, as check_dataset wrote them; none if the recipe names no field.

    Raises:
        CorruptArtifact: the file is damaged; the artifact is quarantined by now.
    """
    if not workspace.recipe.slice_fields:
        return {}
    from loraflow.data.checks.heldout_fields import FILE, parse_field_values

    return parse_field_values(read_intact(workspace.store, result.rows, FILE))


def read_unscored_parts(workspace: Workspace, result: PipelineResult, scored: Set[str]) -> list[str]:
    """Return the parts that gate.slices guards and of which no row was scored.

    Raises:
        CorruptArtifact: the held-out rows are damaged; the artifact is quarantined by now.
    """
    rules = workspace.recipe.gate.slices
    if not rules:
        return []
    import pandas as pd

    from loraflow.evaluation.guards import unscored_parts

    rows = compared_rows(read_intact(workspace.store, result.rows, "heldout.jsonl"), None, 0)
    prompts = [json.dumps(row.messages[:-1], ensure_ascii=False) for _, row in rows]
    everything = pd.DataFrame({"id": [row.id for _, row in rows], "prompt": prompts})
    return unscored_parts(everything, scored, rules, read_field_values(workspace, result))


def heldout_scores(workspace: Workspace, ref: Ref) -> pd.DataFrame:
    """Return the scores of the gate's set. The bytes that are parsed are the bytes that were hashed.

    Raises:
        CorruptArtifact: they are damaged; they are quarantined by now.
    """
    from loraflow.evaluation.gate import heldout_rows

    return heldout_rows(read_table(workspace.store, ref), workspace.store.location(ref))


def heldout_slices(workspace: Workspace, result: PipelineResult) -> list[Slice]:
    """Return the scores of the parts that evaluation.slices and gate.slices name.

    Empty if a score table is damaged: the gate has decided by now, so the run continues.
    """
    recipe, gate = workspace.recipe, workspace.recipe.gate
    by = list(dict.fromkeys([*recipe.evaluation.slices, *gate.slices]))
    if not by:
        return []
    from loraflow.evaluation.slices import slice_scores

    refs = {"base": result.base_scores, "tuned": result.tuned_scores, "champion": result.champion_scores}
    try:
        tables = {name: heldout_scores(workspace, ref) for name, ref in refs.items() if ref is not None}
        fields = read_field_values(workspace, result)
    except CorruptArtifact as failure:
        log.warning("the scores of slices are missing. %s", failure)
        return []
    guarded = [name for margins in gate.slices.values() for name in margins]
    metrics = list(dict.fromkeys([gate.primary, *gate.guards, *guarded]))
    return slice_scores(tables, by, metrics, confidence=recipe.evaluation.confidence, fields=fields)


def read_general_guards(workspace: Workspace, result: PipelineResult) -> list[GeneralGuard]:
    """Return what gate.forgetting asks for; nothing if it is not set.

    Raises:
        CorruptArtifact: scores are damaged; they are quarantined by now.
    """
    margins, store = workspace.recipe.gate.forgetting_margins, workspace.store
    if not margins:
        return []
    from loraflow.evaluation.general import TABLES
    from loraflow.evaluation.guards import SCORES, general_guards

    sets = {SCORES[score][0] for score in margins}
    tables = {
        model: {rows: read_table(store, ref, TABLES[rows]) for rows in sets} for model, ref in result.general.items()
    }
    return general_guards(margins, tables.pop("tuned"), tables)


def require_general_comparable(guards: Sequence[GeneralGuard]) -> None:
    """Check scores on general rows before a look is spent on them.

    Raises:
        BadData: they cannot be compared; see `require_comparable`. The message names general rows, and how to score them.
    """
    from loraflow.evaluation.gate import require_comparable

    for guard in guards:
        try:
            require_comparable(guard.challenger, guard.others, {guard.metric})
        except BadData as failure:
            raise BadData(
                failure.what,
                where=f"{failure.where} on general rows",
                expected=failure.expected,
                got=failure.got,
                next_step="score them again with one protocol: `loraflow run RECIPE --force score_general`",
            ) from failure
