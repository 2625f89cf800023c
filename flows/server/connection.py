"""Questions to the configured Prefect server: does it answer, and which work pools have a worker."""

from __future__ import annotations

import time
from collections.abc import Callable, Collection

import httpx
from prefect.client.orchestration import get_client
from prefect.client.schemas.filters import WorkerFilter, WorkerFilterStatus
from prefect.exceptions import PrefectHTTPStatusError
from prefect.settings import get_current_settings

from loraflow.failures import BadConfig, Network

ONLINE = WorkerFilter(status=WorkerFilterStatus(any_=["ONLINE"]))


def require_server() -> None:
    """Check that the configured server answers and accepts our credentials.

    Raises:
        BadConfig: no server is configured, or it refuses our credentials.
        Network: it does not answer, or is not a Prefect server.
    """
    url = get_current_settings().api.url
    if not url:
        raise BadConfig(
            "No Prefect server is configured.",
            where="PREFECT_API_URL",
            next_step="`loraflow up` starts a server here; or export PREFECT_API_URL=http://HOST:4200/api",
        )
    try:
        with get_client(sync_client=True) as client:
            client.read_work_pools(limit=1)
    except PrefectHTTPStatusError as error:
        if error.response.status_code in (401, 403):
            raise BadConfig(
                "The Prefect server refuses the credentials.",
                where=str(url),
                got=f"HTTP {error.response.status_code}",
                expected="the server's auth string",
                next_step="export PREFECT_API_AUTH_STRING=USER:PASSWORD",
            ) from error
        raise Network(
            "The server at this address is not a Prefect server.",
            where=str(url),
            got=f"HTTP {error.response.status_code}",
            next_step="the address ends in /api, as in http://127.0.0.1:4200/api",
        ) from error
    except (httpx.HTTPError, ValueError) as error:
        raise Network(
            "The Prefect server does not answer.",
            where=str(url),
            got=f"{type(error).__name__}: {error}".splitlines()[0],
            next_step="`loraflow up` starts a server here; or correct PREFECT_API_URL",
        ) from error


def pools_without_workers(
    pools: Collection[str],
    wait: float,
    expected: Collection[str] | None = None,
    while_waiting: Callable[[], None] | None = None,
) -> list[str]:
    """Return the work pools that have no worker online.

    Workers of the `expected` pools (by default all) get `wait` seconds to come online. `while_waiting` is called once a
    second; it can end the wait with an exception.
    """
    deadline = time.monotonic() + wait
    with get_client(sync_client=True) as client:
        while True:
            idle = [
                pool for pool in sorted(pools) if not client.read_workers_for_work_pool(pool, ONLINE, offset=0, limit=1)
            ]
            awaited = set(idle) & set(pools if expected is None else expected)
            if not awaited or time.monotonic() > deadline:
                return idle
            if while_waiting is not None:
                while_waiting()
            time.sleep(1)
