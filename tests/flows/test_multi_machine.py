"""Several machines: Prefect's database in Postgres, the store in a bucket, workers with their own pools and folders."""

import json
import subprocess
import sys
import time

import pytest

from loraflow.store import open_store
from tests.conftest import chat
from tests.multi_machine import MultiMachineDeployment, missing

pytestmark = [
    pytest.mark.slow,
    pytest.mark.timeout(2400),
    pytest.mark.skipif(missing() is not None, reason=f"not installed: {missing()}"),
]


@pytest.fixture(scope="module")
def machines(tmp_path_factory, quick_phi3):
    machines = MultiMachineDeployment(tmp_path_factory.mktemp("machines"), quick_phi3)
    yield machines
    machines.stop()


def command(machines, *arguments: str) -> subprocess.CompletedProcess[str]:
    """Run loraflow in the clone that adds data."""
    line = [sys.executable, "-c", "from loraflow.cli import main; main()", *arguments]
    return subprocess.run(line, cwd=machines.mine, env=machines.environment("me"), capture_output=True, text=True)


def sub_runs(machines, parent: dict) -> dict[str, dict]:
    """Return the runs of the stage flow under a run, by their stage."""
    found = machines.api("POST", "/flow_runs/filter", {"flow_runs": {"parent_flow_run_id": {"any_": [parent["id"]]}}})
    return {run["name"]: run for run in found}


def newer_than(machines, before: set[str]) -> dict:
    """Return the run that was created since."""
    for _ in range(300):
        if new := [run for run in machines.runs() if run["id"] not in before and run["parent_task_run_id"] is None]:
            return new[0]
        time.sleep(0.2)
    raise AssertionError("the event started no run")


def test_placed_stages_run_on_the_other_worker_and_all_artifacts_are_in_the_bucket(machines):
    run = machines.wait(machines.start("finetune/local"))
    assert run["state"]["name"] == "Completed", run["state"]
    placed = sub_runs(machines, run)
    assert {name.split()[0] for name in placed} == {"train", "evaluate"}, placed.keys()
    assert {run["work_pool_name"] for run in placed.values()} == {"gpu"}
    output = command(machines, "runs", "--store", machines.store)
    assert output.stdout.split()[-1] == "promote", output.stdout + output.stderr
    assert command(machines, "verify", "--deep", "--store", machines.store).returncode == 0
    assert "no runs in .loraflow/store" in command(machines, "runs").stderr
    trained = list(machines.cache("gpu").rglob("adapter_model.safetensors"))
    assert trained, "the second worker trained, in its own cache"
    for clone in (machines.mine, *machines.clones.values()):
        assert not (clone / ".loraflow" / "store").exists(), "the store is only in the bucket"


def test_another_machine_reuses_the_artifacts_of_the_workers(machines):
    plan = command(machines, "plan", "configs/tiny.yaml")
    assert plan.returncode == 0, plan.stderr
    lines = [line for line in plan.stdout.splitlines() if line.strip()]
    assert len(lines) >= 9 and all(" cached " in line for line in lines), plan.stdout


def test_new_data_retrains_and_a_nightly_run_without_new_data_is_up_to_date(machines):
    before = {run["id"] for run in machines.runs()}
    rows = [json.dumps(chat(i)) + "\n" for i in range(90)]
    (machines.mine / "data" / "train.jsonl").write_text("".join(rows))
    added = command(machines, "data", "add", "data", "--commit", "--git-push")
    assert added.returncode == 0, added.stderr
    run = newer_than(machines, before)
    assert machines.wait(run["id"])["state"]["type"] == "COMPLETED"
    night = machines.wait(machines.start("retrain/nightly"))
    assert night["state"]["name"] == "UpToDate", night["state"]


def test_another_machine_resumes_when_a_gpu_machine_dies(machines):
    """Ten minutes, on a busy machine twenty: the server waits for three heartbeats before it believes it."""
    settings = {"training_config.max_steps": 600, "training_config.save_steps": 5, "training_config.seed": 77}
    run = machines.start("finetune/local", settings=settings)
    manifests = [f"checkpoint-{step}/complete.json" for step in range(10, 600, 5)]

    def checkpoint_in_bucket() -> bool:
        found = machines.bucket.client().list_objects_v2(
            Bucket="tests", Prefix=f"{machines.store.split('/', 3)[3]}/work/train/"
        )
        return any(entry["Key"].endswith(tuple(manifests)) for entry in found.get("Contents", []))

    until = time.monotonic() + 600
    while not checkpoint_in_bucket():
        assert time.monotonic() < until, "no checkpoint came into the bucket"
        time.sleep(0.2)
    killed = " ".join(machines.kill_machine("gpu"))
    assert "worker start" in killed and "prefect.engine" in killed and "loraflow.execution.worker" in killed, killed
    started = time.monotonic()
    machines.add_worker("gpu", "spare")
    ended = machines.wait(run, seconds=1000)
    assert ended["state"]["name"] == "Completed", ended["state"]
    placed = machines.api("POST", "/flow_runs/filter", {"flow_runs": {"parent_flow_run_id": {"any_": [run]}}})
    trained = sorted((run for run in placed if run["name"].startswith("train")), key=lambda run: run["created"])
    assert [run["state"]["type"] for run in trained] == ["CRASHED", "COMPLETED"], trained
    assert "no heartbeat for 9 minutes" in trained[0]["state"]["message"]
    with pytest.MonkeyPatch.context() as patch:
        for name, value in {**machines.bucket.settings, "LORAFLOW_CACHE": str(machines.cache("me"))}.items():
            patch.setenv(name, value)
        resumed = open_store(machines.store).newest("train").figures["resumed_at"]
    assert resumed >= 10, "training resumed from the checkpoint of the dead machine in the bucket"
    print(f"the run ended {time.monotonic() - started:.0f} s after the machine; training resumed at step {resumed}")
