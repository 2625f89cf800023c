"""Start a worker process: as a fork of the fork server where the system has one, otherwise as a new Python.

Each process that launches jobs has at most one fork server. What a server's workers take from its environment was set when
it started, so a job with other variables, such as another number of threads, starts another server; the old one ends with
its last worker.
"""

import atexit
import contextlib
import json
import logging
import math
import os
import select
import signal
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import BinaryIO, Protocol

from loraflow.config.stage_configs import MergeConfig, StageConfig, TrainConfig, TrainGroupConfig, VerifyConfig
from loraflow.execution.device_group import PARENT
from loraflow.execution.fork_server import NVML_CHECK
from loraflow.execution.job_file import JobFile
from loraflow.execution.outcome import PIPE

log = logging.getLogger(__name__)

# -P: a file of the project, such as its evaluate.py, is not imported in place of a library
WORKER = [sys.executable, "-P", "-m", "loraflow.execution.worker"]
SERVER = [sys.executable, "-P", "-m", "loraflow.execution.fork_server"]
START_SECONDS = 600.0  # time for a fork server to import the libraries, also from a slow disk
# Environment: no library reads these variables while it is imported, so each worker gets its own values.
_NOT_READ_AT_IMPORT = ("LORAFLOW_", "PREFECT_", "PYTEST_")


class WorkerProcess(Protocol):
    """A worker that has been started. `subprocess.Popen` is one."""

    pid: int

    def poll(self) -> int | None:
        """Return the exit status if the process has ended; negative is the number of the signal that ended it."""

    def wait(self, timeout: float | None = None) -> int:
        """Wait for the end and return the exit status, or raise `subprocess.TimeoutExpired`."""


class ForkedWorker:
    """A worker that the fork server forked, known by its id and the pipe to which the server writes its status.

    Args:
        pipe: the end of the pipe to read from, which this object closes.
    """

    def __init__(self, pipe: int):
        self._pipe: BinaryIO = os.fdopen(pipe, "rb", buffering=0)
        self._text = b""
        self._code: int | None = None
        self.pid = 0

    def started(self, timeout: float) -> bool:
        """Wait for the process id; return False if the server has ended or does not answer in time."""
        ends = time.monotonic() + timeout
        while b"\n" not in self._text:
            if not self._read(max(0.0, ends - time.monotonic())):
                return False
        line, _, self._text = self._text.partition(b"\n")
        self.pid = int(line.split()[1])
        return True

    @property
    def has_ended(self) -> bool:
        """Whether `poll` or `wait` has returned an exit status. Another thread may ask, since this reads nothing."""
        return self._code is not None

    def poll(self) -> int | None:
        """Return the exit status if the process has ended."""
        self._read(0)
        return self._code

    def wait(self, timeout: float | None = None) -> int:
        """Wait for the end of the process and return its exit status.

        Raises:
            subprocess.TimeoutExpired: it has not ended in time.
        """
        ends = None if timeout is None else time.monotonic() + timeout
        while self._code is None:
            left = None if ends is None else max(0.0, ends - time.monotonic())
            if not self._read(left) and self._code is None:
                raise subprocess.TimeoutExpired(WORKER, timeout or 0)
        return self._code

    def close(self) -> None:
        """Close the pipe. The process continues."""
        self._pipe.close()

    def _read(self, timeout: float | None) -> bool:
        """Read what the server wrote; return whether there was something. Its end is the end of the worker."""
        if self._code is not None or self._pipe.closed:
            return False
        poll = select.poll()
        poll.register(self._pipe, select.POLLIN)
        if not poll.poll(None if timeout is None else math.ceil(timeout * 1000)):
            return False
        data = self._pipe.read(100) or b""
        self._text += data
        if self.pid and (not data or b"\n" in self._text):
            ended = self._text.split()
            self._code = int(ended[1]) if len(ended) == 2 else -signal.SIGKILL  # the server was killed
            self._pipe.close()
        return bool(data)


class _ForkServer:
    """The process of a fork server and this process's end of the socket to it."""

    def __init__(self, environment: dict[str, str]):
        self.environment, self.owner = environment, os.getpid()
        self._workers: list[ForkedWorker] = []  # workers that may still run
        self._socket, other = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        with other:
            self.process = subprocess.Popen(
                [*SERVER, str(other.fileno()), str(os.getpid())],
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                stderr=subprocess.DEVNULL,
                env=environment | {NVML_CHECK: "1"},
                pass_fds=[other.fileno()],
                start_new_session=True,
            )

    def fits(self, environment: dict[str, str]) -> bool:
        """Return whether the server runs, and its workers would have this environment."""
        return self.owner == os.getpid() and self.environment == environment and self.process.poll() is None

    def fork(
        self, stage: str, job_file: Path, environment: dict[str, str], log_file: int, outcome: int
    ) -> ForkedWorker:
        """Fork a worker.

        Raises:
            OSError: the server has ended or does not answer.
        """
        read_end, write_end = os.pipe()
        worker = ForkedWorker(read_end)
        try:
            request = {"stage": stage, "job_file": str(job_file), "folder": str(Path.cwd()), "environment": environment}
            socket.send_fds(self._socket, [json.dumps(request).encode()], [log_file, outcome, write_end])
            os.close(write_end)
            write_end = -1
            if not worker.started(START_SECONDS):
                raise ChildProcessError(f"the fork server ended with {self.process.poll()}, or it does not answer")
            self._workers = [running for running in (*self._workers, worker) if not running.has_ended]
        # After an interruption too: the server may be about to fork a worker that no process would follow.
        except BaseException:
            worker.close()
            self._socket.close()
            self.process.kill()  # the server's workers end with it
            self.process.wait()
            raise
        finally:
            if write_end != -1:
                os.close(write_end)
        return worker

    def end(self) -> None:
        """Let the server end: at once if it has no workers, otherwise after its last one."""
        self._socket.close()
        if self.owner == os.getpid() and all(worker.has_ended for worker in self._workers):
            self.process.kill()  # the server may be importing
            self.process.wait()


_lock = threading.Lock()
_server: _ForkServer | None = None


def start_worker(
    command: list[str], file: JobFile, environment: dict[str, str], log_file: int, outcome: int
) -> WorkerProcess:
    """Start a worker process.

    Args:
        command: starts a worker; the job file is appended to it.
        outcome: the file descriptor of the pipe for its outcome.
    """
    job_file = file.write()
    if command == WORKER and file.job.runtime.worker_start == "fork" and _can_fork(file.job.config):
        try:
            with _lock:
                own = {key: value for key, value in environment.items() if key.startswith(_NOT_READ_AT_IMPORT)}
                return _server_for(environment).fork(file.job.stage, job_file, own, log_file, outcome)
        except OSError as error:
            log.warning("no worker can be forked, so a new Python is started: %s", error)
    return subprocess.Popen(
        [*command, str(job_file)],
        stdin=subprocess.DEVNULL,
        stdout=log_file,
        stderr=log_file,
        env=environment | {PIPE: str(outcome), PARENT: str(os.getpid())},
        pass_fds=[outcome],
        start_new_session=True,
    )


def _can_fork(config: StageConfig) -> bool:
    """Tell whether a worker can be a fork: on Linux, unless it needs bitsandbytes.

    bitsandbytes starts CUDA when it is imported, so it cannot be imported in the fork server and its workers.
    """
    return sys.platform == "linux" and not _needs_bitsandbytes(config)


def _needs_bitsandbytes(config: StageConfig) -> bool:
    match config:
        case TrainGroupConfig():
            return any(_needs_bitsandbytes(trial) for trial in config.trials)
        case TrainConfig():
            return config.base.quantization == "nf4" or config.training_config.optim.startswith("paged_")
        case MergeConfig() | VerifyConfig():
            return config.nf4 is not None
        case _:
            return False


def start_fork_server(environment: dict[str, str]) -> None:
    """Start the fork server, if the system has one, before a worker needs it. It imports the libraries."""
    if sys.platform == "linux":
        with contextlib.suppress(OSError), _lock:  # the first worker tries again, and reports it
            _server_for(environment)


def _server_for(environment: dict[str, str]) -> _ForkServer:
    global _server
    environment = {key: value for key, value in environment.items() if not key.startswith(_NOT_READ_AT_IMPORT)}
    if _server is None or not _server.fits(environment):
        end_fork_server()
        _server = _ForkServer(environment)
    return _server


@atexit.register
def end_fork_server() -> None:
    """Let this process's fork server end, if it has one: at once, or after its last worker."""
    global _server
    if _server is not None:
        _server.end()
        _server = None
