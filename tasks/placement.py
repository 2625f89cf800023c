"""Run stages on other work pools: start a run of the deployment `stage/<name>`, watch it, and cancel it with this run.

`runtime.placement` names the deployment of a stage. Parameters and states go through Prefect's server, artifacts through
the store that both sides share. A failure on the other side is raised here as the same failure.
"""

from __future__ import annotations

import json
import logging
import platform
import time

from prefect.client.orchestration import SyncPrefectClient, get_client
from prefect.client.schemas.objects import DeploymentStatus, FlowRun, StateType, WorkerStatus
from prefect.client.schemas.responses import DeploymentResponse
from prefect.context import FlowRunContext
from prefect.deployments import run_deployment
from prefect.exceptions import ObjectNotFound
from prefect.states import Cancelled, Cancelling
from pydantic import JsonValue, ValidationError

from loraflow.config.stage_configs import StageConfig
from loraflow.failures import BadConfig, BadPlacement, Crashed, Failure, Killed, Network, from_dict
from loraflow.job import Job
from loraflow.stages import STAGES
from loraflow.store import LocalStore, Ref, Store, open_store

log = logging.getLogger("loraflow")

POLL = 2.0  # seconds between two checks of a sub-run
PATIENCE = 120.0  # seconds to wait for a worker of the pool to come online; there is no limit for busy workers
_MARK = "failure: "


def run_on_pool(job: Job[StageConfig], store: Store, label: str, name: str, *, force: bool) -> Ref | None:
    """Run a stage through the deployment `stage/<name>` and return the artifact from the shared store.

    Returns None, and starts nothing, if the deployment belongs to the pool and queue that this run is on: the stage then
    runs here. Otherwise this run could hold the slot that its own stage waits for.

    Raises:
        Failure: the stage's own; or there is no such deployment, no worker, or the run was cancelled.
    """
    with get_client(sync_client=True) as client:
        try:
            deployment = client.read_deployment_by_name(f"stage/{name}")
        except ObjectNotFound:
            raise BadPlacement(
                f"There is no deployment stage/{name}, which runtime.placement names.",
                where=f"runtime.placement.{job.stage}",
                next_step="`loraflow deploy` creates stage/cpu and stage/gpu; or add another to prefect.yaml",
            ) from None
        if _is_own_queue(deployment):
            log.info("%s runs here: stage/%s is on this run's own pool, %s", label, name, deployment.work_pool_name)
            return None
        parameters = {"job": job.model_dump(mode="json"), "store": store.uri, "label": label, "force": force}
        run: FlowRun = run_deployment(deployment.id, parameters=parameters, timeout=0)  # type: ignore[assignment]
        log.info("%s goes to stage/%s (pool %s): sub-run %s", label, name, deployment.work_pool_name, run.id)
        try:
            done = _watch(client, run, deployment.work_pool_name, label)
        except BaseException:
            _cancel(client, run, label)
            raise
    _raise_failure(done, label, name)
    ref = store.find(job.stage, job.fingerprint)
    if ref is None:
        raise _other_store(store, f"{label} completed on the worker, but this run's store does not have its artifact")
    return ref


def _is_own_queue(deployment: DeploymentResponse) -> bool:
    """Return whether a deployment's runs wait in the work queue that the current flow run came from."""
    context = FlowRunContext.get()
    run = context.flow_run if context else None
    if run is None or run.work_pool_name is None:  # started by the command line
        return False
    return (run.work_pool_name, run.work_queue_name) == (deployment.work_pool_name, deployment.work_queue_name)


def _watch(client: SyncPrefectClient, run: FlowRun, pool: str | None, label: str) -> FlowRun:
    """Wait for a sub-run's end. Once a sub-run waits longer than `PATIENCE`, say what it waits for."""
    waiting_since, logged_state, is_reported = time.monotonic(), None, False
    while True:
        run = client.read_flow_run(run.id)
        assert run.state is not None
        if run.state.is_final():
            return run
        if run.state.name != logged_state:
            log.info("%s: %s", label, run.state.name)
            logged_state = run.state.name
        if run.state.is_running():
            waiting_since = time.monotonic()
        elif time.monotonic() - waiting_since > PATIENCE:
            if not _has_worker(client, run, pool):
                raise BadPlacement(
                    f"No worker took {label} within {PATIENCE:.0f} s.",
                    where=f"work pool {pool}" if pool else f"deployment of sub-run {run.id}",
                    got="no worker is online",
                    next_step=f"prefect worker start --pool {pool}" if pool else "start the process that serves it",
                )
            if not is_reported:
                log.warning("%s has waited for %.0f s: %s", label, PATIENCE, _waiting_reason(client, run, pool))
                is_reported = True
        time.sleep(POLL)


def _waiting_reason(client: SyncPrefectClient, run: FlowRun, pool: str | None) -> str:
    """Return a sentence on why workers are online but have not started a sub-run."""
    if pool is None:
        return "the process that serves its deployment is busy"
    found = client.read_work_pool(pool)
    if found.is_paused:
        return f"the work pool {pool} is paused: prefect work-pool resume {pool}"
    if run.work_queue_name is not None and client.read_work_queue_by_name(run.work_queue_name, pool).is_paused:
        return f"the queue {run.work_queue_name} of the work pool {pool} is paused"
    limits = f", whose concurrency limit is {found.concurrency_limit}" if found.concurrency_limit is not None else ""
    return (
        f"every worker of the pool {pool}{limits} is busy with other runs, or does not take this queue. It starts when one "
        "of them is free; a higher --limit of `prefect worker start` or `loraflow up` lets it start sooner"
    )


def _has_worker(client: SyncPrefectClient, run: FlowRun, pool: str | None) -> bool:
    if pool is None:
        assert run.deployment_id is not None
        return client.read_deployment(run.deployment_id).status == DeploymentStatus.READY
    workers = client.request(
        "POST", "/work_pools/{work_pool_name}/workers/filter", path_params={"work_pool_name": pool}, json={}
    )
    return any(worker["status"] == WorkerStatus.ONLINE.value for worker in workers.json())


def _cancel(client: SyncPrefectClient, run: FlowRun, label: str) -> None:
    """Cancel the sub-run, so that it does not continue without this run. Its checkpoint stays."""
    try:
        now = client.read_flow_run(run.id).state
        if now is None or now.is_final():
            return
        started = now.is_running() or now.is_cancelling() or run.infrastructure_pid is not None
        client.set_flow_run_state(run.id, Cancelling() if started or now.is_pending() else Cancelled(), force=True)
        log.info("%s: its sub-run %s is cancelled too", label, run.id)
    except Exception as error:  # this run is ending with another error, which is the one to report
        log.warning("%s: its sub-run %s could not be cancelled (%s): prefect flow-run cancel %s", label, run.id, error,
                    run.id)  # fmt: skip


def _raise_failure(run: FlowRun, label: str, name: str) -> None:
    state = run.state
    assert state is not None
    if state.type == StateType.COMPLETED:
        return
    message = state.message or ""
    where = f"stage/{name}, sub-run {run.id}"
    if _MARK in message:
        raise from_dict(json.loads(message.rpartition(_MARK)[2]))
    if state.type == StateType.CANCELLED:
        raise Failure(f"{label} was cancelled.", where=where, got=message, next_step="run again: it resumes")
    if state.type == StateType.CRASHED:
        raise Killed(f"The process that ran {label} died.", where=where, got=message, next_step="run again: it resumes")
    raise Crashed(f"{label} ended with an unexpected error.", where=where, got=message,
                  next_step=f"prefect flow-run logs {run.id}")  # fmt: skip


# -- on the worker that runs the stage ------------------------------------------------------------------------------


def accept_job(job: dict[str, JsonValue], store: str) -> tuple[Job[StageConfig], Store]:
    """Check that this worker has the same code and store as the run, and return the job and the store.

    Raises:
        BadConfig: this worker has other code, or does not see the run's artifacts.
        Network: the store does not answer.
    """
    here = f"worker on {platform.node()}"
    stage = STAGES.get(str(job.get("stage", "")))
    if stage is None or stage.version != job.get("version"):
        raise BadConfig(
            "The worker has another version of loraflow than the run.",
            where=here,
            expected=f"stage {job.get('stage')} version {job.get('version')}",
            got=f"version {stage.version}" if stage else "no such stage",
            next_step="bring both to the same version of loraflow and start the worker again",
        )
    try:
        accepted = Job[StageConfig].model_validate(job)
    except ValidationError as error:
        raise BadConfig(
            "The worker cannot read the job: it has another version of loraflow than the run.",
            where=here,
            got=str(error.errors()[0]["msg"]),
            next_step="bring both to the same version of loraflow and start the worker again",
        ) from error
    try:
        artifacts = open_store(store)
    except (BadConfig, Network) as failure:
        failure.where = f"{failure.where} ({here})"
        raise
    missing = [str(ref) for ref in accepted.inputs.values() if MISSING in artifacts.check(ref)]
    if missing:
        raise _other_store(artifacts, f"{', '.join(missing)} not found on the {here}")
    return accepted, artifacts


MISSING = "manifest.json: FileNotFoundError"


def _other_store(store: Store, got: str) -> BadPlacement:
    advice = "set runtime.store to s3://bucket/prefix, or to a folder that both sides mount at the same path"
    return BadPlacement(
        "The run and the worker do not share a store.",
        where=store.uri,
        got=got,
        next_step=advice if isinstance(store, LocalStore) else "give both the same bucket and AWS_ENDPOINT_URL_S3",
    )


def failure_message(failure: Failure) -> str:
    """Return a failure as a state's message. `run_on_pool` raises the failure again from its last line."""
    return f"{failure}\n{_MARK}{json.dumps(failure.to_dict(), default=str)}"
