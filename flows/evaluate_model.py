"""Scores of a model on a recipe's held-out rows. (A file named evaluate.py would shadow the library of that name.)"""

from __future__ import annotations

from typing import Any

from prefect import flow
from prefect.runtime import flow_run

from loraflow.execution.direct import score_model
from loraflow.flows.parameters import NO_SETTINGS, RecipeName
from loraflow.tasks.report import publish_scores
from loraflow.tasks.run import open_run


def _run_name() -> str:
    return f"{flow_run.parameters['model']} by {flow_run.parameters['recipe']}"


@flow(name="evaluate", flow_run_name=_run_name, validate_parameters=True)
def evaluate(
    model: str = "champion", recipe: RecipeName = "quickstart", settings: dict[str, Any] = NO_SETTINGS
) -> dict[str, Any]:
    """Score a model on the held-out rows of a recipe, by its protocol.

    Args:
        model: The champion (or champion:NAME), the id of a run, or the path of a model's folder.
        recipe: One of configs/, or a path.
        settings: Any other key of the recipe, such as {"evaluation.max_rows": 50}.
    """
    with open_run(recipe, settings, []) as run:
        folder, scores = score_model(run, model)
        return publish_scores(run, model, folder, scores)
