"""Import the function that does a stage's work. Its module is imported only in the process that runs the stage."""

from __future__ import annotations

from collections.abc import Callable
from importlib import import_module
from pathlib import Path
from typing import TypeVar

from loraflow.config.stage_configs import StageConfig
from loraflow.job import Inputs, Job, Progress
from loraflow.stages import Stage
from loraflow.store import Summary

C = TypeVar("C", bound=StageConfig)


def stage_function(stage: Stage) -> Callable[[Job[C], Inputs, Path, Progress], Summary]:
    """Return `run` of a stage's module: it reads the inputs' folders and writes the artifact's files into a folder."""
    function: Callable[[Job[C], Inputs, Path, Progress], Summary] = import_module(stage.module).run
    return function
