"""Runs of which nothing is heard any more: the server ends them, whatever they were at, and no others."""

import time
from datetime import timedelta
from pathlib import Path

import pytest
from prefect.client.schemas.objects import StateType
from prefect.events import emit_event
from prefect.states import Cancelling, Completed, Pending, Running

WITHIN = 25  # seconds; heartbeats go through a queue, and a busy machine lets them wait
FILE = Path(__file__).parent.parent.parent / "prefect.yaml"


@pytest.fixture
def deployments(client, monkeypatch):
    """One of ours and one of somebody else's, on a server whose automations are quicker."""
    from flows import automations
    from flows.automations import Notifications
    from flows.deployments import Setup, read_specs

    for name in ("SILENT", "STARTING"):
        monkeypatch.setattr(automations, name, timedelta(seconds=WITHIN))
    specs = read_specs(FILE, ["retrain/nightly"])
    specs[0].values["work_pool"]["name"] = "silent"
    specs[0].values.update(name="silent", concurrency_limit=None)
    setup = Setup(client)
    setup.everything(specs, Notifications())
    ours = client.read_deployment_by_name(specs[0].full_name)
    theirs = client.create_deployment(ours.flow_id, "theirs")
    yield ours.id, theirs
    for one in client.read_automations():
        client.delete_automation(one.id)
    for id_ in (ours.id, theirs):
        client.delete_deployment(id_)
    client.delete_work_pool("silent")


@pytest.mark.slow
def test_runs_of_which_nothing_is_heard_end_and_others_do_not(client, deployments):
    ours, theirs = deployments

    def run(deployment, *states, heartbeat=False):
        id_ = client.create_flow_run_from_deployment(deployment).id
        for state in states:
            client.set_flow_run_state(id_, state)
        if heartbeat:
            emit_event("prefect.flow-run.heartbeat", {"prefect.resource.id": f"prefect.flow-run.{id_}"})
        return id_

    ended = {
        run(ours, Pending(name="Submitting")): StateType.CRASHED,
        run(ours, Pending(), Running()): StateType.CRASHED,
        run(ours, Pending(), Running(), heartbeat=True): StateType.CRASHED,
        run(ours, Pending(), Running(), Cancelling()): StateType.CANCELLED,
        run(theirs, Pending(), Running(), heartbeat=True): StateType.CRASHED,
    }
    left = {
        run(theirs, Pending(), Running()): StateType.RUNNING,  # it may be of those that send no heartbeats
        run(ours, Pending(), Running(), Completed()): StateType.COMPLETED,
        run(ours): StateType.SCHEDULED,
    }
    alive = run(ours, Pending(), Running(), heartbeat=True)
    until, found = time.monotonic() + 4 * WITHIN, {}
    while time.monotonic() < until and found != ended:
        emit_event("prefect.flow-run.heartbeat", {"prefect.resource.id": f"prefect.flow-run.{alive}"})
        time.sleep(2)
        found = {id_: client.read_flow_run(id_).state.type for id_ in ended}
    assert found == ended
    assert {id_: client.read_flow_run(id_).state.type for id_ in left} == left
    assert client.read_flow_run(alive).state.type == StateType.RUNNING
