"""A job: a stage with its inputs, config and runtime. `Inputs` and `Progress` are what the stage's `run` gets with it."""

from __future__ import annotations

import json
import time
from collections.abc import Mapping
from functools import cached_property
from pathlib import Path
from typing import Any, Generic, TypeVar

from pydantic import BaseModel, ConfigDict, JsonValue, SerializeAsAny, field_serializer, model_validator

from loraflow import identity
from loraflow.config.job_runtime import JobRuntime
from loraflow.config.stage_configs import StageConfig
from loraflow.stages import STAGES
from loraflow.store import Ref

MEMORY_ESTIMATE = "memory-estimate.json"  # in the work folder
C = TypeVar("C", bound=StageConfig, covariant=True)  # a job is frozen


class Job(BaseModel, Generic[C]):
    """A stage, its inputs and its config, which make up the fingerprint; and its runtime, which does not.

    `inputs` are refs; `facets` names the part of an input that the stage depends on, if it does not depend on all of it.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    stage: str
    version: int
    inputs: dict[str, Ref] = {}
    facets: dict[str, str] = {}
    config: SerializeAsAny[C]
    runtime: JobRuntime = JobRuntime()

    @model_validator(mode="before")
    @classmethod
    def _config_of_the_stage(cls, values: dict[str, Any]) -> dict[str, Any]:
        """Validate the config by the stage's own class: a job may come from a file or from another machine."""
        config, stage = values.get("config", {}), STAGES.get(values.get("stage", ""))
        if stage is not None and isinstance(config, Mapping):
            return {**values, "config": stage.config.model_validate(dict(config))}
        return values

    @field_serializer("config")
    def _only_set_fields(self, config: StageConfig) -> dict[str, JsonValue]:
        return config.identity()

    @property
    def payload(self) -> dict[str, JsonValue]:
        """The values that the fingerprint hashes."""
        digests = {name: ref.identity(self.facets.get(name)) for name, ref in self.inputs.items()}
        return identity.payload(self.stage, self.version, digests, self.config.identity())

    @cached_property
    def fingerprint(self) -> str:
        """The job's identity."""
        return identity.fingerprint(self.payload)

    @property
    def short(self) -> str:
        """The first characters of the fingerprint, for messages."""
        return identity.short(self.fingerprint)

    @property
    def pool(self) -> str | None:
        """The name of the deployment `stage/<name>` that runs the job, from runtime.placement; None is this machine."""
        return next((pool for stage, pool in self.runtime.placement.items() if stage == self.stage), None)

    def with_runtime(self, **changes: JsonValue) -> Job[C]:
        """Return the same job with other runtime settings. Its fingerprint stays."""
        return self.model_copy(update={"runtime": self.runtime.model_copy(update=changes)})


class Inputs:
    """A stage's input artifacts as folders, by the names that the stage table gives them."""

    def __init__(self, folders: Mapping[str, Path]):
        self._folders = folders

    def __getitem__(self, name: str) -> Path:
        return self._folders[name]

    def __contains__(self, name: str) -> bool:
        return name in self._folders


class Progress:
    """Reports the progress of a stage as lines of JSON, in a file that the launcher reads.

    Args:
        path: the file; None reports nothing.
        work: the work folder, which outlives the attempt: for checkpoints and finished parts.
    """

    def __init__(self, path: Path | None = None, work: Path | None = None):
        self.path = path
        self.work = work

    def __call__(self, **figures: JsonValue) -> None:
        """Report figures, such as `step=3, total=50, loss=1.2`."""
        if self.path is not None:
            with self.path.open("a", encoding="utf-8") as file:
                file.write(json.dumps({"time": time.time(), **figures}) + "\n")

    def expect_memory(self, parts: Mapping[str, int]) -> None:
        """Record how much memory the stage expects to need, in bytes by part. The manifest has it beside the peak."""
        if self.work is not None:
            (self.work / MEMORY_ESTIMATE).write_text(json.dumps(dict(parts)), encoding="utf-8")
