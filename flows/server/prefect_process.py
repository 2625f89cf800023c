"""Prefect's server and workers as processes of loraflow.

They end with the process that started them, even if that is killed. The transactions of a server on SQLite wait for each
other, instead of failing or blocking the server.

python -m loraflow.flows.server.prefect_process PARENT_PID server start --port 4242
python -m loraflow.flows.server.prefect_process PARENT_PID uvicorn --factory prefect.server.api.server:create_app ...
"""

from __future__ import annotations

import asyncio
import runpy
import signal
import sys
from collections.abc import AsyncGenerator
from contextlib import asynccontextmanager
from typing import TYPE_CHECKING
from weakref import WeakKeyDictionary

from loraflow.execution.parent_death import end_group_with_parent

if TYPE_CHECKING:
    from prefect.server.database.configurations import AioSqliteConfiguration
    from sqlalchemy.ext.asyncio import AsyncSession, AsyncSessionTransaction

GRACE_SECONDS = 25.0  # seconds; a training that is asked to end saves a checkpoint, which takes up to 20
TEMPORARY_GRACE_SECONDS = 5.0  # of a temporary server, which runs nothing
TURN_SECONDS = 60.0  # as long as Prefect lets SQLite wait
_turns: WeakKeyDictionary[asyncio.AbstractEventLoop, asyncio.Lock] = WeakKeyDictionary()


def write_in_turn() -> None:
    """Make this process's SQLite transactions run one after the other, each with the write lock from its beginning.

    Prefect begins transactions as DEFERRED, and most of them read before they write. If another writer commits in
    between, SQLite refuses the write with "database is locked" at once and ignores the timeout, because the data
    that the transaction has read is outdated. The server answers HTTP 503, which Prefect's client retries but a browser does
    not. Prefect has no setting for it.

    The transactions wait in asyncio, not in SQLite. A connection that waits in SQLite holds its mutex. If the garbage
    collector then frees a cursor of that connection, the server's only thread for requests waits for the mutex too, and
    the writer that would free the database cannot proceed: the server answers nothing for up to a minute.
    """
    from prefect.server.database.configurations import AioSqliteConfiguration

    begin = AioSqliteConfiguration.begin_transaction

    @asynccontextmanager
    async def begin_in_turn(
        self: AioSqliteConfiguration, session: AsyncSession, with_for_update: bool = False
    ) -> AsyncGenerator[AsyncSessionTransaction, None]:
        async with _turn(), begin(self, session, with_for_update=True) as transaction:
            yield transaction

    AioSqliteConfiguration.begin_transaction = begin_in_turn  # type: ignore[method-assign]


@asynccontextmanager
async def _turn() -> AsyncGenerator[None, None]:
    """Wait for this task's turn; after `TURN_SECONDS` SQLite's own lock decides."""
    lock = _turns.setdefault(asyncio.get_running_loop(), asyncio.Lock())
    try:
        async with asyncio.timeout(TURN_SECONDS):
            await lock.acquire()
    except TimeoutError:
        yield
        return
    try:
        yield
    finally:
        lock.release()


def main() -> None:
    """Become uvicorn, for a temporary server, or the command `prefect`, tied to the parent process."""
    parent, *sys.argv = sys.argv[1:]
    is_temporary = sys.argv[0] == "uvicorn"
    end_group_with_parent(int(parent), TEMPORARY_GRACE_SECONDS if is_temporary else GRACE_SECONDS)
    if not is_temporary:
        sys.argv.insert(0, "prefect")
        # A worker sends itself SIGINT when it gets SIGTERM. A shell's background job inherits that SIGINT is ignored.
        signal.signal(signal.SIGINT, signal.default_int_handler)
    if sys.argv[:3] != ["prefect", "worker", "start"]:
        write_in_turn()
    runpy.run_module(sys.argv[0], run_name="__main__", alter_sys=True)


if __name__ == "__main__":
    main()
