"""The worker process of a heavy stage. It never imports prefect.

    python -P -m loraflow.execution.worker job.json

It reads the job, writes the artifact's files into the staging folder, and writes `progress.jsonl` and `outcome.json` beside
the job. The launcher commits the artifact. The same command runs a failed job again by hand. With LORAFLOW_NODE=1, 2, …
in the environment, the process is another node of the same training.
"""

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
    pipe = take_pipe()
    _prepare_process(file)
    lock, name = ("worker.lock", FILE) if node() == 0 else (f"worker-node-{node()}.lock", f"node-{node()}.json")
    rank = os.environ.get("RANK")  # set in each process of a group
    if rank is not None:
        name = f"outcome-{rank}.json"
    failure, summary = None, Summary()
    try:
        # A killed launcher frees its job lock at once, but its worker continues to the end of its current step.
        with contextlib.nullcontext() if rank is not None else flock(file.work / lock):
            if rank is None and needs_group(file):
                summary = run_in_group(file)
            else:
                _claim_staging_folder(file.out, rank)
                progress = Progress(file.work / "progress.jsonl", work=file.work)
                summary = stage_function(file.stage)(file.job, file.inputs, file.out, progress)
    except BaseException as error:
        failure = _failure_of(error, file)
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


def _prepare_process(file: JobFile) -> None:
    """Set up this process: the end of its launcher, its log, signals, devices, and where modules are imported from."""
    if str(Path.cwd()) not in sys.path:
        sys.path.append(str(Path.cwd()))  # last: modules that metrics import from there, and no library
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


def _claim_staging_folder(out: Path, rank: str | None) -> None:
    """Make the staging folder, empty. Of several ranks, rank 0 does: it writes the files."""
    if rank in (None, "0"):
        out.parent.mkdir(parents=True, exist_ok=True)
        staging.claim(out)  # held until this process ends, also if the launcher is killed
        if out.exists():
            shutil.rmtree(out)
        out.mkdir()


def _failure_of(error: BaseException, file: JobFile) -> failures.Failure:
    """Return what ended the job as a `Failure`."""
    if isinstance(error, failures.Failure):
        return failures.of_machine(error)
    if isinstance(error, KeyboardInterrupt):
        return failures.Preempted("The worker was interrupted.", next_step="run again: it resumes")
    with contextlib.suppress(OSError):  # the log's disk is full
        print(format_masked(error), file=sys.stderr)
    return classify(error, file.job.stage, [file.out, file.work])


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
