"""`loraflow up, deploy`: flows that people run from Prefect's UI, on a server of one's own or one that is there."""

from __future__ import annotations

import logging
import os
import shlex
import time
from pathlib import Path
from typing import Any

import click

from loraflow.cli import quiet_logging
from loraflow.failures import BadConfig

only_option = click.option(
    "--only", multiple=True, metavar="FLOW/NAME", help="Only this deployment of prefect.yaml; all by default."
)


@click.command()
@click.option("--port", default=4242, show_default=True, type=click.IntRange(1, 65535))
@click.option("--host", default="127.0.0.1", show_default=True, help="Others need PREFECT_SERVER_API_AUTH_STRING.")
@click.option(
    "--pool", "pools", multiple=True, default=["local"], show_default=True, help="Pools to start a worker for."
)
@click.option("--limit", default=4, show_default=True, type=click.IntRange(1), help="Runs at a time, for each worker.")
@click.option("--home", default=".loraflow/prefect", show_default=True, type=click.Path(path_type=Path))
@only_option
def up(port: int, host: str, pools: tuple[str, ...], limit: int, home: Path, only: tuple[str, ...]) -> None:
    """Start Prefect's server and a worker here, with all deployments. Ctrl-C stops everything."""
    quiet_logging()
    from loraflow.flows.server.local_server import Processes, environment, refuse_taken
    from loraflow.store.lock import Held, flock

    os.environ.update(environment(home, host, port))
    refuse_taken(host, port)
    try:
        with flock(home / "up.lock", wait=False), Processes(home) as processes:
            _run(processes, port, host, pools, limit, only)
    except Held:
        raise BadConfig(
            "A `loraflow up` runs here already.",
            where=str(home),
            next_step="use it, or name another folder with --home",
        ) from None
    except KeyboardInterrupt:
        click.echo("\nstopped; what was made is kept, and `loraflow up` finds runs and schedules as they were")


def _run(processes: Any, port: int, host: str, pools: tuple[str, ...], limit: int, only: tuple[str, ...]) -> None:
    click.echo(f"starting Prefect's server (the first time takes a minute); log {processes.home / 'server.log'}")
    processes.start("server", "server", "start", "--host", host, "--port", str(port))
    processes.wait_for_server(port, host)
    from loraflow.flows.server.abandoned_runs import end_abandoned, worker_name
    from loraflow.flows.server.deployments import deploy, idle_pools

    _quiet_prefect()
    specs, changes = deploy(list(only))
    _say(changes)
    for line in end_abandoned(list(pools)):
        click.echo(line)
    for pool in pools:
        options = ("--name", worker_name(), "--limit", str(limit))
        processes.start(f"worker-{pool}", "worker", "start", "--pool", pool, *options)
    idle = idle_pools(specs, wait=60, expected=set(pools), look=processes.check)
    near = os.environ["PREFECT_API_URL"].removesuffix("/api")
    click.echo(f"\nUI       {click.style(near, bold=True)}")
    click.echo(f"here     export PREFECT_API_URL={near}/api")
    _say_idle(idle)
    click.echo("Ctrl-C stops server and workers")
    while True:
        processes.check()
        time.sleep(1)


@click.command()
@click.option("--wait", default=10.0, show_default=True, help="Seconds in which workers may appear.")
@only_option
def deploy(wait: float, only: tuple[str, ...]) -> None:
    """Put pools, deployments, schedules and automations onto the server at PREFECT_API_URL. Twice changes nothing."""
    quiet_logging()
    from loraflow.flows.server.deployments import deploy as put
    from loraflow.flows.server.deployments import idle_pools

    _quiet_prefect()
    specs, changes = put(list(only))
    _say(changes)
    _say_idle(idle_pools(specs, wait))


def _quiet_prefect() -> None:
    for name in ("httpx", "prefect"):
        logging.getLogger(name).setLevel(logging.WARNING)


def _say(changes: list[str]) -> None:
    for change in changes or ["everything is as prefect.yaml says; nothing changed"]:
        click.echo(change)


def _say_idle(pools: list[str]) -> None:
    here = shlex.quote(str(Path.cwd()))
    for pool in pools:
        click.echo(f"pool {pool} has no worker, so that its runs wait. Start one where they shall run:")
        click.echo(f"  LORAFLOW_HOME={here} prefect worker start --pool {pool}")
