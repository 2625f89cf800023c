"""Ties a process to the one that started it: the kernel sends SIGTERM when the parent dies, however it dies. Linux only."""

from __future__ import annotations

import ctypes
import signal
import sys


def end_with_parent() -> None:
    """Ask for the signal, from the main thread: the wish is forgotten when the thread that made it ends."""
    if sys.platform == "linux":
        ctypes.CDLL(None, use_errno=True).prctl(1, signal.SIGTERM)  # PR_SET_PDEATHSIG
