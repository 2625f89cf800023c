"""The runtime of a job: the settings that decide only where and how a stage runs."""

from typing import Literal, Self

from pydantic import JsonValue, SerializerFunctionWrapHandler, model_serializer

from loraflow.config.locations import Origin
from loraflow.config.recipe import Recipe
from loraflow.config.runtime import Runtime
from loraflow.config.stage_configs import RecipeContext, TrainConfig
from loraflow.config.training import BestCheckpoint, TrainerSettings, UnfingerprintedTraining
from loraflow.frozen import FrozenModel, Positive


class JobTrainingRuntime(UnfingerprintedTraining, BestCheckpoint):
    """The part of training_config that is not in a train job's fingerprint."""


class JobRuntime(Runtime):
    """Where and how a job runs: the recipe's runtime, and further settings of some stages."""

    training_config: JobTrainingRuntime | None = None  # train only
    use_cache: bool = False  # train only: base.use_cache
    origin: Origin | None = None  # version_dataset and resolve_base: where files are read from
    chat_template: str | None = None  # resolve_base only: the text of base.chat_template

    @model_serializer(mode="wrap")
    def _without_absent(self, handler: SerializerFunctionWrapHandler) -> dict[str, JsonValue]:
        """Leave out the fields that this stage does not use, because manifests record the runtime."""
        absent = {"training_config", "use_cache", "origin", "chat_template"} - self.model_fields_set
        return {name: value for name, value in handler(self).items() if name not in absent}

    @classmethod
    def from_recipe(cls, recipe: Recipe, context: RecipeContext) -> Self:
        """Return the runtime of a stage that needs only the recipe's runtime."""
        return cls.model_validate(recipe.runtime.model_dump())

    @classmethod
    def of_training(cls, recipe: Recipe, context: RecipeContext) -> Self:
        """Return the runtime of the train stage."""
        training = recipe.training_config
        fields = set(UnfingerprintedTraining.model_fields)
        if not training.load_best_model_at_end:
            fields |= set(BestCheckpoint.model_fields)
        values = {"training_config": training.model_dump(include=fields), "use_cache": recipe.base.use_cache}
        return cls.model_validate({**recipe.runtime.model_dump(), **values})

    @classmethod
    def of_dataset(cls, recipe: Recipe, context: RecipeContext) -> Self:
        """Return the runtime of the stage that reads the dataset's files."""
        return cls.model_validate({**recipe.runtime.model_dump(), "origin": context.dataset.origin.model_dump()})

    @classmethod
    def of_general(cls, recipe: Recipe, context: RecipeContext) -> Self:
        """Return the runtime of the stage that reads the general rows."""
        origin = {} if context.general is None else {"origin": context.general.origin.model_dump()}
        return cls.model_validate({**recipe.runtime.model_dump(), **origin})

    @classmethod
    def of_base(cls, recipe: Recipe, context: RecipeContext) -> Self:
        """Return the runtime of the stage that reads the base model's files."""
        values = {**recipe.runtime.model_dump(), "origin": context.base.origin.model_dump()}
        if context.base.chat_template is not None:
            values["chat_template"] = context.base.chat_template
        return cls.model_validate(values)

    def trainer_settings(self, config: TrainConfig) -> TrainerSettings:
        """Return the settings of the trainer: those of the train stage's config and those of this runtime.

        Raises:
            ValueError: this runtime has no training_config.
        """
        if self.training_config is None:
            raise ValueError("a train job needs runtime.training_config")
        identity = config.training_config.model_dump(exclude_unset=True, exclude={"global_batch"})
        return TrainerSettings.model_validate({**self.training_config.model_dump(exclude_unset=True), **identity})


class RetryWith(FrozenModel):
    """Runtime settings that need less memory and give the same result: what a stage proposes when memory runs out."""

    micro_batch: Positive | None = None
    micro_tokens: Positive | None = None
    checkpointing: Literal["full"] | None = None

    def changes(self) -> dict[str, int | str]:
        """Return the settings to change; empty if the stage cannot run with less memory."""
        return self.model_dump(exclude_none=True)
