"""The config of each stage, built from the recipe.

A stage's config has the settings that decide its result. All fields that are set are part of the fingerprint. A field that
does not matter for a job is left unset, not null, so that a new field does not change existing fingerprints.
`loraflow.config.job_runtime` has the settings that decide only where and how a stage runs.
"""

from __future__ import annotations

import hashlib
from collections.abc import Set
from typing import Annotated, Any, Literal, Protocol, Self

from pydantic import Field, JsonValue

from loraflow.config.data import ProfileCheckName, ProfileRule, read_tools_file
from loraflow.config.data_sources import RowFormat, source_settings
from loraflow.config.locations import BaseLocation, DatasetLocation, SourcesOrigin
from loraflow.config.lora import LoralibConfig, PeftConfig
from loraflow.config.recipe import Recipe
from loraflow.config.training import BestCheckpoint, TrainingMath
from loraflow.frozen import Dtype, FrozenModel, Positive, Share


class RecipeContext(Protocol):
    """The facts beyond the recipe that configs need. Each property is computed when it is first read."""

    @property
    def dataset(self) -> DatasetLocation:
        """The dataset."""

    @property
    def base(self) -> BaseLocation:
        """The base model."""

    @property
    def metric_modules(self) -> dict[str, str]:
        """The hash of each metric's module, by name."""

    @property
    def general(self) -> DatasetLocation | None:
        """The file of evaluation.general; None if the recipe names none."""

    @property
    def dealt(self) -> Set[str] | None:
        """The keys of the held-out rows that models are scored on; None if none were dealt (data.heldout_reserve)."""

    @property
    def grouped(self) -> tuple[TrainConfig, ...]:
        """The trainings of the trials of a sweep that are trained together; empty if none are."""


class StageConfig(FrozenModel):
    """The base of all stage configs."""

    def identity(self) -> dict[str, JsonValue]:
        """Return the fields that were set, as JSON values: the config's part of a fingerprint's payload."""
        values: dict[str, JsonValue] = self.model_dump(mode="json", exclude_unset=True)
        return values

    @classmethod
    def of(cls, values: dict[str, Any]) -> Self:
        """Return the validated config. Each of the values becomes part of the fingerprint."""
        return cls.model_validate(values)

    @classmethod
    def from_recipe(cls, recipe: Recipe, context: RecipeContext) -> Self:
        """Return the stage's config for a recipe. This default is for a stage that needs nothing from the recipe."""
        return cls.of({})


class VersionDatasetConfig(StageConfig):
    """Config of version_dataset."""

    md5: str
    name: str | None = None  # a folder's md5 covers its files' names; a single file's does not
    # {source: {file, or "" for a folder: md5}}; set only if the recipe has some
    sources: dict[str, dict[str, str]] = {}

    @classmethod
    def from_recipe(cls, recipe: Recipe, context: RecipeContext) -> Self:
        """See `StageConfig.from_recipe`."""
        dataset = context.dataset
        if isinstance(dataset.origin, SourcesOrigin):
            parts = {name: {part.path: part.md5 for part in parts} for name, parts in dataset.origin.sources.items()}
            return cls.of({"md5": dataset.md5, "sources": parts})
        return cls.of({"md5": dataset.md5} | ({} if dataset.md5.endswith(".dir") else {"name": dataset.name}))


class SourceConfig(FrozenModel):
    """How the rows of a source are read and used."""

    name: str
    files: list[str] = ["*"]
    query: str | None = None
    weight: float = 1.0
    limit: Positive | None = None
    format: RowFormat = "auto"
    columns: dict[str, str] = {}
    ignore: list[str] = []
    split: Literal["train", "heldout"] | None = None


class CheckDatasetConfig(StageConfig):
    """Config of check_dataset."""

    format: RowFormat
    columns: dict[str, str]
    train: list[str]
    heldout: list[str]
    extra_heldout: dict[str, str]
    validation_fraction: Share
    system: str | None
    duplicates: Literal["drop", "keep"]
    limit: Positive | None
    heldout_fraction: Share = 0.0  # set only if no file is held out
    seed: int = 0  # set only if rows are split or sampled by their hash
    thinking: Literal["strip"] | None = None  # set only if reasoning is removed from the rows
    group: str | None = None  # set only if rows have groups
    near_duplicates: Literal["report", "drop"] | None = None  # set only if near-duplicates are searched
    tools: list[JsonValue] | None = None  # the content of data.tools; set only if the recipe names it
    profile: dict[ProfileCheckName, ProfileRule] = {}  # set only if the recipe has checks
    sources: list[SourceConfig] = []  # set only if the recipe has sources
    ignore: list[str] = []  # set only if the recipe ignores keys
    heldout_fields: list[str] = []  # set only if rows are divided by their fields

    @classmethod
    def from_recipe(cls, recipe: Recipe, context: RecipeContext) -> Self:
        """See `StageConfig.from_recipe`."""
        data = recipe.data
        fields = {"format", "columns", "train", "heldout", "extra_heldout", "validation_fraction", "system"}
        fields |= {"duplicates", "limit"}
        is_held_out = bool(data.heldout) or any(source.split == "heldout" for source in data.sources)
        if not is_held_out:
            fields.add("heldout_fraction")
        if not is_held_out or data.validation_fraction or data.sources or (data.limit and data.seed):
            fields.add("seed")
        if data.group is not None:
            fields.add("group")
        if data.ignore:
            fields.add("ignore")
        values = data.model_dump(include=fields)
        if data.thinking in ("strip", "empty"):
            values["thinking"] = "strip"
        if data.near_duplicates != "off":  # refuse computes the same as drop: the run compares the report with it
            values["near_duplicates"] = "report" if data.near_duplicates == "report" else "drop"
        if data.profile:
            values["profile"] = {name: rule.model_dump(exclude_none=True) for name, rule in data.profile.items()}
        if data.tools is not None:
            values["tools"] = read_tools_file(data.tools)
        if data.sources:
            values["sources"] = [source_settings(source) for source in data.sources]
        if recipe.slice_fields:
            values["heldout_fields"] = list(recipe.slice_fields)
        return cls.of(values)


class ResolveBaseConfig(StageConfig):
    """Config of resolve_base."""

    source: dict[str, str]
    repack: Literal["phi3"] | None
    trust_remote_code: bool
    dtype: Dtype | None = None  # set only if the weights are repacked, and so converted
    chat_template: str | None = None  # sha256 of the recipe's template; set only if it names one
    thinking: Literal["empty"] | None = None  # set only if the template is fixed not to think

    @classmethod
    def from_recipe(cls, recipe: Recipe, context: RecipeContext) -> Self:
        """See `StageConfig.from_recipe`."""
        base = recipe.base
        values = {
            "source": context.base.source,
            "repack": base.repack,
            "trust_remote_code": base.trust_remote_code,
        }
        used: dict[str, str] = {"dtype": base.dtype} if base.repack else {}
        if (template := context.base.chat_template) is not None:
            used["chat_template"] = hashlib.sha256(template.encode()).hexdigest()
        if recipe.data.thinking == "empty":
            used["thinking"] = "empty"
        return cls.of({**values, **used})


class TokenizeConfig(StageConfig):
    """Config of tokenize."""

    loss_on: Literal["assistant", "last_assistant", "all"]
    too_long: Literal["error", "drop", "truncate"]
    special_tokens: Literal["error", "drop", "allow"]
    max_length: Positive
    packing: bool
    thinking: Literal["keep"] | None = None  # set only if answers whose reasoning is cut are context

    @classmethod
    def from_recipe(cls, recipe: Recipe, context: RecipeContext) -> Self:
        """See `StageConfig.from_recipe`."""
        data, training = recipe.data, recipe.training_config
        return cls.of(
            ({"thinking": "keep"} if data.thinking == "keep" else {})
            | {
                "loss_on": data.loss_on,
                "too_long": data.too_long,
                "special_tokens": data.special_tokens,
                "max_length": training.max_length,
                "packing": training.packing,
            }
        )


class FingerprintedTraining(TrainingMath, BestCheckpoint):
    """The part of training_config that determines the adapter."""

    global_batch: Positive
    # A recipe's default is the integer 1. It stays an integer, since training.json is part of the adapter's digest.
    num_train_epochs: Annotated[int | float, Field(gt=0)] = 1
    # Set only with load_best_model_at_end: they decide which checkpoints are candidates, and their measured loss.
    save_steps: Positive | None = None
    per_device_eval_batch_size: Positive | None = None


class FrozenBaseConfig(FrozenModel):
    """The part of `base` that decides what training computes."""

    dtype: Dtype
    quantization: Literal["nf4", "fp8"] | None
    trust_remote_code: bool
    double_quantization: bool = False  # set only with quantization


class TrainedPeftConfig(PeftConfig):
    """The recipe's peft_config, with integers left as they are: adapter_config.json is part of the adapter's digest."""

    lora_alpha: Annotated[int | float, Field(gt=0)] = 32


class TrainConfig(StageConfig):
    """Config of train."""

    method: Literal["peft", "loralib"]
    training_config: FingerprintedTraining
    peft_config: TrainedPeftConfig
    loralib_config: LoralibConfig = LoralibConfig()  # set only with method: loralib
    base: FrozenBaseConfig
    # How validation losses are computed; set only with load_best_model_at_end, where they choose the checkpoint.
    validation_loss: Literal["mean over tokens"] | None = None
    # How large NEFTune's noise is; set only with neftune_noise_alpha. Earlier results depended on the micro-batch.
    noise: Literal["by document"] | None = None

    @classmethod
    def from_recipe(cls, recipe: Recipe, context: RecipeContext) -> Self:
        """See `StageConfig.from_recipe`."""
        training, base = recipe.training_config, recipe.base
        fields = set(TrainingMath.model_fields)
        if training.load_best_model_at_end:
            fields |= {*BestCheckpoint.model_fields, "save_steps", "per_device_eval_batch_size"}
        identity = training.model_dump(include=fields)
        if training.load_best_model_at_end and training.eval_strategy == "steps" and training.eval_steps is None:
            identity["eval_steps"] = training.logging_steps  # what transformers falls back to
        base_fields = {"dtype", "quantization", "trust_remote_code"}
        values: dict[str, Any] = {
            "method": recipe.method,
            "training_config": {**identity, "global_batch": training.global_batch},
            # Set only if it is used, so that the fingerprints of other recipes stay.
            "peft_config": recipe.peft_config.model_dump(
                exclude=set() if recipe.peft_config.target_parameters else {"target_parameters"}
            ),
            "base": base.model_dump(include=base_fields | ({"double_quantization"} if base.quantization else set())),
        }
        if training.load_best_model_at_end:
            values["validation_loss"] = "mean over tokens"
        if training.neftune_noise_alpha is not None:
            values["noise"] = "by document"
        if recipe.method == "loralib":
            values["loralib_config"] = recipe.loralib_config.model_dump()
        return cls.of(values)


class TrainGroupConfig(StageConfig):
    """Config of train_group: that of each trial's training, in the order of the group."""

    trials: list[TrainConfig] = []  # unset before a sweep has made groups

    @classmethod
    def from_recipe(cls, recipe: Recipe, context: RecipeContext) -> Self:
        """See `StageConfig.from_recipe`. Which trials a group has is not in a recipe."""
        return cls.of({"trials": [trial.identity() for trial in context.grouped]} if context.grouped else {})


class Nf4Config(FrozenModel):
    """The settings of NF4 quantization."""

    dtype: Dtype
    double: bool


class MergeNf4Config(Nf4Config):
    """How an adapter that was trained on NF4 weights is merged."""

    onto: Literal["auto", "base", "dequantized"]
    trust: bool


class MergeConfig(StageConfig):
    """Config of merge."""

    dtype: Dtype | None
    max_shard_size_gb: float
    nf4: MergeNf4Config | None = None  # set only with base.quantization: nf4

    @classmethod
    def from_recipe(cls, recipe: Recipe, context: RecipeContext) -> Self:
        """See `StageConfig.from_recipe`."""
        values = recipe.merge.model_dump(include={"dtype", "max_shard_size_gb"})
        if recipe.base.quantization == "nf4":
            values["nf4"] = {**_nf4(recipe), "onto": recipe.merge.onto, "trust": recipe.base.trust_remote_code}
        return cls.of(values)


class VerifyConfig(StageConfig):
    """Config of verify."""

    prompts: Positive
    trust_remote_code: bool
    nf4: Nf4Config | None = None  # set only with base.quantization: nf4

    @classmethod
    def from_recipe(cls, recipe: Recipe, context: RecipeContext) -> Self:
        """See `StageConfig.from_recipe`."""
        values = {"prompts": recipe.merge.verify_prompts, "trust_remote_code": recipe.base.trust_remote_code}
        return cls.of({**values, "nf4": _nf4(recipe)} if recipe.base.quantization == "nf4" else values)


class DealRowsConfig(StageConfig):
    """Config of deal_rows."""

    keys: list[str] | None = None  # keys of the rows of the gate's set, sorted; unset before rows are dealt

    @classmethod
    def from_recipe(cls, recipe: Recipe, context: RecipeContext) -> Self:
        """See `StageConfig.from_recipe`."""
        return cls.of({} if context.dealt is None else {"keys": sorted(context.dealt)})


class EvaluateConfig(StageConfig):
    """Config of evaluate."""

    metrics: list[str]
    max_rows: Positive | None
    max_new_tokens: Positive
    dtype: Dtype
    confidence: float
    seed: int
    trust_remote_code: bool
    modules: dict[str, str]  # the hash of each metric's module

    @classmethod
    def from_recipe(cls, recipe: Recipe, context: RecipeContext) -> Self:
        """See `StageConfig.from_recipe`."""
        values = recipe.evaluation.model_dump(exclude={"samples", "slices", "general"})
        trust = recipe.base.trust_remote_code
        return cls.of({**values, "trust_remote_code": trust, "modules": context.metric_modules})


class CheckGeneralConfig(StageConfig):
    """Config of check_general."""

    md5: str | None = None  # set only if the recipe names a file
    name: str | None = None  # the file's name

    @classmethod
    def from_recipe(cls, recipe: Recipe, context: RecipeContext) -> Self:
        """See `StageConfig.from_recipe`."""
        found = context.general
        return cls.of({} if found is None else {"md5": found.md5, "name": found.name})


class ScoreGeneralConfig(StageConfig):
    """Config of score_general. Nothing is set if the recipe names no general rows."""

    dtype: Dtype = "float32"
    confidence: float = 0.95
    seed: int = 0
    trust_remote_code: bool = False

    @classmethod
    def from_recipe(cls, recipe: Recipe, context: RecipeContext) -> Self:
        """See `StageConfig.from_recipe`."""
        if recipe.evaluation.general is None:
            return cls.of({})
        values = recipe.evaluation.model_dump(include={"dtype", "confidence", "seed"})
        return cls.of({**values, "trust_remote_code": recipe.base.trust_remote_code})


def _nf4(recipe: Recipe) -> dict[str, str | bool]:
    return {"dtype": recipe.base.dtype, "double": recipe.base.double_quantization}
