"""Build the job of one stage for tests and benchmarks, with a made-up dataset and base."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from loraflow.config import Recipe
from loraflow.config.locations import BaseLocation, DatasetLocation, FolderOrigin, GgufOrigin, HubOrigin
from loraflow.config.stage_configs import StageConfig, TrainConfig
from loraflow.execution import workspace
from loraflow.job import Job
from loraflow.stages import STAGES
from loraflow.store import Ref
from loraflow.store.files import hash_file

DATASET = DatasetLocation(md5="1" * 32, name="data", origin=FolderOrigin(folder="data"))
BASE = BaseLocation(source={}, origin=FolderOrigin(folder="base"))


@dataclass(frozen=True)
class Outside:
    """The dataset, base model and metric modules that a recipe is resolved against."""

    dataset: DatasetLocation = DATASET
    base: BaseLocation = BASE
    metric_modules: dict[str, str] = field(default_factory=dict)
    general: DatasetLocation | None = None
    dealt: frozenset[str] | None = None
    grouped: tuple[TrainConfig, ...] = ()


def from_gguf(file: str) -> Outside:
    """Return surroundings whose base model is a GGUF file."""
    return Outside(base=BaseLocation(source={"gguf": hash_file(Path(file))}, origin=GgufOrigin(gguf=file)))


def from_hub(model: str, commit: str) -> Outside:
    """Return surroundings whose base model is a commit on the hub."""
    source = {"hub": model, "commit": commit}
    return Outside(base=BaseLocation(source=source, origin=HubOrigin(hub=model, commit=commit)))


def make_job(
    stage: str, recipe: Recipe, inputs: Mapping[str, Ref] | None = None, outside: Outside | None = None
) -> Job[StageConfig]:
    """Return the job of the stage with this name."""
    return workspace.make_job(STAGES[stage], recipe, outside or Outside(), inputs or {})
