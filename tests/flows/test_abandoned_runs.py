"""Runs that a killed `loraflow up` left unfinished: the next one ends them, unless another worker may have them."""

import signal
import socket
import time
from pathlib import Path

import pytest
from prefect.client.schemas.objects import StateType
from prefect.states import Cancelling, Pending, Running

from tests.local_deployment import LocalDeployment, build_project

FILE = Path(__file__).parent.parent.parent / "prefect.yaml"


@pytest.fixture
def nightly(client):
    """A deployment with a limit of one, in a pool of its own."""
    from loraflow.flows.server.automations import Notifications
    from loraflow.flows.server.deployments import Deployer
    from loraflow.flows.server.prefect_yaml import read_all

    [nightly] = read_all(FILE, ["retrain/nightly"])[0]
    pool = nightly.work_pool.model_copy(update={"name": "abandoned"})
    spec = nightly.model_copy(update={"name": "abandoned", "work_pool": pool})
    Deployer(client).deploy_all([spec], Notifications())
    deployment = client.read_deployment_by_name("retrain/abandoned")
    yield deployment
    client.delete_deployment(deployment.id)
    client.delete_work_pool("abandoned")


def run_with_states(client, deployment, *states):
    """Create a run that goes through some states."""
    run = client.create_flow_run_from_deployment(deployment.id)
    for state in states:
        client.set_flow_run_state(run.id, state)
    return run.id


@pytest.mark.parametrize(
    ("states", "final_state"),
    [
        ([Pending(name="Submitting")], StateType.CRASHED),
        ([Pending(), Running()], StateType.CRASHED),
        ([Pending(), Running(), Cancelling()], StateType.CANCELLED),
    ],
    ids=["submitting", "running", "cancelling"],
)
def test_an_abandoned_run_ends_and_frees_its_slot(client, nightly, states, final_state):
    from loraflow.flows.server.automations import end_abandoned

    left = run_with_states(client, nightly, *states)
    waiting = client.read_flow_run(run_with_states(client, nightly, Pending()))
    assert waiting.state.name == "AwaitingConcurrencySlot", "the abandoned run has the only slot"
    [line] = end_abandoned(["abandoned"])
    assert f"was left {states[-1].name}" in line
    assert client.read_flow_run(left).state.type == final_state
    assert client.read_flow_run(run_with_states(client, nightly, Pending())).state.type == StateType.PENDING
    assert len(end_abandoned(["abandoned"])) == 1 and end_abandoned(["abandoned"]) == []


def test_a_run_that_another_worker_may_execute_is_not_ended(client, nightly):
    from loraflow.flows.server.automations import end_abandoned, worker_name

    left = run_with_states(client, nightly, Pending(), Running())
    for name in (worker_name(), "elsewhere"):
        client.send_worker_heartbeat("abandoned", name, 30)
    assert end_abandoned(["abandoned"]) == []
    assert client.read_flow_run(left).state.type == StateType.RUNNING


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_after_sigkill_the_next_up_ends_the_run_and_the_next_retraining_starts(tmp_path, quick_phi3):
    deployment = LocalDeployment(build_project(tmp_path / "project", quick_phi3))
    run = deployment.start("retrain/nightly", settings={"training_config.max_steps": 4000})
    deployment.wait_for_step(3)
    deployment.process.send_signal(signal.SIGKILL)
    deployment.process.wait()
    for _ in range(300):  # server and worker end with `loraflow up`, in seconds
        with socket.socket() as probe:
            if probe.connect_ex(("127.0.0.1", deployment.port)):
                break
        time.sleep(0.1)
    deployment = LocalDeployment(deployment.folder)
    try:
        assert deployment.api("GET", f"/flow_runs/{run}")["state"]["type"] == "CRASHED"
        assert "was left Running: now Crashed" in deployment.log.read_text()
        again = deployment.wait(
            deployment.start("retrain/nightly", settings={"training_config.max_steps": 2}), seconds=200
        )
        assert again["state"]["type"] == "COMPLETED", again["state"]
    finally:
        assert deployment.stop() == 0
