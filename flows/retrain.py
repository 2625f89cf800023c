"""Retraining, by schedule or when a dataset changes: the newest dataset of a branch through the whole flow.

Nothing new is said in seconds, by a state of the name UpToDate.
"""

from __future__ import annotations

from typing import Any

from prefect import flow
from prefect.client.schemas.objects import State
from prefect.states import Completed

from loraflow.config import load_recipe
from loraflow.data.git_branch import newest
from loraflow.flows.finetune import make_model
from loraflow.flows.parameters import NO_SETTINGS, RecipeName
from loraflow.tasks.approval import refuse_without_deployment
from loraflow.tasks.run import open_run
from loraflow.tasks.run_name import run_name


@flow(name="retrain", flow_run_name=run_name, validate_parameters=True)
def retrain(
    recipe: RecipeName = "quickstart",
    branch: str = "main",
    approval: bool = False,
    settings: dict[str, Any] = NO_SETTINGS,
) -> dict[str, Any] | State:
    """Run a recipe on the newest dataset of a branch, and promote the model if it beats the champion.

    Args:
        recipe: One of configs/, or a path.
        branch: The git branch whose data.dvc counts, at the remote `origin` or here, whichever is ahead.
        approval: Wait for a person's yes before a model becomes the champion.
        settings: Any other key of the recipe, such as {"evaluation.max_rows": 50}.
    """
    if approval:
        refuse_without_deployment()
    found = newest(load_recipe(recipe, settings).data.repo, branch)
    with open_run(recipe, {**settings, **found.settings()}, []) as run:
        summary = make_model(run, approval)
    return summary if is_news(summary) else Completed(name="UpToDate", message=why_not(summary), data=summary)


def is_news(summary: dict[str, Any]) -> bool:
    """Tell whether a run computed or decided anything."""
    return summary["decision"]["verdict"] != "unchanged" or any(one["state"] != "cached" for one in summary["stages"])


def why_not(summary: dict[str, Any]) -> str:
    """Say why there was nothing to do."""
    return f"Every stage is cached, and {'; '.join(summary['decision']['reasons'])}."
