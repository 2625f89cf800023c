"""A team's set-up: Prefect's database in Postgres, the store in a bucket, workers of different pools and folders."""

import json
import subprocess
import sys
import time

import pytest

from loraflow.store import open_store
from tests.conftest import chat
from tests.team import Team, missing

pytestmark = [
    pytest.mark.slow,
    pytest.mark.timeout(1200),
    pytest.mark.skipif(missing() is not None, reason=f"not installed: {missing()}"),
]


@pytest.fixture(scope="module")
def team(tmp_path_factory, quick_phi3):
    team = Team(tmp_path_factory.mktemp("team"), quick_phi3)
    yield team
    team.stop()


def command(team, *arguments: str) -> subprocess.CompletedProcess[str]:
    """Run loraflow as the member of the team does who adds data."""
    line = [sys.executable, "-c", "from loraflow.cli import main; main()", *arguments]
    return subprocess.run(line, cwd=team.mine, env=team.environment("me"), capture_output=True, text=True)


def sub_runs(team, parent: dict) -> dict[str, dict]:
    """Return the runs of the stage flow under a run, by their stage."""
    found = team.api("POST", "/flow_runs/filter", {"flow_runs": {"parent_flow_run_id": {"any_": [parent["id"]]}}})
    return {run["name"]: run for run in found}


def newer_than(team, before: set[str]) -> dict:
    """Return the run that came to be since."""
    for _ in range(300):
        if new := [run for run in team.runs() if run["id"] not in before and run["parent_task_run_id"] is None]:
            return new[0]
        time.sleep(0.2)
    raise AssertionError("the event started no run")


def test_stages_go_to_the_other_worker_and_everything_lies_in_the_bucket(team):
    run = team.wait(team.start("finetune/local"))
    assert run["state"]["name"] == "Completed", run["state"]
    placed = sub_runs(team, run)
    assert {name.split()[0] for name in placed} == {"train", "evaluate"}, placed.keys()
    assert {one["work_pool_name"] for one in placed.values()} == {"gpu"}
    said = command(team, "runs", "--store", team.store)
    assert said.stdout.split()[-1] == "promote", said.stdout + said.stderr
    assert command(team, "verify", "--deep", "--store", team.store).returncode == 0
    assert "no runs in .loraflow/store" in command(team, "runs").stderr
    trained = list(team.cache("gpu").rglob("adapter_model.safetensors"))
    assert trained, "the second worker trained, in its own cache"
    for clone in (team.mine, *team.clones.values()):
        assert not (clone / ".loraflow" / "store").exists(), "nothing is kept beside the bucket"


def test_a_member_of_the_team_reuses_what_the_workers_made(team):
    plan = command(team, "plan", "configs/tiny.yaml")
    assert plan.returncode == 0, plan.stderr
    lines = [line for line in plan.stdout.splitlines() if line.strip()]
    assert len(lines) >= 9 and all(" cached " in line for line in lines), plan.stdout


def test_new_data_retrains_and_a_night_without_any_is_up_to_date(team):
    before = {run["id"] for run in team.runs()}
    rows = [json.dumps(chat(i)) + "\n" for i in range(90)]
    (team.mine / "data" / "train.jsonl").write_text("".join(rows))
    added = command(team, "data", "add", "data", "--commit", "--git-push")
    assert added.returncode == 0, added.stderr
    run = newer_than(team, before)
    assert team.wait(run["id"])["state"]["type"] == "COMPLETED"
    night = team.wait(team.start("retrain/nightly"))
    assert night["state"]["name"] == "UpToDate", night["state"]


def test_a_gpu_machine_dies_and_another_one_goes_on_from_its_checkpoint(team):
    """Ten minutes: the server waits for three heartbeats before it believes it."""
    settings = {"training_config.max_steps": 600, "training_config.save_steps": 5, "training_config.seed": 77}
    run = team.start("finetune/local", settings=settings)
    seals = [f"checkpoint-{step}/complete.json" for step in range(10, 600, 5)]

    def kept() -> bool:
        found = team.bucket.client().list_objects_v2(
            Bucket="tests", Prefix=f"{team.store.split('/', 3)[3]}/work/train/"
        )
        return any(one["Key"].endswith(tuple(seals)) for one in found.get("Contents", []))

    for _ in range(600):
        if kept():
            break
        time.sleep(0.2)
    killed = " ".join(team.kill_machine("gpu"))
    assert "worker start" in killed and "prefect.engine" in killed and "loraflow.execution.worker" in killed, killed
    started = time.monotonic()
    team.add_worker("gpu", "spare")
    ended = team.wait(run, seconds=1000)
    assert ended["state"]["name"] == "Completed", ended["state"]
    placed = team.api("POST", "/flow_runs/filter", {"flow_runs": {"parent_flow_run_id": {"any_": [run]}}})
    trained = sorted((one for one in placed if one["name"].startswith("train")), key=lambda one: one["created"])
    assert [one["state"]["type"] for one in trained] == ["CRASHED", "COMPLETED"], trained
    assert "no heartbeat for 9 minutes" in trained[0]["state"]["message"]
    with pytest.MonkeyPatch.context() as patch:
        for name, value in {**team.bucket.settings, "LORAFLOW_CACHE": str(team.cache("me"))}.items():
            patch.setenv(name, value)
        resumed = open_store(team.store).newest("train").figures["resumed_at"]
    assert resumed >= 10, "it went on from what the dead machine had kept in the bucket"
    print(f"the run ended {time.monotonic() - started:.0f} s after the machine; training went on from step {resumed}")
