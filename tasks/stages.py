"""One Prefect task for each stage: a thin coat of key, retries and progress."""

from __future__ import annotations

import logging
import time
from typing import Any
from uuid import UUID

from prefect import task
from prefect.artifacts import create_progress_artifact, update_progress_artifact
from prefect.client.schemas.objects import State
from prefect.states import Completed
from prefect.tasks import Task

from loraflow.execution.launcher import run_job
from loraflow.failures import Failure
from loraflow.identity import short
from loraflow.job import Job
from loraflow.stages import STAGES
from loraflow.store import Ref, Store, open_store
from loraflow.tasks.cache import StageKey
from loraflow.tasks.gpu_lease import gpu_lease
from loraflow.tasks.placement import place

log = logging.getLogger("loraflow")

RETRIES = 2
RETRY_DELAYS: list[float] = [2, 30]  # seconds; what can be retried at all is preempted, killed or a network's fault
UPDATE_EVERY = 5.0  # seconds between updates of the progress artifact


def is_retryable(task: Task, task_run: Any, state: State) -> bool:
    """Tell whether a retry can help: the failure's class knows. A plain function: Prefect takes no other."""
    error = state.result(raise_on_failure=False)
    return isinstance(error, Failure) and error.retryable


def _stage_task(name: str) -> Task:
    @task(
        name=name,
        task_run_name="{label}",
        description=STAGES[name].function,
        cache_policy=StageKey(),
        result_serializer="json",
        retries=RETRIES,
        retry_delay_seconds=RETRY_DELAYS,
        retry_condition_fn=is_retryable,
    )
    def run_stage(job: Job, store: str, label: str, force: bool = False) -> Any:
        artifacts = open_store(store)
        ref = artifacts.find(job.stage, job.fingerprint)
        if ref is not None and not force:
            return Completed(name="Cached", message=_why_cached(artifacts, ref), data=ref)
        elsewhere = job.runtime.get("placement", {}).get(name)
        if elsewhere:
            return place(job, artifacts, label, elsewhere, force=force)
        return run_here(job, artifacts, label, force=force)

    return run_stage


def _why_cached(store: Any, ref: Ref) -> str:
    made = store.manifest(ref).provenance.get("started", "earlier")
    return (
        f"same inputs, settings and stage version as {short(ref.fingerprint)}, made {made} (digest {short(ref.digest)})"
    )


def run_here(job: Job, store: Store, label: str, *, force: bool = False) -> Ref:
    """Run a stage on this machine, and show how far it is."""
    with gpu_lease(job):
        return run_job(job, store, _Shown(label), force=force)


class _Shown:
    """A stage's progress as one artifact in the UI, updated now and then."""

    def __init__(self, label: str):
        self.label = label
        self.artifact: UUID | None = None
        self.last = 0.0

    def __call__(self, figures: dict[str, Any]) -> None:
        done = figures.get("step", figures.get("done", figures.get("tensors")))
        total = figures.get("total")
        if done is None or not total or (time.monotonic() - self.last < UPDATE_EVERY and done < total):
            return
        self.last = time.monotonic()
        text = self._text(figures, done, total)
        log.info("%s", text)
        percent = 100.0 * done / total
        if self.artifact is None:
            key = self.label.lower().replace(" ", "-").replace("_", "-") + "-progress"
            self.artifact = create_progress_artifact(progress=percent, key=key, description=text)  # type: ignore[assignment]
        else:
            update_progress_artifact(self.artifact, progress=percent, description=text)  # type: ignore[unused-coroutine]

    def _text(self, figures: dict[str, Any], done: int, total: int) -> str:
        parts = [f"{self.label} {done}/{total}"]
        if figures.get("loss") is not None:
            parts.append(f"loss {figures['loss']:.4f}")
        if figures.get("tokens_per_second"):
            parts.append(f"{figures['tokens_per_second']:,.0f} tokens/s")
        if figures.get("eta_seconds") is not None:
            parts.append(f"{figures['eta_seconds']:.0f} s left")
        return ", ".join(parts)


version_dataset = _stage_task("version_dataset")
check_dataset = _stage_task("check_dataset")
resolve_base = _stage_task("resolve_base")
tokenize = _stage_task("tokenize")
train = _stage_task("train")
merge = _stage_task("merge")
verify = _stage_task("verify")
evaluate = _stage_task("evaluate")

TASKS: dict[str, Task] = {
    one.name: one for one in (version_dataset, check_dataset, resolve_base, tokenize, train, merge, verify, evaluate)
}


def call(job: Job, store: Store, label: str, found: Ref | None, *, force: bool) -> Ref:
    """Run a stage's task and return the artifact; `found` is what the store had for it just now.

    The task looks into the store itself, and says why it is cached. A hit of Prefect's own would say nothing, never looks
    at the artifact, and another server has none.
    """
    made = TASKS[job.stage].with_options(refresh_cache=True)(job, store.uri, label, force)
    ref = made if isinstance(made, Ref) else found or store.find(job.stage, job.fingerprint)  # a hit gives a state
    assert ref is not None, f"{label} ended without an artifact"
    return ref
