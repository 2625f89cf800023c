"""Run a job's worker process: start it, follow it to its end, and end its process group whatever happens."""

import contextlib
import json
import logging
import os
import signal
import subprocess
import time
from collections.abc import Callable
from pathlib import Path

from pydantic import JsonValue

from loraflow import failures
from loraflow.config import Recipe
from loraflow.config.locations import HubOrigin
from loraflow.config.stage_configs import StageConfig
from loraflow.execution.job_file import JobFile, clear_memory
from loraflow.execution.log_file import LOGS, ProgressReader, limit_log, mask_log
from loraflow.execution.outcome import FILE, read_outcome
from loraflow.execution.stall_watch import AwakeClock, StallWatch, remove_stacks
from loraflow.execution.start_worker import WorkerProcess, start_fork_server, start_worker
from loraflow.job import Job
from loraflow.stages import RESOLVE_BASE
from loraflow.store import Summary, open_store

log = logging.getLogger(__name__)

Figures = dict[str, JsonValue]
_PAUSE = 60.0  # seconds without progress on the display, after it failed
_READS = 16  # reads of the progress file between two checks of the worker
OnProgress = Callable[[Figures], None]


def run_in_worker_process(
    command: list[str], file: JobFile, on_progress: OnProgress | None, ends: float | None = None
) -> Summary:
    """Run a job in a worker process and return its summary.

    Args:
        command: starts a worker; the job file is appended to it.
        ends: when the time of the run is over, in seconds since 1970.

    Raises:
        Failure: the stage's own; or that of a worker that ended without an outcome, stalled, or ran too long.
    """
    job, work = file.job, file.work
    for name in (FILE, "progress.jsonl"):
        (work / name).unlink(missing_ok=True)
    remove_stacks(work)
    clear_memory(work)
    kills_before = _oom_kills()
    read_end, write_end = os.pipe()
    try:
        with (work / "log.txt").open("ab") as log_file:
            process = start_worker(command, file, _environment_of(file), log_file.fileno(), write_end)
        os.close(write_end)
        write_end = -1
        log.info("%s %s: worker %d, log %s", job.stage, job.short, process.pid, work / "log.txt")
        spent = None
        try:
            _follow(process, file, on_progress, ends)
        except failures.BudgetSpent as over:
            spent = over
        finally:
            _end_group(process, job.runtime.grace_seconds)
            for name in LOGS:
                mask_log(work / name)
        try:
            return read_outcome(file, read_end, process.wait(), oom_killed=_oom_kills() > kills_before)
        except failures.Failure:
            if spent is None:
                raise
        raise spent  # the worker could not finish within the grace period
    finally:
        os.close(read_end)
        if write_end != -1:
            os.close(write_end)


def import_ahead(recipe: Recipe) -> None:
    """Start the fork server ahead of the first worker, if no model was ever resolved in the recipe's store.

    A new store means that heavy stages run soon. The libraries are imported while Prefect's server starts.
    """
    runtime, model = recipe.runtime, recipe.base.model
    is_local = model.startswith("bundled:") or Path(model).expanduser().is_dir()  # else other variables are set
    if runtime.worker_start != "fork" or not is_local or "://" in runtime.store:
        return
    if open_store(runtime.store).newest(RESOLVE_BASE.name) is None:
        start_fork_server(_environment(runtime.threads, is_offline=True))


def _environment_of(file: JobFile) -> dict[str, str]:
    runtime = file.job.runtime
    return _environment(runtime.threads, is_offline=not isinstance(runtime.origin, HubOrigin))


def _environment(threads: int | None, *, is_offline: bool) -> dict[str, str]:
    # Prefect puts the project's folder there, whose datasets.py would be imported in place of the library.
    paths = os.environ.get("PYTHONPATH", "").split(os.pathsep)
    own = Path.cwd() if not Path("loraflow", "__init__.py").exists() else None
    kept = [path for path in paths if path and Path(path).resolve() != own]
    env = {
        "TOKENIZERS_PARALLELISM": "true",
        **os.environ,
        "PYTHONPATH": os.pathsep.join(kept),
        "PYTHONUNBUFFERED": "1",
        "HF_HUB_DISABLE_TELEMETRY": "1",
        "DO_NOT_TRACK": "1",
    }
    if is_offline:
        env |= {"HF_HUB_OFFLINE": "1", "HF_EVALUATE_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1"}
    if threads:
        env["OMP_NUM_THREADS"] = str(threads)
    return env


def _follow(process: WorkerProcess, file: JobFile, on_progress: OnProgress | None, ends: float | None) -> None:
    """Wait for the worker to end, and pass each new line of its progress file to `on_progress`."""
    progress, clock, runtime = ProgressReader(file.work / "progress.jsonl"), AwakeClock(), file.job.runtime
    stall = StallWatch(process.pid, file.work, *_stall_minutes(file))
    display = _Display(on_progress)
    while True:
        code = process.poll()
        for _ in range(_READS):
            if not (lines := progress.new_lines()):
                break
            display.show(lines)
        limit_log(file.work / "log.txt")
        if code is not None:
            return
        now = clock.seconds()
        stall.check(now)
        if runtime.deadline_minutes is not None and now > runtime.deadline_minutes * 60:
            raise failures.DeadlineExceeded(
                f"The worker ran for more than {runtime.deadline_minutes} minutes.",
                where=str(file.work),
                next_step="raise runtime.deadline_minutes; a rerun resumes from the last checkpoint",
            )
        check_budget(file.job, ends)
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(timeout=0.2)


def _stall_minutes(file: JobFile) -> list[float | None]:
    """Return the limits of `StallWatch`: nodes may wait for each other before them."""
    runtime = file.job.runtime
    wait = 0 if file.nodes == 1 else runtime.rendezvous.wait_minutes
    return [None if minutes is None else minutes + wait for minutes in (runtime.stall_minutes, runtime.silent_minutes)]


def check_budget(job: Job[StageConfig], ends: float | None) -> None:
    """Check the time of the run, of which the worker needs the last seconds to save a checkpoint.

    Raises:
        BudgetSpent: it is over.
    """
    if ends is not None and time.time() > ends - job.runtime.grace_seconds:
        raise failures.BudgetSpent(
            "The run reached its time limit.",
            where=f"{job.stage} {job.short}",
            expected=f"at most {job.runtime.max_hours} hours (runtime.max_hours)",
            next_step="run again, here or on another machine that uses the store: training resumes from its last checkpoint",
        )


class _Display:
    """Pass lines of progress to a function. If it fails, the stage continues; each kind of error is logged once.

    Prefect's client repeats a call to a lost server for half a minute, during which the worker is not checked. So after
    an error, lines are left out for a minute.
    """

    def __init__(self, on_progress: OnProgress | None):
        self._on_progress, self._logged, self._pauses_until = on_progress, set[type[Exception]](), 0.0

    def show(self, lines: list[bytes]) -> None:
        """Show lines of JSON, without those that cannot be parsed."""
        for line in lines:
            if self._on_progress is None or time.monotonic() < self._pauses_until:
                return
            try:
                progress = json.loads(line)
            except ValueError as error:  # a library printed between the parts of a line
                self._log_once(error, "a line of progress is not JSON")
                continue
            try:
                self._on_progress(progress)
            except Exception as error:
                self._log_once(error, "progress is not shown for a minute")
                self._pauses_until = time.monotonic() + _PAUSE

    def _log_once(self, error: Exception, what: str) -> None:
        if type(error) not in self._logged:
            log.warning("%s: %s: %s", what, type(error).__name__, error)
        self._logged.add(type(error))


def _end_group(process: WorkerProcess, grace: float) -> None:
    """End the worker's process group: SIGTERM, then SIGKILL. Do nothing if it has ended.

    A second interruption, such as another Ctrl-C, ends the wait: the group is killed at once.
    """
    try:
        if process.poll() is None:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGTERM)
                os.killpg(process.pid, signal.SIGCONT)  # a stopped process would not see the first signal
            try:
                process.wait(timeout=grace)
            except subprocess.TimeoutExpired:
                log.warning("worker %d did not end within %.0f s of SIGTERM; killing it", process.pid, grace)
    finally:
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()


def _oom_kills() -> int:
    """Return how many processes the kernel killed for lack of memory, in this control group if it has one; 0 if unknown."""
    with contextlib.suppress(OSError, ValueError, StopIteration):
        group = next(
            line.split("::", 1)[1] for line in Path("/proc/self/cgroup").read_text().splitlines() if "::" in line
        )
        events = Path("/sys/fs/cgroup" + group, "memory.events").read_text()
        return sum(int(line.split()[1]) for line in events.splitlines() if line.startswith("oom_kill "))
    with contextlib.suppress(OSError, ValueError, StopIteration):
        vmstat = Path("/proc/vmstat").read_text()
        return next(int(line.split()[1]) for line in vmstat.splitlines() if line.startswith("oom_kill "))
    return 0
