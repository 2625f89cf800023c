"""Runs that a killed `loraflow up` left in Pending, Running or Cancelling, where they would hold their slots for ever."""

from __future__ import annotations

import socket
from collections.abc import Callable
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

HEARTBEATS = timedelta(seconds=90)  # three of a worker's
UNDER_WAY = FlowRunFilter(
    state=FlowRunFilterState(
        type=FlowRunFilterStateType(any_=[StateType.PENDING, StateType.RUNNING, StateType.CANCELLING])
    )
)
PAGE = 200


def worker_name() -> str:
    """Return the name of this host's workers under `loraflow up`, the same each time, so that others' are told apart."""
    return f"loraflow up on {socket.gethostname()}"


def end_abandoned(pools: list[str]) -> list[str]:
    """End the runs of pools that no worker can have, before this host's workers start; return a line for each.

    A run that a worker of another name may have, seen since shortly before the run's last state, is left to it and to
    its heartbeats.
    """
    said = []
    with get_client(sync_client=True) as client:
        for pool in pools:
            others = _others_seen(client, pool)
            for run in _under_way(client, pool):
                assert run.state is not None  # as the filter asked for
                if any(seen > run.state.timestamp - HEARTBEATS for seen in others):
                    continue
                ended: Callable[..., State[None]] = Cancelled if run.state.type == StateType.CANCELLING else Crashed
                state = ended(message="Its worker ended with the `loraflow up` before this one. Retry goes on from the"
                              " last finished stage.")  # fmt: skip
                client.set_flow_run_state(run.id, state)
                said.append(f"run {run.name} was left {run.state.name}: now {state.name}; Retry in the UI goes on")
    return said


def _under_way(client: SyncPrefectClient, pool: str) -> list[FlowRun]:
    found: list[FlowRun] = []
    while True:
        page = client.read_flow_runs(
            flow_run_filter=UNDER_WAY,
            work_pool_filter=WorkPoolFilter(name=WorkPoolFilterName(any_=[pool])),
            limit=PAGE,
            offset=len(found),
        )
        found += page
        if len(page) < PAGE:
            return found


def _others_seen(client: SyncPrefectClient, pool: str) -> list[datetime]:
    try:
        workers = client.read_workers_for_work_pool(pool)
    except ObjectNotFound:  # no deployment has it yet
        return []
    return [one.last_heartbeat_time for one in workers if one.name != worker_name() and one.last_heartbeat_time]
