"""What Prefect shows of a run: a stage's progress, and events that automations listen to."""

from __future__ import annotations

import logging
import re
import time
from pathlib import Path
from uuid import UUID

import httpx
from prefect.artifacts import create_progress_artifact, update_progress_artifact
from prefect.client.orchestration import get_client
from prefect.events import Event, Resource, emit_event
from prefect.exceptions import PrefectHTTPStatusError
from prefect.settings import get_current_settings
from pydantic import JsonValue

from loraflow.config.project import served_project
from loraflow.execution.workspace import Registration
from loraflow.failures import BadConfig, Network, first_line

log = logging.getLogger("loraflow")
DATASET = "loraflow.dataset.updated"
CHAMPION = "loraflow.champion.promoted"
REJECTED = "loraflow.challenger.rejected"
RUN_WAITING = "loraflow.run.waits"
UPDATE_EVERY = 5.0  # seconds between updates
PROJECT_LABEL = "loraflow.project"  # label of a decision's resource: several projects may share a server


def announce_waiting(run_id: str) -> None:
    """Tell the server that a run suspended itself, so that the automation for missing heartbeats leaves it alone.

    Heartbeats are sent until the flow's function ends, and reach the server later than a state does. This event takes
    the same route, so it arrives after them.
    """
    emit_event(RUN_WAITING, {"prefect.resource.id": f"prefect.flow-run.{run_id}"})


def announce_decision(model: str, registration: Registration) -> None:
    """Emit an event for a promotion, or for a rejection. Its resource names the project (see `served_project`).

    A `prefect.yaml` that cannot be read is a warning: the promotion is in the log already, so the run continues.
    """
    decision, entry = registration.decision, registration.entry
    resource = {"prefect.resource.id": f"loraflow.model.{model}", "prefect.resource.name": model}
    if project := _project():
        resource[PROJECT_LABEL] = project
    payload = {"model": model, "reasons": "; ".join(decision.reasons)}
    if entry is not None:
        emit_event(CHAMPION, resource, payload={**payload, "entry": entry})
    elif decision.verdict == "reject":
        emit_event(REJECTED, resource, payload=payload)


def _project() -> str | None:
    try:
        return served_project(Path())
    except BadConfig as failure:
        log.warning(
            "the decision's event names no project, so notifications for one project are not sent: %s",
            failure,
        )
        return None


def announce_dataset(name: str, md5: str, commit: str, project: str | None = None) -> str | None:
    """Notify the configured server of a new dataset, and return its address; None where no server is configured.

    The resource is `loraflow.dataset.PROJECT.NAME`, so that a trigger can listen to one project's datasets.

    Raises:
        Network: the server does not take it.
    """
    url = get_current_settings().api.url
    if not url:
        return None
    resource = f"loraflow.dataset.{project}.{name}" if project else f"loraflow.dataset.{name}"
    event = Event(
        event=DATASET,
        resource=Resource({"prefect.resource.id": resource, "prefect.resource.name": name}),
        payload={"md5": md5, "commit": commit},
    )
    try:
        with get_client(sync_client=True) as client:
            client.request("POST", "/events", json=[event.model_dump(mode="json")]).raise_for_status()
    except (httpx.HTTPError, PrefectHTTPStatusError) as error:
        raise Network(
            "The dataset is versioned, but Prefect's server was not notified.",
            where=str(url),
            got=first_line(error),
            next_step="start the server, then the same command again; or run retrain from the UI",
        ) from error
    return str(url)


class ProgressArtifact:
    """The progress of one label."""

    def __init__(self, label: str):
        self.label = label
        self.artifact: UUID | None = None
        self.updated = 0.0
        self.first: tuple[float, int] | None = None  # when figures first came, and how much was done

    def show_figures(self, figures: dict[str, JsonValue]) -> None:
        """Show a worker's figures: how much is done of how much, the time left, and for training loss and speed."""
        done = figures.get("step", figures.get("done", figures.get("tensors")))
        total, loss = figures.get("total"), figures.get("loss")
        speed, left = figures.get("tokens_per_second"), figures.get("eta_seconds")
        if not isinstance(done, int) or not isinstance(total, int) or not total:
            return
        started, before = self.first = self.first or (time.monotonic(), done)
        if left is None and before < done < total:
            left = (time.monotonic() - started) / (done - before) * (total - done)
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
