"""Retraining as a team has it: data from one clone, a worker in another, the event between them."""

import json
import os
import subprocess
import sys
import time

import pytest

from tests.conftest import WORDS, chat
from tests.site import ROOT, Site, build_clones, git

pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]


@pytest.fixture(scope="module")
def team(tmp_path_factory, quick_phi3):
    """The clone of who adds data, and a worker with its server in another."""
    mine, worker = build_clones(tmp_path_factory.mktemp("team"), quick_phi3)
    site = Site(worker)
    yield mine, site
    assert site.stop() == 0, site.log.read_text()


def push_data(mine, site, train: list[dict]) -> str:
    """Add data as a person does, and return the run that the event started."""
    before = {run["id"] for run in site.runs()}
    (mine / "data" / "train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in train))
    env = {**os.environ, "PREFECT_API_URL": f"{site.url}/api", "PYTHONPATH": str(ROOT)}
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
    assert done.returncode == 0 and f"notified  {site.url}/api" in done.stdout, done.stdout + done.stderr
    for _ in range(300):
        if new := [run["id"] for run in site.runs() if run["id"] not in before]:
            return new[0]
        time.sleep(0.2)
    raise AssertionError("the event started no run")


def champion(site) -> str | None:
    """Return the newest entry of the promotion log."""
    log = sorted((site.folder / ".loraflow" / "store" / "registry" / "tiny" / "log").glob("*.json"))
    return log[-1].read_text() if log else None


def test_data_from_another_clone_retrains_here_without_a_pull_and_bad_data_is_not_promoted(team):
    mine, site = team
    head = git(site.folder, "rev-parse", "HEAD")

    first = site.wait(push_data(mine, site, [chat(i) for i in range(100)]))
    assert first["state"]["type"] == "COMPLETED", first["state"]
    promoted = champion(site)
    assert promoted is not None, "the first model that beats its base is the champion"
    assert git(site.folder, "rev-parse", "HEAD") == head and not (site.folder / "data").exists(), "nobody pulled"
    assert git(mine, "rev-parse", "HEAD") != head

    lies = [
        {"messages": [chat(i)["messages"][0], {"role": "assistant", "content": WORDS[i * 5 % 22] * 9}]}
        for i in range(100)
    ]
    worse = site.wait(push_data(mine, site, lies))
    assert worse["state"]["name"] == "Completed", worse["state"]
    assert champion(site) == promoted, "answers that are wrong make no champion"

    broken = site.wait(push_data(mine, site, [{"messages": "not a chat"}]))
    assert broken["state"]["type"] == "FAILED" and "train.jsonl" in broken["state"]["message"]
    assert champion(site) == promoted

    again = site.wait(push_data(mine, site, [chat(i) for i in range(100)]))
    assert again["state"]["name"] == "UpToDate", "data that was there before is computed already"


def test_a_second_run_waits_for_the_first_and_finds_everything_cached(team):
    _, site = team
    new = {"settings": {"training_config.max_steps": 9}}
    first, second = (site.start("retrain/nightly", **new) for _ in range(2))
    ended = sorted((site.wait(first), site.wait(second)), key=lambda run: run["end_time"])
    assert [run["state"]["name"] for run in ended] == ["Completed", "UpToDate"]
    assert ended[1]["start_time"] >= ended[0]["end_time"], "one at a time"
    third = site.wait(site.start("retrain/nightly", **new))
    assert third["state"]["name"] == "UpToDate" and "Every stage is cached" in third["state"]["message"]
    assert third["total_run_time"] < 60
