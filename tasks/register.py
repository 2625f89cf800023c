"""Write a promotion into the log, unless another run was faster."""

from __future__ import annotations

import logging

from prefect import task
from prefect.cache_policies import NO_CACHE

from loraflow.evaluation.values import Decision
from loraflow.execution.results import PipelineResult, Registration
from loraflow.execution.workspace import Workspace
from loraflow.registry.log import HeadChanged, actor
from loraflow.store import require_intact_in_store

log = logging.getLogger("loraflow")
MOVED = "another run promoted a model in the meantime; run again to compare with that model"


@task(name="register", task_run_name="register", cache_policy=NO_CACHE, persist_result=False)
def register(workspace: Workspace, result: PipelineResult, decision: Decision) -> Registration:
    """Write a promotion into the log. Other verdicts write nothing.

    All files of the model and its adapter are hashed first, whatever was hashed before: the log names intact weights.
    If another run promoted a model first, this run ends undecided: the next run compares with that model.

    Raises:
        CorruptArtifact: the model or its adapter is damaged; it is quarantined by now, and nothing was written.
    """
    if decision.verdict != "promote":
        return Registration(decision)
    for ref in (result.merged, result.adapter):
        require_intact_in_store(workspace.store, ref, workspace.memo)
    seen = workspace.seen_head
    try:
        entry = workspace.log.append(
            seen,
            action="promote",
            merged=result.merged,
            adapter=result.adapter,
            inputs={
                "dataset": workspace.dataset.md5,
                "base": workspace.recipe.base.model,
                "recipe": workspace.recipe.name,
                **({} if decision.look is None else {"look": str(decision.look)}),
            },
            reasons=list(decision.reasons),
            actor=actor(),
        )
        return Registration(decision, entry.seq)
    except HeadChanged:
        log.warning("%s", MOVED)
        return Registration(decision.overruled("undecided", MOVED))
