"""Run a stage on this machine, for a run of this machine or of another one."""

from __future__ import annotations

import logging
import re
import time
from uuid import UUID

from prefect.artifacts import create_progress_artifact, update_progress_artifact
from pydantic import JsonValue

from loraflow.config.stage_configs import StageConfig
from loraflow.execution.launcher import run_job
from loraflow.job import Job
from loraflow.store import Ref, Store
from loraflow.tasks.gpu_lease import gpu_lease


def run_here(
    job: Job[StageConfig], store: Store, label: str, *, force: bool = False, run_started: float | None = None
) -> Ref:
    """Run a job in a worker process of this machine. Hold the GPU meanwhile, and show the progress in the UI."""
    with gpu_lease(job):
        return run_job(job, store, ProgressArtifact(label).show_figures, force=force, run_started=run_started)


log = logging.getLogger("loraflow")

UPDATE_EVERY = 5.0  # seconds between updates


class ProgressArtifact:
    """The progress of one label."""

    def __init__(self, label: str):
        self.label = label
        self.artifact: UUID | None = None
        self.updated = 0.0

    def show_figures(self, figures: dict[str, JsonValue]) -> None:
        """Show a worker's figures: how much is done of how much, and for training loss, speed and time left."""
        done = figures.get("step", figures.get("done", figures.get("tensors")))
        total, loss = figures.get("total"), figures.get("loss")
        speed, left = figures.get("tokens_per_second"), figures.get("eta_seconds")
        if not isinstance(done, int) or not isinstance(total, int) or not total:
            return
        details = []
        if isinstance(loss, int | float):
            details.append(f"loss {loss:.4f}")
        if isinstance(speed, int | float) and speed:
            details.append(f"{speed:,.0f} tokens/s")
        if isinstance(left, int | float):
            details.append(f"{left:.0f} s left")
        self.show(done, total, *details)

    def show(self, done: int, total: int, *details: str) -> None:
        """Show how much is done. Most calls do nothing: updates are `UPDATE_EVERY` seconds apart, but for the last."""
        if time.monotonic() - self.updated < UPDATE_EVERY and done < total:
            return
        self.updated = time.monotonic()
        text, percent = ", ".join([f"{self.label} {done}/{total}", *details]), 100.0 * done / total
        log.info("%s", text)
        if self.artifact is None:
            key = re.sub(r"[^a-z0-9]+", "-", self.label.lower()) + "-progress"
            created = create_progress_artifact(progress=percent, key=key, description=text)
            assert isinstance(created, UUID)  # a coroutine only where an event loop runs
            self.artifact = created
        else:
            update_progress_artifact(self.artifact, progress=percent, description=text)  # type: ignore[unused-coroutine]
