"""A small project under `loraflow up`, for tests that need a server, workers and deployments."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from pathlib import Path
from typing import Any

from tests.conftest import RECIPE, chat

ROOT = Path(__file__).parent.parent
ONLY = ["finetune/local", "retrain/nightly", "retrain/on-dataset-update", "evaluate/local"]
ENDED = ("COMPLETED", "FAILED", "CRASHED", "CANCELLED")


def build_project(folder: Path, base: Path, store: str = ".loraflow/store", more: str = "") -> Path:
    """Make a git repository with a recipe, a versioned dataset and this repository's `prefect.yaml` for that recipe.

    `more` is added to the recipe's `runtime` section.
    """
    for name in ("data", "configs"):
        (folder / name).mkdir(parents=True)
    for name, numbers in (("train.jsonl", range(80)), ("heldout.jsonl", range(1000, 1070))):
        (folder / "data" / name).write_text("".join(json.dumps(chat(i)) + "\n" for i in numbers))
    text = RECIPE.format(data="data.dvc", base=base, store=store) + more
    text = text.replace("max_rows: 8", "max_rows: 70")  # enough for the gate to promote
    (folder / "configs" / "tiny.yaml").write_text(text)
    deployments = (ROOT / "prefect.yaml").read_text()
    for name in ("quickstart", "phi3-mini"):
        deployments = deployments.replace(f"recipe: {name}", "recipe: tiny")
    (folder / "prefect.yaml").write_text(deployments)
    (folder / ".gitignore").write_text("/.loraflow/\n")
    git = ["git", "-c", "user.name=a", "-c", "user.email=a@b.c"]
    for command in (["git", "init", "-q", "-b", "main"], [sys.executable, "-m", "dvc", "init", "-q"],
                    [sys.executable, "-m", "dvc", "add", "-q", "data"], ["git", "add", "-A"],
                    [*git, "commit", "-qm", "first"]):  # fmt: skip
        subprocess.run(command, cwd=folder, check=True)
    return folder


def git(folder: Path, *arguments: str) -> str:
    """Run git with a fixed author."""
    command = ["git", "-c", "user.name=a", "-c", "user.email=a@b.c", *arguments]
    return subprocess.run(command, cwd=folder, check=True, capture_output=True, text=True).stdout.strip()


def build_clones(folder: Path, base: Path, *more: str) -> tuple[Path, Path]:
    """Make two clones that share a git remote and a DVC remote: one to add data in, one for a worker."""
    mine = build_project(folder / "mine", base, *more)
    subprocess.run(
        [sys.executable, "-m", "dvc", "remote", "add", "-q", "-d", "shared", str(folder / "dvc")], cwd=mine, check=True
    )
    subprocess.run([sys.executable, "-m", "dvc", "push", "-q"], cwd=mine, check=True)
    git(mine, "commit", "-qam", "remote")
    git(folder, "init", "-q", "--bare", "-b", "main", "remote.git")
    git(mine, "remote", "add", "origin", str(folder / "remote.git"))
    git(mine, "push", "-q", "-u", "origin", "main")
    git(folder, "clone", "-q", "remote.git", "worker")
    git(mine, "config", "user.name", "a")
    git(mine, "config", "user.email", "a@b.c")
    return mine, folder / "worker"


def free_port() -> int:
    """Return a free port."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def environment(**more: str) -> dict[str, str]:
    """Return this process's environment without its Prefect settings, for processes that use another server."""
    paths = [path for path in os.environ.get("PYTHONPATH", "").split(os.pathsep) if path]
    env = {key: value for key, value in os.environ.items() if not key.startswith("PREFECT_")}
    return env | {"PYTHONPATH": os.pathsep.join([str(ROOT), *paths]), "OMP_NUM_THREADS": "1", **more}


class Api:
    """A client of a Prefect server's REST API."""

    url: str

    def api(self, method: str, path: str, body: Any = None) -> Any:
        data = json.dumps(body if body is not None else {}).encode() if method != "GET" else None
        request = urllib.request.Request(
            f"{self.url}/api{path}", data=data, headers={"content-type": "application/json"}, method=method
        )
        return json.loads(urllib.request.urlopen(request, timeout=60).read() or "null")

    def read_deployment(self, name: str) -> dict[str, Any]:
        return self.api("GET", f"/deployments/name/{name}")

    def runs(self) -> list[dict[str, Any]]:
        """Return the runs that are not scheduled ones, newest first."""
        found = self.api("POST", "/flow_runs/filter", {"sort": "EXPECTED_START_TIME_DESC", "limit": 50})
        return [run for run in found if not run["auto_scheduled"]]

    def start(self, name: str, **parameters: Any) -> str:
        body = {"parameters": parameters, "state": {"type": "SCHEDULED"}}
        return self.api("POST", f"/deployments/{self.read_deployment(name)['id']}/create_flow_run", body)["id"]

    def wait(self, run: str, *states: str, seconds: float = 600) -> dict[str, Any]:
        until = time.monotonic() + seconds
        while time.monotonic() < until:
            found = self.api("GET", f"/flow_runs/{run}")
            if found["state"]["type"] in (states or ENDED):
                return found
            assert states or found["state"]["type"] not in ENDED
            time.sleep(0.3)
        raise AssertionError(found["state"])


class LocalDeployment(Api):
    """A running `loraflow up`, on a free port unless one is given."""

    def __init__(self, folder: Path, port: int = 0):
        self.folder = folder
        self.port = port or free_port()
        self.url = f"http://127.0.0.1:{self.port}"
        self.log = folder / "up.log"
        only = [part for name in ONLY for part in ("--only", name)]
        command = [sys.executable, "-c", "from loraflow.cli import main; main()", "up", "--port", str(self.port), *only]
        env = environment()
        with self.log.open("wb") as file:
            self.process = subprocess.Popen(
                command, cwd=folder, stdout=file, stderr=file, env=env, start_new_session=True
            )
        for _ in range(600):
            if "Ctrl-C stops" in self.log.read_text():
                return
            assert self.process.poll() is None, self.log.read_text()
            time.sleep(0.5)
        raise AssertionError(self.log.read_text())

    def stop(self) -> int:
        self.process.send_signal(signal.SIGINT)
        return self.process.wait(90)

    def wait_for_step(self, step: int) -> None:
        """Wait until a training that is running now reaches a step. Files of earlier trainings are ignored."""
        now = time.time()
        work = self.folder / ".loraflow" / "store" / "work" / "train"
        for _ in range(1800):
            running = [file for file in work.glob("*/progress.jsonl") if file.stat().st_mtime > now]
            if any(f'"step": {step}' in file.read_text() for file in running):
                return
            time.sleep(0.1)
        raise AssertionError(f"training did not reach step {step}")

    def workers(self) -> list[int]:
        """Return the processes that compute a stage."""
        rows = subprocess.run(
            ["ps", "-ww", "-eo", "pid=,stat=,args="], capture_output=True, text=True
        ).stdout.splitlines()
        mine = [row.split() for row in rows if "loraflow.execution.worker" in row and str(self.folder) in row]
        return [int(row[0]) for row in mine if not row[1].startswith("Z")]
