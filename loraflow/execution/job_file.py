"""The file `job.json`, through which the launcher gives a worker process its job.

Two folders belong to a job. Both are in the store's scratch folder, on this machine:

- the work folder outlives an attempt. It holds `job.json`, the log, progress, outcome and checkpoints.
- the staging folder is new for each attempt. The stage writes the artifact's files into it, and the launcher commits them.
"""

from __future__ import annotations

import contextlib
import json
import resource
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from pydantic import JsonValue, TypeAdapter, ValidationError

from loraflow.config.stage_configs import StageConfig
from loraflow.job import MEMORY_ESTIMATE, Inputs, Job
from loraflow.stages import STAGES, Stage
from loraflow.store.checksum import check_document, with_checksum
from loraflow.store.files import write_atomic, write_json


@dataclass(frozen=True)
class JobFile:
    """A job as a worker process sees it.

    Attributes:
        job: the job, its config validated by the stage's class.
        out: the staging folder.
        input_folders: the input artifacts, by input name.
        work: the work folder, which the file itself is in.
    """

    job: Job[StageConfig]
    out: Path
    input_folders: Mapping[str, Path]
    work: Path

    @property
    def stage(self) -> Stage:
        """The job's stage."""
        return STAGES[self.job.stage]

    @property
    def inputs(self) -> Inputs:
        """The input artifacts' folders."""
        return Inputs(self.input_folders)

    @property
    def nodes(self) -> int:
        """How many machines share the job."""
        return self.job.runtime.rendezvous.nodes if self.stage.several_nodes else 1

    def write(self) -> Path:
        """Write the file and return its path."""
        path = self.work / "job.json"
        values = {
            **self.job.model_dump(mode="json"),
            "fingerprint": self.job.fingerprint,
            "out": str(self.out),
            "input_folders": {name: str(folder) for name, folder in self.input_folders.items()},
        }
        write_atomic(path, with_checksum(_name(path), values))
        return path

    @classmethod
    def read(cls, path: Path) -> JobFile:
        """Read a file that `write` wrote.

        Raises:
            ValueError: it was changed, or is the file of another job.
        """
        values = json.loads(check_document(_name(path), path.read_bytes()))
        return cls(
            Job[StageConfig].model_validate({key: values[key] for key in Job.model_fields if key in values}),
            Path(values["out"]),
            {name: Path(folder) for name, folder in values["input_folders"].items()},
            path.parent,
        )


def _name(path: Path) -> str:
    """Return the name that the checksum covers: the work folder is named by the job's fingerprint."""
    return f"{path.parent.name}/{path.name}"


_SIZES = TypeAdapter(dict[str, int])


def clear_memory(work: Path) -> None:
    """Remove what an earlier attempt of the job wrote."""
    for file in (work / MEMORY_ESTIMATE, *work.glob("memory-peak-*.json")):
        file.unlink(missing_ok=True)


def record_peak(work: Path, rank: str) -> None:
    """Write this process's peak. A full disk does not matter here: the outcome will say so."""
    with contextlib.suppress(OSError):
        write_json(work / f"memory-peak-{rank}.json", {**peak_bytes()})


def read_memory(work: Path) -> dict[str, JsonValue] | None:
    """Return the peak of the largest process of a job, and the estimate by part, in bytes; None if nothing is recorded."""
    peaks = [peak for file in work.glob("memory-peak-*.json") if (peak := _read(file))]
    if not peaks:
        return None
    largest: dict[str, JsonValue] = {
        kind: max(peak.get(kind, 0) for peak in peaks)
        for kind in ("host", "gpu")
        if any(kind in peak for peak in peaks)
    }
    found: dict[str, JsonValue] = {"peak_bytes": largest}
    if estimate := _read(work / MEMORY_ESTIMATE):
        found["estimate_bytes"] = {**estimate}
    return found


def _read(file: Path) -> dict[str, int]:
    try:
        return _SIZES.validate_python(json.loads(file.read_bytes()))
    except (OSError, ValueError, ValidationError):
        return {}


def peak_bytes() -> dict[str, int]:
    """Return the peak of this process: `host`, its resident memory, and `gpu`, what torch allocated, if it used one.

    Linux's VmHWM belongs to the program that runs. `getrusage` starts with the memory of the process that started it.
    """
    peak = {"host": _resident()}
    torch = sys.modules.get("torch")  # a process that did not import it has nothing on a GPU
    if torch is not None and torch.cuda.is_initialized():
        peak["gpu"] = int(torch.cuda.max_memory_allocated())
    return peak


def _resident() -> int:
    try:
        lines = Path("/proc/self/status").read_text(encoding="utf-8").splitlines()
        return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("VmHWM:"))
    except (OSError, StopIteration):  # not Linux
        used = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        return used if sys.platform == "darwin" else used * 1024
