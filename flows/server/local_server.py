"""A Prefect server with workers on this machine, started and stopped together, for `loraflow up`.

Prefect reads its settings from the environment when it is imported. `environment` returns them.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from types import TracebackType

import psutil

from loraflow.failures import BadConfig, Crashed, Failure
from loraflow.flows.server.prefect_process import GRACE_SECONDS

START_TIMEOUT = 300.0  # seconds; the first start migrates a database, which takes over a minute on a busy machine


def environment(home: Path, host: str, port: int) -> dict[str, str]:
    """Return the environment of the server and its workers: their home and address, no telemetry, frequent polling.

    Raises:
        BadConfig: other machines could connect, and no password is set.
    """
    auth = os.environ.get("PREFECT_SERVER_API_AUTH_STRING", "")
    if not auth and host not in ("127.0.0.1", "localhost", "::1"):
        raise BadConfig(
            "Anyone who can reach the server can run code here, so other machines may connect only with a password.",
            where=f"--host {host}",
            next_step="export PREFECT_SERVER_API_AUTH_STRING=USER:PASSWORD, or omit --host",
        )
    address = _local_address(host)
    return {
        "PREFECT_HOME": str(home.absolute()),
        "PREFECT_API_URL": f"http://{address}:{port}/api",
        # Browsers on other machines use the address that they loaded the UI from.
        "PREFECT_SERVER_UI_API_URL": f"http://{address}:{port}/api" if address == host else "/api",
        "PREFECT_SERVER_ANALYTICS_ENABLED": "false",
        "DO_NOT_TRACK": "1",
        "PREFECT_WORKER_QUERY_SECONDS": "2",
        "LORAFLOW_HOME": str(Path.cwd()),
        **({"PREFECT_API_AUTH_STRING": auth} if auth else {}),
    }


def _local_address(host: str) -> str:
    """Return the address at which this machine reaches a server that listens on `host`."""
    return "127.0.0.1" if host in ("0.0.0.0", "::") else host


class Processes:
    """Prefect's processes, each with its own log and process group. On exit all of them end, the server last."""

    def __init__(self, home: Path):
        self.home = home
        self.running: dict[str, subprocess.Popen[bytes]] = {}

    def __enter__(self) -> Processes:
        return self

    def start(self, name: str, *arguments: str) -> Path:
        """Start `prefect ARGUMENTS`; return its log."""
        log = self._log(name)
        with log.open("wb") as file:
            self.running[name] = subprocess.Popen(
                [sys.executable, "-P", "-m", "loraflow.flows.server.prefect_process", str(os.getpid()), *arguments],
                stdin=subprocess.DEVNULL,
                stdout=file,
                stderr=file,
                start_new_session=True,
            )
        return log

    def _log(self, name: str) -> Path:
        return self.home / f"{name}.log"

    def check(self) -> None:
        """Check that all processes run.

        Raises:
            Crashed: a process ended.
        """
        for name, process in self.running.items():
            if process.poll() is not None:
                tail = self._log(name).read_bytes()[-1500:].decode(errors="replace").strip()
                raise Crashed(
                    f"Prefect's {name} ended.",
                    where=str(self._log(name)),
                    got=f"exit status {process.returncode}\n{tail}",
                    next_step="loraflow up",
                )

    def wait_for_server(self, port: int, host: str) -> None:
        """Wait until the server answers.

        Raises:
            Crashed: it ended instead.
            Failure: it does not answer in time.
        """
        url = f"http://{_local_address(host)}:{port}/api/health"
        deadline = time.monotonic() + START_TIMEOUT
        while time.monotonic() < deadline:
            self.check()
            try:
                urllib.request.urlopen(url, timeout=5).close()
                return
            except urllib.error.HTTPError:  # it asks for the password, so it is up
                return
            except OSError:
                time.sleep(0.3)
        raise Failure(
            "Prefect's server did not answer.",
            where=url,
            expected=f"an answer within {START_TIMEOUT:.0f} s",
            next_step=f"read its log: {self._log('server')}",
        )

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        with _signals_ignored():  # a second Ctrl-C must not interrupt the clean-up
            workers = [process for name, process in self.running.items() if name != "server"]
            # Flow runs first: while the server is up, they can still report that they ended.
            _end_flow_runs([process.pid for process in workers])
            _end_groups(workers)
            _end_groups([process for name, process in self.running.items() if name == "server"])


@contextmanager
def _signals_ignored() -> Iterator[None]:
    """Ignore SIGINT and SIGTERM. Afterwards the handlers are the ones of before."""
    if threading.current_thread() is not threading.main_thread():  # only the main thread may set handlers
        yield
        return
    before = {number: signal.signal(number, signal.SIG_IGN) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    finally:
        for number, handler in before.items():
            if handler is not None:  # None: C code had set it
                signal.signal(number, handler)


def _end_flow_runs(workers: list[int]) -> None:
    """End the flow runs of workers, each a process in its own session, and wait until they are gone."""
    runs = []
    for worker in workers:
        with suppress(psutil.Error):
            runs += psutil.Process(worker).children()
    for run in runs:
        with suppress(psutil.NoSuchProcess):
            run.terminate()
    psutil.wait_procs(runs, timeout=GRACE_SECONDS)


def _end_groups(processes: list[subprocess.Popen[bytes]]) -> None:
    """End the process groups of some processes: SIGTERM, then SIGKILL to those that are left after `GRACE_SECONDS`."""
    for process in processes:
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGTERM)
    deadline = time.monotonic() + GRACE_SECONDS
    for process in processes:
        while _group_exists(process) and time.monotonic() < deadline:
            time.sleep(0.1)
        with suppress(ProcessLookupError, PermissionError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()


def _group_exists(process: subprocess.Popen[bytes]) -> bool:
    process.poll()  # reap it: a zombie would still count as a member of the group
    try:
        os.killpg(process.pid, 0)
    except (ProcessLookupError, PermissionError):
        return False
    return True
