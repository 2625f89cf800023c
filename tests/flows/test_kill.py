"""SIGKILL to the command at a random moment of every stage: the store verifies, and the next run comes to its end."""

import os
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


@pytest.mark.parametrize("stage", STAGES)
def test_sigkill_in_any_stage_leaves_an_intact_store(project, stage):
    before = {one["stage"]: one["digest"] for one in last_record(project)["stages"]}
    shutil.rmtree(project.store / stage)
    command = [sys.executable, "-c", "from loraflow.cli import main; main()", "run", str(project.recipe), "-q"]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, start_new_session=True,
                               env=with_server())  # fmt: skip
    for _ in range(3000):
        if list((project.store / "staging").glob(f"{stage}-*")) or process.poll() is not None:
            break
        time.sleep(0.01)
    time.sleep(random.Random(stage).uniform(0.0, 0.02 if stage in ("version_dataset", "check_dataset") else 6.0))
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    for _ in range(300):
        if not processes_with(str(project.store / "work")):
            break
        time.sleep(0.1)
    assert processes_with(str(project.store / "work")) == []
    store = LocalStore(project.store)
    assert all(store.verify(ref) == [] for ref in store.artifacts())
    after = {one["stage"]: one["digest"] for one in project.run()["stages"]}
    assert {k: after[k] for k in before} == before, "what was lost comes out the same"
    assert all(store.verify(ref) == [] for ref in store.artifacts())
