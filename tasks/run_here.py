"""Run a stage on this machine, for a run of this machine or of another one.

One stage at a time uses a host's GPU: by a concurrency limit on the server, or by a lock file without a server.
"""

from __future__ import annotations

import logging
import os
import re
import socket
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from uuid import UUID

from prefect.artifacts import create_progress_artifact, update_progress_artifact
from prefect.client.orchestration import SyncPrefectClient, get_client
from prefect.client.schemas.actions import GlobalConcurrencyLimitCreate
from prefect.concurrency.sync import concurrency
from prefect.exceptions import ObjectAlreadyExists, ObjectNotFound
from prefect.settings import get_current_settings
from pydantic import JsonValue

from loraflow.config.stage_configs import StageConfig
from loraflow.execution.launcher import run_job
from loraflow.job import Job
from loraflow.stages import STAGES
from loraflow.store import Ref, Store
from loraflow.store.lock import flock

log = logging.getLogger("loraflow")


def run_here(
    job: Job[StageConfig], store: Store, label: str, *, force: bool = False, run_started: float | None = None
) -> Ref:
    """Run a job in a worker process of this machine. Hold the GPU meanwhile, and show the progress in the UI."""
    with gpu_lease(job):
        return run_job(job, store, ProgressArtifact(label).show_figures, force=force, run_started=run_started)


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


def limit_name() -> str:
    """Return the limit's name: the host, and its devices if CUDA_VISIBLE_DEVICES selects some of them."""
    devices = os.environ.get("CUDA_VISIBLE_DEVICES", "").replace(",", "-")
    return f"gpu-{socket.gethostname()}{f'-{devices}' if devices else ''}"


def create_limit(client: SyncPrefectClient) -> bool:
    """Create this host's limit of one stage at a time, if it does not exist; return whether it was created."""
    try:
        client.read_global_concurrency_limit_by_name(limit_name())
        return False
    except ObjectNotFound:
        with suppress(ObjectAlreadyExists):  # another process was faster
            client.create_global_concurrency_limit(GlobalConcurrencyLimitCreate(name=limit_name(), limit=1))
        return True


def _log_waiting(client: SyncPrefectClient) -> None:
    """Log that the limit has no free slot. Prefect itself logs nothing, and waits for ever if the limit was set to 0."""
    limit = client.read_global_concurrency_limit_by_name(limit_name())
    if not limit.active or limit.active_slots < limit.limit:
        return
    if limit.limit == 0:
        log.warning(
            "the limit %s on the server is 0, so no stage may use this host's GPU, and this stage waits. To raise it: "
            "prefect gcl update %s --limit 1",
            limit.name,
            limit.name,
        )
    else:
        log.info("waits for another stage to release this host's GPU (limit %s: prefect gcl ls)", limit.name)


def has_gpu() -> bool:
    """Return whether the kernel shows an NVIDIA device. Asking torch would take seconds, to import it."""
    return any(Path("/dev").glob("nvidia[0-9]*"))


@contextmanager
def gpu_lease(job: Job[StageConfig]) -> Iterator[None]:
    """Hold the GPU while a job runs, if it uses the GPU."""
    if not STAGES[job.stage].uses_gpu or job.runtime.device == "cpu" or not has_gpu():
        yield
    elif get_current_settings().api.url:
        with get_client(sync_client=True) as client:
            create_limit(client)
            _log_waiting(client)
        # Without the last argument, a server that is slow to renew the lease would end the training.
        with concurrency(limit_name(), occupy=1, strict=True, raise_on_lease_renewal_failure=False):
            yield
    else:  # Prefect's temporary server would not release the slot of a killed run; the kernel releases a file lock
        with flock(Path(tempfile.gettempdir(), f"loraflow-{limit_name()}-{os.getuid()}.lock")):
            yield
