"""The disk space that a job needs: checked before it starts, and named when it runs out."""

from __future__ import annotations

import contextlib
import shutil
from pathlib import Path

from loraflow import failures
from loraflow.config.locations import FolderOrigin
from loraflow.config.stage_configs import StageConfig
from loraflow.job import Job
from loraflow.stages import STAGES
from loraflow.store import Store
from loraflow.store.checkpoints import FOLDER, finalized_checkpoints, remove_incomplete
from loraflow.store.files import folder_size
from loraflow.store.lock import LockHeld, flock


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
    with contextlib.suppress(LockHeld), flock(work / "worker.lock", wait=False):
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
