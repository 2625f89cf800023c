"""Retraining across two clones: data is added in one, an event starts a run in the other."""

import json
import os
import subprocess
import sys
import time

import pytest

from tests.conftest import WORDS, chat
from tests.local_deployment import ROOT, LocalDeployment, build_clones, git

pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]


@pytest.fixture(scope="module")
def clones(tmp_path_factory, quick_phi3):
    """A clone to add data in, and a worker with its server in another clone."""
    mine, worker = build_clones(tmp_path_factory.mktemp("clones"), quick_phi3)
    deployment = LocalDeployment(worker)
    yield mine, deployment
    assert deployment.stop() == 0, deployment.log.read_text()


def push_data(mine, deployment, train: list[dict]) -> str:
    """Add data with the command line, and return the run that the event started."""
    before = {run["id"] for run in deployment.runs()}
    (mine / "data" / "train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in train))
    env = {**os.environ, "PREFECT_API_URL": f"{deployment.url}/api", "PYTHONPATH": str(ROOT)}
    command = [
        sys.executable,
        "-c",
        "from loraflow.cli import main; main()",
        "data",
        "add",
        "data",
        "--commit",
        "--git-push",
    ]
    done = subprocess.run(command, cwd=mine, env=env, capture_output=True, text=True)
    assert done.returncode == 0 and f"notified  {deployment.url}/api" in done.stdout, done.stdout + done.stderr
    for _ in range(300):
        if new := [run["id"] for run in deployment.runs() if run["id"] not in before]:
            return new[0]
        time.sleep(0.2)
    raise AssertionError("the event started no run")


def champion(deployment) -> str | None:
    """Return the newest entry of the promotion log."""
    log = sorted((deployment.folder / ".loraflow" / "store" / "registry" / "tiny" / "log").glob("*.json"))
    return log[-1].read_text() if log else None


def test_data_from_another_clone_retrains_without_a_pull_and_bad_data_is_not_promoted(clones):
    mine, deployment = clones
    head = git(deployment.folder, "rev-parse", "HEAD")

    first = deployment.wait(push_data(mine, deployment, [chat(i) for i in range(100)]))
    assert first["state"]["type"] == "COMPLETED", first["state"]
    promoted = champion(deployment)
    assert promoted is not None, "the first model that beats its base is the champion"
    assert git(deployment.folder, "rev-parse", "HEAD") == head and not (deployment.folder / "data").exists(), "no pull"
    assert git(mine, "rev-parse", "HEAD") != head

    wrong_answers = [
        {"messages": [chat(i)["messages"][0], {"role": "assistant", "content": WORDS[i * 5 % 22] * 9}]}
        for i in range(100)
    ]
    worse = deployment.wait(push_data(mine, deployment, wrong_answers))
    assert worse["state"]["name"] == "Completed", worse["state"]
    assert champion(deployment) == promoted, "a model trained on wrong answers is not promoted"

    broken = deployment.wait(push_data(mine, deployment, [{"messages": "not a chat"}]))
    assert broken["state"]["type"] == "FAILED" and "train.jsonl" in broken["state"]["message"]
    assert champion(deployment) == promoted

    again = deployment.wait(push_data(mine, deployment, [chat(i) for i in range(100)]))
    assert again["state"]["name"] == "UpToDate", "data that was there before is computed already"


def test_a_second_run_waits_for_the_first_and_finds_everything_cached(clones):
    _, deployment = clones
    new = {"settings": {"training_config.max_steps": 9}}
    first, second = (deployment.start("retrain/nightly", **new) for _ in range(2))
    ended = sorted((deployment.wait(first), deployment.wait(second)), key=lambda run: run["end_time"])
    assert [run["state"]["name"] for run in ended] == ["Completed", "UpToDate"]
    assert ended[1]["start_time"] >= ended[0]["end_time"], "one at a time"
    third = deployment.wait(deployment.start("retrain/nightly", **new))
    assert third["state"]["name"] == "UpToDate" and "Every stage is cached" in third["state"]["message"]
    assert third["total_run_time"] < 60
