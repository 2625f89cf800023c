"""A job: one stage to run, as a value and as a JSON file that a worker runs by hand."""

from __future__ import annotations

import json
import time
from functools import cached_property
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict

from loraflow import identity
from loraflow.store import Ref


class Job(BaseModel):
    """Stage, version, inputs, config slice; apart from those, and out of identity, runtime.

    `inputs` are refs; `facets` says on which part of an input the stage depends, where that is not the whole.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    stage: str
    version: int
    inputs: dict[str, Ref] = {}
    facets: dict[str, str] = {}
    config: dict[str, Any] = {}
    runtime: dict[str, Any] = {}

    @property
    def payload(self) -> dict[str, Any]:
        """What the fingerprint is taken over."""
        digests = {name: ref.identity(self.facets.get(name)) for name, ref in self.inputs.items()}
        return identity.payload(self.stage, self.version, digests, self.config)

    @cached_property
    def fingerprint(self) -> str:
        """The job's identity."""
        return identity.fingerprint(self.payload)

    @property
    def short(self) -> str:
        """The part of the fingerprint that people are shown."""
        return identity.short(self.fingerprint)


class Inputs:
    """A stage's input artifacts as folders."""

    def __init__(self, folders: dict[str, Path]):
        self._folders = folders

    def __getitem__(self, name: str) -> Path:
        return self._folders[name]

    def __contains__(self, name: str) -> bool:
        return name in self._folders


class Progress:
    """Where a stage says how far it is: a line of JSON each, in a file that the launcher follows."""

    def __init__(self, path: Path | None = None, work: Path | None = None):
        self.path = path
        self.work = work  # a folder that outlives the attempt: checkpoints, finished parts

    def __call__(self, **figures: Any) -> None:
        """Report figures, such as `step=3, total=50, loss=1.2`."""
        if self.path is not None:
            with self.path.open("a", encoding="utf-8") as file:
                file.write(json.dumps({"time": time.time(), **figures}) + "\n")
