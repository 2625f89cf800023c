"""`loraflow up, deploy`: start a Prefect server with all deployments, or update the deployments of another server."""

from __future__ import annotations

import logging
import os
import shlex
import time
from pathlib import Path
from typing import TYPE_CHECKING, NoReturn

import click

from loraflow.cli import quiet_logging, require_free_port
from loraflow.credentials import mask
from loraflow.failures import BadConfig

if TYPE_CHECKING:
    from loraflow.flows.server.local_server import Processes

only_option = click.option(
    "--only",
    multiple=True,
    metavar="FLOW/NAME",
    help="Only this deployment of prefect.yaml; repeat for several. Default: all.",
)


@click.command()
@click.option("--port", default=4242, show_default=True, type=click.IntRange(1, 65535), help="Port of UI and API.")
@click.option(
    "--host",
    default="127.0.0.1",
    show_default=True,
    help="Address to listen on. Addresses other than localhost need PREFECT_SERVER_API_AUTH_STRING.",
)
@click.option(
    "--pool",
    "pools",
    multiple=True,
    help="Work pool to start a worker for; repeat for several. Default: `local`, or all pools of prefect.yaml if it has "
    "no pool of that name.",
)
@click.option("--limit", default=4, show_default=True, type=click.IntRange(1), help="Concurrent runs of each worker.")
@click.option(
    "--home",
    default=".loraflow/prefect",
    show_default=True,
    type=click.Path(path_type=Path),
    help="Folder of the server's database and the logs.",
)
@only_option
def up(port: int, host: str, pools: tuple[str, ...], limit: int, home: Path, only: tuple[str, ...]) -> None:
    """Start a Prefect server and workers here, with all deployments. Ctrl-C stops them, and active runs with them."""
    quiet_logging()
    from loraflow.flows.server.local_server import Processes, environment
    from loraflow.store.lock import LockHeld, flock

    os.environ.update(environment(home, host, port))
    running = f"PREFECT_API_URL=http://{host}:{port}/api loraflow deploy"
    require_free_port(host, port, f"loraflow up --port {port + 1}; or, if a server runs there: {running}")
    from loraflow.flows.server.prefect_yaml import find_prefect_yaml, read_all  # prefect, which reads the environment

    read_all(find_prefect_yaml(), list(only))  # what is wrong there is reported at once, not after a server's start
    try:
        with flock(home / "up.lock", wait=False), Processes(home) as processes:
            _start_all(processes, port, host, pools, limit, only)
    except LockHeld:
        raise BadConfig(
            "`loraflow up` is already running here.",
            where=str(home),
            next_step="use the running server, or name another folder with --home",
        ) from None
    except KeyboardInterrupt:
        click.echo("\nstopped; artifacts, runs and schedules are kept for the next `loraflow up`")


def _start_all(
    processes: Processes, port: int, host: str, pools: tuple[str, ...], limit: int, only: tuple[str, ...]
) -> NoReturn:
    """Start the server, deploy, start the workers, and check that they run until an exception."""
    click.echo(f"starting Prefect's server (the first time takes a minute); log {processes.home / 'server.log'}")
    processes.start("server", "server", "start", "--host", host, "--port", str(port))
    processes.wait_for_server(port, host)
    from loraflow.flows.server.automations import end_abandoned, worker_name
    from loraflow.flows.server.connection import pools_without_workers
    from loraflow.flows.server.deployments import deploy

    _quiet_prefect()
    specs, changes = deploy(list(only))
    _show_changes(changes)
    named = {spec.work_pool.name for spec in specs}
    pools = pools or (("local",) if "local" in named else tuple(sorted(named)))
    for line in end_abandoned(pools):
        click.echo(line)
    for pool in pools:
        options = ("--name", worker_name(), "--limit", str(limit))
        processes.start(f"worker-{pool}", "worker", "start", "--pool", pool, *options)
    idle = pools_without_workers(
        {spec.work_pool.name for spec in specs}, wait=60, expected=pools, while_waiting=processes.check
    )
    address = os.environ["PREFECT_API_URL"].removesuffix("/api")
    click.echo(f"\nUI       {click.style(mask(address), bold=True)}")
    click.echo(f"shell    export PREFECT_API_URL={mask(address)}/api")
    _show_idle_pools(idle)
    click.echo("Ctrl-C stops server and workers")
    while True:
        processes.check()
        time.sleep(1)


@click.command()
@click.option("--wait", default=10.0, show_default=True, help="Seconds to wait for workers.")
@only_option
def deploy(wait: float, only: tuple[str, ...]) -> None:
    """Create or update pools, deployments, schedules and automations on the server at PREFECT_API_URL.

    A second call changes nothing.
    """
    quiet_logging()
    from loraflow.flows.server import deployments
    from loraflow.flows.server.connection import pools_without_workers

    _quiet_prefect()
    specs, changes = deployments.deploy(list(only))
    _show_changes(changes)
    _show_idle_pools(pools_without_workers({spec.work_pool.name for spec in specs}, wait))


def _quiet_prefect() -> None:
    for name in ("httpx", "prefect"):
        logging.getLogger(name).setLevel(logging.WARNING)


def _show_changes(changes: list[str]) -> None:
    for change in changes or ["the server already matches prefect.yaml; nothing changed"]:
        click.echo(change)


def _show_idle_pools(pools: list[str]) -> None:
    here = shlex.quote(str(Path.cwd()))
    for pool in pools:
        click.echo(
            f"pool {pool} has no worker, so its runs wait. To start a worker, on the machine that should run them:"
        )
        click.echo(f"  LORAFLOW_HOME={here} prefect worker start --pool {pool}")
