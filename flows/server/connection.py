"""Questions to the configured Prefect server: does it answer, and which work pools have a worker."""

from __future__ import annotations

import re
import time
from collections.abc import Callable, Collection

import httpx
import prefect
from prefect._internal.urls import strip_auth_from_url, strip_auth_from_urls_in_text
from prefect.client.orchestration import get_client
from prefect.client.schemas.filters import WorkerFilter, WorkerFilterStatus
from prefect.context import SettingsContext, get_settings_context
from prefect.exceptions import PrefectHTTPStatusError
from prefect.settings import get_current_settings

from loraflow.failures import BadConfig, Failure, Network

TIMEOUT = 10.0  # seconds for a server to answer the first request
ONLINE = WorkerFilter(status=WorkerFilterStatus(any_=["ONLINE"]))


def require_server() -> None:
    """Check with one request that the configured server answers, accepts our credentials, and speaks our protocol.

    Raises:
        BadConfig: no server is configured, it refuses our credentials, or it is another major version of Prefect.
        Network: it does not answer, or is not a Prefect server.
    """
    url = get_current_settings().api.url
    if not url:
        raise BadConfig(
            "No Prefect server is configured.",
            where="PREFECT_API_URL",
            next_step="`loraflow up` starts a server here; or export PREFECT_API_URL=http://HOST:4200/api",
        )
    shown = shown_url(url)
    try:
        # The version needs the credentials, `/health` does not.
        with (
            _without_retries(),
            get_client(sync_client=True, httpx_settings={"timeout": httpx.Timeout(TIMEOUT)}) as client,
        ):
            found = client.api_version()
    except PrefectHTTPStatusError as error:
        raise _bad_answer(error.response.status_code, shown) from error
    except ValueError as error:  # the answer is no JSON: the page of a web site, or of Prefect's UI
        raise _not_prefect(shown, "an answer that is not JSON") from error
    except (httpx.HTTPError, httpx.InvalidURL, OSError) as error:
        got = strip_auth_from_urls_in_text(f"{type(error).__name__}: {error}".splitlines()[0])
        certificate = "; for a private certificate, export PREFECT_API_SSL_CERT_FILE=FILE" if "CERT" in got else ""
        raise Network(
            "The Prefect server does not answer.",
            where=shown,
            got=got,
            next_step=f"`loraflow up` starts a server here; or correct PREFECT_API_URL{certificate}",
        ) from error
    if not re.match(r"\d+\.", str(found)):
        raise _not_prefect(shown, f"{found!r:.80} as its version")
    if str(found).split(".")[0] != prefect.__version__.split(".")[0]:
        raise BadConfig(
            "The Prefect server is another major version.",
            where=shown,
            expected=f"Prefect {prefect.__version__.split('.')[0]}",
            got=f"Prefect {found:.40}",
            next_step="use a server of the same major version; `loraflow up` starts one here",
        )


def _without_retries() -> SettingsContext:
    """Return settings without Prefect's retries, which take minutes. `temporary_settings` validates all others again."""
    now = get_settings_context()
    client = now.settings.client.model_copy(update={"max_retries": 0})
    return SettingsContext(profile=now.profile, settings=now.settings.model_copy(update={"client": client}))


def require_server_for_run() -> None:
    """Check the configured server before a run. Any fault is in the command's environment, so each failure is BadConfig.

    Raises:
        BadConfig: the server cannot be used.
    """
    try:
        require_server()
    except Network as failure:
        raise BadConfig(
            failure.what,
            where=failure.where,
            got=failure.got,
            next_step=f"{failure.next_step}; or `unset PREFECT_API_URL` to run with a temporary server",
        ) from failure


def shown_url(url: str) -> str:
    """Return a server's address without the credentials that it may have."""
    return strip_auth_from_url(str(url))


def _bad_answer(status: int, where: str) -> Failure:
    if status in (401, 403):
        return BadConfig(
            "The Prefect server refuses the credentials.",
            where=where,
            got=f"HTTP {status}",
            expected="the server's auth string",
            next_step="export PREFECT_API_AUTH_STRING=USER:PASSWORD",
        )
    if status >= 500 or status == 429:
        return Network(
            "The Prefect server is not ready.",
            where=where,
            got=f"HTTP {status}",
            next_step="try again in a minute; look at the server's log",
        )
    return _not_prefect(where, f"HTTP {status}")


def _not_prefect(where: str, got: str) -> Network:
    return Network(
        "The server at this address is not a Prefect server.",
        where=where,
        got=got,
        next_step="the address ends in /api, as in http://127.0.0.1:4200/api",
    )


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
