"""Walk parts of the DAG without Prefect: for commands that want one artifact, such as `loraflow evaluate`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from loraflow.config import Recipe
from loraflow.execution.launcher import run_job
from loraflow.execution.plan import Jobs
from loraflow.store import Ref, require_intact


class Direct:
    """Runs stages in this process's own workers; each is taken from the store where it is there."""

    def __init__(self, recipe: Recipe):
        self.jobs = Jobs(recipe)

    def stage(self, name: str, label: str = "", /, **inputs: Ref) -> Ref:
        """Run a stage, or take it from the store."""
        job, store = self.jobs.job(name, inputs), self.jobs.store
        found = store.find(name, job.fingerprint)
        if found is not None:
            return found
        for ref in inputs.values():
            require_intact(store, ref)
        return run_job(job, store)


def score_model(walk: Any, model: str) -> tuple[Path, Ref]:
    """Score a model (see `loraflow.serving.models`) on the held-out rows of a walk's recipe; return its folder and scores.

    `walk` runs stages, through Prefect or without; its `jobs` become those of another base where the model is a folder.
    """
    from loraflow.serving.models import find_model

    found = find_model(walk.jobs.store, model)
    found.refuse_unmerged("Evaluation")
    rows = walk.stage("check_dataset", dataset=walk.stage("version_dataset"))
    ref = found.ref
    if ref is None:
        walk.jobs = Jobs(Recipe.model_validate(open_path_as_base(walk.jobs.recipe, found.folder)))
        ref = walk.stage("resolve_base")
    return found.folder, walk.stage("evaluate", model=ref, rows=rows)


def open_path_as_base(recipe: Recipe, folder: Path) -> dict[str, Any]:
    """Return a recipe's document with another base, to score a model's folder by the recipe's protocol."""
    document = recipe.model_dump(by_alias=True)
    document["base"] |= {"model": str(folder), "revision": None, "repack": None, "quantization": None}
    return document
