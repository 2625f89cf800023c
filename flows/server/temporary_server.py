"""The server that Prefect starts for a command where none is configured: it ends with the command, however that ends."""

from __future__ import annotations

import subprocess
import sys
import threading
from pathlib import Path

from prefect.client.base import ServerType, determine_server_type

_watchdogs: list[subprocess.Popen[bytes]] = []  # the pipes to them close with this process, and not before


def start_temporary_server() -> None:
    """Start Prefect's temporary server, if this process would have one, under a watchdog.

    Prefect ends it at exit, which SIGKILL skips. What it starts later in this process is this same server.
    """
    if determine_server_type() is not ServerType.EPHEMERAL:
        return
    from prefect.server.api.server import SubprocessASGIServer  # a second and a half, which PREFECT_API_URL saves

    server = SubprocessASGIServer()
    if server.running:
        return
    # A session of its own: what is sent to the command's group must not end the watchdog first.
    watchdog = subprocess.Popen(
        [sys.executable, "-IS", str(Path(__file__).with_name("watchdog.py"))],
        stdin=subprocess.PIPE,
        stdout=subprocess.DEVNULL,
        start_new_session=True,
    )
    _watchdogs.append(watchdog)
    started = threading.Event()

    def tell() -> None:  # while the server starts, which takes seconds: the command may be killed in them
        told = None
        while True:
            last = started.wait(0.02)
            process = server.server_process
            if process is not None and process.pid != told:
                told = process.pid
                assert watchdog.stdin is not None
                watchdog.stdin.write(b"%d\n" % told)
                watchdog.stdin.flush()
            if last:
                return

    teller = threading.Thread(target=tell, name="server-watchdog", daemon=True)
    teller.start()
    try:
        server.start()
    finally:
        started.set()
        teller.join()
