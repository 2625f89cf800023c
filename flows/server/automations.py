"""Runs whose process vanished, and the server's automations: those that end such runs, and those that notify people.

Notifications are configured in `prefect.yaml`, under `notifications`. A block that does not exist on the server is skipped.
"""

from __future__ import annotations

import logging
import socket
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from datetime import datetime, timedelta
from uuid import UUID

from prefect.client.orchestration import SyncPrefectClient, get_client
from prefect.client.schemas.filters import (
    FlowRunFilter,
    FlowRunFilterState,
    FlowRunFilterStateType,
    WorkPoolFilter,
    WorkPoolFilterName,
)
from prefect.client.schemas.objects import FlowRun, State, StateType
from prefect.events.actions import CallWebhook, ChangeFlowRunState, SendNotification
from prefect.events.schemas.automations import AutomationCore, EventTrigger, Posture
from prefect.events.schemas.events import ResourceSpecification
from prefect.exceptions import ObjectNotFound
from prefect.states import Cancelled, Crashed
from pydantic import BaseModel, ConfigDict, Field

from loraflow.failures import BadConfig
from loraflow.tasks.events import CHAMPION, PROJECT_LABEL, REJECTED, RUN_WAITING

log = logging.getLogger("loraflow")
HEARTBEAT_TIMEOUT = timedelta(seconds=540)  # three heartbeats, which are 180 s apart
START_TIMEOUT = timedelta(hours=1)  # enough to pull an image and to start a node
LORAFLOW_TAG = "loraflow"  # on all deployments in prefect.yaml
HEARTBEAT_TAG = "heartbeat"  # on deployments that set PREFECT_FLOWS_HEARTBEAT_FREQUENCY


class Notifications(BaseModel):
    """The `notifications` of `prefect.yaml`."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    blocks: list[str] = Field([], description="Blocks as TYPE/NAME, such as slack-webhook/loraflow or webhook/ops.")
    champion_older_than_days: float = Field(30, gt=0)


@dataclass(frozen=True)
class NotificationBlock:
    """A block on the server that sends messages."""

    name: str  # TYPE/NAME
    id: UUID

    def send(self, subject: str, body: str) -> CallWebhook | SendNotification:
        """Return the action that sends a message through this block."""
        if self.name.startswith("webhook/"):
            return CallWebhook(block_document_id=self.id, payload=body)
        return SendNotification(block_document_id=self.id, subject=subject, body=body)


@dataclass(frozen=True)
class Project:
    """A project of the server, which notifications are about."""

    name: str
    retrains: tuple[str, ...]  # names of its deployments of the flow `retrain`


def automations_of(
    client: SyncPrefectClient, notifications: Notifications, project: Project | None = None
) -> Iterator[AutomationCore]:
    """Yield the automations that the server should have.

    Those that end runs are the same for all projects of a server. Notifications are about one project; without a
    project, as with an older `prefect.yaml`, they are about all of them.

    Raises:
        BadConfig: a block is not named as TYPE/NAME.
    """
    yield from lost_run_automations()
    for block in _find_blocks(client, notifications.blocks):
        yield from notification_automations(block, timedelta(days=notifications.champion_older_than_days), project)


def lost_run_automations() -> Iterator[AutomationCore]:
    """Yield the automations that end runs whose machine or process vanished, which a self-hosted server lacks.

    A proactive trigger starts to wait at an event of `after`, and any `expect` event ends the wait. A run may get stuck in
    a state after which no event follows, so there is a trigger for each such state. Deployments of earlier versions may
    still be on the server. They send no heartbeats, so a first heartbeat is expected only of runs with the heartbeat tag.
    """
    silence, start = (f"{timeout.total_seconds() / 60:g} minutes" for timeout in (HEARTBEAT_TIMEOUT, START_TIMEOUT))
    yield _end_silent_runs("crashed runs", {"heartbeat"}, HEARTBEAT_TIMEOUT, f"no heartbeat for {silence}")
    yield _end_silent_runs(
        "runs that died at once", {"Running"}, HEARTBEAT_TIMEOUT, f"no first heartbeat for {silence}", HEARTBEAT_TAG
    )
    yield _end_silent_runs(
        "runs that did not start",
        {"Pending", "Submitting", "InfrastructurePending"},
        START_TIMEOUT,
        f"not started {start} after a worker took it",
        LORAFLOW_TAG,
    )
    yield _end_silent_runs(
        "runs that nobody cancels",
        {"Cancelling"},
        HEARTBEAT_TIMEOUT,
        f"no worker cancelled it within {silence}",
        LORAFLOW_TAG,
        StateType.CANCELLED,
    )


def _end_silent_runs(
    title: str,
    after: set[str],
    within: timedelta,
    reason: str,
    tag: str | None = None,
    state: StateType = StateType.CRASHED,
) -> AutomationCore:
    """Return an automation that ends runs of deployments with this tag, if no event follows in time."""
    tagged = {"prefect.resource.role": "tag", "prefect.resource.id": f"prefect.tag.{tag}"} if tag else {}
    return AutomationCore(
        name=f"loraflow: {title}",
        description=f"Marks a run {state.value.capitalize()}: {reason}. Retry resumes after the last finished stage.",
        trigger=EventTrigger(
            after={f"prefect.flow-run.{name}" for name in after},
            expect={"prefect.flow-run.*", RUN_WAITING},  # any new state ends the wait, whatever its name
            match=ResourceSpecification({"prefect.resource.id": ["prefect.flow-run.*"]}),
            match_related=ResourceSpecification({**tagged}),
            for_each={"prefect.resource.id"},
            posture=Posture.Proactive,
            threshold=1,
            within=within,
        ),
        actions=[ChangeFlowRunState(state=state, message=reason)],
    )


def notification_automations(
    block: NotificationBlock, champion_age: timedelta, project: Project | None = None
) -> Iterator[AutomationCore]:
    """Yield the automations that send messages about a project through a block."""
    about = f"{project.name}: " if project else ""
    model = {"prefect.resource.id": "loraflow.model.*", **({PROJECT_LABEL: project.name} if project else {})}
    if project is None or project.retrains:
        yield AutomationCore(
            name=f"loraflow: {about}retraining failed → {block.name}",
            trigger=EventTrigger(
                expect={"prefect.flow-run.Failed", "prefect.flow-run.Crashed", "prefect.flow-run.TimedOut"},
                match=ResourceSpecification({"prefect.resource.id": "prefect.flow-run.*"}),
                match_related=_retrainings(project),
                posture=Posture.Reactive,
                threshold=1,
            ),
            actions=[
                block.send(
                    f"{about}Retraining failed",
                    about + "{{ flow_run.name }} is {{ flow_run.state.name }}: {{ flow_run.state.message }}\n"
                    "{{ flow_run|ui_url }}",
                )
            ],
        )
    yield AutomationCore(
        name=f"loraflow: {about}challenger rejected → {block.name}",
        trigger=EventTrigger(
            expect={REJECTED}, match=ResourceSpecification(model), posture=Posture.Reactive, threshold=1
        ),
        actions=[
            block.send(f"{about}Challenger rejected", about + "{{ event.payload.model }}: {{ event.payload.reasons }}")
        ],
    )
    days = f"{champion_age / timedelta(days=1):g}"
    yield AutomationCore(
        name=f"loraflow: {about}old champion → {block.name}",
        trigger=EventTrigger(
            after={CHAMPION},
            expect={CHAMPION},
            match=ResourceSpecification(model),
            for_each={"prefect.resource.id"},
            posture=Posture.Proactive,
            threshold=1,
            within=champion_age,
        ),
        actions=[block.send(f"{about}Old champion", f"{about}No model was promoted for {days} days.")],
    )


def _retrainings(project: Project | None) -> list[ResourceSpecification | dict[str, str | list[str]]]:
    """Return what a run is related to if it is a retraining of the project: the flow, and one of its deployments."""
    specifications: list[dict[str, str | list[str]]] = [
        {"prefect.resource.role": "flow", "prefect.resource.name": "retrain"}
    ]
    if project is not None:
        specifications.append({"prefect.resource.role": "deployment", "prefect.resource.name": list(project.retrains)})
    return [ResourceSpecification({**specification}) for specification in specifications]


def _find_blocks(client: SyncPrefectClient, names: list[str]) -> Iterator[NotificationBlock]:
    for name in names:
        block_type, slash, block_name = name.partition("/")
        if not slash or not block_name:
            raise BadConfig(
                "A block is named by type and name.",
                where=f"notifications.blocks: {name}",
                expected="slack-webhook/NAME, webhook/NAME, custom-webhook/NAME or sendgrid-email/NAME",
                next_step="correct the name in prefect.yaml; the UI lists the blocks under Blocks",
            )
        try:
            block = client.read_block_document_by_name(block_name, block_type)
        except ObjectNotFound:
            log.warning("no notifications to %s: the server has no such block; create it in the UI, under Blocks", name)
        else:
            yield NotificationBlock(name, block.id)


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
