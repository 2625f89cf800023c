"""Run single stages without Prefect, for commands that need one artifact, such as `loraflow evaluate`."""

import logging
from pathlib import Path

from loraflow.config import Recipe
from loraflow.execution.cache import look_up
from loraflow.execution.deal import deal_for_scores
from loraflow.execution.launcher import run_job
from loraflow.execution.workspace import Workspace
from loraflow.failures import CorruptArtifact
from loraflow.serving.models import Model, find_model
from loraflow.stages import CHECK_DATASET, DEAL_ROWS, EVALUATE, RESOLVE_BASE, VERSION_DATASET, Stage
from loraflow.store import Ref, require_intact

log = logging.getLogger("loraflow")


def run_stage(workspace: Workspace, stage: Stage, seed: int | None = None, /, **inputs: Ref) -> Ref:
    """Return a stage's artifact: from the store, or computed by a worker process of this process.

    Args:
        seed: the training seed, if it is not the recipe's own.
    """
    job, store = workspace.job(stage, inputs, seed), workspace.store
    found = look_up(store, job).ref
    if found is not None:
        return found
    for ref in inputs.values():
        require_intact(store, ref)
    return run_job(job, store)


def intact_result(workspace: Workspace, stage: Stage, **inputs: Ref) -> Ref:
    """Run a stage if it is not cached, and hash its result, for callers that read the files without a stage.

    A damaged artifact is moved to the quarantine, and computed again.

    Raises:
        CorruptArtifact: it is damaged again.
    """
    ref = run_stage(workspace, stage, **inputs)
    try:
        require_intact(workspace.store, ref, workspace.memo)
    except CorruptArtifact as failure:
        log.warning("%s", failure)
        ref = run_stage(workspace, stage, **inputs)
        require_intact(workspace.store, ref, workspace.memo)
    return ref


def score_model(recipe: Recipe, model: str) -> tuple[Workspace, Model, Ref]:
    """Score a model (see `loraflow.serving.models`) on the held-out rows of a recipe.

    Returns:
        The workspace whose store has the scores, the model, and its scores.
    """
    workspace = Workspace(recipe)
    with workspace.store.reader_lock():
        found = find_scorable_model(workspace, model)
        rows = run_stage(workspace, CHECK_DATASET, dataset=run_stage(workspace, VERSION_DATASET))
        workspace, ref = with_model(workspace, found)
        if ref is None:
            ref = run_stage(workspace, RESOLVE_BASE)
        if workspace.recipe.deals_rows:
            deal_for_scores(workspace, rows, ref)
            rows = run_stage(workspace, DEAL_ROWS, rows=rows)
        scores = run_stage(workspace, EVALUATE, model=ref, rows=rows)
        workspace.save()
    return workspace, found, scores


def find_scorable_model(workspace: Workspace, model: str) -> Model:
    """Return a model that can be scored.

    Raises:
        BadConfig: there is no such model, or it is an adapter that has not been merged.
    """
    found = find_model(workspace.store, model, memo=workspace.memo)
    found.refuse_unmerged("Evaluation")
    return found


def with_model(workspace: Workspace, model: Model) -> tuple[Workspace, Ref | None]:
    """Return the workspace to score a model in, and the model's artifact.

    A model that is only a folder has no artifact yet. The returned workspace has that folder as its base model, so that
    resolve_base computes the artifact.
    """
    if model.ref is not None:
        return workspace, model.ref
    return Workspace(with_base_folder(workspace.recipe, model.folder)), None


def with_base_folder(recipe: Recipe, folder: Path) -> Recipe:
    """Return a recipe whose base is a model's folder, to score that model with the recipe's evaluation settings."""
    document = recipe.model_dump(by_alias=True)
    document["base"] |= {"model": str(folder), "revision": None, "repack": None, "quantization": None}
    return Recipe.model_validate(document)
