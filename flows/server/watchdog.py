"""End processes when the process that started them is gone, even by SIGKILL.

python -IS watchdog.py    reads a process id from each line of stdin; stdin ends when the process at its other side does

It runs by its path and imports no package, so that it starts in hundredths of a second.
"""

from __future__ import annotations

import os
import signal
import sys
import time

GRACE_SECONDS = 5.0


def send(pid: int, handle: int | None, signal_: signal.Signals | None = None) -> bool:
    """Send a signal to a process, if any, and tell whether the process exists.

    A process id may be reused by another process, a handle (a pidfd, on Linux) never is.
    """
    try:
        if handle is None:
            os.kill(pid, signal_ or 0)
        else:
            signal.pidfd_send_signal(handle, signal_ or 0)
    except ProcessLookupError:
        return False
    return True


def main() -> None:
    """Read process ids until stdin ends, then end those processes."""
    watched: list[tuple[int, int | None]] = []
    for line in sys.stdin:
        pid = int(line)
        try:
            watched.append((pid, os.pidfd_open(pid) if hasattr(os, "pidfd_open") else None))
        except ProcessLookupError:  # it has already ended
            continue
    watched = [(pid, handle) for pid, handle in watched if send(pid, handle, signal.SIGTERM)]
    deadline = time.monotonic() + GRACE_SECONDS
    while watched and time.monotonic() < deadline:
        time.sleep(0.05)
        watched = [(pid, handle) for pid, handle in watched if send(pid, handle)]
    for pid, handle in watched:
        send(pid, handle, signal.SIGKILL)


if __name__ == "__main__":
    main()
