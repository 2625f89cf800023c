"""The flow: fine-tune, evaluate, merge, gate, register.

loraflow run configs/quickstart.yaml
"""

from __future__ import annotations

from prefect import flow
from pydantic import JsonValue

from loraflow.flows.parameters import NO_OVERRIDES, NO_SETTINGS, NO_STAGES, Overrides, RecipeName, Settings, StageName
from loraflow.flows.pipeline import pipeline
from loraflow.registry.runs import RunSummary
from loraflow.tasks.approval import ask_for_approval, refuse_without_deployment
from loraflow.tasks.events import announce_decision
from loraflow.tasks.gate import gate
from loraflow.tasks.publish import publish
from loraflow.tasks.register import register
from loraflow.tasks.report import publish_report
from loraflow.tasks.run import Run, open_run
from loraflow.tasks.run_name import run_name


@flow(name="finetune", flow_run_name=run_name, validate_parameters=True)
def finetune(
    recipe: RecipeName = "quickstart",
    overrides: Overrides = NO_OVERRIDES,
    force: list[StageName] = NO_STAGES,
    approval: bool = False,
    settings: Settings = NO_SETTINGS,
) -> dict[str, JsonValue]:
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
        return make_model(run, approval).model_dump(mode="json")


def make_model(run: Run, approval: bool) -> RunSummary:
    """Run the pipeline, decide, register, publish, report."""
    result = run.until_intact(pipeline)
    decision = gate(run.workspace, result)
    if approval:
        decision = ask_for_approval(run, result, decision)
    registration = register(run.workspace, result, decision)
    announce_decision(run.workspace.recipe.register_.model, registration)
    run.summarize(result, registration)
    published = publish(run, result)
    summary = run.keep_summary(published)
    publish_report(run, result, registration.decision, summary)
    return summary
