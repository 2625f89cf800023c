"""A server or worker of Prefect that ends with the process that started it, however that ends.

python -m loraflow.flows.server.child PARENT_PID server start --port 4242
"""

from __future__ import annotations

import runpy
import sys
from typing import Any

from loraflow.execution.parent_death import end_group_with_parent

GRACE = 25.0  # seconds; a training that is asked to end saves a checkpoint in up to 20


def lock_before_reading() -> None:
    """Have the server's SQLite transactions take the write lock when they begin, and wait for it.

    Prefect begins them DEFERRED, and most read before they write. Whoever was overtaken by another writer in between is
    refused with "database is locked" at once, whatever the time-out, since what it read is old; the answer is HTTP 503,
    which Prefect's client repeats and a browser does not. Prefect has no setting for it.
    """
    from prefect.server.database.configurations import AioSqliteConfiguration

    begin = AioSqliteConfiguration.begin_transaction

    def begin_immediate(self: Any, session: Any, with_for_update: bool = False) -> Any:
        return begin(self, session, with_for_update=True)

    AioSqliteConfiguration.begin_transaction = begin_immediate  # type: ignore[method-assign]


def main() -> None:
    """Tie this process to its parent, then become the command `prefect`."""
    end_group_with_parent(int(sys.argv[1]), GRACE)
    sys.argv = ["prefect", *sys.argv[2:]]
    if sys.argv[1:3] == ["server", "start"]:
        lock_before_reading()
    runpy.run_module("prefect", run_name="__main__", alter_sys=True)


if __name__ == "__main__":
    main()
