"""Ends processes when the one that started it is gone, even by SIGKILL.

python -IS watchdog.py    a process id on each line of stdin; the end of stdin is the end of who holds its other side

It is run by its path, and needs no package, so that it starts in hundredths of a second.
"""

from __future__ import annotations

import os
import signal
import sys
import time

GRACE_SECONDS = 5.0


def alive(pid: int, handle: int | None, kill: signal.Signals | None = None) -> bool:
    """Tell whether a process is there, and send it a signal. A handle is never another process's; a pid may be."""
    try:
        if handle is None:
            os.kill(pid, kill or 0)
        else:
            signal.pidfd_send_signal(handle, kill or 0)
    except ProcessLookupError:
        return False
    return True


def main() -> None:
    """Read ids until the end, then end those processes."""
    watched: list[tuple[int, int | None]] = []
    for line in sys.stdin:
        pid = int(line)
        try:
            watched.append((pid, os.pidfd_open(pid) if hasattr(os, "pidfd_open") else None))
        except ProcessLookupError:  # it has ended by itself
            continue
    watched = [one for one in watched if alive(*one, signal.SIGTERM)]
    deadline = time.monotonic() + GRACE_SECONDS
    while watched and time.monotonic() < deadline:
        time.sleep(0.05)
        watched = [one for one in watched if alive(*one)]
    for one in watched:
        alive(*one, signal.SIGKILL)


if __name__ == "__main__":
    main()
