"""The worker process of a heavy stage. It never imports prefect.

    python -m loraflow.execution.worker job.json

It reads the job and writes the artifact's files into a staging folder, `progress.jsonl` and `outcome.json` beside the
job. The launcher commits the artifact. A failed job can be run again by hand with that one command. With LORAFLOW_NODE=1,
2, … in the environment the process is another node of the same training.
"""

from __future__ import annotations

import contextlib
import faulthandler
import logging
import os
import shutil
import signal
import sys
import traceback
from collections.abc import Callable
from pathlib import Path
from types import FrameType

from pydantic import JsonValue

from loraflow import failures
from loraflow.execution.device_group import PARENT, needs_group, node, run_in_group
from loraflow.execution.job_file import JobFile
from loraflow.execution.parent_death import end_group_with_parent
from loraflow.execution.stage_function import stage_function
from loraflow.job import Progress
from loraflow.store import Summary
from loraflow.store.files import write_json
from loraflow.store.lock import flock


def main(argv: list[str]) -> int:
    """Run the job of a file. Return 0 if it is done, 1 if it failed with a failure in `outcome.json`."""
    file = JobFile.read(Path(argv[0]).absolute())
    _end_with_launcher(file.job.runtime.grace_seconds)
    faulthandler.enable()
    logging.basicConfig(
        level=logging.INFO, format="%(asctime)s %(levelname)s %(name)s: %(message)s", stream=sys.stderr, force=True
    )
    signal.signal(signal.SIGTERM, _preempted)
    if file.job.runtime.devices == 1:  # transformers would spread one process over all GPUs that it sees
        os.environ["CUDA_VISIBLE_DEVICES"] = os.environ.get("CUDA_VISIBLE_DEVICES", "0").split(",")[0]
    rank = os.environ.get("RANK")
    if rank is not None:
        failure, summary = _attempt(file, execute)
        name = f"outcome-{rank}.json"
    else:
        failure, summary = _attempt(file, _as_only_worker)
        name = "outcome.json" if node() == 0 else f"node-{node()}.json"
    outcome: dict[str, JsonValue] = (
        {"status": "done", "summary": summary.model_dump(mode="json")}
        if failure is None
        else {"status": "failed", "failure": failure.to_dict()}
    )
    with contextlib.suppress(OSError):  # on a full disk even this fails; the exit status still tells
        write_json(file.home / name, outcome)
    if _is_orphaned():  # nobody is left to end the processes that we started
        os.killpg(0, signal.SIGKILL)
    if failure is not None:
        print(failure, file=sys.stderr, flush=True)
        return 1
    return 0


def _attempt(file: JobFile, run: Callable[[JobFile], Summary]) -> tuple[failures.Failure | None, Summary]:
    """Run a job and turn whatever ends it into a failure."""
    try:
        return None, run(file)
    except failures.Failure as failure:
        return failure, Summary()
    except KeyboardInterrupt:
        return failures.Preempted("The worker was interrupted."), Summary()
    except BaseException as error:
        traceback.print_exc()
        return classify(error, file.job.stage), Summary()


def _as_only_worker(file: JobFile) -> Summary:
    """Run a job while no other worker process does.

    When a launcher is killed, its job lock is free at once, but its worker ends only after its current step.
    """
    with flock(file.home / ("worker.lock" if node() == 0 else f"worker-node-{node()}.lock")):
        return run_in_group(file) if needs_group(file) else execute(file)


def execute(file: JobFile) -> Summary:
    """Run a job's stage into its staging folder and return its summary."""
    if os.environ.get("RANK", "0") == "0":  # of several devices, the first one writes
        shutil.rmtree(file.out, ignore_errors=True)
        file.out.mkdir(parents=True)
    progress = Progress(file.home / "progress.jsonl", work=file.home)
    return stage_function(file.stage)(file.job, file.inputs, file.out, progress)


def classify(error: BaseException, stage: str) -> failures.Failure:
    """Turn an exception that no stage foresaw into a failure with a class."""
    text = f"{type(error).__name__}: {error}"
    name = type(error).__name__
    if isinstance(error, OSError) and (known := failures.from_os_error(error, stage)):
        return known
    if "No space left on device" in text:
        return failures.DiskFull("The disk is full.", where=stage, next_step="free space, or move runtime.store")
    if isinstance(error, MemoryError) or name == "OutOfMemoryError" or "can't allocate memory" in text.lower():
        return failures.OutOfMemory("There is not enough memory.", where=stage, got=text[:500])
    if isinstance(error, ImportError) and getattr(error, "name", None):
        return failures.MissingExtra(
            f"The Python package {error.name} is missing.", where=stage, got=text[:300], next_step="loraflow doctor"
        )
    if name in ("ConnectionError", "ConnectTimeout", "ReadTimeout", "LocalEntryNotFoundError", "ConnectError"):
        return failures.Network("A remote did not answer.", where=stage, got=text[:500])
    return failures.Crashed("The stage ended with an unexpected exception.", where=stage, got=text[:2000])


def _is_orphaned() -> bool:
    parent = os.environ.get(PARENT)
    return parent is not None and os.getppid() != int(parent)


def _preempted(signum: int, frame: FrameType | None) -> None:
    # A second signal must not interrupt what the first one started.
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    raise failures.Preempted("The worker was asked to stop.", got="SIGTERM", next_step="run again: it resumes")


def _end_with_launcher(grace: float) -> None:
    """End when the launcher dies. A worker that was started by hand has none."""
    parent = os.environ.get(PARENT)
    if parent is None:
        return
    end_group_with_parent(int(parent), grace)
    if _is_orphaned():  # the launcher died before we asked for the signal
        sys.exit(1)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
