"""Write a promotion into the log, unless another run was faster, and upload the promoted model if the recipe says so."""

from __future__ import annotations

import logging

from prefect import task
from prefect.cache_policies import NO_CACHE

from loraflow.evaluation.values import Decision
from loraflow.execution.workspace import PipelineResult, Registration, Workspace
from loraflow.failures import Failure
from loraflow.registry.log import HeadChanged, actor
from loraflow.registry.runs import Publication
from loraflow.store import require_intact, require_intact_in_store
from loraflow.tasks.run import Run
from loraflow.tasks.run_record import as_record

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


@task(name="publish", task_run_name="publish", cache_policy=NO_CACHE, persist_result=False)
def publish(run: Run, result: PipelineResult) -> Publication | None:
    """Upload the model once, if the recipe names a repository and the model is the champion.

    A failed upload does not undo the promotion: it is logged, and the next run tries again.
    """
    workspace = run.workspace
    rules, head, store = workspace.recipe.publish, workspace.log.head(), workspace.store
    if rules.repo is None or head is None or head.merged.digest != result.merged.digest:
        return None
    from loraflow.serving import publish as hub
    from loraflow.serving.models import Model

    model = Model(
        workspace.log.model,
        store.path(result.merged),
        ref=result.merged,
        adapter_ref=result.adapter,
        base=store.path(result.base),
        base_ref=result.base,
        run=as_record(run),
    )
    earlier = hub.find_publication(store, model, rules.repo, rules.what)
    if earlier is not None:
        return earlier
    try:
        if rules.what == "merged":  # `publish` itself requires an intact adapter
            require_intact(store, result.merged, workspace.memo)
        publication = hub.publish(store, model, rules.repo, what=rules.what, private=rules.private)
        log.info("published: %s", publication.url)
        return publication
    except Failure as failure:
        log.warning("%s is promoted, but not published. %s", workspace.log.model, failure)
        return Publication(repo=rules.repo, problem=failure.what)
