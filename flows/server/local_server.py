"""A Prefect server with workers on this machine: started together, stopped together. Behind `loraflow up`.

It is set up through the environment, which has to be in place before prefect is imported: `environment` does that.
"""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from contextlib import suppress
from pathlib import Path
from types import TracebackType

from loraflow.failures import BadConfig, Crashed, Failure
from loraflow.flows.server.child import GRACE

START = 300.0  # seconds; the first start migrates a database, on a busy machine for a minute and more


def environment(home: Path, host: str, port: int) -> dict[str, str]:
    """Return the environment of server, workers and deploying: one home, no telemetry, a quick worker.

    Raises:
        BadConfig: other machines could come in, and no auth string is set.
    """
    auth = os.environ.get("PREFECT_SERVER_API_AUTH_STRING", "")
    if not auth and host not in ("127.0.0.1", "localhost", "::1"):
        raise BadConfig(
            "Whoever reaches the server can run code here, so that without a password it listens to this machine only.",
            where=f"--host {host}",
            next_step="export PREFECT_SERVER_API_AUTH_STRING=USER:PASSWORD, or leave --host out",
        )
    near = "127.0.0.1" if host in ("0.0.0.0", "::") else host
    return {
        "PREFECT_HOME": str(home.absolute()),
        "PREFECT_API_URL": f"http://{near}:{port}/api",
        "PREFECT_SERVER_UI_API_URL": f"http://{near}:{port}/api" if near == host else "/api",
        "PREFECT_SERVER_ANALYTICS_ENABLED": "false",
        "DO_NOT_TRACK": "1",
        "PREFECT_WORKER_QUERY_SECONDS": "2",
        "LORAFLOW_HOME": str(Path.cwd()),
        **({"PREFECT_API_AUTH_STRING": auth} if auth else {}),
    }


def refuse_taken(host: str, port: int) -> None:
    """Refuse a port that somebody listens on.

    Raises:
        BadConfig: it is taken, or no address of this machine.
    """
    try:
        with socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET) as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            probe.bind((host, port))
    except OSError as error:
        raise BadConfig(
            f"The server cannot listen on port {port}.",
            where=f"{host}:{port}",
            got=error.strerror or str(error),
            next_step=f"loraflow up --port {port + 1}; or, if a server runs there: "
            f"PREFECT_API_URL=http://{host}:{port}/api loraflow deploy",
        ) from error


class Processes:
    """Prefect's processes, each with a log and a group of its own; all of them end on exit, newest first."""

    def __init__(self, home: Path):
        self.home = home
        self.running: dict[str, subprocess.Popen[bytes]] = {}

    def __enter__(self) -> Processes:
        return self

    def start(self, name: str, *arguments: str) -> Path:
        """Start `prefect ARGUMENTS`; return its log."""
        log = self.home / f"{name}.log"
        with log.open("wb") as file:
            self.running[name] = subprocess.Popen(
                [sys.executable, "-m", "loraflow.flows.server.child", str(os.getpid()), *arguments],
                stdin=subprocess.DEVNULL,
                stdout=file,
                stderr=file,
                start_new_session=True,
            )
        return log

    def check(self) -> None:
        """Look whether all of them run.

        Raises:
            Crashed: one ended.
        """
        for name, process in self.running.items():
            if process.poll() is not None:
                tail = (self.home / f"{name}.log").read_bytes()[-1500:].decode(errors="replace").strip()
                raise Crashed(
                    f"Prefect's {name} ended.",
                    where=str(self.home / f"{name}.log"),
                    got=f"exit status {process.returncode}\n{tail}",
                    next_step="loraflow up",
                )

    def wait_for_server(self, port: int, host: str) -> None:
        """Wait until the server answers.

        Raises:
            Crashed: it ended instead.
            Failure: it does not answer in time.
        """
        near = "127.0.0.1" if host in ("0.0.0.0", "::") else host
        url, until = f"http://{near}:{port}/api/health", time.monotonic() + START
        while time.monotonic() < until:
            self.check()
            try:
                urllib.request.urlopen(url, timeout=5).close()
                return
            except urllib.error.HTTPError:  # it wants the password: it is there
                return
            except OSError:
                time.sleep(0.3)
        raise Failure(
            "Prefect's server did not answer.",
            where=url,
            expected=f"an answer within {START:.0f} s",
            next_step=f"its log: {self.home / 'server.log'}",
        )

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        with suppress(ValueError):  # a second Ctrl-C must not leave anything behind
            signal.signal(signal.SIGINT, signal.SIG_IGN)
            signal.signal(signal.SIGTERM, signal.SIG_IGN)
        workers = [process for name, process in self.running.items() if name != "server"]
        _end_runs(
            [process.pid for process in workers]
        )  # first: what is running can still tell the server that it ended
        _end(workers)
        _end([process for name, process in self.running.items() if name == "server"])


def _end_runs(workers: list[int]) -> None:
    """End the flow runs of workers, each a process in a session of its own, and wait until they are gone."""
    rows = subprocess.run(["ps", "-eo", "pid=,ppid="], capture_output=True, text=True).stdout.splitlines()
    runs = [int(pid) for pid, parent in map(str.split, rows) if int(parent) in workers]
    for pid in runs:
        with suppress(ProcessLookupError):
            os.kill(pid, signal.SIGTERM)
    until = time.monotonic() + GRACE
    while any(map(_lives, runs)) and time.monotonic() < until:
        time.sleep(0.1)


def _lives(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    return True


def _end(processes: list[subprocess.Popen[bytes]]) -> None:
    """End groups of processes: SIGTERM, and SIGKILL to what is left after a while."""
    for process in processes:
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGTERM)
    until = time.monotonic() + GRACE
    for process in processes:
        while _group_lives(process) and time.monotonic() < until:
            time.sleep(0.1)
        with suppress(ProcessLookupError, PermissionError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()


def _group_lives(process: subprocess.Popen[bytes]) -> bool:
    process.poll()  # a zombie of ours would count as alive
    try:
        os.killpg(process.pid, 0)
    except (ProcessLookupError, PermissionError):
        return False
    return True
