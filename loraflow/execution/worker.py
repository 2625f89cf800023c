"""The worker process of a heavy stage. It never imports prefect.

    python -P -m loraflow.execution.worker job.json

It reads the job, writes the artifact's files into the staging folder, and writes `progress.jsonl` and `outcome.json` beside
the job. The launcher commits the artifact. The same command runs a failed job again by hand. With LORAFLOW_NODE=1, 2, …
in the environment, the process is another node of the same training.
"""

from __future__ import annotations

import contextlib
import faulthandler
import logging
import os
import shutil
import signal
import sys
from collections.abc import Callable
from importlib import import_module
from pathlib import Path
from types import FrameType
from typing import TypeVar

from loraflow import failures
from loraflow.config.stage_configs import StageConfig
from loraflow.credentials import format_masked, protect_output, protect_streams
from loraflow.execution.classify import classify
from loraflow.execution.device_group import PARENT, needs_group, node, run_in_group
from loraflow.execution.job_file import JobFile, record_peak
from loraflow.execution.outcome import FILE, report_outcome, take_pipe
from loraflow.execution.parent_death import end_group_with_parent
from loraflow.execution.stall_watch import write_stacks_on_request
from loraflow.job import Inputs, Job, Progress
from loraflow.stages import Stage
from loraflow.store import Summary, staging
from loraflow.store.lock import flock

C = TypeVar("C", bound=StageConfig)
_asked: list[failures.Preempted] = []  # to stop; training has its own handler


def main(argv: list[str]) -> int:
    """Run the job of a file, write `outcome.json`, and return the exit status: 0 if the job succeeded, 1 if it failed."""
    try:
        file = JobFile.read(Path(argv[0]).absolute())
    except (OSError, ValueError) as error:
        print(f"The job file {argv[0]} cannot be read: {error}", file=sys.stderr, flush=True)
        return 1
    if str(Path.cwd()) not in sys.path:
        sys.path.append(str(Path.cwd()))  # last: modules that metrics import from there, and no library
    pipe = take_pipe()
    _end_with_launcher(file.job.runtime.grace_seconds)
    faulthandler.enable()
    protect_output()
    protect_streams()
    write_stacks_on_request(file.work)
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
        failure, summary = _attempt(file, _run_locked)
        name = FILE if node() == 0 else f"node-{node()}.json"
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    if _asked:  # code that catches every exception may have continued
        failure = _asked[0]
    record_peak(file.work, rank or f"node-{node()}")
    failure = report_outcome(file, name, pipe, failure, summary)
    if _is_orphaned():  # the launcher is gone, so this process ends its own group
        os.killpg(0, signal.SIGKILL)
    if failure is not None:
        with contextlib.suppress(OSError):  # the log's disk is full
            print(failure, file=sys.stderr, flush=True)
        return 1
    return 0


def _attempt(file: JobFile, run: Callable[[JobFile], Summary]) -> tuple[failures.Failure | None, Summary]:
    try:
        return None, run(file)
    except failures.Failure as failure:
        return failures.of_machine(failure), Summary()
    except KeyboardInterrupt:
        return failures.Preempted("The worker was interrupted.", next_step="run again: it resumes"), Summary()
    except BaseException as error:
        with contextlib.suppress(OSError):  # the log's disk is full
            print(format_masked(error), file=sys.stderr)
        return classify(error, file.job.stage, [file.out, file.work]), Summary()


def _run_locked(file: JobFile) -> Summary:
    """Wait until no other worker process runs the job, then run it.

    A killed launcher frees its job lock at once, but its worker continues to the end of its current step.
    """
    with flock(file.work / ("worker.lock" if node() == 0 else f"worker-node-{node()}.lock")):
        return run_in_group(file) if needs_group(file) else execute(file)


def execute(file: JobFile) -> Summary:
    """Run a job's stage into its staging folder and return its summary."""
    if os.environ.get("RANK", "0") == "0":  # rank 0 writes the files
        file.out.parent.mkdir(parents=True, exist_ok=True)
        staging.claim(file.out)  # held until this process ends, also if the launcher is killed
        if file.out.exists():
            shutil.rmtree(file.out)
        file.out.mkdir()
    progress = Progress(file.work / "progress.jsonl", work=file.work)
    return stage_function(file.stage)(file.job, file.inputs, file.out, progress)


def _is_orphaned() -> bool:
    parent = os.environ.get(PARENT)
    return parent is not None and os.getppid() != int(parent)


def _preempted(signum: int, frame: FrameType | None) -> None:
    # A second signal must not interrupt the handling of the first one.
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    _asked.append(failures.Preempted("The worker was asked to stop.", got="SIGTERM", next_step="run again: it resumes"))
    raise _asked[0]


def _end_with_launcher(grace: float) -> None:
    """End when the launcher dies. A worker that was started by hand has none."""
    parent = os.environ.get(PARENT)
    if parent is None:
        return
    end_group_with_parent(int(parent), grace)
    if _is_orphaned():  # the launcher died before we asked for the signal
        sys.exit(1)


def stage_function(stage: Stage) -> Callable[[Job[C], Inputs, Path, Progress], Summary]:
    """Return `run` of a stage's module: it reads the inputs' folders and writes the artifact's files into a folder."""
    function: Callable[[Job[C], Inputs, Path, Progress], Summary] = import_module(stage.module).run
    return function


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
