"""SIGKILL to the command at a random moment of every stage: the store verifies, and the next run comes to its end."""

import random
import shutil
import signal
import subprocess
import sys
import time

import pytest

from loraflow.store import LocalStore
from tests.flows.test_finetune import last_record, processes_with, with_server

STAGES = ["version_dataset", "check_dataset", "resolve_base", "tokenize", "train", "merge", "verify", "evaluate"]


def kill_a_run_in(stage, project):
    """Run the recipe without `stage`'s artifacts, and kill the command a random time after that stage began.

    A machine may be so fast that the run ends before the kill: then the same is done again with half the delay.
    """
    command = [sys.executable, "-c", "from loraflow.cli import main; main()", "run", str(project.recipe), "-q"]
    stderr_file = project.folder / "stderr.txt"
    longest = 0.02 if stage in ("version_dataset", "check_dataset") else 6.0
    for attempt in range(8):
        shutil.rmtree(project.store / stage)
        with stderr_file.open("wb") as stderr:
            process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=stderr,
                                       start_new_session=True, env=with_server())  # fmt: skip
        while process.poll() is None:
            if list((project.store / "staging").glob(f"{stage}-*")) or (project.store / stage).exists():
                break
            time.sleep(0.01)
        time.sleep(random.Random(stage).uniform(0.0, longest) / 2**attempt)
        process.kill()  # does nothing to a process that `poll` or `wait` saw the end of
        if process.wait() == -signal.SIGKILL:
            return
        assert process.returncode == 0, stderr_file.read_text()[-2000:]
    raise AssertionError("the run was never killed before its end")


@pytest.mark.parametrize("stage", STAGES)
def test_sigkill_in_any_stage_leaves_an_intact_store(project, stage):
    before = {stage["stage"]: stage["digest"] for stage in last_record(project)["stages"]}
    kill_a_run_in(stage, project)
    for _ in range(300):
        if not processes_with(str(project.store / "work")):
            break
        time.sleep(0.1)
    assert processes_with(str(project.store / "work")) == []
    store = LocalStore(project.store)
    assert all(store.verify(ref) == [] for ref in store.artifacts())
    after = {stage["stage"]: stage["digest"] for stage in project.run()["stages"]}
    assert {k: after[k] for k in before} == before, "what was lost comes out the same"
    assert all(store.verify(ref) == [] for ref in store.artifacts())
