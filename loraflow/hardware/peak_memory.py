"""The most memory that this process has used, from the system's own counters."""

from __future__ import annotations

import resource
import sys
from pathlib import Path


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
