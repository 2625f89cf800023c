"""Walk parts of the DAG without Prefect: for commands that want one artifact, such as `loraflow evaluate`."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from loraflow.config import Recipe
from loraflow.failures import BadConfig, CorruptArtifact
from loraflow.launch import run_job
from loraflow.plan import Jobs
from loraflow.registry import PromotionLog
from loraflow.registry.log import models
from loraflow.store import Ref, Store


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
            problems = store.fetch(ref)
            if problems:
                store.set_aside(ref, problems)
                raise CorruptArtifact(
                    f"{ref} was damaged.", got="; ".join(problems[:3]), next_step="run the command again"
                )
        return run_job(job, store)


def find_model(store: Store, model: str) -> tuple[Path, Ref | None]:
    """Return the folder of a model: `champion`, `champion:NAME`, a run's id, or a path; and its ref, if it has one.

    Raises:
        BadConfig: there is no such model.
    """
    if model.split(":")[0] == "champion":
        name = model.partition(":")[2] or only_model(store)
        head = PromotionLog(store, name).head()
        if head is None:
            raise BadConfig(f"No champion of {name} yet.", next_step="loraflow registry --model NAME")
        return store.path(head.merged), head.merged
    if re.fullmatch(r"\d{8}-\d{6}-[0-9a-f]{6}", model):
        import json

        record = store.read_document(f"runs/{model}.json")
        if record is not None:
            for stage in json.loads(record)["stages"]:
                if stage["stage"] == "merge" and (ref := store.find("merge", stage["fingerprint"])):
                    return store.path(ref), ref
        raise BadConfig("This run has no merged model in the store.", where=model, next_step="loraflow runs")
    folder = Path(model)
    if (folder / "config.json").exists():
        return folder, None
    raise BadConfig("There is no such model.", where=model, expected="champion, a run's id, or a model's folder")


def only_model(store: Store) -> str:
    """Return the one name in the registry.

    Raises:
        BadConfig: there is none, or more than one.
    """
    names = models(store)
    if len(names) == 1:
        return names[0]
    raise BadConfig(
        "Which champion?" if names else "The registry is empty.",
        expected=" or ".join(f"champion:{name}" for name in names) or "a promoted model",
        next_step="loraflow run configs/quickstart.yaml" if not names else f"loraflow chat champion:{names[0]}",
    )


def open_path_as_base(recipe: Recipe, folder: Path) -> dict[str, Any]:
    """Return a recipe's document with another base, to score a model's folder by the recipe's protocol."""
    document = recipe.model_dump(by_alias=True)
    document["base"] |= {"model": str(folder), "revision": None, "repack": None, "quantization": None}
    return document
