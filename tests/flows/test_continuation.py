"""A deployed run that reached its time limit goes on in another run of its deployment, as long as it makes progress."""

from pathlib import Path
from types import SimpleNamespace

import pytest
from prefect.client.schemas.objects import StateType
from prefect.exceptions import TerminationSignal
from prefect.states import Pending, Running

from loraflow.failures import BudgetSpent
from loraflow.tasks import continuation
from loraflow.tasks import run as running

FILE = Path(__file__).parent.parent.parent / "prefect.yaml"


@pytest.fixture
def deployed(client):
    """A deployment in a pool of its own."""
    from loraflow.flows.server.automations import Notifications
    from loraflow.flows.server.deployments import Deployer
    from loraflow.flows.server.prefect_yaml import read_all

    [local] = read_all(FILE, ["finetune/local"])[0]
    pool = local.work_pool.model_copy(update={"name": "continued"})
    Deployer(client).deploy_all([local.model_copy(update={"name": "continued", "work_pool": pool})], Notifications())
    deployment = client.read_deployment_by_name("finetune/continued")
    yield deployment
    client.delete_deployment(deployment.id)
    client.delete_work_pool("continued")


def test_a_run_that_reaches_its_time_limit_continues_in_exactly_one_new_run_of_its_deployment(
    client, deployed, monkeypatch
):
    parameters = {
        "recipe": "phi3-mini",
        "force": ["tokenize", "train", "evaluate"],
        "settings": {"runtime.max_hours": 8},
    }
    first = client.create_flow_run_from_deployment(deployed.id, parameters=parameters, tags=["mine"])
    for state in (Pending(), Running()):
        client.set_flow_run_state(first.id, state)
    monkeypatch.setattr(continuation, "flow_run", SimpleNamespace(id=str(first.id)))
    spent = BudgetSpent("The run reached its time limit.", saved=True)
    continuation.schedule_continuation(spent, ["tokenize", "evaluate base"])
    continuation.schedule_continuation(BudgetSpent("The run reached its time limit.", saved=True), ["tokenize"])
    runs = [run for run in client.read_flow_runs() if run.deployment_id == deployed.id and run.id != first.id]
    [following] = [run for run in runs if not run.auto_scheduled]
    assert following.state.type == StateType.SCHEDULED and following.work_queue_name == first.work_queue_name
    assert following.parameters["recipe"] == "phi3-mini" and following.parameters["settings"] == parameters["settings"]
    assert following.parameters["force"] == ["train"], "what is finished is not forced again"
    assert "mine" in following.tags
    assert following.name in spent.next_step and "last checkpoint" in spent.next_step


def test_a_run_without_progress_is_not_followed_by_another(monkeypatch):
    monkeypatch.setattr(continuation, "get_client", lambda **_: pytest.fail("the server was asked"))
    for details in ({}, {"saved": False}):
        spent = BudgetSpent("The run reached its time limit.", **details)
        continuation.schedule_continuation(spent, [])
        assert "runtime.max_hours" in spent.next_step and "no other run was scheduled" in spent.next_step


def test_a_server_that_is_gone_leaves_the_failure_as_it_was(monkeypatch, caplog):
    def gone(**_):
        raise ConnectionError("no route")

    monkeypatch.setattr(continuation, "get_client", gone)
    spent = BudgetSpent("The run reached its time limit.", next_step="run again", saved=True)
    with caplog.at_level("WARNING", logger="loraflow"):
        continuation.schedule_continuation(spent, ["train"])
    assert spent.next_step == "run again" and "no route" in caplog.text


@pytest.mark.parametrize("is_deployed", [True, False])
def test_only_a_deployed_run_continues_by_itself(tmp_path, monkeypatch, is_deployed):
    asked = []
    monkeypatch.setattr(running, "deployment", SimpleNamespace(id="d" if is_deployed else None))
    for name in ("end_with_parent", "mask_parameters"):
        monkeypatch.setattr(running, name, lambda *_: None)
    monkeypatch.setattr(running, "schedule_continuation", lambda spent, computed: asked.append((spent, computed)))
    (tmp_path / "r.yaml").write_text(
        f"name: r\ndata: {{source: {tmp_path}}}\nbase: {{model: {tmp_path}}}\nruntime: {{store: {tmp_path}/store}}\n"
    )
    spent = BudgetSpent("The run reached its time limit.")
    with pytest.raises(BudgetSpent) as caught, running.open_run(str(tmp_path / "r.yaml"), {}, [], rename=False) as run:
        run.stages = {
            "tokenize": SimpleNamespace(stage="tokenize", state="cached"),
            "train": SimpleNamespace(stage="train", state="computed"),
        }
        monkeypatch.setattr(running, "write_record", lambda *_: None)
        raise spent
    assert caught.value is spent
    assert asked == ([(spent, ["train"])] if is_deployed else [])


def test_a_run_whose_credentials_are_masked_on_the_server_is_not_started_with_the_mask(
    client, deployed, monkeypatch, caplog
):
    first = client.create_flow_run_from_deployment(deployed.id, parameters={"recipe": "https://user:***@host/x"})
    monkeypatch.setattr(continuation, "flow_run", SimpleNamespace(id=str(first.id)))
    continuation.schedule_continuation(BudgetSpent("The run reached its time limit.", saved=True), ["tokenize"])
    runs = [run for run in client.read_flow_runs() if run.deployment_id == deployed.id and run.id != first.id]
    assert [run for run in runs if not run.auto_scheduled] == []
    assert "credentials in this run's parameters are masked" in caplog.text


@pytest.mark.parametrize(
    ("state", "follows"),
    [("RUNNING", True), ("PENDING", True), ("CANCELLING", False), ("CANCELLED", False), (None, False)],
)
def test_a_run_that_gets_sigterm_continues_unless_it_was_cancelled_on_the_server(monkeypatch, state, follows):
    """`None` is a run without a state."""
    created = []

    class Client:
        def __enter__(self):
            return self

        def __exit__(self, *_):
            pass

        def read_flow_run(self, _):
            known = SimpleNamespace(type=StateType[state]) if state else None
            values = dict(
                id="r", deployment_id="d", parameters={"recipe": "a", "force": ["train", "merge"]}, run_count=1
            )
            return SimpleNamespace(state=known, tags=[], work_queue_name=None, job_variables={}, **values)

        def create_flow_run_from_deployment(self, deployment, **values):
            created.append((deployment, values["parameters"]["force"], values["idempotency_key"]))
            return SimpleNamespace(name="next")

    monkeypatch.setattr(continuation, "get_client", lambda **_: Client())
    monkeypatch.setattr(continuation, "flow_run", SimpleNamespace(id="r"))
    continuation.schedule_continuation_after_signal(["train"])
    assert created == ([("d", ["merge"], "goes-on-r-1")] if follows else [])


def test_a_run_whose_server_does_not_answer_after_sigterm_is_not_followed_by_another(monkeypatch, caplog):
    def gone(**_):
        raise ConnectionError("no route")

    monkeypatch.setattr(continuation, "get_client", gone)
    continuation.schedule_continuation_after_signal(["train"])
    assert "no other run was scheduled: no route" in caplog.text


@pytest.mark.parametrize(("is_deployed", "preemptible"), [(True, True), (True, False), (False, True)])
def test_only_a_deployed_run_that_is_preemptible_continues_after_sigterm(
    tmp_path, monkeypatch, is_deployed, preemptible
):
    asked = []
    monkeypatch.setattr(running, "deployment", SimpleNamespace(id="d" if is_deployed else None))
    for name in ("end_with_parent", "mask_parameters"):
        monkeypatch.setattr(running, name, lambda *_: None)
    monkeypatch.setattr(running, "write_record", lambda *_: None)
    monkeypatch.setattr(running, "mirror_run", lambda *_: None)
    monkeypatch.setattr(running, "schedule_continuation_after_signal", asked.append)
    (tmp_path / "r.yaml").write_text(
        f"name: r\ndata: {{source: {tmp_path}}}\nbase: {{model: {tmp_path}}}\n"
        f"runtime: {{store: {tmp_path}/store, preemptible: {str(preemptible).lower()}}}\n"
    )
    with pytest.raises(TerminationSignal), running.open_run(str(tmp_path / "r.yaml"), {}, [], rename=False) as run:
        run.stages = {"train": SimpleNamespace(stage="train", state="computed")}
        raise TerminationSignal(signal=15)
    assert asked == ([["train"]] if is_deployed and preemptible else [])


@pytest.mark.parametrize(
    ("own", "parent", "expected"), [(None, None, []), ("d", None, ["asked"]), (None, "task", ["asked"])]
)
def test_a_run_of_a_command_does_not_ask_the_server_for_its_deployment(monkeypatch, own, parent, expected):
    asked = []

    class Deployment:
        @property
        def id(self):
            asked.append("asked")
            return "d"

    run = SimpleNamespace(deployment_id=own, parent_task_run_id=parent)
    monkeypatch.setattr(running.FlowRunContext, "get", lambda: SimpleNamespace(flow_run=run))
    monkeypatch.setattr(running, "deployment", Deployment())
    assert running._has_deployment() is bool(expected)
    assert asked == expected
