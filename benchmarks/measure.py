"""Whole processes, measured: wall seconds and peak memory, several times, medians."""

from __future__ import annotations

import os
import statistics
import subprocess
import sys
import time


def once(command: list[str], env: dict[str, str] | None = None) -> tuple[float, float]:
    """Run a command; return (seconds, MiB of its largest process)."""
    started = time.perf_counter()
    process = subprocess.Popen(
        command, env={**os.environ, **(env or {})}, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE
    )
    assert process.stderr is not None
    said = process.stderr.read()
    _, status, usage = os.wait4(process.pid, 0)
    process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode:
        sys.exit(f"{' '.join(command)} ended with {process.returncode}:\n{said.decode()[-2000:]}")
    return time.perf_counter() - started, usage.ru_maxrss / 1024


def several(command: list[str], times: int = 3, env: dict[str, str] | None = None) -> tuple[float, float]:
    """Run a command several times; return the median seconds and the largest MiB."""
    runs = [once(command, env) for _ in range(times)]
    return statistics.median(seconds for seconds, _ in runs), max(memory for _, memory in runs)


def row(*cells: object) -> None:
    """Print a line of a table."""
    print(" | ".join(f"{cell:.2f}" if isinstance(cell, float) else str(cell) for cell in cells), flush=True)
