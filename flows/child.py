"""A server or worker of Prefect that ends with the process that started it, however that ends.

python -m flows.child PARENT_PID server start --port 4242
"""

from __future__ import annotations

import os
import runpy
import signal
import sys
import threading
import time

from loraflow.tether import end_with_parent

GRACE = 25.0  # seconds; a training that is asked to end saves a checkpoint in up to 20


def main() -> None:
    """Tie this process to its parent, then become the command `prefect`."""
    parent = int(sys.argv[1])
    end_with_parent()

    def watch() -> None:
        while os.getppid() == parent:
            time.sleep(0.5)
        time.sleep(GRACE)
        os.killpg(0, signal.SIGKILL)

    threading.Thread(target=watch, daemon=True).start()
    sys.argv = ["prefect", *sys.argv[2:]]
    runpy.run_module("prefect", run_name="__main__", alter_sys=True)


if __name__ == "__main__":
    main()
