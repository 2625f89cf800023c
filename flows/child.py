"""A server or worker of Prefect that ends with the process that started it, however that ends.

python -m flows.child PARENT_PID server start --port 4242
"""

from __future__ import annotations

import ctypes
import os
import runpy
import signal
import sys
import threading
import time

GRACE = 25.0  # seconds; a training that is asked to end saves a checkpoint in up to 20


def main() -> None:
    """Tie this process to its parent, then become the command `prefect`."""
    parent = int(sys.argv[1])
    if sys.platform == "linux":
        ctypes.CDLL(None, use_errno=True).prctl(1, signal.SIGTERM)  # PR_SET_PDEATHSIG

    def watch() -> None:
        while os.getppid() == parent:
            time.sleep(0.5)
        os.killpg(0, signal.SIGTERM)  # what it started, flow runs that is, gets no death signal of its own
        time.sleep(GRACE)
        os.killpg(0, signal.SIGKILL)

    threading.Thread(target=watch, daemon=True).start()
    sys.argv = ["prefect", *sys.argv[2:]]
    runpy.run_module("prefect", run_name="__main__", alter_sys=True)


if __name__ == "__main__":
    main()
