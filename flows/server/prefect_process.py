"""A Prefect server or worker that ends with the process that started it, even if that is killed.

python -m loraflow.flows.server.prefect_process PARENT_PID server start --port 4242
"""

from __future__ import annotations

import runpy
import sys

from loraflow.execution.parent_death import end_group_with_parent
from loraflow.flows.server.sqlite_writes import write_in_turn

GRACE_SECONDS = 25.0  # seconds; a training that is asked to end saves a checkpoint, which takes up to 20


def main() -> None:
    """Tie this process to its parent, then become the command `prefect`."""
    end_group_with_parent(int(sys.argv[1]), GRACE_SECONDS)
    sys.argv = ["prefect", *sys.argv[2:]]
    if sys.argv[1:3] == ["server", "start"]:
        write_in_turn()
    runpy.run_module("prefect", run_name="__main__", alter_sys=True)


if __name__ == "__main__":
    main()
