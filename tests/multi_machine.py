"""A deployment on several simulated machines, without containers: Postgres, an S3 server, Prefect's server, and workers of different pools.

Each worker has a clone, a cache and a home of its own; what they share is Prefect's server, the bucket and two remotes.
"""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from contextlib import suppress
from pathlib import Path
from typing import Any

import psutil

from tests import local_deployment
from tests.local_deployment import Api, build_clones, free_port, git
from tests.object_server import Server
from tests.object_server import program as object_server

PLACED = "  placement: {train: gpu, evaluate: gpu}\n"
ONLY = ["finetune/local", "retrain/nightly", "retrain/on-dataset-update", "stage/gpu"]


def postgres() -> Path | None:
    """Return the folder of Postgres's programs, as Debian installs them or as they are on the path."""
    debian = sorted(Path("/usr/lib/postgresql").glob("*/bin/initdb"))
    found = debian[-1] if debian else Path(shutil.which("initdb") or "")
    return found.parent if found.name and (os.getuid() or shutil.which("runuser")) else None


def missing() -> str | None:
    """Return the programs that this deployment needs and this machine does not have."""
    from importlib.util import find_spec

    needed = {"Postgres": postgres(), "SeaweedFS": object_server(), "boto3": find_spec("boto3")}
    return ", ".join(name for name, found in needed.items() if not found) or None


class Postgres:
    """A Postgres server with a database `prefect`. It runs as another user, because Postgres refuses root."""

    def __init__(self) -> None:
        found = postgres()
        assert found
        self.folder, self.port = Path(tempfile.mkdtemp(prefix="loraflow-postgres-")), free_port()
        self.user = ["runuser", "-u", "postgres", "--"] if os.getuid() == 0 else []
        if self.user:
            shutil.chown(self.folder, "postgres")
        self._run(found / "initdb", "-D", "data", "-U", "prefect", "-A", "trust", "--no-sync")
        options = f"-p {self.port} -k {self.folder} -c listen_addresses=127.0.0.1"
        self._run(found / "pg_ctl", "-D", "data", "-w", "-l", "log", "-o", options, "start")
        self._run(found / "createdb", "-h", "127.0.0.1", "-p", self.port, "-U", "prefect", "prefect")
        self.control = found / "pg_ctl"
        self.url = f"postgresql+asyncpg://prefect@127.0.0.1:{self.port}/prefect"

    def _run(self, *command: Any) -> None:
        subprocess.run([*self.user, *map(str, command)], cwd=self.folder, check=True, stdout=subprocess.DEVNULL)

    def stop(self) -> None:
        """Stop the server and remove its files."""
        self._run(self.control, "-D", "data", "-m", "immediate", "stop")
        shutil.rmtree(self.folder)


class MultiMachineDeployment(Api):
    """The deployment, started in a folder."""

    def __init__(self, folder: Path, base: Path):
        self.folder = folder
        self.running: dict[str, subprocess.Popen[bytes]] = {}
        self.bucket = Server(folder / "bucket")
        self.store = self.bucket.new_store_uri()
        self.mine, first = build_clones(folder, base, self.store, PLACED)
        self.clones = {"local": first}
        self.database = Postgres()
        port = free_port()
        self.url = f"http://127.0.0.1:{port}"
        server = {"PREFECT_SERVER_DATABASE_CONNECTION_URL": self.database.url}
        self._start("server", folder, ["server", "start", "--port", str(port)], **server)
        self._wait(self._answers, "server")
        only = [part for name in ONLY for part in ("--only", name)]
        command = [sys.executable, "-c", "from loraflow.cli import main; main()", "deploy", "--wait", "0", *only]
        subprocess.run(command, cwd=self.mine, env=self.environment("me"), check=True, stdout=subprocess.DEVNULL)
        self.add_worker("local", "local")
        self.add_worker("gpu", "gpu")

    def add_worker(self, pool: str, name: str) -> None:
        """Start a worker of a pool with its own clone, and wait until the server shows it as online."""
        if name not in self.clones:
            git(self.folder, "clone", "-q", "remote.git", f"clone of {name}")
            self.clones[name] = self.folder / f"clone of {name}"
        options = ["--pool", pool, "--type", "process", "--name", name, "--limit", "4"]
        self._start(name, self.clones[name], ["worker", "start", *options], LORAFLOW_HOME=str(self.clones[name]))
        self._wait(lambda: self._online(pool, name), name)

    def kill_machine(self, name: str) -> list[str]:
        """Kill a worker and all its child processes at once, as a power cut does. Return their command lines."""
        home, killed = str(self.clones[name]), dict[int, psutil.Process]()
        for process in psutil.process_iter():
            with suppress(psutil.Error):  # it ended meanwhile, or is another user's
                if process.environ().get("LORAFLOW_HOME") == home:
                    process.suspend()  # so that no process sees another one end
                    killed[process.pid] = process
        for process in [*killed.values()]:  # a forked worker's environment is that of its fork server
            with suppress(psutil.Error):
                killed |= {child.pid: child for child in process.children(recursive=True)}
        lines = []
        for process in killed.values():
            with suppress(psutil.Error):
                process.suspend()
                lines.append(" ".join(process.cmdline()))
        for process in killed.values():
            with suppress(psutil.Error):
                process.kill()
        self.running.pop(name).wait()
        return lines

    def environment(self, machine: str, **more: str) -> dict[str, str]:
        home = self.folder / f"home of {machine}"
        own = {"PREFECT_HOME": str(home / "prefect"), "LORAFLOW_CACHE": str(home / "cache"), "DO_NOT_TRACK": "1"}
        quick = {"PREFECT_WORKER_QUERY_SECONDS": "2", "PREFECT_SERVER_ANALYTICS_ENABLED": "false"}
        return local_deployment.environment(
            PREFECT_API_URL=f"{self.url}/api", **self.bucket.settings, **own, **quick, **more
        )

    def _start(self, name: str, cwd: Path, arguments: list[str], **more: str) -> None:
        with self.log(name).open("wb") as log:
            self.running[name] = subprocess.Popen(
                [sys.executable, "-m", "prefect", *arguments], cwd=cwd, env=self.environment(name, **more),
                stdout=log, stderr=log, start_new_session=True,
            )  # fmt: skip

    def log(self, name: str) -> Path:
        """Return the log of the server or of a worker."""
        return self.folder / f"{name}.log"

    def cache(self, name: str) -> Path:
        """Return the folder of a worker's downloads."""
        return self.folder / f"home of {name}" / "cache"

    def _wait(self, condition: Any, name: str) -> None:
        for _ in range(600):
            if condition():
                return
            assert self.running[name].poll() is None, self.log(name).read_text()
            time.sleep(0.5)
        raise AssertionError(self.log(name).read_text())

    def _answers(self) -> bool:
        try:
            urllib.request.urlopen(f"{self.url}/api/health", timeout=5).close()
        except (OSError, urllib.error.HTTPError):
            return False
        return True

    def _online(self, pool: str, name: str) -> bool:
        workers = self.api("POST", f"/work_pools/{pool}/workers/filter")
        return any(worker["status"] == "ONLINE" and worker["name"] == name for worker in workers)

    def stop(self) -> None:
        """Stop the workers, then Prefect's server, database and bucket."""
        for process in reversed(self.running.values()):
            process.terminate()
            try:
                process.wait(30)
            except subprocess.TimeoutExpired:
                os.killpg(process.pid, signal.SIGKILL)
                process.wait()
        self.database.stop()
        self.bucket.stop()
