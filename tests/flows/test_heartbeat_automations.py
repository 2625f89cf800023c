"""Runs without heartbeats: the server ends them in every unfinished state, and ends no other runs."""

import time
from datetime import timedelta
from pathlib import Path

import pytest
from prefect.client.schemas.objects import StateType
from prefect.events import emit_event
from prefect.exceptions import Pause
from prefect.states import Cancelling, Completed, Pending, Running, Suspended

from loraflow.store import LocalStore
from loraflow.tasks import run as run_module
from loraflow.tasks.events import announce_waiting
from tests.flows.conftest import Project

WITHIN = 25  # seconds; heartbeats go through a queue, and a busy machine lets them wait
FILE = Path(__file__).parent.parent.parent / "prefect.yaml"


@pytest.fixture
def deployments(client, monkeypatch):
    """A deployment of loraflow, a foreign one, one of an earlier version; the automations have short timeouts."""
    from loraflow.flows.server import automations
    from loraflow.flows.server.automations import Notifications
    from loraflow.flows.server.deployments import Deployer
    from loraflow.flows.server.prefect_yaml import read_all

    for name in ("HEARTBEAT_TIMEOUT", "START_TIMEOUT"):
        monkeypatch.setattr(automations, name, timedelta(seconds=WITHIN))
    [nightly] = read_all(FILE, ["retrain/nightly"])[0]
    pool = nightly.work_pool.model_copy(update={"name": "silent"})
    spec = nightly.model_copy(update={"name": "silent", "work_pool": pool, "concurrency_limit": None})
    Deployer(client).deploy_all([spec], Notifications())
    with_heartbeats = client.read_deployment_by_name("retrain/silent")
    of_another_project = client.create_deployment(with_heartbeats.flow_id, "theirs")
    older = client.create_deployment(
        with_heartbeats.flow_id, "older", tags=["loraflow"]
    )  # of a version without heartbeats
    yield with_heartbeats.id, of_another_project, older
    for automation in client.read_automations():
        client.delete_automation(automation.id)
    for id_ in (with_heartbeats.id, of_another_project, older):
        client.delete_deployment(id_)
    client.delete_work_pool("silent")


@pytest.mark.slow
def test_runs_without_a_heartbeat_are_ended_and_others_are_not(client, deployments):
    with_heartbeats, of_another_project, older = deployments
    tags = {id_: client.read_deployment(id_).tags for id_ in deployments}

    def beat(id_, deployment):
        """Send what Prefect's engine sends, tags included."""
        related = [
            {"prefect.resource.id": f"prefect.tag.{tag}", "prefect.resource.role": "tag"} for tag in tags[deployment]
        ]
        emit_event("prefect.flow-run.heartbeat", {"prefect.resource.id": f"prefect.flow-run.{id_}"}, related=related)

    def run(deployment, *states, heartbeat=False):
        id_ = client.create_flow_run_from_deployment(deployment).id
        for state in states:
            client.set_flow_run_state(id_, state)
        if heartbeat:
            beat(id_, deployment)
        return id_

    alive = run(with_heartbeats, Pending(), Running(), heartbeat=True)
    ended = {
        run(with_heartbeats, Pending(name="Submitting")): StateType.CRASHED,
        run(with_heartbeats, Pending(), Running()): StateType.CRASHED,
        run(with_heartbeats, Pending(), Running(), heartbeat=True): StateType.CRASHED,
        run(with_heartbeats, Pending(), Running(), Cancelling()): StateType.CANCELLED,
        run(of_another_project, Pending(), Running(), heartbeat=True): StateType.CRASHED,
    }
    left = {
        alive: StateType.RUNNING,
        run(of_another_project, Pending(), Running()): StateType.RUNNING,  # it may send no heartbeats
        run(older, Pending(), Running()): StateType.RUNNING,
        run(with_heartbeats, Pending(), Running(), Completed()): StateType.COMPLETED,
        run(with_heartbeats): StateType.SCHEDULED,
        (
            waits := run(with_heartbeats, Pending(), Running(), Suspended(), heartbeat=True)
        ): StateType.PAUSED,  # its last heartbeat arrived after this state
    }
    announce_waiting(waits)
    begun, found = time.monotonic(), {}
    while time.monotonic() < begun + 6 * WITHIN and (found != ended or time.monotonic() < begun + 2 * WITHIN):
        beat(alive, with_heartbeats)
        time.sleep(2)
        found = {id_: client.read_flow_run(id_).state.type for id_ in ended}
    assert found == ended
    assert {id_: client.read_flow_run(id_).state.type for id_ in left} == left


def test_a_suspended_run_is_announced_after_its_work_is_finished(tmp_path, dataset, quick_phi3, monkeypatch):
    """Its heartbeats continue until then."""
    project, announced = Project(tmp_path, quick_phi3), []

    def announce(run):
        with LocalStore(project.store).cleanup_lock():
            announced.append(run)

    monkeypatch.setattr(run_module, "announce_waiting", announce)
    with pytest.raises(Pause), run_module.open_run(str(project.recipe), {}, []):
        raise Pause
    assert len(announced) == 1
