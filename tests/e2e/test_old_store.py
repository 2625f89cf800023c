"""A store that an earlier commit wrote, with its promotion, is read by this version: nothing has to be migrated."""

import io
import json
import os
import subprocess
import sys
import tarfile
from pathlib import Path

import pytest

from tests.conftest import build_phi3, chat
from tests.local_deployment import ROOT

pytestmark = pytest.mark.slow

SETTINGS = ("base.dtype=float32", "training_config.bf16=false", "training_config.max_steps=2", "gate.guards={}",
            "evaluation.metrics=[token_loss]", "gate.primary=token_loss", "evaluation.max_new_tokens=8",
            "runtime.device=cpu")  # fmt: skip
SET = [part for setting in SETTINGS for part in ("--set", setting)]
START = "import sys; from loraflow.cli import main; sys.exit(main())"


def loraflow(code: Path, project: Path, *arguments: str) -> str:
    """Run a command with the code of a folder, in the project's folder; return its output."""
    done = subprocess.run(
        [sys.executable, "-c", START, *arguments], cwd=project, env={**os.environ, "PYTHONPATH": str(code)},
        capture_output=True, text=True, timeout=500,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.fixture(params=["ca8beb2", "53a0533"])
def old_project(request, tmp_path):
    """A project whose model was trained and promoted by an earlier commit."""
    packed = subprocess.run(["git", "archive", request.param], cwd=ROOT, capture_output=True)
    if packed.returncode:
        pytest.skip(f"this clone does not have the commit {request.param}: {packed.stderr.decode().strip()}")
    code, project = tmp_path / "code", tmp_path / "project"
    with tarfile.open(fileobj=io.BytesIO(packed.stdout)) as archive:
        archive.extractall(code, filter="data")
    build_phi3(project / "base", dtype="float32")
    (project / "chats.jsonl").write_text("".join(json.dumps(chat(i)) + "\n" for i in range(60)))
    loraflow(code, project, "init", "--data", "chats.jsonl", "--base", "./base")
    loraflow(code, project, "run", "configs/chats.yaml", *SET)
    if "champion  " not in loraflow(code, project, "registry"):  # later gates leave so few rows undecided
        run = loraflow(code, project, "runs").split()[0]
        loraflow(code, project, "promote", run, "--reason", "for the test")
    return project


def test_the_store_of_an_earlier_commit_is_read(old_project):
    def now(*arguments: str) -> str:
        return loraflow(ROOT, old_project, *arguments)

    assert ", 0 damaged" in now("verify", "--deep")
    assert "done" in now("runs")
    assert "promote" in now("registry") and "champion  " in now("registry")
    shown = now("show", "champion")
    assert "promoted " in shown and "token_loss" in shown and "trained on cpu" in shown
    plan = {line.split("  ")[0]: line for line in now("plan", "configs/chats.yaml", *SET).splitlines()}
    assert " cached " in plan["version_dataset"]
    assert "version " in plan["check_dataset"], "the plan says why a stage with a newer version runs again"
    assert "evaluate champion" in plan, "the old champion is a candidate's opponent"
