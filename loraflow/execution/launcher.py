"""Run a job: hold its lock, run its stage in this process or in a worker process, and commit the artifact.

A worker has a process group of its own and a deadline, and ends when this process ends. `run_job` returns the artifact's
ref, or raises a `Failure` whose class says how the worker ended.
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
import platform
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from pydantic import JsonValue

from loraflow import failures
from loraflow.config.stage_configs import FolderOrigin, HubOrigin, JobRuntime, RetryWith, StageConfig
from loraflow.execution.cache import look_up
from loraflow.execution.code_digest import code_digest
from loraflow.execution.device_group import PARENT
from loraflow.execution.job_file import JobFile
from loraflow.execution.stage_function import stage_function
from loraflow.identity import short
from loraflow.job import Inputs, Job, Progress
from loraflow.stages import STAGES
from loraflow.store import Ref, Store, Summary

log = logging.getLogger(__name__)

WORKER = [sys.executable, "-m", "loraflow.execution.worker"]
Figures = dict[str, JsonValue]
OnProgress = Callable[[Figures], None]
_RECORDED = ("torch", "transformers", "peft", "trl", "datasets", "tokenizers", "evaluate", "dvc", "numpy", "pyarrow")


def run_job(job: Job[StageConfig], store: Store, on_progress: OnProgress | None = None, *, force: bool = False) -> Ref:
    """Hold a job's lock, run the job and commit its artifact. If another run committed it meanwhile, return that one.

    Raises:
        Failure: the stage's own failure; or Killed, Preempted, Crashed or DeadlineExceeded, if its worker left none.
    """
    with store.lock(job.stage, job.fingerprint):
        ref = look_up(store, job).ref
        if ref is not None and not force:
            log.info("%s %s: another run computed it meanwhile", job.stage, job.short)
            return ref
        if not force and (ref := store.resume_commit(job.stage, job.fingerprint)) is not None:
            log.info("%s %s: computed before; its commit was interrupted and is finished now", job.stage, job.short)
            return ref
        work = store.work_folder(job.stage, job.fingerprint, ref if force else None)
        _check_free_space(job, store)
        staged = store.staging(job.stage, job.fingerprint)
        started = time.time()
        try:
            with store.mirror_checkpoints(job.stage, job.fingerprint):
                summary, runtime = _run_with_less_memory_if_needed(job, store, staged, work, on_progress)
            ref = store.commit(
                staged,
                payload=job.payload,
                inputs=job.inputs,
                summary=summary,
                provenance=_provenance(job, runtime, started),
                replace=force,
            )
        except OSError as error:
            raise failures.from_os_error(error, store.uri) or error from error
        finally:
            shutil.rmtree(staged, ignore_errors=True)
        store.remove_work_folder(job.stage, job.fingerprint)
        return ref


def _check_free_space(job: Job[StageConfig], store: Store) -> None:
    """Check the free disk space, for a stage whose result is about as large as one of its inputs.

    Raises:
        DiskFull: there is too little.
    """
    source, origin = STAGES[job.stage].disk_estimate, job.runtime.origin
    if source == "base":
        need = store.manifest(job.inputs["base"]).size
    elif source == "origin" and isinstance(origin, FolderOrigin):
        need = sum(path.stat().st_size for path in Path(origin.folder).iterdir() if path.is_file())
    else:
        return
    free = shutil.disk_usage(store.scratch).free
    if free < need * 1.05:
        raise failures.DiskFull(
            f"The {job.stage} stage needs more disk space than is free.",
            where=str(store.scratch),
            expected=f"{need * 1.05 / 2**30:.1f} GiB free",
            got=f"{free / 2**30:.1f} GiB",
            next_step="`loraflow gc` removes what no run needs; or set runtime.store to another disk",
        )


def _run_with_less_memory_if_needed(
    job: Job[StageConfig], store: Store, staged: Path, work: Path, on_progress: OnProgress | None
) -> tuple[Summary, JobRuntime]:
    """Run a job's stage, again with less memory if it runs out; return its summary and the runtime that succeeded."""
    stage = STAGES[job.stage]
    folders = {name: store.path(ref) for name, ref in job.inputs.items()}
    if not stage.in_worker:
        return stage_function(stage)(job, Inputs(folders), staged, Progress(None, work)), job.runtime
    while True:
        try:
            return _run_in_worker_process(job, folders, staged, work, on_progress), job.runtime
        except failures.OutOfMemory as failure:
            job = _with_less_memory(job, failure)


def _with_less_memory(job: Job[StageConfig], failure: failures.OutOfMemory) -> Job[StageConfig]:
    """Return the job with the settings that the stage proposes, else with half the micro-batch. The result is the same.

    Raises:
        OutOfMemory: the job cannot run with less memory.
    """
    proposal = failure.details.get("retry_with")
    if proposal is not None:
        changes = RetryWith.model_validate(proposal).changes()
        if not changes:
            raise failure
        log.warning("%s ran out of memory; trying again with %s", job.stage, changes)
        return job.with_runtime(**changes)
    field = STAGES[job.stage].oom_field
    if field is None:
        raise failure
    training = job.runtime.training_config
    now = getattr(job.runtime, field) or (training.per_device_train_batch_size if training else 1)
    if now <= 1:
        failure.next_step = "a single row does not fit: lower training_config.max_length, or quantize the base"
        raise failure
    log.warning("%s ran out of memory with %s %d; trying again with %d", job.stage, field, now, now // 2)
    return job.with_runtime(**{field: now // 2})


def _run_in_worker_process(
    job: Job[StageConfig], folders: dict[str, Path], staged: Path, work: Path, on_progress: OnProgress | None
) -> Summary:
    for name in ("outcome.json", "progress.jsonl"):
        (work / name).unlink(missing_ok=True)
    job_file = JobFile(job, staged, folders, work).write()
    env = {
        **os.environ,
        PARENT: str(os.getpid()),
        "PYTHONUNBUFFERED": "1",
        "TOKENIZERS_PARALLELISM": os.environ.get("TOKENIZERS_PARALLELISM", "true"),
        "HF_HUB_DISABLE_TELEMETRY": "1",
        "DO_NOT_TRACK": "1",
    }
    if not isinstance(job.runtime.origin, HubOrigin):
        env |= {"HF_HUB_OFFLINE": "1", "HF_EVALUATE_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1"}
    if job.runtime.threads:
        env["OMP_NUM_THREADS"] = str(job.runtime.threads)
    kills_before = _oom_kills()
    with (work / "log.txt").open("ab") as log_file:
        process = subprocess.Popen(
            [*WORKER, str(job_file)],
            stdin=subprocess.DEVNULL,
            stdout=log_file,
            stderr=log_file,
            env=env,
            start_new_session=True,
        )
        log.info("%s %s: worker %d, log %s", job.stage, job.short, process.pid, work / "log.txt")
        try:
            code = _follow(process, work / "progress.jsonl", job.runtime.deadline_minutes, on_progress)
        finally:
            _end_group(process, job.runtime.grace_seconds)
    return _outcome(job, work, code, oom_killed=_oom_kills() > kills_before)


def _follow(
    process: subprocess.Popen[bytes], progress: Path, deadline_minutes: float | None, on_progress: OnProgress | None
) -> int:
    """Wait for the worker to end, and pass each new line of its progress file to `on_progress`; return its exit status."""
    started, offset = time.monotonic(), 0
    while True:
        code = process.poll()
        if on_progress is not None and progress.exists():
            with progress.open("rb") as file:
                file.seek(offset)
                block = file.read()
            complete_lines = block[: block.rfind(b"\n") + 1]
            offset += len(complete_lines)
            for line in complete_lines.splitlines():
                try:
                    on_progress(json.loads(line))
                except Exception as error:  # a failed progress display must not end the stage
                    log.warning("progress is not shown: %s", error)
        if code is not None:
            return code
        if deadline_minutes is not None and time.monotonic() - started > deadline_minutes * 60:
            raise failures.DeadlineExceeded(
                f"The worker ran for more than {deadline_minutes} minutes.",
                where=str(progress.parent),
                next_step="raise runtime.deadline_minutes; a rerun resumes from the last checkpoint",
            )
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(timeout=0.2)


def _end_group(process: subprocess.Popen[bytes], grace: float) -> None:
    """End the worker's process group: SIGTERM, then SIGKILL. Do nothing if it has ended."""
    if process.poll() is None:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGTERM)
        try:
            process.wait(timeout=grace)
        except subprocess.TimeoutExpired:
            log.warning("worker %d did not end within %.0f s of SIGTERM; killing it", process.pid, grace)
    with contextlib.suppress(ProcessLookupError, PermissionError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()


def _outcome(job: Job[StageConfig], work: Path, code: int, *, oom_killed: bool) -> Summary:
    command = f"{Path(sys.executable).name} -m loraflow.execution.worker {work / 'job.json'}"
    next_step = f"read the log {work / 'log.txt'}; run it by hand: {command}"
    try:
        outcome = json.loads((work / "outcome.json").read_bytes())
    except (FileNotFoundError, json.JSONDecodeError):
        outcome = None
    if outcome and outcome["status"] == "done" and code == 0:
        return Summary.model_validate(outcome["summary"])
    if outcome and outcome["status"] == "failed":
        failure = failures.from_dict(outcome["failure"])
        failure.next_step = failure.next_step or next_step
        raise failure
    where = f"{job.stage} {short(job.fingerprint)}"
    if code == -signal.SIGKILL and oom_killed:
        raise failures.OutOfMemory(
            "The host ran out of memory and killed the worker.", where=where, next_step=next_step
        )
    if code == -signal.SIGKILL:
        raise failures.Killed("The worker was killed.", where=where, got="SIGKILL", next_step=next_step)
    if code == -signal.SIGTERM:
        raise failures.Preempted("The worker was asked to end.", where=where, got="SIGTERM", next_step=next_step)
    got = f"signal {signal.Signals(-code).name}" if code < 0 else f"exit status {code}"
    tail = (work / "log.txt").read_bytes()[-1500:].decode(errors="replace").strip()
    raise failures.Crashed(
        "The worker ended without an outcome.", where=where, got=f"{got}\n{tail}", next_step=next_step
    )


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


def _provenance(job: Job[StageConfig], runtime: JobRuntime, started: float) -> dict[str, JsonValue]:
    """Return the facts that the manifest records but the fingerprint does not include: time, runtime, versions, machine."""
    versions: dict[str, JsonValue] = {}
    for name in _RECORDED:
        with contextlib.suppress(PackageNotFoundError):
            versions[name] = version(name)
    return {
        "seconds": round(time.time() - started, 3),
        "started": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime(started)),
        "runtime": runtime.model_dump(mode="json"),
        "versions": versions,
        "python": platform.python_version(),
        "machine": platform.machine(),
        "code": code_digest(STAGES[job.stage]),
    }
