"""One stage at a time uses a host's GPU: by a concurrency limit on the server, or by a lock file without a server."""

from __future__ import annotations

import logging
import os
import socket
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from prefect.client.orchestration import SyncPrefectClient, get_client
from prefect.client.schemas.actions import GlobalConcurrencyLimitCreate
from prefect.concurrency.sync import concurrency
from prefect.exceptions import ObjectAlreadyExists, ObjectNotFound
from prefect.settings import get_current_settings

from loraflow.config.stage_configs import StageConfig
from loraflow.job import Job
from loraflow.stages import STAGES
from loraflow.store.lock import flock

log = logging.getLogger("loraflow")


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
    """Log that the limit has no free slot. Prefect logs nothing, and waits without end if the limit was set to 0."""
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
