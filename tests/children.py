"""Child processes that a test kills: forked from a server that has imported everything and computed nothing.

A fork of the test's own process would wait for ever for the threads that torch computed with; a spawned child imports
torch, transformers, trl and peft anew, ten seconds of a core.
"""

from __future__ import annotations

import multiprocessing
from collections.abc import Callable
from typing import Any

_FORKS = multiprocessing.get_context("forkserver")
_FORKS.set_forkserver_preload(["tests.unit.test_training", "loraflow.training.trainer", "loraflow.adapters.loralib.model",
                               "loraflow.adapters.variants", "loraflow.adapters.merge_folders", "loraflow.serving.predict", "peft"])  # fmt: skip


def exit_code(target: Callable[..., Any], *args: Any, seconds: float = 120) -> int | None:
    """Run a function in a child and return its exit code; None if it has not ended in time, and is killed now."""
    child = _FORKS.Process(target=target, args=args)
    child.start()
    child.join(seconds)
    code = child.exitcode
    if code is None:
        child.kill()
        child.join()
    return code
