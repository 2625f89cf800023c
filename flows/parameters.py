"""The run form: what a person sees and fills in before a run, in Prefect's UI.

The form is short. Whatever else a recipe holds is changed in the recipe, or through `settings` by its dotted key.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, SerializerFunctionWrapHandler, model_serializer
from pydantic.annotated_handlers import GetJsonSchemaHandler
from pydantic_core import CoreSchema

StageName = Literal[
    "version_dataset", "check_dataset", "resolve_base", "tokenize", "train", "merge", "verify", "evaluate"
]


class RecipeChoice:
    """Shows a text field as a choice among the recipes of `configs/`, or a path."""

    def __get_pydantic_json_schema__(self, core_schema: CoreSchema, handler: GetJsonSchemaHandler) -> dict[str, Any]:
        """Return the schema, with the recipes that are there now: at deploy time."""
        names = sorted(path.stem for path in Path("configs").glob("*.yaml"))
        path = {"title": "A path", "type": "string", "minLength": 1}
        return {"anyOf": [{"title": "From configs/", "type": "string", "enum": names}, path]} if names else path


RecipeName = Annotated[str, RecipeChoice()]
NO_STAGES: list[StageName] = []
Settings = dict[str, Any]  # dotted keys of the recipe and their values; JsonValue would show no form in the UI
NO_SETTINGS: Settings = {}


class _Empty:
    """Shows a field that may stay empty as one box, where `X | None` would be shown as two tabs."""

    def __get_pydantic_json_schema__(self, core_schema: CoreSchema, handler: GetJsonSchemaHandler) -> dict[str, Any]:
        """Return the schema without null; a form that leaves a field empty does not send it."""
        (shown,) = [one for one in handler(core_schema)["anyOf"] if one != {"type": "null"}]
        return shown


class _Decimal:
    """Shows a number as text: the new UI's number box takes whole numbers only (its step is 1), and nobody types 2e-4."""

    def __get_pydantic_json_schema__(self, core_schema: CoreSchema, handler: GetJsonSchemaHandler) -> dict[str, Any]:
        """Return the schema: above zero and at most one, as a decimal or with an exponent."""
        return {"type": "string", "pattern": r"^(?![0.]*$)(0?\.\d+|[1-9](\.\d+)?[eE]-0?[1-9]\d?|1(\.0*)?)$"}


MaybeInt = Annotated[int | None, _Empty()]
MaybeText = Annotated[str | None, _Empty()]


def _field(title: str, description: str, position: int, **bounds: Any) -> Any:
    def extra(schema: dict[str, Any]) -> None:
        schema.pop("default", None)  # null, which an empty box is not
        schema["position"] = position

    return Field(None, title=title, description=description, json_schema_extra=extra, **bounds)


class Overrides(BaseModel):
    """What to change for this run. What is left empty stays as the recipe says."""

    model_config = ConfigDict(frozen=True, extra="forbid", title="Changes to the recipe")

    epochs: MaybeInt = _field(
        "Epochs", "How often training reads every row. Takes the place of max_steps, too.", 0, ge=1, le=1000
    )
    learning_rate: Annotated[float | None, _Decimal()] = _field(
        "Learning rate", "Its peak, such as 2e-4 or 0.0002; LoRA bears 1e-5 to 1e-3.", 1, gt=0, le=1
    )
    rank: MaybeInt = _field("LoRA rank", "Columns of the adapter's matrices: more learn more, and cost more.", 2,
                              ge=1, le=1024)  # fmt: skip
    alpha: MaybeInt = _field("LoRA alpha", "The adapter's scale is alpha / rank.", 3, ge=1, le=4096)
    max_length: MaybeInt = _field("Longest row, in tokens", "Longer ones are treated by data.too_long.", 4,
                                    ge=8, le=1_048_576)  # fmt: skip
    dataset_rev: MaybeText = _field(
        "Dataset revision", "Git revision or branch of the .dvc file; by default the files that are there.", 5,
        min_length=1,
    )  # fmt: skip
    seed: MaybeInt = _field("Seed", "Of the adapter's start and the order of rows.", 6, ge=0, le=2**32 - 1)
    loss_on: Annotated[Literal["assistant", "last_assistant", "all"] | None, _Empty()] = _field(
        "Learn from", "Which tokens are learned: every answer, the last one of each chat, or all text.", 7
    )

    @model_serializer(mode="wrap")
    def _without_empty(self, handler: SerializerFunctionWrapHandler) -> dict[str, Any]:
        return {name: value for name, value in handler(self).items() if value is not None}

    def settings(self) -> dict[str, Any]:
        """Return the changes as {dotted key of the recipe: value}."""
        out = {_KEYS[name]: value for name, value in self if value is not None}
        if self.epochs is not None:
            out["training_config.max_steps"] = -1  # which would otherwise win over the epochs
        return out


NO_OVERRIDES = Overrides()
_KEYS = {
    "epochs": "training_config.num_train_epochs",
    "learning_rate": "training_config.learning_rate",
    "rank": "peft_config.r",
    "alpha": "peft_config.lora_alpha",
    "max_length": "training_config.max_length",
    "dataset_rev": "data.rev",
    "seed": "training_config.seed",
    "loss_on": "data.loss_on",
}
