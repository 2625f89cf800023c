"""A Prefect server or worker that ends with the process that started it, even if that is killed.

python -m loraflow.flows.server.prefect_process PARENT_PID server start --port 4242
"""

from __future__ import annotations

import runpy
import sys
from collections.abc import AsyncGenerator
from contextlib import asynccontextmanager
from typing import TYPE_CHECKING

from loraflow.execution.parent_death import end_group_with_parent

if TYPE_CHECKING:
    from prefect.server.database.configurations import AioSqliteConfiguration
    from sqlalchemy.ext.asyncio import AsyncSession, AsyncSessionTransaction

GRACE_SECONDS = 25.0  # seconds; a training that is asked to end saves a checkpoint, which takes up to 20


def lock_before_reading() -> None:
    """Make the server's SQLite transactions take the write lock when they begin, and wait for it.

    Prefect begins transactions as DEFERRED, and most of them read before they write. If another writer commits in
    between, SQLite refuses the write with "database is locked" at once and ignores the timeout, because the data
    that the transaction has read is outdated. The server answers HTTP 503, which Prefect's client retries but a browser does
    not. Prefect has no setting for it.
    """
    from prefect.server.database.configurations import AioSqliteConfiguration

    begin = AioSqliteConfiguration.begin_transaction

    @asynccontextmanager
    async def begin_immediate(
        self: AioSqliteConfiguration, session: AsyncSession, with_for_update: bool = False
    ) -> AsyncGenerator[AsyncSessionTransaction, None]:
        async with begin(self, session, with_for_update=True) as transaction:
            yield transaction

    AioSqliteConfiguration.begin_transaction = begin_immediate  # type: ignore[method-assign]


def main() -> None:
    """Tie this process to its parent, then become the command `prefect`."""
    end_group_with_parent(int(sys.argv[1]), GRACE_SECONDS)
    sys.argv = ["prefect", *sys.argv[2:]]
    if sys.argv[1:3] == ["server", "start"]:
        lock_before_reading()
    runpy.run_module("prefect", run_name="__main__", alter_sys=True)


if __name__ == "__main__":
    main()
