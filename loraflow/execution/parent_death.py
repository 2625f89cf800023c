"""End a process when the process that started it ends, however that ends. The kernel's signal is Linux only."""

import ctypes
import os
import signal
import sys
import threading
import time


def end_with_parent() -> None:
    """Ask the kernel for SIGTERM when the parent dies. Call it on the main thread: the request ends with its thread."""
    if sys.platform == "linux":
        ctypes.CDLL(None, use_errno=True).prctl(1, signal.SIGTERM)  # PR_SET_PDEATHSIG


def end_group_with_parent(parent: int, grace: float) -> None:
    """End this process, and `grace` seconds later its whole process group, when the process `parent` has ended.

    The kernel's signal comes first. A thread also watches the parent's id, because the signal reaches neither the rest of
    the group nor systems other than Linux.
    """
    end_with_parent()

    def watch() -> None:
        while os.getppid() == parent:
            time.sleep(0.5)
        time.sleep(grace)
        os.killpg(0, signal.SIGKILL)

    threading.Thread(target=watch, name="parent-death", daemon=True).start()
