"""Upload the champion to the Hugging Face hub, if the recipe asks for it."""

from __future__ import annotations

import logging

from prefect import task
from prefect.cache_policies import NO_CACHE

from loraflow.execution.results import PipelineResult
from loraflow.failures import Failure
from loraflow.registry.runs import Publication
from loraflow.store import require_intact
from loraflow.tasks.run import Run
from loraflow.tasks.run_record import as_record

log = logging.getLogger("loraflow")


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
