"""Run a job as one process per device, by torch's elastic launcher, on one machine or several."""

from __future__ import annotations

import logging
import os
import signal
import socket
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from loraflow import failures
from loraflow.config.runtime import Rendezvous
from loraflow.execution.classify import full_folder
from loraflow.execution.job_file import JobFile
from loraflow.execution.outcome import parse_outcome
from loraflow.store import Summary

if TYPE_CHECKING:
    from torch.distributed.launcher.api import LaunchConfig

log = logging.getLogger(__name__)
NODE, PARENT = "LORAFLOW_NODE", "LORAFLOW_PARENT"  # environment: this node's number; the process id of the launcher


def node() -> int:
    """Return the number of this node. Node 0 runs the flow and hosts the rendezvous."""
    return int(os.environ.get(NODE, "0"))


def needs_group(file: JobFile) -> bool:
    """Return whether a job runs as more than one process.

    Raises:
        BadConfig: this node's number is larger than the job's number of nodes allows.
    """
    if node() >= file.nodes:
        raise failures.BadConfig(
            "This node's number is too large for the job.",
            where=NODE,
            expected=f"less than {file.nodes}",
            got=str(node()),
            next_step="set runtime.rendezvous.nodes to the number of nodes",
        )
    return file.stage.several_devices and (file.job.runtime.devices > 1 or file.nodes > 1)


def run_in_group(file: JobFile) -> Summary:
    """Start a process for each device of this node and return the summary of the process that wrote the artifact.

    The elastic launcher decides which node gets rank 0. That rank writes the artifact's files into the store that all nodes
    share, and the caller on node 0 commits them.

    Raises:
        Failure: the failure that ended the group. The other processes are ended with it.
    """
    if node() == 0:  # no rank starts before this node has joined the rendezvous
        for old in file.work.glob("outcome-*.json"):
            old.unlink()
    devices, nodes, job_path = file.job.runtime.devices, file.nodes, file.work / "job.json"
    os.environ.setdefault("OMP_NUM_THREADS", str(max(1, (os.cpu_count() or 1) // devices)))
    log.info("%s on %d devices of node %d of %d", file.job.stage, devices, node(), nodes)
    if node() == 0 and nodes > 1:
        log.info("start the other nodes with: %s=1 python -P -m loraflow.execution.worker %s", NODE, job_path)
    with _watched_by_ranks():
        exit_codes = _launch(file, job_path)
    if node() > 0 and not exit_codes:  # node 0 may have committed by now, and removed the job's folder
        return Summary()
    return _first_summary(file.work, exit_codes)


@contextmanager
def _watched_by_ranks() -> Iterator[None]:
    """Name this process as the parent in the environment of the ranks.

    Ranks have sessions of their own, so a signal to this process group does not reach them. Each of them watches this
    process instead.
    """
    launcher = os.environ.get(PARENT)
    os.environ[PARENT] = str(os.getpid())
    try:
        yield
    finally:
        os.environ.pop(PARENT, None)
        if launcher is not None:
            os.environ[PARENT] = launcher


def _launch(file: JobFile, job_path: Path) -> dict[int, int]:
    """Run this node's ranks to their end; return the exit codes by rank if a rank failed, and nothing otherwise."""
    from torch.distributed.elastic.multiprocessing.api import SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.elastic.rendezvous.api import RendezvousConnectionError, RendezvousTimeoutError
    from torch.distributed.launcher.api import elastic_launch

    rendezvous = file.job.runtime.rendezvous
    try:
        elastic_launch(_launch_config(file), sys.executable)("-P", "-m", "loraflow.execution.worker", str(job_path))
    except ChildFailedError as error:
        return {rank: failed.exitcode for rank, failed in error.failures.items()}
    except (RendezvousTimeoutError, RendezvousConnectionError) as error:
        raise failures.Network(
            "Not all nodes joined the training.",
            where=f"{rendezvous.endpoint}, node {node()}",
            expected=f"{file.nodes} nodes within {rendezvous.wait_minutes} minutes",
            got=str(error),
            next_step="start the other nodes (the log has the command); check that each of them reaches the endpoint",
        ) from error
    except SignalException as error:
        raise failures.Preempted("The worker was asked to stop.", got=str(error), next_step="run again") from error
    return {}


def _launch_config(file: JobFile) -> LaunchConfig:
    from torch.distributed.launcher.api import LaunchConfig

    nodes, rendezvous = file.nodes, file.job.runtime.rendezvous
    return LaunchConfig(
        min_nodes=nodes,
        max_nodes=nodes,
        nproc_per_node=file.job.runtime.devices,
        run_id=rendezvous.id or file.work.name[:32],
        rdzv_backend="c10d",
        rdzv_endpoint=rendezvous.endpoint if nodes > 1 and rendezvous.endpoint else "localhost:0",
        rdzv_configs=_timeouts(rendezvous) if nodes > 1 else {},
        local_addr=_own_address(rendezvous.endpoint) if nodes > 1 and rendezvous.endpoint else None,
        max_restarts=0,
        monitor_interval=0.2,
    )


def _timeouts(rendezvous: Rendezvous) -> dict[str, bool | int]:
    seconds = max(1, round(rendezvous.wait_minutes * 60))
    return {"is_host": node() == 0, "join_timeout": seconds, "read_timeout": seconds}


def _own_address(endpoint: str) -> str:
    """Return this node's address on the route to the endpoint: the other nodes may not resolve its host name."""
    host, _, port = endpoint.rpartition(":")
    try:
        with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
            probe.connect((host, int(port)))  # nothing is sent
            return str(probe.getsockname()[0])
    except OSError as error:
        raise failures.Network(
            "The first node's address cannot be resolved here.",
            where=f"runtime.rendezvous.endpoint, node {node()}",
            got=f"{endpoint}: {error}",
            next_step="set it to a host:port of the first node that every node resolves",
        ) from error


def _first_summary(work: Path, exit_codes: dict[int, int]) -> Summary:
    """Return the summary of the lowest rank, or raise the failure that ended the group.

    When a rank ends, the others crash with a closed connection. So a failure with a known cause, or a killed rank, comes
    first.
    """
    found = {int(path.stem.split("-")[1]): parse_outcome(path) for path in work.glob("outcome-*.json")}
    outcomes = {rank: outcome for rank, outcome in found.items() if outcome is not None}  # a damaged one counts as none
    failed = [
        failures.from_dict(outcome["failure"])
        for _, outcome in sorted(outcomes.items())
        if outcome["status"] == "failed" and isinstance(outcome["failure"], dict)
    ]
    for failure in failed:
        if not isinstance(failure, failures.Preempted | failures.Crashed):
            raise failure
    silent = {rank: code for rank, code in exit_codes.items() if rank not in outcomes}
    if silent:
        if -signal.SIGKILL not in silent.values() and (folder := full_folder([work])):
            raise failures.disk_full(str(folder))
        # torch's launcher kills the others if they do not end after a rank failed, so a crash may be the cause.
        crashes = [f"another rank: {failure.what} {failure.got}" for failure in failed]
        got = "; ".join([*(f"rank {rank}: {code}" for rank, code in sorted(silent.items())), *crashes])
        kind = failures.Killed if -signal.SIGKILL in silent.values() else failures.Crashed
        raise kind("A device's process ended without an outcome.", got=got, next_step="run again: it resumes")
    if failed:
        raise next((failure for failure in failed if isinstance(failure, failures.Crashed)), failed[0])
    if not outcomes:
        raise failures.Crashed(
            "No device's process left an outcome.",
            got=str(exit_codes),
            next_step="run again: it resumes; the reason is in the stage's log",
        )
    return Summary.model_validate(outcomes[min(outcomes)]["summary"])
