"""Run a job as one process per device, by torch's elastic launcher, on one machine or several."""

from __future__ import annotations

import json
import logging
import os
import signal
import socket
import sys
from pathlib import Path

from loraflow import failures
from loraflow.config.runtime import Rendezvous
from loraflow.execution.job_file import JobFile
from loraflow.store import Summary

log = logging.getLogger("loraflow.worker")
NODE, PARENT = "LORAFLOW_NODE", "LORAFLOW_PARENT"  # environment: this node's number; the process id of the launcher


def node() -> int:
    """Return the number of this node. Node 0 runs the flow and hosts the rendezvous."""
    return int(os.environ.get(NODE, "0"))


def needs_group(file: JobFile) -> bool:
    """Tell whether a job runs as more than one process.

    Raises:
        BadConfig: this is a further node, and the job has no place for it.
    """
    if node() >= file.nodes:
        raise failures.BadConfig(
            "The job has no place for this node.",
            where=NODE,
            expected=f"less than {file.nodes}",
            got=str(node()),
            next_step="set runtime.rendezvous.nodes to the number of nodes",
        )
    return file.stage.several_devices and (file.job.runtime.devices > 1 or file.nodes > 1)


def run_in_group(file: JobFile) -> Summary:
    """Start a process for each device of this node and return the summary of the process that wrote the artifact.

    The elastic launcher decides which node gets rank 0. That rank writes into the store that all nodes share, and the
    caller on node 0 commits what it finds there.

    Raises:
        Failure: the failure that ended the group. The other processes are ended with it.
    """
    from torch.distributed.elastic.multiprocessing.api import SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.elastic.rendezvous.api import RendezvousConnectionError, RendezvousTimeoutError
    from torch.distributed.launcher.api import LaunchConfig, elastic_launch

    devices, nodes, meeting = file.job.runtime.devices, file.nodes, file.job.runtime.rendezvous
    job_path = file.home / "job.json"
    if node() == 0:  # no rank starts before this node has joined the rendezvous
        for old in file.home.glob("outcome-*.json"):
            old.unlink()
    os.environ.setdefault("OMP_NUM_THREADS", str(max(1, (os.cpu_count() or 1) // devices)))
    config = LaunchConfig(
        min_nodes=nodes,
        max_nodes=nodes,
        nproc_per_node=devices,
        run_id=meeting.id or file.home.name[:32],
        rdzv_backend="c10d",
        rdzv_endpoint=meeting.endpoint if nodes > 1 and meeting.endpoint else "localhost:0",
        rdzv_configs=_timeouts(meeting) if nodes > 1 else {},
        local_addr=_own_address(meeting.endpoint) if nodes > 1 and meeting.endpoint else None,
        max_restarts=0,
        monitor_interval=0.2,
    )
    log.info("%s on %d devices of node %d of %d", file.job.stage, devices, node(), nodes)
    if node() == 0 and nodes > 1:
        log.info("start the other nodes with: %s=1 python -m loraflow.execution.worker %s", NODE, job_path)
    codes: dict[int, int] = {}
    # The ranks get sessions of their own, out of reach of a signal to our group: each of them watches this process.
    launcher = os.environ.get(PARENT)
    try:
        os.environ[PARENT] = str(os.getpid())
        elastic_launch(config, sys.executable)("-m", "loraflow.execution.worker", str(job_path))
    except ChildFailedError as error:
        codes = {rank: one.exitcode for rank, one in error.failures.items()}
    except (RendezvousTimeoutError, RendezvousConnectionError) as error:
        raise failures.Network(
            "The nodes of the training did not meet.",
            where=f"{meeting.endpoint}, node {node()}",
            expected=f"{nodes} nodes within {meeting.wait_minutes} minutes",
            got=str(error),
            next_step="start the other nodes (the log has the command); check that each of them reaches the endpoint",
        ) from error
    except SignalException as error:
        raise failures.Preempted("The worker was asked to stop.", got=str(error), next_step="run again") from error
    finally:
        os.environ.pop(PARENT, None)
        if launcher is not None:
            os.environ[PARENT] = launcher
    if node() > 0 and not codes:  # node 0 may have committed by now, and removed the job's folder
        return Summary()
    return _first_summary(file.home, codes)


def _timeouts(meeting: Rendezvous) -> dict[str, bool | int]:
    seconds = max(1, round(meeting.wait_minutes * 60))
    return {"is_host": node() == 0, "join_timeout": seconds, "read_timeout": seconds}


def _own_address(endpoint: str) -> str:
    """Return the address from which this node reaches the endpoint: its own name may be unknown to the others.

    Raises:
        Network: the endpoint's name has no address.
    """
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


def _first_summary(home: Path, codes: dict[int, int]) -> Summary:
    """Return the summary of the lowest rank, or raise the failure that ended the group.

    A rank that lost another rank crashes with a closed connection. So a known failure, or a killed rank, comes first.
    """
    outcomes = {int(path.stem.split("-")[1]): json.loads(path.read_bytes()) for path in home.glob("outcome-*.json")}
    failed = [
        failures.from_dict(outcome["failure"])
        for _, outcome in sorted(outcomes.items())
        if outcome["status"] == "failed"
    ]
    for failure in failed:
        if not isinstance(failure, failures.Preempted | failures.Crashed):
            raise failure
    silent = {rank: code for rank, code in codes.items() if rank not in outcomes}
    if silent:
        got = ", ".join(f"rank {rank}: {code}" for rank, code in sorted(silent.items()))
        kind = failures.Killed if -signal.SIGKILL in silent.values() else failures.Crashed
        raise kind("A device's process ended without an outcome.", got=got, next_step="run again: it resumes")
    if failed:
        raise next((failure for failure in failed if isinstance(failure, failures.Crashed)), failed[0])
    if not outcomes:
        raise failures.Crashed("No device's process left an outcome.", got=str(codes))
    return Summary.model_validate(outcomes[min(outcomes)]["summary"])
