"""What a run will do, before it does anything: jobs from a recipe, and a verdict for each.

`Jobs` builds jobs for whoever walks the DAG; `Planner` walks it without running, `tasks.run.Run` by running. The DAG
itself stands once, in `flows.pipeline`.
"""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, Protocol

from loraflow import identity
from loraflow.config import Recipe
from loraflow.failures import Failure
from loraflow.job import Job
from loraflow.registry import Entry, PromotionLog
from loraflow.stages import code_digest, make_job
from loraflow.store import LocalStore, Ref, Store, open_store
from loraflow.store.files import HashMemo


@dataclass(frozen=True)
class Unknown:
    """The artifact of a stage that has to run first."""

    stage: str


class Walker(Protocol):
    """Whoever walks the DAG: each call is one stage."""

    jobs: Jobs

    def stage(self, name: str, label: str = "", /, **inputs: Any) -> Any:
        """Do, or plan, a stage and return its artifact's ref; `label` tells apart stages that run several times."""

    def admit(self, what: str, ref: Any) -> None:
        """Stop here if a report is outside of the recipe's bounds."""

    def champion(self) -> Ref | None:
        """Return the model in use."""


class Jobs:
    """Builds a recipe's jobs, from what the outside world says: the dataset's md5, the base's content, the champion."""

    def __init__(self, recipe: Recipe):
        self.recipe = recipe
        self.store = open_store(recipe.runtime.store)
        self.log = PromotionLog(self.store, recipe.register_.model)
        self.memo = HashMemo(self.store.scratch / "hashes.json")
        self.seen: Entry | None = None

    @cached_property
    def dataset(self) -> dict[str, Any]:
        """What identifies the dataset. Dirt in the work tree is refused here, before every run."""
        from loraflow.data.version import locate

        return locate(self.recipe.data, self.memo)

    @cached_property
    def base(self) -> dict[str, Any]:
        """What identifies the base model."""
        from loraflow.base.resolve import locate

        return locate(self.recipe.base, self.memo)

    @cached_property
    def metric_modules(self) -> dict[str, str]:
        """The contents of the metrics' modules."""
        from loraflow.evaluation.metric_modules import identify

        return identify(self.recipe.evaluation.metrics, self.memo)

    def job(self, name: str, inputs: dict[str, Ref]) -> Job:
        """Build a stage's job."""
        known: dict[str, Any] = {}
        if name == "version_dataset":
            known = self.dataset
        elif name == "resolve_base":
            known = self.base
        elif name == "evaluate":
            known = {"metric_modules": self.metric_modules}
        return make_job(name, self.recipe, inputs, known)

    def champion(self) -> Ref | None:
        """Return the merged model in use, and remember the head of the log: the gate decides in sight of that one.

        Raises:
            Failure: its artifact is gone; nothing may be promoted without having been compared with it.
        """
        self.seen = self.log.head()
        if self.seen is None:
            return None
        if self.store.find("merge", self.seen.merged.fingerprint) != self.seen.merged and self.store.check(
            self.seen.merged
        ):
            raise Failure(
                "The champion's model is gone or damaged, so that nothing can be compared with it.",
                where=self.store.location(self.seen.merged),
                next_step="run the recipe that made it (`loraflow registry` names it), or `loraflow rollback --reason …`",
            )
        return self.seen.merged

    def save(self) -> None:
        """Keep the hashes that were learned."""
        self.memo.save()


@dataclass
class Verdict:
    """What will happen to a stage, and why."""

    label: str
    stage: str
    verdict: str  # cached | runs | depends
    why: list[str] = field(default_factory=list)
    fingerprint: str | None = None
    seconds: float | None = None  # that it took, when it ran, or the last time that it did


class Planner:
    """Walks the DAG without running anything. It imports neither torch nor prefect."""

    def __init__(self, jobs: Jobs, force: list[str]):
        self.jobs, self.force = jobs, force
        self.verdicts: list[Verdict] = []

    def stage(self, name: str, label: str = "", /, **inputs: Ref | Unknown) -> Ref | Unknown:
        """Judge a stage."""
        label = label or name
        waiting = [one.stage for one in inputs.values() if isinstance(one, Unknown)]
        if waiting:
            come = "come" if len(waiting) > 1 else "comes"
            reused = f"runs, or is reused if {' and '.join(waiting)} {come} out the same"
            self.verdicts.append(Verdict(label, name, "depends", [reused], seconds=self._last_time(name)))
            return Unknown(label)
        job = self.jobs.job(name, {key: ref for key, ref in inputs.items() if isinstance(ref, Ref)})
        store = self.jobs.store
        ref = store.find(name, job.fingerprint)
        if ref is not None and name not in self.force:
            manifest = store.manifest(ref)
            why: list[str] = []
            if manifest.provenance.get("code") != code_digest(name):
                why.append("made by other code of the same stage version; --force makes it again")
            self.verdicts.append(
                Verdict(label, name, "cached", why, job.fingerprint, manifest.provenance.get("seconds"))
            )
            return ref
        why = ["--force"] if name in self.force else explain_miss(store, job)
        self.verdicts.append(Verdict(label, name, "runs", why, job.fingerprint, self._last_time(name)))
        return Unknown(label)

    def admit(self, what: str, ref: Ref | Unknown) -> None:
        """Plans go on."""

    def champion(self) -> Ref | None:
        """Return the model in use."""
        try:
            return self.jobs.champion()
        except Failure as failure:
            self.verdicts.append(Verdict("evaluate champion", "evaluate", "runs", [f"will fail: {failure.what}"]))
            return None

    def memory(self) -> tuple[float, float] | None:
        """Return the bytes that training takes at least and at full speed; None where the base's shape is not at hand."""
        from loraflow.training import memory

        recipe, config = self.jobs.recipe, self._base_config()
        shape = memory.shape_of(json.loads(config.read_text(encoding="utf-8"))) if config else None
        if shape is None:
            return None
        training = recipe.training_config
        width = 2 if training.bf16 or training.fp16 else {"float32": 4}.get(recipe.base.dtype, 2)
        weights = recipe.base.quantization or recipe.base.dtype
        return memory.needed(shape, weights, recipe.peft_config.r, training.max_length, width)

    def _base_config(self) -> Path | None:
        """Return the base's config.json: of its artifact in a local store, or of the folder that it is taken from."""
        store, known = self.jobs.store, self.jobs.base
        ref = store.find("resolve_base", self.jobs.job("resolve_base", {}).fingerprint)
        places = [store.path(ref)] if ref is not None and isinstance(store, LocalStore) else []
        if "folder" in known["origin"]:
            places.append(Path(known["origin"]["folder"]))
        return next((place / "config.json" for place in places if (place / "config.json").exists()), None)

    def _last_time(self, name: str) -> float | None:
        newest = self.jobs.store.newest(name)
        return newest.provenance.get("seconds") if newest else None


def explain_miss(store: Store, job: Job) -> list[str]:
    """Say why a job is not in the store: what differs from the nearest one that is."""
    remains = store.previous_state(job.stage, job.fingerprint)
    if remains is not None:
        return ["its artifact is incomplete or was changed" if remains == "damaged" else "its artifact was removed"]
    nearest = store.newest_payload(job.stage, job.payload)
    if nearest is None:
        return ["never made in this store"]
    return identity.explain(nearest, job.payload) or ["its artifact is gone"]
