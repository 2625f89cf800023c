"""Run a stage on this machine, for a run of this machine or of another one."""

from __future__ import annotations

from loraflow.config.stage_configs import StageConfig
from loraflow.execution.launcher import run_job
from loraflow.job import Job
from loraflow.store import Ref, Store
from loraflow.tasks.gpu_lease import gpu_lease
from loraflow.tasks.progress import ProgressArtifact


def run_here(
    job: Job[StageConfig], store: Store, label: str, *, force: bool = False, run_started: float | None = None
) -> Ref:
    """Run a job in a worker process of this machine. Hold the GPU meanwhile, and show the progress in the UI."""
    with gpu_lease(job):
        return run_job(job, store, ProgressArtifact(label).show_figures, force=force, run_started=run_started)
