"""Stages placed on another pool, through a real server and a real process worker."""

import json
import os
import signal
import subprocess
import sys
import threading
from types import SimpleNamespace

import pytest
from prefect import flow
from prefect.client.orchestration import get_client
from prefect.client.schemas.actions import WorkPoolUpdate
from prefect.states import Cancelled

from loraflow.config import load_recipe
from loraflow.execution.runner import run_stage
from loraflow.execution.workspace import Workspace
from loraflow.failures import BadConfig, BadData, Crashed, Failure, Killed, OutOfMemory, from_dict
from loraflow.flows import finetune
from loraflow.flows import stage as stage_module
from loraflow.stages import CHECK_DATASET, RESOLVE_BASE, TOKENIZE, VERSION_DATASET
from loraflow.store import LocalStore
from loraflow.tasks import placement as placing
from loraflow.tasks.run import open_run
from loraflow.tasks.stages import check_dataset, resolve_base, tokenize, version_dataset
from tests.conftest import chat
from tests.flows.conftest import Project
from tests.flows.pools import deploy_stage, sub_runs, wait_for, worker
from tests.flows.test_finetune import processes_with


def first_stages(run):
    """The pipeline as far as its first heavy stages."""
    rows = check_dataset(run, dataset=version_dataset(run))
    return tokenize(run, rows=rows, base=resolve_base(run)), run.stages


@flow(name="part", persist_result=False)
def part(recipe: str, overrides: dict):
    with open_run(recipe, overrides, []) as run:
        return first_stages(run)


@flow(name="repaired", persist_result=False)
def repaired(recipe: str, overrides: dict):
    """Run the first stages, again after a damaged artifact was quarantined."""
    with open_run(recipe, overrides, []) as run:
        for attempt in finetune.repairs(run):
            with attempt:
                found = first_stages(run)
        return found


@pytest.fixture(scope="module")
def started_project(tmp_path_factory, phi3):
    """A recipe whose first stages are in the store."""
    folder = tmp_path_factory.mktemp("started")
    (folder / "data").mkdir()
    for name, numbers in (("train.jsonl", range(40)), ("heldout.jsonl", range(1000, 1010))):
        (folder / "data" / name).write_text("".join(json.dumps(chat(i)) + "\n" for i in numbers))
    project = Project(folder, phi3)
    workspace = Workspace(load_recipe(project.recipe, {}))
    run_stage(workspace, CHECK_DATASET, dataset=run_stage(workspace, VERSION_DATASET))
    run_stage(workspace, RESOLVE_BASE)
    return project


@pytest.fixture(scope="module")
def gpu_pool(tmp_path_factory):
    deploy_stage("gpu", "gpu-pool")
    with worker("gpu-pool", tmp_path_factory.mktemp("gpu worker")) as process:
        yield process


def job_of(started_project, **overrides):
    workspace = Workspace(load_recipe(started_project.recipe, overrides))
    rows = run_stage(workspace, CHECK_DATASET, dataset=run_stage(workspace, VERSION_DATASET))
    return workspace.job(TOKENIZE, {"rows": rows, "base": run_stage(workspace, RESOLVE_BASE)})


def test_a_placed_stage_runs_on_the_other_pool_and_keeps_its_fingerprint(started_project, gpu_pool):
    expected = job_of(started_project).fingerprint
    ref, stages = part(str(started_project.recipe), {"runtime.placement": {"tokenize": "gpu"}})
    assert ref.fingerprint == expected and stages["tokenize"].state == "computed"
    [run] = sub_runs()
    assert run.name == "tokenize" and run.state.is_completed() and run.parent_task_run_id is not None
    assert run.work_pool_name == "gpu-pool"
    assert LocalStore(started_project.store).verify(ref) == []
    again, stages = part(str(started_project.recipe), {})
    assert again == ref and stages["tokenize"].state == "cached", "placed or not, it is the same stage"


def test_a_damaged_input_is_detected_by_the_worker_and_recomputed(started_project, gpu_pool):
    """Both share a folder, so that no download would verify the hashes."""
    store = LocalStore(started_project.store)
    rows = job_of(started_project).inputs["rows"]
    file = store.path(rows) / "train.jsonl"
    file.write_bytes(file.read_bytes()[:-9] + b"#" + file.read_bytes()[-8:])
    damaged = {"training_config.max_length": 200, "runtime.placement": {"tokenize": "gpu"}}
    ref, stages = repaired(str(started_project.recipe), damaged)
    assert stages["tokenize"].state == "computed" and store.verify(ref) == [] and store.verify(rows) == []
    [aside] = (store.root / "set-aside").glob("*.json")
    assert "train.jsonl" in aside.read_text()
    assert sorted(run.state.type.value for run in sub_runs()[:2]) == ["COMPLETED", "FAILED"]


def test_an_unreadable_input_is_reported_with_its_path(started_project, monkeypatch):
    def refuse(store, ref):
        raise PermissionError(13, "Permission denied", "/of/somebody/else")

    monkeypatch.setattr(stage_module, "require_intact", refuse)
    monkeypatch.setattr(stage_module, "end_with_parent", lambda: None)
    job = job_of(started_project, **{"training_config.max_length": 201}).model_dump(mode="json")
    state = stage_module.stage(job, str(started_project.store), "tokenize", return_state=True)
    failure = from_dict(json.loads(state.message.rpartition("failure: ")[2]))
    assert failure.what == "A file cannot be read or written." and failure.where == "/of/somebody/else"


def test_a_remote_failure_keeps_its_class(started_project, gpu_pool):
    with pytest.raises(BadData, match="longer than max_length"):
        part(str(started_project.recipe), {"training_config.max_length": 5, "runtime.placement": {"tokenize": "gpu"}})
    assert "max_length" in sub_runs()[0].state.message, "the sub-run shows the reason too"


@pytest.mark.slow
def test_cancelling_a_run_cancels_its_sub_run(project, gpu_pool):
    from prefect.settings import PREFECT_API_URL

    command = [sys.executable, "-c", "from loraflow.cli import main; main()", "run", str(project.recipe),
               "--set", "training_config.max_steps=3000", "--set", "runtime.placement.train=gpu"]  # fmt: skip
    env = {**os.environ, "PREFECT_API_URL": PREFECT_API_URL.value()}
    log = project.folder / "output.txt"
    process = subprocess.Popen(command, env=env, stdout=log.open("w"), stderr=subprocess.STDOUT)
    wait_for(lambda: list((project.store / "work" / "train").glob("*/progress.jsonl")), 120, log.read_text)
    process.send_signal(signal.SIGINT)
    assert process.wait(timeout=60) == 130, log.read_text()
    wait_for(lambda: sub_runs()[0].state.is_final(), 60)
    assert sub_runs()[0].state.is_cancelled()
    wait_for(lambda: not processes_with(str(project.store / "work")), 60)


@pytest.mark.parametrize(("queue", "placed"), [("default", False), ("high", True)])
def test_a_stage_on_the_runs_own_pool_and_queue_runs_in_place(started_project, monkeypatch, queue, placed):
    """The run holds a slot of the pool. With `--limit 1` it would wait for its own stage, and the stage for the slot."""
    deploy_stage("own", "own-pool")
    run = SimpleNamespace(work_pool_name="own-pool", work_queue_name=queue)
    monkeypatch.setattr(placing.FlowRunContext, "get", lambda: SimpleNamespace(flow_run=run, flow=None))
    with monkeypatch.context() as inner:
        inner.setattr(placing, "run_deployment", lambda *_, **__: pytest.fail("a sub-run was started"))
        with get_client(sync_client=True) as client:
            deployment = client.read_deployment_by_name("stage/own")
        assert placing._is_own_queue(deployment) is not placed
        if not placed:
            job, store = job_of(started_project), LocalStore(started_project.store)
            assert placing.run_on_pool(job, store, "tokenize", "own", force=False) is None


def test_a_sub_run_that_waits_for_a_busy_worker_says_what_it_waits_for(monkeypatch, caplog):
    deploy_stage("busy", "busy-pool")
    monkeypatch.setattr(placing, "PATIENCE", 0.2)
    monkeypatch.setattr(placing, "POLL", 0.1)
    monkeypatch.setattr(placing, "_has_worker", lambda *_: True)
    with get_client(sync_client=True) as client:
        run = client.create_flow_run_from_deployment(client.read_deployment_by_name("stage/busy").id, parameters={})
        threading.Timer(3, lambda: client.set_flow_run_state(run.id, Cancelled(), force=True)).start()
        assert placing._watch(client, run, "busy-pool", "train").state.is_cancelled()
        client.update_work_pool("busy-pool", WorkPoolUpdate(is_paused=True))
        assert "prefect work-pool resume busy-pool" in placing._waiting_reason(client, run, "busy-pool")
    [warning] = [record.getMessage() for record in caplog.records if "has waited" in record.getMessage()]
    assert "every worker of the pool busy-pool is busy" in warning


def test_a_pool_without_a_worker_is_reported_with_the_command_that_starts_one(started_project, monkeypatch):
    deploy_stage("idle", "idle-pool")
    monkeypatch.setattr(placing, "PATIENCE", 2.0)
    with pytest.raises(BadConfig) as caught:
        part(str(started_project.recipe), {"training_config.max_length": 64, "runtime.placement": {"tokenize": "idle"}})
    assert "prefect worker start --pool idle-pool" in str(caught.value)
    assert sub_runs()[0].state.is_cancelled(), "a worker that starts later does not find it"


def test_a_placement_without_a_deployment_is_reported(started_project):
    with pytest.raises(BadConfig) as caught:
        part(str(started_project.recipe), {"training_config.max_length": 64, "runtime.placement": {"tokenize": "moon"}})
    assert "stage/moon" in str(caught.value) and "loraflow deploy" in str(caught.value)


def test_a_worker_with_other_code_refuses_the_job(started_project):
    sent = job_of(started_project).model_dump(mode="json")
    job, store = placing.accept_job(sent, str(started_project.store))
    assert job == job_of(started_project) and isinstance(store, LocalStore)
    for change in ({"version": 99}, {"stage": "distil"}, {"something": "new"}):
        with pytest.raises(BadConfig, match="another version of loraflow") as caught:
            placing.accept_job({**sent, **change}, str(started_project.store))
        assert "same version of loraflow" in str(caught.value)


def test_a_worker_without_access_to_the_store_reports_it(started_project, tmp_path):
    with pytest.raises(BadConfig, match="do not share a store") as caught:
        placing.accept_job(job_of(started_project).model_dump(mode="json"), str(tmp_path / "elsewhere"))
    assert "s3://" in str(caught.value)


def test_states_of_sub_runs_become_failures_that_survive_serialization():
    from prefect.client.schemas.objects import FlowRun
    from prefect.states import Cancelled, Completed, Failed
    from prefect.states import Crashed as CrashedState

    def outcome(state):
        run = FlowRun(flow_id="00000000-0000-0000-0000-000000000000", state=state)
        placing._raise_failure(run, "train", "gpu")

    outcome(Completed())
    sent = OutOfMemory("Memory did not suffice.", where="train", next_step="less", needed=3)
    with pytest.raises(OutOfMemory) as caught:
        outcome(Failed(message=placing.failure_message(sent)))
    assert caught.value.to_dict() == sent.to_dict()
    for state, kind in ((CrashedState(), Killed), (Failed(message="odd"), Crashed), (Cancelled(), Failure)):
        with pytest.raises(kind) as caught:
            outcome(state)
        assert caught.value.retryable == (kind is Killed) and "sub-run" in str(caught.value)
