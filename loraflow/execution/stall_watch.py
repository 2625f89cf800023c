"""Notice that a worker process makes no progress: first warn, with the stacks of its threads, then fail.

Any of these is progress: a line of progress or log, a new or ended process, processor time, reads and writes.

Processor time alone may be a loop that waits for another process, or a metric of a user that computes for long. So such a
worker is only warned about, with its stacks. It is ended after `runtime.silent_minutes`, if the recipe sets it. NCCL has
its own watchdog.
"""

from __future__ import annotations

import contextlib
import faulthandler
import logging
import math
import os
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from loraflow.execution.log_file import read_tail
from loraflow.failures import Stalled

if TYPE_CHECKING:  # imported where a worker is followed: a cached run does not need it
    import psutil

log = logging.getLogger(__name__)

LONGEST_STEP = 5.0  # seconds of a step of `AwakeClock`
_CPU_SHARE = 0.01  # share of one core: idle threads of torch and Python take less, a slow download takes more
_IO_BYTES = 2**20  # read or written since the last sign of progress
_DUMP_SECONDS = 1.0  # to wait for the stacks
_STACKS = "stacks-"  # files in the work folder


class AwakeClock:
    """Count the seconds in which this process ran.

    Between two readings there is a gap if the machine was suspended, or the container or the launcher was stopped. A gap
    counts as one step, so a worker that was paused together with its launcher does not count as stalled.
    """

    def __init__(self, now: Callable[[], float] = time.monotonic):
        self._now = now
        self._last, self._seconds = now(), 0.0

    def seconds(self) -> float:
        """Return the seconds so far. Call it every few seconds."""
        now = self._now()
        self._seconds += min(now - self._last, LONGEST_STEP)
        self._last = now
        return self._seconds


class _Sample(NamedTuple):
    files: tuple[tuple[int, int], ...]  # size and mtime
    pids: frozenset[int]
    cpu_seconds: float
    io_bytes: int
    stopped: frozenset[int]  # processes in state T


class StallWatch:
    """The signs of progress of one worker process and its children.

    Args:
        minutes: time without progress after which it has stalled; None is never.
        silent_minutes: time with nothing but processor time after which it counts as a loop; None is never.
    """

    def __init__(self, pid: int, work: Path, minutes: float | None, silent_minutes: float | None = None):
        self.pid, self.work = pid, work
        self.limit = math.inf if minutes is None else minutes * 60
        self.silent_limit = math.inf if silent_minutes is None else silent_minutes * 60
        self._last: _Sample | None = None  # at the last sign of progress
        self._progress_at = self._next_check = 0.0
        self._has_warned = False
        self._last_output: _Sample | None = None  # at the last sign other than processor time, or when it was idle
        self._output_at = 0.0
        self._has_warned_of_loop = False

    def check(self, now: float) -> None:
        """Look for progress. `now` is the time of an `AwakeClock`.

        Raises:
            Stalled: there was none for too long.
        """
        shortest = min(self.limit, self.silent_limit)
        if shortest == math.inf or now < self._next_check:
            return
        self._next_check = now + min(10.0, shortest / 20)
        sample = self._sample()
        self._watch_output(sample, now)
        idle = now - self._progress_at
        if self._last is None or _is_progress(self._last, sample, idle):
            self._last, self._progress_at, self._has_warned = sample, now, False
        elif idle >= self.limit:
            raise self._stalled(
                f"The worker made no progress for {self.limit / 60:.3g} minutes.", "stall_minutes", _describe(sample)
            )
        elif idle >= self.limit / 3 and not self._has_warned:
            self._has_warned = True
            log.warning(
                "worker %d made no progress for %.3g minutes; it is ended after %.3g. %s",
                self.pid,
                idle / 60,
                self.limit / 60,
                _describe(sample) or self._dump_stacks(sample.pids),
            )

    def _watch_output(self, sample: _Sample, now: float) -> None:
        """Warn once if there was nothing but processor time for as long as a worker may be idle."""
        # A worker that waits is ended by `stall_minutes`; that time does not count as a loop.
        is_idle = now - self._progress_at >= min(self.limit, self.silent_limit) / 3
        if self._last_output is None or is_idle or _is_output(self._last_output, sample):
            self._last_output, self._output_at, self._has_warned_of_loop = sample, now, False
            return
        seconds = now - self._output_at
        if seconds >= self.silent_limit:
            self._dump_stacks(sample.pids)
            raise self._stalled(
                f"The worker has used the processor for {self.silent_limit / 60:.3g} minutes without progress, log, reads "
                "or writes.",
                "silent_minutes",
                _describe(sample),
            )
        if seconds >= self.limit and not self._has_warned_of_loop:
            self._has_warned_of_loop = True
            log.warning(
                "worker %d has used the processor for %.3g minutes without progress, log, reads or writes: it computes, or "
                "waits in a loop. It is not ended (runtime.silent_minutes does that). %s",
                self.pid,
                seconds / 60,
                self._dump_stacks(sample.pids),
            )

    def _stalled(self, what: str, key: str, got: str = "") -> Stalled:
        return Stalled(
            what,
            where=str(self.work),
            got=got or self._innermost_frames(),
            next_step=f"none is needed: the stage is tried again and resumes. If it needs longer, raise runtime.{key}",
        )

    def _sample(self) -> _Sample:
        import psutil

        processes, cpu, io, stopped = _tree(self.pid), 0.0, 0, set()
        for process in processes:
            with contextlib.suppress(psutil.Error, NotImplementedError):
                times = process.cpu_times()
                cpu += times.user + times.system
                if process.status() in (psutil.STATUS_STOPPED, psutil.STATUS_TRACING_STOP):
                    stopped.add(process.pid)
                counters = process.io_counters()
                io += counters.read_bytes + counters.read_chars + counters.write_chars
        files = tuple(_stamp(self.work / name) for name in ("log.txt", "progress.jsonl"))
        return _Sample(files, frozenset(process.pid for process in processes), cpu, io, frozenset(stopped))

    def _dump_stacks(self, pids: frozenset[int]) -> str:
        asked = [pid for pid in sorted(pids) if _catches(pid, signal.SIGUSR1)]
        for pid in asked:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGUSR1)
        time.sleep(_DUMP_SECONDS if asked else 0.0)
        stacks = [f"Stacks of process {pid}:\n{text}" for pid in asked if (text := self._stacks(pid))]
        return "\n".join(stacks) or "It does not answer."

    def _stacks(self, pid: int) -> str:
        return read_tail(self.work / f"{_STACKS}{pid}.txt", 8000)

    def _innermost_frames(self) -> str:
        """Return the innermost frame of the worker's main thread, from the stacks that it wrote."""
        main_thread = self._stacks(self.pid).rpartition("(most recent call first):")[2]  # faulthandler writes it last
        frames = (line.strip() for line in main_thread.splitlines())
        return next((frame for frame in frames if frame.startswith("File ")), "it waits")


def write_stacks_on_request(work: Path) -> None:
    """Let the launcher ask this process for the stacks of its threads, by SIGUSR1. They go to a file in the work folder."""
    with contextlib.suppress(OSError):  # a full disk: there are no stacks then
        file = (work / f"{_STACKS}{os.getpid()}.txt").open("w", encoding="utf-8")
        faulthandler.register(signal.SIGUSR1, file=file, all_threads=True)


def remove_stacks(work: Path) -> None:
    """Remove the stacks of earlier attempts."""
    for path in work.glob(f"{_STACKS}*.txt"):
        path.unlink(missing_ok=True)


def _is_progress(before: _Sample, now: _Sample, seconds: float) -> bool:
    if now.files != before.files:
        return True
    if now.stopped:  # the others may take processor time while they wait for it
        return False
    return _is_output(before, now) or now.cpu_seconds - before.cpu_seconds > _CPU_SHARE * seconds + 0.05


def _is_output(before: _Sample, now: _Sample) -> bool:
    """Tell whether there was a sign of progress other than processor time."""
    return now.files != before.files or now.pids != before.pids or now.io_bytes - before.io_bytes > _IO_BYTES


def _describe(sample: _Sample) -> str:
    if not sample.stopped:
        return ""
    pids = " ".join(map(str, sorted(sample.stopped)))
    return f"process {pids} is stopped by a signal (state T) and cannot answer; `kill -CONT {pids}` lets it continue"


def _tree(pid: int) -> list[psutil.Process]:
    """Return a process and its descendants: torchrun's ranks have process groups of their own."""
    import psutil

    try:
        process = psutil.Process(pid)
        return [process, *process.children(recursive=True)]
    except psutil.Error:
        return []


def _stamp(path: Path) -> tuple[int, int]:
    try:
        found = path.stat()
    except OSError:
        return (0, 0)
    return (found.st_size, found.st_mtime_ns)


def _catches(pid: int, number: int) -> bool:
    """Tell whether a process has a handler for a signal, which would end it otherwise. Linux only."""
    try:
        status = Path(f"/proc/{pid}/status").read_text(encoding="utf-8")
    except OSError:
        return False
    mask = next((line.split()[1] for line in status.splitlines() if line.startswith("SigCgt:")), "0")
    return bool(int(mask, 16) >> (number - 1) & 1)
