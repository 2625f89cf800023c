"""The flow finetune: train, merge, evaluate, gate, register.

loraflow run configs/quickstart.yaml
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import TypeVar

from prefect import flow
from pydantic import JsonValue

from loraflow.execution.results import PipelineResult, Registration
from loraflow.failures import CorruptArtifact, DamagedLog, Failure
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
from loraflow.tasks.run_record import set_publication, set_summary

log = logging.getLogger("loraflow")
MAX_REPAIRS = 5
T = TypeVar("T")


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
        recipe: Name of a recipe in configs/, or a path.
        overrides: Changes to the recipe, for this run only. Empty fields keep the recipe's values.
        force: Recompute these stages even if cached.
        approval: Require manual approval before promotion.
        settings: Any other key of the recipe, such as {"evaluation.max_rows": 50}.
    """
    if approval:
        refuse_without_deployment()
    with open_run(recipe, {**settings, **overrides.settings()}, list(force)) as run:
        return run_and_promote(run, approval).model_dump(mode="json")


def run_and_promote(run: Run, approval: bool) -> RunSummary:
    """Run the pipeline, decide, register, publish, report."""
    result, registration = until_intact(run, lambda: run_and_register(run, approval))
    announce_decision(run.workspace.recipe.register_.model, registration)
    set_summary(run, result, registration)
    published = publish(run, result)
    summary = set_publication(run, published)
    publish_report(run, result, registration.decision, summary)
    return summary


def run_and_register(run: Run, approval: bool) -> tuple[PipelineResult, Registration]:
    """Run the pipeline, decide, and register. Each of them can find a damaged artifact; nothing is registered then."""
    result = pipeline(run)
    decision = gate(run.workspace, result)
    if approval:
        decision = ask_for_approval(run, result, decision)
    return result, register(run.workspace, result, decision)


def until_intact(run: Run, step: Callable[[], T]) -> T:
    """Do a step. If an artifact turns out to be damaged, do it again: only the damaged one is recomputed.

    Raises:
        Failure: artifacts were damaged again and again.
    """
    for _ in range(MAX_REPAIRS):
        try:
            return step()
        except DamagedLog:  # nothing recomputes it
            raise
        except CorruptArtifact as failure:  # the artifact is quarantined by now, so the next lookup misses it
            log.warning("%s", failure)
    raise Failure(
        f"Artifacts were damaged {MAX_REPAIRS} times in one run.",
        where=run.workspace.store.uri,
        next_step="check the disk; `loraflow verify --deep` checks the whole store",
    )
