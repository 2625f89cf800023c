"""The child process that does a heavy stage. It never imports prefect.

    python -m loraflow.execution.worker job.json

Reads the job, writes the artifact's staging folder, `progress.jsonl` and `outcome.json` beside the job. Anyone can
run a failed job again with that one command; the caller commits. With LORAFLOW_NODE=1, 2, … in the environment it is
another node of the same training.
"""

from __future__ import annotations

import contextlib
import faulthandler
import importlib
import json
import logging
import os
import shutil
import signal
import socket
import sys
import threading
import time
import traceback
from pathlib import Path
from typing import Any

from loraflow import failures
from loraflow.execution.parent_death import end_with_parent
from loraflow.job import Inputs, Job, Progress
from loraflow.store.files import write_json
from loraflow.store.lock import flock

log = logging.getLogger("loraflow.execution.worker")


def main(argv: list[str]) -> int:
    """Run the job of a file. Return 0 if it is done, 1 if it failed and said so in `outcome.json`."""
    job_file = Path(argv[0]).absolute()
    spec = json.loads(job_file.read_text(encoding="utf-8"))
    _die_with_parent(spec["runtime"].get("grace_seconds", 20.0))
    faulthandler.enable()
    logging.basicConfig(
        level=logging.INFO, format="%(asctime)s %(levelname)s %(name)s: %(message)s", stream=sys.stderr, force=True
    )
    signal.signal(signal.SIGTERM, _preempted)
    if spec["runtime"].get("devices", 1) == 1:  # transformers would spread one process over all GPUs that it sees
        os.environ["CUDA_VISIBLE_DEVICES"] = os.environ.get("CUDA_VISIBLE_DEVICES", "0").split(",")[0]
    outcome: dict[str, Any]
    rank = os.environ.get("RANK")
    try:
        if rank is not None:
            outcome = {"status": "done", "summary": execute(spec, job_file.parent)}
        else:
            # When a launcher is killed, its job lock is free at once, but its worker ends only after its step.
            with flock(job_file.parent / ("worker.lock" if node() == 0 else f"worker-node-{node()}.lock")):
                run = run_on_devices if several_devices(spec) else execute
                outcome = {"status": "done", "summary": run(spec, job_file.parent)}
    except failures.Failure as failure:
        outcome = {"status": "failed", "failure": failure.to_dict()}
    except KeyboardInterrupt:
        outcome = {"status": "failed", "failure": failures.Preempted("The worker was interrupted.").to_dict()}
    except BaseException as error:
        traceback.print_exc()
        outcome = {"status": "failed", "failure": classify(error, spec["stage"]).to_dict()}
    if rank is not None:
        name = f"outcome-{rank}.json"
    else:
        name = "outcome.json" if node() == 0 else f"node-{node()}.json"
    with contextlib.suppress(OSError):  # on a full disk even this fails; the exit status still says so
        write_json(job_file.parent / name, outcome)
    if _orphaned():  # nobody is left to end what we started
        os.killpg(0, signal.SIGKILL)
    if outcome["status"] == "failed":
        print(failures.from_dict(outcome["failure"]), file=sys.stderr, flush=True)
        return 1
    return 0


def execute(spec: dict[str, Any], home: Path) -> dict[str, Any]:
    """Run a job's stage function into its staging folder and return its summary as JSON values."""
    from loraflow.stages import STAGES

    job = Job.model_validate({key: spec[key] for key in Job.model_fields if key in spec})
    module, function = STAGES[job.stage].function.split(":")
    out = Path(spec["out"])
    if os.environ.get("RANK", "0") == "0":  # of several devices, the first one writes
        shutil.rmtree(out, ignore_errors=True)
        out.mkdir(parents=True)
    inputs = Inputs({name: Path(path) for name, path in spec["input_folders"].items()})
    progress = Progress(home / "progress.jsonl", work=home)
    summary = getattr(importlib.import_module(module), function)(job, inputs, out, progress)
    return summary.model_dump()


def node() -> int:
    """Return which of a training's nodes this is. The first one runs the flow and hosts the meeting."""
    return int(os.environ.get("LORAFLOW_NODE", "0"))


def nodes_of(spec: dict[str, Any]) -> int:
    """Return how many machines share a job: only training has more than one."""
    return int(spec["runtime"].get("rendezvous", {}).get("nodes", 1)) if spec["stage"] == "train" else 1


def several_devices(spec: dict[str, Any]) -> bool:
    """Tell whether a job is one that devices share, and has more than one of them.

    Raises:
        BadConfig: this is a further node, and the job has no place for it.
    """
    if node() >= nodes_of(spec):
        raise failures.BadConfig(
            "The job has no place for this node.", where="LORAFLOW_NODE", expected=f"less than {nodes_of(spec)}",
            got=str(node()), next_step="set runtime.rendezvous.nodes to the number of nodes",
        )  # fmt: skip
    return spec["stage"] in ("train", "evaluate") and (spec["runtime"].get("devices", 1) > 1 or nodes_of(spec) > 1)


def run_on_devices(spec: dict[str, Any], home: Path) -> dict[str, Any]:
    """Start a process for each device of this node, by torch's elastic launcher, and return the first one's summary.

    Which node gets rank 0 is the launcher's matter: it writes into the store that all nodes see, and the first node's
    caller commits what it finds there.

    Raises:
        Failure: the one that ended the group. The others are ended with it.
    """
    from torch.distributed.elastic.multiprocessing.api import SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.elastic.rendezvous.api import RendezvousConnectionError, RendezvousTimeoutError
    from torch.distributed.launcher.api import LaunchConfig, elastic_launch

    devices, nodes, meeting = spec["runtime"].get("devices", 1), nodes_of(spec), spec["runtime"].get("rendezvous", {})
    if node() == 0:  # no rank starts before this node has come to the meeting
        for old in home.glob("outcome-*.json"):
            old.unlink()
    # The ranks get sessions of their own, out of reach of a signal to our group: each watches this process instead.
    launcher = os.environ.get("LORAFLOW_PARENT")
    os.environ.setdefault("OMP_NUM_THREADS", str(max(1, (os.cpu_count() or 1) // devices)))
    config = LaunchConfig(
        min_nodes=nodes,
        max_nodes=nodes,
        nproc_per_node=devices,
        run_id=meeting.get("id") or home.name[:32],
        rdzv_backend="c10d",
        rdzv_endpoint=meeting["endpoint"] if nodes > 1 else "localhost:0",
        rdzv_configs=_waits(meeting["wait_minutes"]) if nodes > 1 else {},
        local_addr=_address(meeting["endpoint"]) if nodes > 1 else None,
        max_restarts=0,
        monitor_interval=0.2,
    )
    log.info("%s on %d devices of node %d of %d", spec["stage"], devices, node(), nodes)
    if node() == 0 and nodes > 1:
        log.info("the other nodes: LORAFLOW_NODE=1 python -m loraflow.execution.worker %s", home / "job.json")
    codes: dict[int, int] = {}
    try:
        os.environ["LORAFLOW_PARENT"] = str(os.getpid())
        elastic_launch(config, sys.executable)("-m", "loraflow.execution.worker", str(home / "job.json"))
    except ChildFailedError as error:
        codes = {rank: one.exitcode for rank, one in error.failures.items()}
    except (RendezvousTimeoutError, RendezvousConnectionError) as error:
        raise failures.Network(
            "The nodes of the training did not meet.", where=f"{meeting.get('endpoint')}, node {node()}",
            expected=f"{nodes} nodes within {meeting.get('wait_minutes')} minutes", got=str(error),
            next_step="start the others (the log has the command); check that the endpoint is reached from each",
        ) from error  # fmt: skip
    except SignalException as error:
        raise failures.Preempted("The worker was asked to end.", got=str(error), next_step="run again") from error
    finally:
        os.environ.pop("LORAFLOW_PARENT", None)
        if launcher is not None:
            os.environ["LORAFLOW_PARENT"] = launcher
    if node() > 0 and not codes:  # the first node may have committed, and removed the job's folder, by now
        return {}
    return _of_all(home, codes)


def _waits(minutes: float) -> dict[str, Any]:
    seconds = max(1, round(minutes * 60))
    return {"is_host": node() == 0, "join_timeout": seconds, "read_timeout": seconds}


def _address(endpoint: str) -> str:
    """Return the address from which this node reaches the endpoint: its own name may be unknown to the others.

    Raises:
        Network: the endpoint's name has no address.
    """
    host, _, port = endpoint.rpartition(":")
    try:
        with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as one:
            one.connect((host, int(port)))  # nothing is sent
            return str(one.getsockname()[0])
    except OSError as error:
        raise failures.Network(
            "The first node's address is not known here.", where=f"runtime.rendezvous.endpoint, node {node()}",
            got=f"{endpoint}: {error}", next_step="set it to a host:port of the first node that every node resolves",
        ) from error  # fmt: skip


def _of_all(home: Path, codes: dict[int, int]) -> dict[str, Any]:
    """Return the first rank's summary, or raise what ended the group: not that the others were ended for it.

    A rank that lost another one crashes with a closed connection, so that what is known, or killed, comes before.
    """
    said = {int(path.stem.split("-")[1]): json.loads(path.read_bytes()) for path in home.glob("outcome-*.json")}
    failed = [failures.from_dict(one["failure"]) for _, one in sorted(said.items()) if one["status"] == "failed"]
    for failure in failed:
        if not isinstance(failure, failures.Preempted | failures.Crashed):
            raise failure
    silent = {rank: code for rank, code in codes.items() if rank not in said}
    if silent:
        got = ", ".join(f"rank {rank}: {code}" for rank, code in sorted(silent.items()))
        kind = failures.Killed if -signal.SIGKILL in silent.values() else failures.Crashed
        # The others then crash over a connection that is gone.
        raise kind("A device's process ended without an outcome.", got=got, next_step="run again: it resumes")
    if failed:
        raise next((one for one in failed if isinstance(one, failures.Crashed)), failed[0])
    if not said:
        raise failures.Crashed("No device's process gave an outcome.", got=str(codes))
    return dict(said[min(said)]["summary"])


def classify(error: BaseException, stage: str) -> failures.Failure:
    """Turn an exception that no stage foresaw into a failure with a class."""
    text = f"{type(error).__name__}: {error}"
    name = type(error).__name__
    if isinstance(error, OSError) and (known := failures.from_os_error(error, stage)):
        return known
    if "No space left on device" in text:
        return failures.DiskFull("The disk is full.", where=stage, next_step="free space, or move runtime.store")
    if isinstance(error, MemoryError) or name == "OutOfMemoryError" or "can't allocate memory" in text.lower():
        return failures.OutOfMemory("Memory did not suffice.", where=stage, got=text[:500])
    if isinstance(error, ImportError) and getattr(error, "name", None):
        return failures.MissingExtra(
            f"The Python package {error.name} is missing.", where=stage, got=text[:300], next_step="loraflow doctor"
        )
    if name in ("ConnectionError", "ConnectTimeout", "ReadTimeout", "LocalEntryNotFoundError", "ConnectError"):
        return failures.Network("A remote did not answer.", where=stage, got=text[:500])
    return failures.Crashed("The stage ended with an exception that it did not foresee.", where=stage, got=text[:2000])


def _orphaned() -> bool:
    expected = os.environ.get("LORAFLOW_PARENT")
    return expected is not None and os.getppid() != int(expected)


def _preempted(signum: int, frame: Any) -> None:
    # A second signal must not interrupt what the first one set going.
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    raise failures.Preempted("The worker was asked to end.", got="SIGTERM", next_step="run again: it resumes")


def _die_with_parent(grace: float) -> None:
    """End when the launcher dies, however it dies: its death signal is SIGTERM, and a watchdog is behind it."""
    expected = os.environ.get("LORAFLOW_PARENT")
    if expected is None:
        return  # run by hand
    end_with_parent()
    parent = int(expected)

    def watch() -> None:
        while os.getppid() == parent:
            time.sleep(0.5)
        time.sleep(grace)
        os.killpg(0, signal.SIGKILL)

    if _orphaned():  # it died before we asked for the signal
        sys.exit(1)
    threading.Thread(target=watch, daemon=True).start()


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
