"""Start worker processes as forks of a process that has imported the libraries once.

    python -m loraflow.execution.fork_server FD PARENT

A worker that is started as a new Python imports torch, transformers and peft, which takes 8 to 12 seconds. The fork server
imports them once for each process that launches jobs, computes nothing, and forks each worker when it is asked to. A worker
is a process of its own, as before: it has its own session and log, and its memory is that of a process that only imported.

The launcher asks by a message on a socket and passes three file descriptors: the worker's log, the pipe for its outcome, and
a pipe for its status. The server writes the worker's process id and later its exit status to that pipe. When the launcher
closes the socket, the server ends after its last worker. When the launcher dies, it ends at once, and its workers with it.
"""

import atexit
import contextlib
import gc
import json
import os
import selectors
import signal
import socket
import sys
from collections.abc import Sequence
from importlib import import_module
from typing import TypedDict

from setproctitle import setproctitle

from loraflow.execution.device_group import PARENT
from loraflow.execution.outcome import PIPE
from loraflow.stages import STAGES

# Environment: torch counts GPUs without starting CUDA. A process that has started it cannot be forked.
NVML_CHECK = "PYTORCH_NVML_BASED_CUDA_CHECK"
# Starts CUDA while it is imported, and peft imports it. In the server and its workers, it cannot be imported.
STARTS_CUDA = "bitsandbytes"
# What each stage imports. The server imports it before it forks the worker, or earlier while idle.
MODULES = {name: (stage.module, *stage.worker_imports) for name, stage in STAGES.items() if stage.in_worker}
_MAX_MESSAGE = 2**17


class Request(TypedDict):
    """The message for one worker."""

    stage: str
    job_file: str
    folder: str  # the worker's working folder
    environment: dict[str, str]  # variables that the server does not have


def main(argv: list[str]) -> int:
    """Fork a worker for each message on the socket FD. A worker runs its job and exits here; the server returns 0.

    PARENT is the process id of the launcher, which may have died before this process could ask for it.
    """
    parent = int(argv[1])
    sys.modules[STARTS_CUDA] = None  # type: ignore[assignment]  # Python's way to say that it cannot be imported
    with socket.socket(fileno=int(argv[0])) as connection:
        connection.set_inheritable(False)
        job_file = Server(connection, parent).serve()
    if job_file is None:
        return 0
    if (torch := sys.modules.get("torch")) is not None and torch.cuda._is_in_bad_fork():
        # A library has started CUDA while it was imported, so this process cannot use it: begin as a new Python.
        os.execv(sys.executable, [sys.executable, "-P", "-m", "loraflow.execution.worker", job_file])
    from loraflow.execution.worker import main as run_worker

    setproctitle(f"{sys.executable} -P -m loraflow.execution.worker {job_file}")
    code = run_worker([job_file])
    atexit._run_exitfuncs()
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(OSError):  # the log's disk is full
            stream.flush()
    os._exit(code)  # as forks of multiprocessing end: taking the imported modules apart takes seconds


class Server:
    """The loop of the server.

    Args:
        connection: a socket that keeps the borders of messages, whose other end the launcher has.
    """

    def __init__(self, connection: socket.socket, parent: int):
        self.connection, self.parent, self.pid = connection, parent, os.getpid()
        self._status_pipes: dict[int, int] = {}  # by the worker's process id
        self._not_imported = [name for names in MODULES.values() for name in names]

    def serve(self) -> str | None:
        """Fork workers until the launcher ends. Return the path of the job file in a worker, and None in the server."""
        woken, wake = os.pipe2(os.O_NONBLOCK | os.O_CLOEXEC)
        signal.signal(signal.SIGCHLD, lambda *_: None)
        signal.signal(signal.SIGTERM, signal.SIG_IGN)  # workers save a checkpoint then; the server ends after them
        signal.set_wakeup_fd(wake, warn_on_full_buffer=False)
        signal.signal(signal.SIGALRM, lambda *_: self._end_with_launcher())
        signal.siginterrupt(signal.SIGALRM, False)
        signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGALRM})  # a launcher may block it
        signal.setitimer(signal.ITIMER_REAL, 1.0, 1.0)  # an import takes half a minute on a busy machine
        with selectors.DefaultSelector() as selector:
            selector.register(self.connection, selectors.EVENT_READ)
            selector.register(woken, selectors.EVENT_READ)
            is_closed = False
            while not (is_closed and not self._status_pipes):
                self._end_with_launcher()
                ready = {key.fd for key, _ in selector.select(timeout=0 if self._not_imported else 1.0)}
                if woken in ready:
                    with contextlib.suppress(BlockingIOError):
                        os.read(woken, 4096)
                self._reap()
                if self.connection.fileno() in ready:
                    message, descriptors, _, _ = socket.recv_fds(self.connection, _MAX_MESSAGE, 3)
                    if not message:
                        selector.unregister(self.connection)
                        is_closed = True
                        continue
                    request: Request = json.loads(message)
                    self._import(MODULES[request["stage"]])
                    if self._fork(descriptors) == 0:
                        signal.set_wakeup_fd(-1)
                        os.close(woken)
                        os.close(wake)
                        self._become_worker(request, *descriptors)
                        return request["job_file"]
                elif not ready and self._not_imported:
                    self._import(self._not_imported[:1])
        signal.setitimer(signal.ITIMER_REAL, 0)  # Python removes the handler before it ends
        return None

    def _end_with_launcher(self) -> None:
        """Exit if the launcher has died; the kernel ends the workers then."""
        if os.getppid() != self.parent:
            os._exit(0)

    def _import(self, names: Sequence[str]) -> None:
        for name in names:
            if name in self._not_imported:
                self._not_imported.remove(name)
                # The worker that needs the module imports it again, fails with the same error, and reports it.
                with contextlib.suppress(Exception):
                    import_module(name)

    def _fork(self, descriptors: list[int]) -> int:
        gc.freeze()  # a worker's garbage collector leaves the shared pages alone
        pid = os.fork()
        if pid != 0:
            log_file, outcome, status = descriptors
            os.close(log_file)
            os.close(outcome)
            self._status_pipes[pid] = status
            _write(status, f"pid {pid}\n")
        return pid

    def _become_worker(self, request: Request, log_file: int, outcome: int, status: int) -> None:
        """Turn a fork into what `python -P -m loraflow.execution.worker` is at its start."""
        os.setsid()
        for number in (signal.SIGALRM, signal.SIGCHLD, signal.SIGTERM):
            signal.signal(number, signal.SIG_DFL)
        for descriptor in (status, *self._status_pipes.values()):
            os.close(descriptor)
        null = os.open(os.devnull, os.O_RDONLY)
        for source, target in ((null, 0), (log_file, 1), (log_file, 2)):
            os.dup2(source, target)
        os.close(null)
        os.close(log_file)
        os.chdir(request["folder"])
        os.environ.pop(NVML_CHECK, None)
        os.environ |= {**request["environment"], PIPE: str(outcome), PARENT: str(self.pid)}

    def _reap(self) -> None:
        for pid in list(self._status_pipes):
            ended, status = os.waitpid(pid, os.WNOHANG)
            if ended:
                pipe = self._status_pipes.pop(pid)
                _write(pipe, f"exit {os.waitstatus_to_exitcode(status)}\n")
                os.close(pipe)


def _write(pipe: int, line: str) -> None:
    with contextlib.suppress(BrokenPipeError):  # the launcher no longer follows this worker
        os.write(pipe, line.encode())


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
