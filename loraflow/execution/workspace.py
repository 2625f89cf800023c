"""A recipe together with the store, promotion log, dataset and base model that it names; and the results of its run."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Set
from dataclasses import dataclass, field
from functools import cached_property

from loraflow.config import Recipe
from loraflow.config.locations import BaseLocation, DatasetLocation
from loraflow.config.stage_configs import RecipeContext, StageConfig, TrainConfig
from loraflow.evaluation.values import Decision
from loraflow.failures import Failure
from loraflow.job import Job
from loraflow.registry import Entry, PromotionLog
from loraflow.registry.looks import LookRecord
from loraflow.registry.rebuild import how_to_restore_champion
from loraflow.registry.reserve import ReserveState
from loraflow.stages import MERGE, Stage
from loraflow.store import Ref, open_store
from loraflow.store.files import HashMemo


class Workspace:
    """Builds a recipe's jobs. Dataset, base and metrics are looked up once, when they are first needed."""

    def __init__(self, recipe: Recipe):
        self.recipe = recipe
        self.store = open_store(recipe.runtime.store)
        self.log = PromotionLog(self.store, recipe.register_.model)
        self.looks = LookRecord(self.store, recipe.register_.model)
        self.memo = HashMemo(self.store.scratch / "hashes.json")
        self.seen_head: Entry | None = None  # the promotion log's head at the last call of `champion`
        self.dealt: Set[str] | None = None  # keys of the held-out rows that models are scored on (`execution/deal.py`)
        self.grouped: tuple[TrainConfig, ...] = ()  # trials that are trained together (`execution/trial_groups.py`)
        self.reserve: ReserveState | None = None  # what was left of data.heldout_reserve then

    @cached_property
    def dataset(self) -> DatasetLocation:
        """The dataset. Uncommitted changes in the work tree are refused here, before every run."""
        from loraflow.data.versions.version import locate

        return locate(self.recipe.data, self.memo)

    @cached_property
    def general(self) -> DatasetLocation | None:
        """The file of evaluation.general, which is located as a dataset is; None if the recipe names none."""
        source = self.recipe.evaluation.general
        if source is None:
            return None
        from loraflow.data.checks.general import locate_general

        return locate_general(source, self.memo)

    @cached_property
    def base(self) -> BaseLocation:
        """The base model."""
        from loraflow.base.resolve import locate

        return locate(self.recipe.base, self.memo)

    @cached_property
    def metric_modules(self) -> dict[str, str]:
        """The hash of each metric's module, by name."""
        from loraflow.evaluation.metric_modules import module_hashes

        return module_hashes(self.recipe.evaluation.metrics, self.memo)

    def with_recipe(self, recipe: Recipe) -> Workspace:
        """Return the workspace of a variant of the recipe. What both name in the same way is looked up only once."""
        own = self.recipe
        if recipe.runtime.store != own.runtime.store or recipe.register_ != own.register_:
            return Workspace(recipe)
        other = copy.copy(self)
        other.recipe = recipe
        is_equal = {
            "dataset": recipe.data == own.data,
            "general": recipe.evaluation.general == own.evaluation.general,
            "base": recipe.base == own.base,
            "metric_modules": recipe.evaluation == own.evaluation,
        }
        for name, value in vars(Workspace).items():
            if isinstance(value, cached_property) and not is_equal.get(name, False):
                other.__dict__.pop(name, None)  # where cached_property keeps its value
        return other

    def with_group(self, grouped: tuple[TrainConfig, ...]) -> Workspace:
        """Return the workspace of a group of trials, for the job of train_group."""
        other = copy.copy(self)
        other.grouped = grouped
        return other

    def job(self, stage: Stage, inputs: Mapping[str, Ref], seed: int | None = None) -> Job[StageConfig]:
        """Return the job of a stage; with `seed`, for another training seed than the recipe's."""
        recipe = self.recipe if seed is None else self.recipe.with_seed(seed)
        return make_job(stage, recipe, self, inputs)

    def champion(self) -> Ref | None:
        """Return the champion's merged model, and remember the log's head: the gate decides against that champion.

        Raises:
            Failure: its artifact is missing or damaged. A model must be compared with the champion before it is promoted.
        """
        self.seen_head = self.log.head()
        if self.seen_head is None:
            return None
        merged = self.seen_head.merged
        if self.store.find(MERGE.name, merged.fingerprint) != merged and self.store.check(merged):
            raise Failure(
                "The champion's model is missing or damaged, so nothing can be compared with it.",
                where=self.store.location(merged),
                next_step=how_to_restore_champion(self.store, merged),
            )
        return merged

    def save(self) -> None:
        """Save the file hashes that were computed, for the next run."""
        self.memo.save()


def make_job(stage: Stage, recipe: Recipe, context: RecipeContext, inputs: Mapping[str, Ref]) -> Job[StageConfig]:
    """Return the job of a stage for a recipe.

    Raises:
        TypeError: the inputs are not those of the stage table.
    """
    required = {name for name, given in stage.inputs.items() if not given.optional}
    if not required <= inputs.keys() <= stage.inputs.keys():
        raise TypeError(f"{stage.name} takes {sorted(stage.inputs)}, got {sorted(inputs)}")
    return Job[StageConfig](
        stage=stage.name,
        version=stage.version,
        inputs=dict(inputs),
        facets={name: given.part for name, given in stage.inputs.items() if given.part is not None and name in inputs},
        config=stage.config.from_recipe(recipe, context),
        runtime=stage.runtime(recipe, context),
    )


@dataclass(frozen=True)
class SeedResult:
    """The artifacts of a further training seed."""

    seed: int
    adapter: Ref
    merged: Ref
    scores: Ref


@dataclass(frozen=True)
class PipelineResult:
    """The artifacts of a run."""

    dataset: Ref
    rows: Ref
    base: Ref
    tokens: Ref
    adapter: Ref
    merged: Ref
    verified: Ref
    base_scores: Ref
    tuned_scores: Ref
    champion_scores: Ref | None  # None if there is no champion yet
    further_seeds: tuple[SeedResult, ...] = ()  # by gate.seeds
    general: Mapping[str, Ref] = field(default_factory=dict)  # {base, tuned, champion: scores on general rows}


@dataclass(frozen=True)
class Registration:
    """A decision, and the number of its entry in the promotion log if a model was promoted."""

    decision: Decision
    entry: int | None = None
