"""The flow: fine-tune, evaluate, merge, gate, register.

loraflow run configs/quickstart.yaml
"""

from __future__ import annotations

from typing import Any

from prefect import flow

from loraflow.flows.parameters import AS_THE_RECIPE_SAYS, NO_SETTINGS, NO_STAGES, Overrides, RecipeName, StageName
from loraflow.flows.pipeline import pipeline
from loraflow.tasks.approval import ask_for_approval, refuse_without_deployment
from loraflow.tasks.decisions import gate, publish, register
from loraflow.tasks.events import announce_decision
from loraflow.tasks.report import publish_report
from loraflow.tasks.run import Run, open_run
from loraflow.tasks.run_name import run_name


@flow(name="finetune", flow_run_name=run_name, validate_parameters=True)
def finetune(
    recipe: RecipeName = "quickstart",
    overrides: Overrides = AS_THE_RECIPE_SAYS,
    force: list[StageName] = NO_STAGES,
    approval: bool = False,
    settings: dict[str, Any] = NO_SETTINGS,
) -> dict[str, Any]:
    """Fine-tune a model by a recipe, and promote it if it is better than base and champion.

    Args:
        recipe: One of configs/, or a path.
        overrides: What this run does differently.
        force: Stages to compute although they are cached.
        approval: Wait for a person's yes before a model becomes the champion.
        settings: Any other key of the recipe, such as {"evaluation.max_rows": 50}.
    """
    if approval:
        refuse_without_deployment()
    with open_run(recipe, {**settings, **overrides.settings()}, list(force)) as run:
        return make_model(run, approval)


def make_model(run: Run, approval: bool) -> dict[str, Any]:
    """Walk the DAG, decide, register, report."""
    made = run.until_whole(pipeline)
    decision = gate(run.jobs, made)
    if approval:
        ask_for_approval(run, made, decision)
    entry = register(run.jobs, made, decision)
    announce_decision(run.jobs.recipe.register_.model, decision, entry)
    summary = run.summary(made, decision, entry)
    summary["published"] = publish(run.jobs, made, summary)
    publish_report(run, made, summary)
    return summary
