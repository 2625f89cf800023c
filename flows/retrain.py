"""Retrain by schedule, or when a dataset changes: run a recipe on the newest dataset of a branch.

A run that finds nothing new ends within seconds, in a state named UpToDate.
"""

# No `from __future__ import annotations`: Prefect loads a served flow from its file, where it cannot look up names in text.

from typing import Annotated

from prefect.client.schemas.objects import State
from prefect.states import Completed
from pydantic import Field, JsonValue

from loraflow.data.checks.check_report import why_wait
from loraflow.data.versions.git_branch import newest_settings
from loraflow.flows.finetune import decide_and_register, publish_and_report, repairs
from loraflow.flows.parameters import NO_SETTINGS, THE_ONLY_RECIPE, RecipeName, Settings, flow
from loraflow.flows.pipeline import pipeline
from loraflow.registry.runs import RunSummary
from loraflow.tasks.approval import refuse_without_deployment
from loraflow.tasks.drift import compare_data
from loraflow.tasks.report import publish_waiting
from loraflow.tasks.run import Run, open_run, run_name
from loraflow.tasks.stages import check_dataset, version_dataset


@flow(name="retrain", flow_run_name=run_name, validate_parameters=True)
def retrain(
    recipe: RecipeName = THE_ONLY_RECIPE,
    branch: str = "main",
    approval: bool = False,
    settings: Settings = NO_SETTINGS,
    min_changed_rows: Annotated[int, Field(ge=0)] = 0,
    min_shift: Annotated[float, Field(ge=0, le=1)] = 0.0,
) -> dict[str, JsonValue] | State[dict[str, JsonValue]]:
    """Run a recipe on the newest dataset of a branch, and promote the model if it beats the champion.

    Args:
        recipe: Name of a recipe in configs/, or a path. Empty: the only recipe of configs/.
        branch: Git branch to read the .dvc file from. If the branch of `origin` has newer commits, they are used.
        approval: Require manual approval before promotion.
        settings: Any other key of the recipe, such as {"evaluation.max_rows": 50}.
        min_changed_rows: Train only if at least this many training rows were added, removed or edited since the champion.
        min_shift: Train only if the training rows shifted at least this much, from 0 to 1. If both are set, one is enough.
    """
    if approval:
        refuse_without_deployment()
    with open_run(recipe, settings, [], lambda read: newest_settings(read.data, branch)) as run:
        for attempt in repairs(run):
            with attempt:
                if min_changed_rows or min_shift:  # before anything is trained
                    rows = check_dataset(run, dataset=version_dataset(run))
                    run.drift = compare_data(run.workspace, rows)
                wait = why_wait(run.drift, min_changed_rows, min_shift)
                if not wait:
                    result = pipeline(run)
                    run.drift = run.drift or compare_data(run.workspace, result.rows)
                    registration = decide_and_register(run, result, approval)
        if wait:
            publish_waiting(run, wait)
            return Completed(name="WaitsForData", message=wait, data=waiting(run))
        summary = publish_and_report(run, result, registration)
    document = summary.model_dump(mode="json")
    if is_news(summary):
        return document
    return Completed(name="UpToDate", message=why_up_to_date(summary), data=document)


def waiting(run: Run) -> dict[str, JsonValue]:
    """Return the document of a run that waits for more data: its stages so far, and what changed since the champion."""
    stages = list(run.stages.values())
    return RunSummary(run=run.id, recipe=run.workspace.recipe.name, stages=stages, drift=run.drift).model_dump(
        mode="json"
    )


def is_news(summary: RunSummary) -> bool:
    """Return whether a run computed or decided anything."""
    decided = summary.decision is not None and summary.decision.verdict != "unchanged"
    return decided or any(stage.state != "cached" for stage in summary.stages)


def why_up_to_date(summary: RunSummary) -> str:
    """Return why there was nothing to do."""
    reasons = summary.decision.reasons if summary.decision else []
    return f"Every stage is cached, and {'; '.join(reasons)}."
