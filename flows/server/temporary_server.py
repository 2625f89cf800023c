"""Prefect's temporary server for a command where no server is configured. It ends with the command, even by SIGKILL."""

from __future__ import annotations

import os
import re
import subprocess
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace

from prefect.client.base import ServerType, determine_server_type
from prefect.settings import get_current_settings

from loraflow.failures import BadConfig, Crashed
from loraflow.flows.server.connection import require_server_for_run

PORT_IN_USE = 3  # exit status of uvicorn if it cannot start; Prefect then starts it on another port, without end
MAX_STARTS = 3
LOG = "temporary-server.log"  # in PREFECT_HOME
MAX_LOG = 1_000_000  # bytes; a longer log is emptied at the next start


def prepare_server() -> None:
    """Check the configured server, or start a temporary one where none is configured.

    Raises:
        BadConfig: the server does not answer or refuses us, or the folder of a temporary one cannot be written.
        Crashed: the temporary server ended while it started.
    """
    if determine_server_type() is ServerType.EPHEMERAL:
        start_temporary_server()
    else:
        require_server_for_run()


def start_temporary_server() -> None:
    """Start Prefect's temporary server, if this process would use one. Call it on the main thread.

    If Prefect starts a server later in this process, it finds this one.

    Raises:
        BadConfig: its folder cannot be written.
        Crashed: it ended while it started.
    """
    if determine_server_type() is not ServerType.EPHEMERAL:
        return
    from prefect.server.api.server import SubprocessASGIServer  # takes 1.5 s to import

    server = SubprocessASGIServer()
    if server.running:
        return
    _require_writable_home()
    try:
        with _in_its_own_session():
            server.start()
    finally:
        _ServerProcess.starting = False


def _require_writable_home() -> None:
    """Check the server's folder: a server that cannot open its database ends, and Prefect would wait for it for minutes."""
    home = get_current_settings().home
    try:
        home.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=home) as file:
            file.write(b"x")
    except OSError as error:
        raise BadConfig(
            "Prefect's folder cannot be written.",
            where=str(home),
            got=error.strerror or str(error),
            next_step="export PREFECT_HOME=FOLDER with a folder that you may write to",
        ) from error


class _ServerProcess(subprocess.Popen[bytes]):
    """The server, in a session of its own: it has to outlive a Ctrl-C or SIGTERM to the command's process group.

    A run that is interrupted tells the server how it ended. While the server starts, `poll` raises if it has ended. Its
    errors go to a log: some, such as "database is locked", mean nothing to a user.
    """

    starting = True
    starts = 0

    def __init__(self, args: Sequence[str], env: Mapping[str, str]):
        _ServerProcess.starts += 1
        self.log = get_current_settings().home / LOG
        with self.log.open("ab") as file:
            if file.tell() > MAX_LOG:
                file.truncate(0)
            super().__init__(wrapped(args), env=env, stderr=file, start_new_session=True)

    def poll(self) -> int | None:
        """Return the exit status.

        Raises:
            Crashed: the server ended while it started, and another port did not help.
        """
        code = super().poll()
        if self.starting and code is not None and (code != PORT_IN_USE or self.starts >= MAX_STARTS):
            raise Crashed(
                "Prefect's temporary server ended while it started.",
                where=str(self.log),
                got=_last_error(self.log) or f"exit status {code}",
                next_step="read the log; with `export PREFECT_HOME=FOLDER` the server uses another folder and database",
            )
        return code


def wrapped(command: Sequence[str]) -> list[str]:
    """Return the command of Prefect's temporary server, `python -m uvicorn ...`, run through `prefect_process`."""
    at = command.index("-m") + 1
    wrapper = ["loraflow.flows.server.prefect_process", str(os.getpid())]
    return [command[0], "-P", *command[1:at], *wrapper, *command[at:]]


def _last_error(log: Path) -> str:
    lines = log.read_bytes()[-20_000:].decode(errors="replace").splitlines()
    return next((line.strip()[:300] for line in reversed(lines) if re.match(r"[\w.]+(Error|Exception)\b", line)), "")


@contextmanager
def _in_its_own_session() -> Iterator[None]:
    """Make Prefect's module start the server as a `_ServerProcess`. It has no setting for that."""
    from prefect.server.api import server as module

    names = vars(module)
    original = names["subprocess"]
    names["subprocess"] = SimpleNamespace(Popen=_ServerProcess)
    try:
        yield
    finally:
        names["subprocess"] = original
