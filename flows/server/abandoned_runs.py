"""End the runs that a killed `loraflow up` left in Pending, Running or Cancelling, where they would keep their slots."""

from __future__ import annotations

import socket
from collections.abc import Sequence
from datetime import datetime, timedelta

from prefect.client.orchestration import SyncPrefectClient, get_client
from prefect.client.schemas.filters import (
    FlowRunFilter,
    FlowRunFilterState,
    FlowRunFilterStateType,
    WorkPoolFilter,
    WorkPoolFilterName,
)
from prefect.client.schemas.objects import FlowRun, State, StateType
from prefect.exceptions import ObjectNotFound
from prefect.states import Cancelled, Crashed

WORKER_TIMEOUT = timedelta(seconds=90)  # three heartbeats of a worker
UNFINISHED = FlowRunFilter(
    state=FlowRunFilterState(
        type=FlowRunFilterStateType(any_=[StateType.PENDING, StateType.RUNNING, StateType.CANCELLING])
    )
)
PAGE = 200
MESSAGE = "Its worker ended with an earlier `loraflow up`. Retry resumes after the last finished stage."


def worker_name() -> str:
    """Return the name of this host's workers under `loraflow up`. It is constant, so that other workers are recognised."""
    return f"loraflow up on {socket.gethostname()}"


def end_abandoned(pools: Sequence[str]) -> list[str]:
    """End the unfinished runs of work pools whose worker is gone; return a line for each.

    Call it before this host's workers start. A run is left alone if a worker of another name was online when the run
    entered its last state, or later: the run may belong to that worker, and ends through its heartbeats if it is dead.
    """
    ended = []
    with get_client(sync_client=True) as client:
        for pool in pools:
            others = _heartbeats_of_other_workers(client, pool)
            for run in _unfinished_runs(client, pool):
                assert run.state is not None  # the filter asks for states
                if any(heartbeat > run.state.timestamp - WORKER_TIMEOUT for heartbeat in others):
                    continue
                final = _final_state(run.state)
                client.set_flow_run_state(run.id, final)
                ended.append(f"run {run.name} was left {run.state.name}: now {final.name}; Retry in the UI resumes it")
    return ended


def _final_state(state: State[None]) -> State[None]:
    if state.type == StateType.CANCELLING:
        return Cancelled(message=MESSAGE)
    return Crashed(message=MESSAGE)


def _unfinished_runs(client: SyncPrefectClient, pool: str) -> list[FlowRun]:
    found: list[FlowRun] = []
    while True:
        page = client.read_flow_runs(
            flow_run_filter=UNFINISHED,
            work_pool_filter=WorkPoolFilter(name=WorkPoolFilterName(any_=[pool])),
            limit=PAGE,
            offset=len(found),
        )
        found += page
        if len(page) < PAGE:
            return found


def _heartbeats_of_other_workers(client: SyncPrefectClient, pool: str) -> list[datetime]:
    try:
        workers = client.read_workers_for_work_pool(pool)
    except ObjectNotFound:  # no deployment has created the pool yet
        return []
    return [
        worker.last_heartbeat_time for worker in workers if worker.name != worker_name() and worker.last_heartbeat_time
    ]
