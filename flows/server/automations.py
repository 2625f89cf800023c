"""Automations of the server: runs whose process vanished, and notices to people.

Notices are asked for in `prefect.yaml`, under `notifications`; one is set up only if its block exists on the server.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator
from datetime import timedelta
from typing import Any

from prefect.client.orchestration import SyncPrefectClient
from prefect.events.actions import CallWebhook, ChangeFlowRunState, SendNotification
from prefect.events.schemas.automations import AutomationCore, EventTrigger, Posture
from prefect.exceptions import ObjectNotFound
from prefect.states import StateType
from pydantic import BaseModel, ConfigDict, Field

from loraflow.failures import BadConfig
from loraflow.tasks.events import CHAMPION, REJECTED, WAITS

log = logging.getLogger("loraflow")
SILENT = timedelta(seconds=540)  # three heartbeats, of one in 180 s
STARTING = timedelta(hours=1)  # in which an image is pulled and a node comes up
OURS = "loraflow"  # a tag of all deployments in prefect.yaml
BEATS = "heartbeat"  # a tag of those whose runs send them: they have PREFECT_FLOWS_HEARTBEAT_FREQUENCY


class Notifications(BaseModel):
    """The `notifications` of `prefect.yaml`."""

    model_config = ConfigDict(extra="forbid")

    blocks: list[str] = Field([], description="Blocks as TYPE/NAME, such as slack-webhook/loraflow or webhook/ops.")
    champion_older_than_days: float = Field(30, gt=0)


def silent() -> Iterator[AutomationCore]:
    """Yield what ends runs whose machine or process vanished. Self-hosted servers have no such automation of their own.

    A trigger of Prefect's counts what comes after an event, and gives up once it was enough: a state in which nothing
    more comes needs a trigger that begins with it. Deployments of an older version, which one that is named in `deploy
    --only` leaves on the server, send no heartbeats.
    """
    runs = {"prefect.resource.id": ["prefect.flow-run.*"]}

    def end(
        what: str, after: set[str], within: timedelta, state: StateType, why: str, tag: str | None = None
    ) -> AutomationCore:
        tagged = {"prefect.resource.role": "tag", "prefect.resource.id": f"prefect.tag.{tag}"} if tag else {}
        return AutomationCore(
            name=f"loraflow: {what}",
            description=f"A run is marked {state.value.capitalize()}: {why}. Retry goes on from its last finished stage.",
            trigger=EventTrigger(
                after={f"prefect.flow-run.{name}" for name in after},
                # Whatever state a run goes to, custom names included, is a sign of life.
                expect={"prefect.flow-run.*", WAITS},
                match=runs,  # type: ignore[arg-type]
                match_related=tagged,  # type: ignore[arg-type]
                for_each={"prefect.resource.id"},
                posture=Posture.Proactive,
                threshold=1,
                within=within,
            ),
            actions=[ChangeFlowRunState(state=state, message=why)],
        )

    minutes, hour = (f"{within.total_seconds() / 60:g} minutes" for within in (SILENT, STARTING))
    yield end("crashed runs", {"heartbeat"}, SILENT, StateType.CRASHED, f"no heartbeat for {minutes}")
    yield end("runs that died at once", {"Running"}, SILENT, StateType.CRASHED, f"no first heartbeat for {minutes}",
              BEATS)  # fmt: skip
    yield end("runs that did not start", {"Pending", "Submitting", "InfrastructurePending"}, STARTING, StateType.CRASHED,
              f"not started {hour} after a worker took it", OURS)  # fmt: skip
    yield end("runs that nobody cancels", {"Cancelling"}, SILENT, StateType.CANCELLED,
              f"no worker cancelled it within {minutes}", OURS)  # fmt: skip


def notices(wanted: Notifications, block: str, action: Any) -> Iterator[AutomationCore]:
    """Yield the notices that go to one block."""
    yield AutomationCore(
        name=f"loraflow: retraining failed → {block}",
        trigger=EventTrigger(
            expect={"prefect.flow-run.Failed", "prefect.flow-run.Crashed", "prefect.flow-run.TimedOut"},
            match={"prefect.resource.id": "prefect.flow-run.*"},
            match_related={"prefect.resource.role": "flow", "prefect.resource.name": "retrain"},  # type: ignore[arg-type]
            posture=Posture.Reactive,
            threshold=1,
        ),
        actions=[action("Retraining failed", "{{ flow_run.name }} is {{ flow_run.state.name }}: "
                        "{{ flow_run.state.message }}\n{{ flow_run|ui_url }}")],
    )  # fmt: skip
    yield AutomationCore(
        name=f"loraflow: challenger rejected → {block}",
        trigger=EventTrigger(expect={REJECTED}, posture=Posture.Reactive, threshold=1),
        actions=[action("Challenger rejected", "{{ event.payload.model }}: {{ event.payload.reasons }}")],
    )
    yield AutomationCore(
        name=f"loraflow: old champion → {block}",
        trigger=EventTrigger(
            after={CHAMPION},
            expect={CHAMPION},
            for_each={"prefect.resource.id"},
            posture=Posture.Proactive,
            threshold=1,
            within=timedelta(days=wanted.champion_older_than_days),
        ),
        actions=[action("Old champion", f"No model was promoted for {wanted.champion_older_than_days:g} days.")],
    )


def automations(client: SyncPrefectClient, wanted: Notifications) -> Iterator[AutomationCore]:
    """Yield the automations that this server shall have.

    Raises:
        BadConfig: a block is not named as TYPE/NAME.
    """
    yield from silent()
    for block in wanted.blocks:
        kind, slash, name = block.partition("/")
        if not slash or not name:
            raise BadConfig(
                "A block is named by type and name.",
                where=f"notifications.blocks: {block}",
                expected="slack-webhook/NAME, webhook/NAME, custom-webhook/NAME or sendgrid-email/NAME",
            )
        try:
            id_ = client.read_block_document_by_name(name, kind).id
        except ObjectNotFound:
            log.warning("no notices to %s: the server has no such block (Blocks in the UI creates one)", block)
            continue

        def action(subject: str, body: str, kind: str = kind, id_: Any = id_) -> Any:
            if kind == "webhook":
                return CallWebhook(block_document_id=id_, payload=body)
            return SendNotification(block_document_id=id_, subject=subject, body=body)

        yield from notices(wanted, block, action)
