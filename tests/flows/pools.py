"""Work pools with a deployment and a process worker, on the Prefect server of the tests."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

ROOT = Path(__file__).parent.parent.parent


def deploy(flow, name: str, pool: str, entrypoint: str) -> None:
    """Create a process pool, and a deployment in it."""
    from prefect.client.orchestration import get_client
    from prefect.client.schemas.actions import WorkPoolCreate

    with get_client(sync_client=True) as client:
        client.create_work_pool(WorkPoolCreate(name=pool, type="process"), overwrite=True)
        client.create_deployment(
            client.create_flow(flow), name, entrypoint=entrypoint, work_pool_name=pool, pull_steps=[],
            parameter_openapi_schema={"type": "object", "properties": {}}, enforce_parameter_schema=False,
        )  # fmt: skip


def deploy_stage(name: str, pool: str) -> None:
    """Create a process pool, and the deployment stage/<name> in it."""
    from loraflow.flows.stage import stage

    deploy(stage, name, pool, "loraflow.flows.stage.stage")


@contextmanager
def worker(pool: str, folder: Path, **settings: str) -> Iterator[subprocess.Popen]:
    """Run a process worker in its own working folder; at the end it stops, with everything that it started."""
    from prefect.settings import PREFECT_API_URL

    folder.mkdir(parents=True, exist_ok=True)
    env = {**os.environ, "PREFECT_API_URL": PREFECT_API_URL.value(), "PYTHONPATH": str(ROOT), **settings}
    env |= {"PREFECT_LOGGING_EXTRA_LOGGERS": "loraflow", "PREFECT_WORKER_QUERY_SECONDS": "1", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "prefect", "worker", "start", "--pool", pool, "--type", "process", "--name", pool]
    log = folder / "worker.log"
    process = subprocess.Popen(
        command, cwd=folder, env=env, stdout=log.open("ab"), stderr=subprocess.STDOUT, start_new_session=True
    )
    try:
        wait_for(lambda: online(pool), 90, lambda: log.read_text())
        yield process
    finally:
        process.terminate()
        try:
            process.wait(timeout=60)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


def online(pool: str) -> bool:
    from prefect.client.orchestration import get_client

    with get_client(sync_client=True) as client:
        found = client.request(
            "POST", "/work_pools/{work_pool_name}/workers/filter", path_params={"work_pool_name": pool}, json={}
        )
    return any(worker["status"] == "ONLINE" for worker in found.json())


def wait_for(condition, seconds: float, why=lambda: "") -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, why()
        time.sleep(0.2)


def sub_runs(name: str = "stage") -> list:
    """Return the runs of the stage flow, newest first."""
    from prefect.client.orchestration import get_client
    from prefect.client.schemas.filters import FlowFilter, FlowFilterName
    from prefect.client.schemas.sorting import FlowRunSort

    with get_client(sync_client=True) as client:
        return client.read_flow_runs(
            flow_filter=FlowFilter(name=FlowFilterName(any_=[name])),
            sort=FlowRunSort.EXPECTED_START_TIME_DESC,
            limit=200,
        )
