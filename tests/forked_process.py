"""Child processes that a test kills, forked from a server that has imported the modules but computed nothing.

A fork of the test's own process would wait forever for the threads that torch computed with. A spawned child would
import torch, transformers, trl and peft again, which takes ten seconds.
"""

from __future__ import annotations

import multiprocessing
from collections.abc import Callable
from typing import TypeVarTuple

Ts = TypeVarTuple("Ts")
_FORKS = multiprocessing.get_context("forkserver")
_FORKS.set_forkserver_preload(["tests.unit.training.test_training", "loraflow.training.trainer", "loraflow.adapters.loralib.model",
                               "loraflow.adapters.variants", "loraflow.adapters.merge_folders", "loraflow.serving.predict", "peft"])  # fmt: skip


def run_in_fork(target: Callable[[*Ts], None], *args: *Ts, seconds: float = 120) -> int | None:
    """Run a function in a child process. Return its exit code, or None if it was killed after the time limit."""
    child = _FORKS.Process(target=target, args=args)
    child.start()
    child.join(seconds)
    code = child.exitcode
    if code is None:
        child.kill()
        child.join()
    return code
