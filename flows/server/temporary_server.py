"""Prefect's temporary server for a command where no server is configured. It ends with the command, even by SIGKILL."""

from __future__ import annotations

import subprocess
import sys
import threading
from pathlib import Path
from typing import TYPE_CHECKING

from prefect.client.base import ServerType, determine_server_type

if TYPE_CHECKING:
    from prefect.server.api.server import SubprocessASGIServer

_watchdogs: list[subprocess.Popen[bytes]] = []  # keeps the pipes to them open until this process ends


def start_temporary_server() -> None:
    """Start Prefect's temporary server under a watchdog, if this process would use one.

    Prefect ends that server at exit, which SIGKILL skips. If Prefect starts a server later in this process, it finds
    this one.
    """
    if determine_server_type() is not ServerType.EPHEMERAL:
        return
    from prefect.server.api.server import SubprocessASGIServer  # takes 1.5 s to import

    server = SubprocessASGIServer()
    if server.running:
        return
    watchdog = _start_watchdog()
    started = threading.Event()
    # In a thread, because the start takes seconds, and the command may be killed during it.
    reporter = threading.Thread(
        target=_report_pid, args=(server, watchdog, started), name="server-watchdog", daemon=True
    )
    reporter.start()
    try:
        server.start()
    finally:
        started.set()
        reporter.join()


def _start_watchdog() -> subprocess.Popen[bytes]:
    watchdog = subprocess.Popen(
        [sys.executable, "-IS", str(Path(__file__).with_name("watchdog.py"))],
        stdin=subprocess.PIPE,
        stdout=subprocess.DEVNULL,
        start_new_session=True,  # a signal to the command's group must not end the watchdog first
    )
    _watchdogs.append(watchdog)
    return watchdog


def _report_pid(server: SubprocessASGIServer, watchdog: subprocess.Popen[bytes], started: threading.Event) -> None:
    """Send the server's process id to the watchdog as soon as there is one, and each new one until it has started."""
    assert watchdog.stdin is not None
    reported = None
    while True:
        last = started.wait(0.02)
        process = server.server_process
        if process is not None and process.pid != reported:
            reported = process.pid
            watchdog.stdin.write(b"%d\n" % reported)
            watchdog.stdin.flush()
        if last:
            return
