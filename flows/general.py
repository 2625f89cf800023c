"""Read general rows before the training, and score models on them: what a model has forgotten (`evaluation.general`).

With `gate.seeds`, only the model of the recipe's own seed is scored, because only that model can be registered.
"""

from __future__ import annotations

from loraflow.store import Ref
from loraflow.tasks.limits import check_general_rows
from loraflow.tasks.run import Run
from loraflow.tasks.stages import check_general, score_general


def read_general_rows(run: Run, rows: Ref) -> Ref | None:
    """Return the general rows, which must be no training rows; None if the recipe names none."""
    if not run.workspace.recipe.scores_general:
        return None
    general = check_general(run, rows=rows)
    check_general_rows(run.workspace, general)
    return general


def score_on_general_rows(run: Run, general: Ref | None, **models: Ref | None) -> dict[str, Ref]:
    """Return the scores of models by name (base, tuned, champion), without models that do not exist."""
    if general is None:
        return {}
    return {
        name: score_general(run, model=model, general=general, label=f"score_general {name}")
        for name, model in models.items()
        if model is not None
    }
