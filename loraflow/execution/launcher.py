"""Run a job: hold its lock, run its stage in this process or in a worker process, and commit the artifact.

A worker has a process group of its own and a deadline, and ends when this process ends. `run_job` returns the artifact's
ref, or raises a `Failure` whose class says how the worker ended.
"""

import contextlib
import logging
import platform
import shutil
import time
from collections.abc import Iterator
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from pydantic import JsonValue

from loraflow import __version__, failures
from loraflow.config.job_runtime import RetryWith
from loraflow.config.locations import FolderOrigin
from loraflow.config.stage_configs import StageConfig
from loraflow.data.versions.git import has_uncommitted_changes, head_commit
from loraflow.execution.cache import look_up
from loraflow.execution.classify import storage_failure
from loraflow.execution.code_digest import code_digest
from loraflow.execution.job_file import JobFile, read_memory
from loraflow.execution.start_worker import WORKER
from loraflow.execution.worker import stage_function
from loraflow.execution.worker_process import OnProgress, check_budget, run_in_worker_process
from loraflow.job import Inputs, Job, Progress
from loraflow.stages import STAGES
from loraflow.store import LocalStore, Ref, Store, staging
from loraflow.store.checkpoints import COMPLETE, FOLDER, finalized_checkpoints, remove_incomplete
from loraflow.store.files import folder_size
from loraflow.store.lock import LockHeld, flock

log = logging.getLogger(__name__)

_RECORDED = ("torch", "transformers", "peft", "trl", "datasets", "tokenizers", "evaluate", "dvc", "numpy", "pyarrow")


def run_job(
    job: Job[StageConfig],
    store: Store,
    on_progress: OnProgress | None = None,
    *,
    force: bool = False,
    run_started: float | None = None,
) -> Ref:
    """Hold a job's lock, run the job and commit its artifact. If another run committed it meanwhile, return that artifact.

    `runtime.max_hours` is counted from `run_started`, in seconds since 1970; by default from now.

    Raises:
        Failure: the stage's own failure; or Killed, Preempted, Crashed, Stalled, DeadlineExceeded or BudgetSpent, if its
            worker left none.
    """
    hours = job.runtime.max_hours
    ends = None if hours is None else (run_started or time.time()) + hours * 3600
    check_budget(job, ends)
    with store.lock(job.stage, job.fingerprint):
        ref = look_up(store, job).ref
        if ref is not None and not force:
            log.info("%s %s: another run computed it meanwhile", job.stage, job.short)
            return ref
        if not force and (ref := store.resume_commit(job.stage, job.fingerprint)) is not None:
            log.info("%s %s: already computed; finishing its interrupted commit", job.stage, job.short)
            return ref
        work = store.work_folder(job.stage, job.fingerprint, ref if force else None)
        check_free_space(job, store)
        started = time.time()
        with _staging_folder(job, store, work, started) as staged:
            with store.mirror_checkpoints(job.stage, job.fingerprint):
                folders = {name: store.path(ref) for name, ref in job.inputs.items()}
                if not STAGES[job.stage].in_worker:  # no second attempt: the staging folder may have files
                    summary = stage_function(STAGES[job.stage])(job, Inputs(folders), staged, Progress(None, work))
                else:
                    while True:
                        try:
                            file = JobFile(job, staged, folders, work)
                            summary = run_in_worker_process(WORKER, file, on_progress, ends)
                            break
                        except failures.OutOfMemory as failure:
                            job = _with_less_memory(job, failure)
            ref = store.commit(
                staged,
                payload=job.payload,
                inputs=job.inputs,
                summary=summary,
                provenance=_provenance(job, started, work),
                replace=force,
            )
        store.remove_work_folder(job.stage, job.fingerprint)
        return ref


@contextlib.contextmanager
def _staging_folder(job: Job[StageConfig], store: Store, work: Path, started: float) -> Iterator[Path]:
    """Yield a job's staging folder, and remove it at the end.

    Add to a failure what the launcher knows: the space that the job needs, and whether the job saved anything. A stage in
    this process, and a write beside the worker's, may fail with a library's exception: one that is about a disk becomes a
    `Failure`.
    """
    staged = store.staging(job.stage, job.fingerprint)
    try:
        yield staged
    except failures.DiskFull as disk_full:
        explain_disk_full(disk_full, job, store, staged, work)
        raise
    except failures.BudgetSpent as spent:
        spent.details["saved"] = saves_since(work, started, is_shared=isinstance(store, LocalStore))
        raise
    except failures.Failure as known:
        raise failures.of_machine(known) from known.__cause__
    except Exception as error:
        failure = storage_failure(error, str(staged), [staged, work])
        if failure is None:
            raise
        if isinstance(failure, failures.DiskFull):
            explain_disk_full(failure, job, store, staged, work)
        raise failure from error
    finally:
        staging.discard(staged)


def _with_less_memory(job: Job[StageConfig], failure: failures.OutOfMemory) -> Job[StageConfig]:
    """Return the job with the settings that the stage proposes, else with half the micro-batch. The result is the same."""
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


def _provenance(job: Job[StageConfig], started: float, work: Path) -> dict[str, JsonValue]:
    """Return what the manifest records beside the fingerprint's values: time, memory, runtime, versions, machine, git."""
    versions: dict[str, JsonValue] = {"loraflow": __version__}
    for name in _RECORDED:
        with contextlib.suppress(PackageNotFoundError):
            versions[name] = version(name)
    memory = read_memory(work) if STAGES[job.stage].in_worker else None
    return {
        **({"memory": memory} if memory else {}),
        "seconds": round(time.time() - started, 3),
        "started": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime(started)),
        "runtime": job.runtime.model_dump(mode="json"),
        "versions": versions,
        "python": platform.python_version(),
        "machine": platform.machine(),
        "code": code_digest(STAGES[job.stage]),
        "commit": head_commit(Path.cwd()),
        "uncommitted": has_uncommitted_changes(Path.cwd()),
    }


def saves_since(work: Path, started: float, *, is_shared: bool) -> bool:
    """Tell whether a job's work folder has a complete checkpoint, finished answers or shards that are new.

    Args:
        started: when the attempt started, in seconds since 1970.
        is_shared: whether other machines see the work folder. If not, they see its checkpoints only.
    """
    kept = [*work.glob(f"{FOLDER}/*/{COMPLETE}")]
    if is_shared:
        kept += [*work.glob("answers*.jsonl"), *work.glob("shards/*")]
    return any(file.stat().st_mtime >= started for file in kept)


def check_free_space(job: Job[StageConfig], store: Store) -> None:
    """Check the free disk space, for a stage whose result is about as large as one of its inputs.

    Raises:
        DiskFull: there is too little.
    """
    need = _size_of_source(job, store)
    if need is None:
        return
    free = shutil.disk_usage(store.scratch).free
    if free < need * 1.05:
        raise failures.DiskFull(
            f"The {job.stage} stage needs more disk space than is free.",
            where=str(store.scratch),
            expected=f"{_readable(int(need * 1.05))} free",
            got=f"{_readable(free)} free",
            next_step="`loraflow gc` removes what no run needs; or set runtime.store to another disk",
        )


def explain_disk_full(
    failure: failures.DiskFull, job: Job[StageConfig], store: Store, staged: Path, work: Path
) -> None:
    """Add to a failure how much space the job needs and where it resumes. Remove the checkpoint that was cut off.

    The worker has ended. `staged` is its staging folder, `work` its work folder.
    """
    checkpoints = work / FOLDER
    newest = next(iter(finalized_checkpoints(checkpoints)), None)
    if failure.where.startswith((str(staged), str(work), str(store.scratch))) and not failure.expected:
        if newest is not None and failure.where.startswith(str(work)):
            failure.expected = f"about {_readable(folder_size(newest))} for a checkpoint, as {newest.name} has"
        elif (need := _size_of_source(job, store)) is not None:
            failure.expected = f"about {_readable(need)} for the result"
        else:
            failure.expected = (
                f"more than the {_readable(folder_size(staged) + folder_size(work))} that the job had written"
            )
    if newest is not None:
        failure.next_step += f": training resumes from {newest.name}"
    # Without the lock, nothing is removed: the full disk is what is reported.
    with contextlib.suppress(LockHeld, OSError, failures.Failure), flock(work / "worker.lock", wait=False):
        remove_incomplete(checkpoints)


def _size_of_source(job: Job[StageConfig], store: Store) -> int | None:
    """Return the bytes of the input that the stage's result is a copy of; None if the result is no copy."""
    source, origin = STAGES[job.stage].disk_estimate, job.runtime.origin
    if source == "base":
        return store.manifest(job.inputs["base"]).size
    if source == "origin" and isinstance(origin, FolderOrigin):
        return sum(path.stat().st_size for path in Path(origin.folder).iterdir() if path.is_file())
    return None


def _readable(size: int) -> str:
    return f"{size / 2**20:,.1f} MiB" if size >= 2**20 else f"{size / 2**10:,.1f} KiB"
