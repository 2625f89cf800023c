"""The flow finetune: train, merge, evaluate, gate, register.

loraflow run configs/quickstart.yaml
"""

# No `from __future__ import annotations`: Prefect loads a served flow from its file, where it cannot look up names in text.

import logging
from collections.abc import Iterator
from types import TracebackType

from pydantic import JsonValue

from loraflow.execution.workspace import PipelineResult, Registration
from loraflow.failures import CorruptArtifact, DamagedLog, Failure
from loraflow.flows.parameters import (
    NO_OVERRIDES,
    NO_SETTINGS,
    NO_STAGES,
    THE_ONLY_RECIPE,
    Overrides,
    RecipeName,
    Settings,
    StageName,
    flow,
)
from loraflow.flows.pipeline import pipeline
from loraflow.registry.runs import RunSummary
from loraflow.tasks.approval import ask_for_approval, refuse_without_deployment
from loraflow.tasks.events import announce_decision
from loraflow.tasks.gate import gate
from loraflow.tasks.register import publish, register
from loraflow.tasks.report import publish_report
from loraflow.tasks.run import Run, open_run, run_name
from loraflow.tasks.run_record import set_publication, set_summary

log = logging.getLogger("loraflow")
MAX_REPAIRS = 5


@flow(name="finetune", flow_run_name=run_name, validate_parameters=True)
def finetune(
    recipe: RecipeName = THE_ONLY_RECIPE,
    overrides: Overrides = NO_OVERRIDES,
    force: list[StageName] = NO_STAGES,
    approval: bool = False,
    settings: Settings = NO_SETTINGS,
) -> dict[str, JsonValue]:
    """Fine-tune a model by a recipe, and promote it if it is better than base and champion.

    Args:
        recipe: Name of a recipe in configs/, or a path. Empty: the only recipe of configs/.
        overrides: Changes to the recipe, for this run only. Empty fields keep the recipe's values.
        force: Recompute these stages even if cached.
        approval: Require manual approval before promotion.
        settings: Any other key of the recipe, such as {"evaluation.max_rows": 50}.
    """
    if approval:
        refuse_without_deployment()
    with open_run(recipe, {**settings, **overrides.settings()}, list(force)) as run:
        for attempt in repairs(run):
            with attempt:
                result = pipeline(run)
                registration = decide_and_register(run, result, approval)
        return publish_and_report(run, result, registration).model_dump(mode="json")


def decide_and_register(run: Run, result: PipelineResult, approval: bool) -> Registration:
    """Decide whether the new model replaces the champion, and write a promotion into the log."""
    decision = gate(run.workspace, result)
    if approval:
        decision = ask_for_approval(run, result, decision)
    return register(run.workspace, result, decision)


def publish_and_report(run: Run, result: PipelineResult, registration: Registration) -> RunSummary:
    """Announce the decision, upload a promoted model if the recipe says so, and write the report."""
    announce_decision(run.workspace.recipe.register_.model, registration)
    set_summary(run, result, registration)
    published = publish(run, result)
    summary = set_publication(run, published)
    publish_report(run, result, registration.decision, summary)
    return summary


class Attempt:
    """A block that may find a damaged artifact. The artifact is quarantined by then, so the next lookup misses it."""

    succeeded = False

    def __enter__(self) -> None:
        """Begin the block."""

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> bool:
        """End the block. A damaged artifact is logged; every other error is raised."""
        self.succeeded = error is None
        if not isinstance(error, CorruptArtifact) or isinstance(error, DamagedLog):  # nothing recomputes a log
            return False
        log.warning("%s", error)
        return True


def repairs(run: Run) -> Iterator[Attempt]:
    """Yield attempts until one succeeds, as tenacity does. Each recomputes what the one before it found damaged.

    Raises:
        DamagedLog: the promotion log is damaged, or gone since the attempt before.
        Failure: artifacts were damaged again and again.
    """
    for _ in range(MAX_REPAIRS):
        run.workspace.log.entries()  # before hours of training; the store may be gone since
        attempt = Attempt()
        yield attempt
        if attempt.succeeded:
            return
    raise Failure(
        f"Artifacts were damaged {MAX_REPAIRS} times in one run.",
        where=run.workspace.store.uri,
        next_step="check the disk; `loraflow verify --deep` checks the whole store",
    )
