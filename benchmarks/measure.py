"""Measure whole processes: wall seconds and peak memory. Used by the other benchmarks."""

from __future__ import annotations

import os
import statistics
import subprocess
import sys
import time


def measure_command(command: list[str], env: dict[str, str] | None = None) -> tuple[float, float]:
    """Run a command; return (seconds, MiB of its largest process)."""
    started = time.perf_counter()
    process = subprocess.Popen(
        command, env={**os.environ, **(env or {})}, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE
    )
    assert process.stderr is not None
    errors = process.stderr.read()
    _, status, usage = os.wait4(process.pid, 0)
    process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode:
        sys.exit(f"{' '.join(command)} ended with {process.returncode}:\n{errors.decode()[-2000:]}")
    return time.perf_counter() - started, usage.ru_maxrss / 1024


def measure_median(command: list[str], times: int = 3, env: dict[str, str] | None = None) -> tuple[float, float]:
    """Run a command several times; return the median seconds and the largest MiB."""
    runs = [measure_command(command, env) for _ in range(times)]
    return statistics.median(seconds for seconds, _ in runs), max(memory for _, memory in runs)


def print_row(*cells: object) -> None:
    """Print a line of a table."""
    print(" | ".join(f"{cell:.2f}" if isinstance(cell, float) else str(cell) for cell in cells), flush=True)
