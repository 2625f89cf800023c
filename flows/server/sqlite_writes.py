"""A Prefect server on SQLite whose transactions wait for each other, instead of failing or blocking the server.

python -m loraflow.flows.server.sqlite_writes uvicorn --factory prefect.server.api.server:create_app ...
"""

from __future__ import annotations

import asyncio
import runpy
import sys
from collections.abc import AsyncGenerator
from contextlib import asynccontextmanager
from typing import TYPE_CHECKING
from weakref import WeakKeyDictionary

if TYPE_CHECKING:
    from prefect.server.database.configurations import AioSqliteConfiguration
    from sqlalchemy.ext.asyncio import AsyncSession, AsyncSessionTransaction

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
    """Become the module that the first argument names."""
    del sys.argv[0]
    write_in_turn()
    runpy.run_module(sys.argv[0], run_name="__main__", alter_sys=True)


if __name__ == "__main__":
    main()
