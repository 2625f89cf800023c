"""The memory of a job: a worker writes its measured peak beside its job, and the launcher puts it into the manifest.

It is provenance, so no digest or fingerprint depends on it.
"""

from __future__ import annotations

import contextlib
import json
import resource
import sys
from pathlib import Path

from pydantic import JsonValue, TypeAdapter, ValidationError

from loraflow.job import MEMORY_ESTIMATE
from loraflow.store.files import write_json

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
