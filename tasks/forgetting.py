"""The guards of gate.forgetting, with the scores on general rows that they compare."""

from __future__ import annotations

import io
from collections.abc import Sequence
from typing import TYPE_CHECKING

from loraflow.execution.results import PipelineResult
from loraflow.execution.workspace import Workspace
from loraflow.failures import BadData
from loraflow.store import read_intact

if TYPE_CHECKING:
    from loraflow.evaluation.guards import GeneralGuard


def read_general_guards(workspace: Workspace, result: PipelineResult) -> list[GeneralGuard]:
    """Return what gate.forgetting asks for; nothing if it is not set. The bytes that are parsed are those that were hashed.

    Raises:
        CorruptArtifact: scores are damaged; they are quarantined by now.
    """
    margins, store = workspace.recipe.gate.forgetting_margins, workspace.store
    if not margins:
        return []
    import pandas as pd

    from loraflow.evaluation.general import TABLES
    from loraflow.evaluation.guards import SCORES, general_guards

    sets = {SCORES[score][0] for score in margins}
    tables = {
        model: {rows: pd.read_parquet(io.BytesIO(read_intact(store, ref, TABLES[rows]))) for rows in sets}
        for model, ref in result.general.items()
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
