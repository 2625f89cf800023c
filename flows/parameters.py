"""The form of a run in Prefect's UI: the parameters of the flows.

The form has the most common settings. Any other key is changed in the recipe, or through `settings` by its dotted name.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any, Literal, ParamSpec, Self, TypeVar

from prefect import Flow
from pydantic import (
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    GetCoreSchemaHandler,
    GetJsonSchemaHandler,
    JsonValue,
    SerializerFunctionWrapHandler,
    model_serializer,
    model_validator,
)
from pydantic.config import JsonDict
from pydantic.json_schema import JsonSchemaValue
from pydantic_core import CoreSchema, core_schema, to_jsonable_python

from loraflow.config.recipe_text import recipe_names
from loraflow.credentials import HAS_CREDENTIALS, mask_json, protect_output
from loraflow.stages import STAGES

P = ParamSpec("P")
R = TypeVar("R")


class MaskedFlow(Flow[P, R]):
    """A flow that is called from Python with credentials: the server is sent masked ones, the process has its own."""

    def serialize_parameters(self, parameters: dict[str, Any]) -> dict[str, Any]:
        """Return what the server stores."""
        try:
            values = to_jsonable_python(parameters)  # Prefect's own method imports fastapi, which takes 0.25 s
        except ValueError:  # a value that has no JSON form, which Prefect names by its type
            values = super().serialize_parameters(parameters)
        return {name: mask_json(value) for name, value in values.items()}

    def validate_parameters(self, parameters: dict[str, Any]) -> dict[str, Any]:
        """Return the parameters in the flow's types. Prefect logs all of them if one does not fit."""
        protect_output()
        return super().validate_parameters(parameters)

    def with_options(self, **options: Any) -> Flow[P, R]:
        """Return the flow with other options."""
        new = super().with_options(**options)
        new.__class__ = MaskedFlow  # Prefect makes a plain Flow
        return new


# Prefect looks for a decorator named `flow` in the file's syntax tree.
def flow(**options: Any) -> Callable[[Callable[P, R]], MaskedFlow[P, R]]:
    """Make a function a flow, as `prefect.flow` does."""
    return lambda function: MaskedFlow(function, **options)


class RecipeChoice:
    """Show a text field as a choice between the recipes of `configs/` and a path."""

    def __get_pydantic_json_schema__(self, core: CoreSchema, handler: GetJsonSchemaHandler) -> JsonSchemaValue:
        """Return the schema, with the recipes that exist when the flow is deployed."""
        names = recipe_names()
        path: JsonSchemaValue = {"title": "A path", "type": "string"}
        if len(names) != 1:
            path["minLength"] = 1  # an empty text is the only recipe
        return {"anyOf": [{"title": "From configs/", "type": "string", "enum": names}, path]} if names else path


class StageChoice:
    """Show a text field as a choice of one of the stages."""

    def __get_pydantic_core_schema__(self, source: type[str], handler: GetCoreSchemaHandler) -> CoreSchema:
        """Return the schema of a `Literal` of the names of all stages."""
        return core_schema.literal_schema(list(STAGES))


NO_CREDENTIALS = (
    "a text without a password or token, which the server would store: git's credential helper of the worker"
)


_REFUSE_CREDENTIALS: JsonDict = {
    "if": {"type": "string", "pattern": HAS_CREDENTIALS},
    "then": {"const": NO_CREDENTIALS},
}


class WithoutCredentials:
    """Refuse credentials in the texts of a JSON value, however deep they are.

    Prefect's server stores the parameters of a deployment's run before the flow can mask them. So it has to refuse them:
    "'a text without a password …' was expected", an answer that does not repeat the value.
    """

    def __get_pydantic_core_schema__(self, source: object, handler: GetCoreSchemaHandler) -> CoreSchema:
        """Return the schema of the value under a name, by which its own schema refers to it."""
        return core_schema.no_info_after_validator_function(
            lambda value: value, handler(source), ref=_VALUE, metadata={"pydantic_js_functions": [_value_schema]}
        )


_VALUE = "ValueWithoutCredentials"


def _value_schema(core: CoreSchema, handler: GetJsonSchemaHandler) -> JsonSchemaValue:
    value = handler(core_schema.definition_reference_schema(_VALUE))
    return {**_REFUSE_CREDENTIALS, "items": value, "patternProperties": {"": value}}


class AnyObject:
    """Show an object as a JSON editor; the schema of JsonValue itself would show no field at all."""

    def __get_pydantic_json_schema__(self, core: CoreSchema, handler: GetJsonSchemaHandler) -> JsonSchemaValue:
        """Return the schema of an object with any keys and values, but without credentials."""
        values = handler(core)["additionalProperties"]
        return {"type": "object", "additionalProperties": True, "patternProperties": {"": values}}


class OptionalField:
    """Show an optional field as one box; `X | None` would be shown as two tabs."""

    def __get_pydantic_json_schema__(self, core: CoreSchema, handler: GetJsonSchemaHandler) -> JsonSchemaValue:
        """Return the schema without null: the form does not send a field that is left empty."""
        (shown,) = [schema for schema in handler(core)["anyOf"] if schema != {"type": "null"}]
        is_free = shown.get("type") == "string" and "enum" not in shown
        return {**shown, **_REFUSE_CREDENTIALS} if is_free else {**shown}


DECIMAL = "a number above 0 and at most 1, such as 0.0002 or 2e-4"


class DecimalText:
    """Show a number as text: the number box of Prefect's new UI takes whole numbers only, so 2e-4 could not be entered."""

    def __get_pydantic_json_schema__(self, core: CoreSchema, handler: GetJsonSchemaHandler) -> JsonSchemaValue:
        """Return the schema of a number above 0 and at most 1, written as a decimal or with an exponent.

        For a wrong text, the server's answer quotes the schema. A `pattern` would show the regular expression, a `const`
        shows "'a number above 0 …' was expected". Pydantic refuses a person who enters that sentence.
        """
        pattern = r"^(?![0.,]*$)(0?[.,]\d+|[1-9]([.,]\d+)?[eE]-0?[1-9]\d?|1([.,]0*)?)$"
        return {"type": "string", "if": {"pattern": pattern}, "else": {"const": DECIMAL}}


def _in_order(schema: JsonDict) -> None:
    """Give the fields of the form their positions, and remove their defaults, so that they are empty."""
    fields = schema["properties"]
    assert isinstance(fields, dict)
    for position, field in enumerate(fields.values()):
        assert isinstance(field, dict)
        field.pop("default", None)  # an empty box is not sent at all, but a default of null would be
        field["position"] = position


def _named(value: object) -> object:
    """Replace an empty recipe by the only one of `configs/`. It is the default of the flows, as in `finetune.serve()`.

    Flows that are called from Python may also name a Path.
    """
    if value != THE_ONLY_RECIPE:
        return str(value) if isinstance(value, Path) else value
    names = recipe_names()
    if len(names) == 1:
        return names[0]
    have = f"configs/ has {', '.join(names)}" if names else f"there is no recipe in {Path('configs').absolute()}"
    raise ValueError(f'name the recipe, such as parameters={{"recipe": "{names[0] if names else "NAME"}"}}: {have}')


def _decimal_point(value: object) -> object:
    """Read a decimal comma as a point. No value of the form is above 1, so a comma never separates thousands."""
    return value.replace(",", ".") if isinstance(value, str) and value.count(",") == 1 and "." not in value else value


THE_ONLY_RECIPE = ""
RecipeName = Annotated[str, BeforeValidator(_named), RecipeChoice()]
StageName = Annotated[str, StageChoice()]
NO_STAGES: list[StageName] = []
JsonObject = Annotated[dict[str, Annotated[JsonValue, WithoutCredentials()]], AnyObject()]
Settings = JsonObject  # {dotted key of the recipe: value}
NO_SETTINGS: Settings = {}
OptionalInt = Annotated[int | None, OptionalField()]
OptionalText = Annotated[str | None, OptionalField()]
OptionalDecimal = Annotated[float | None, BeforeValidator(_decimal_point), DecimalText()]
OptionalLossOn = Annotated[Literal["assistant", "last_assistant", "all"] | None, OptionalField()]


class Overrides(BaseModel):
    """Changes for this run. An empty field keeps the recipe's value."""

    model_config = ConfigDict(frozen=True, extra="forbid", title="Changes to the recipe", json_schema_extra=_in_order)

    base: OptionalText = Field(
        None,
        title="Base model",
        description="A hub id, a folder on the worker, or bundled:smollm2. The revision in the recipe is not used with it.",
        min_length=1,
    )
    epochs: OptionalInt = Field(
        None,
        title="Epochs",
        description="How many times training reads each row. Replaces the recipe's number of steps, too.",
        ge=1,
        le=1000,
    )
    steps: OptionalInt = Field(
        None,
        title="Steps",
        description="Train for this number of optimizer steps, instead of a number of epochs.",
        ge=1,
        le=100_000_000,
    )
    batch_size: OptionalInt = Field(
        None,
        title="Batch size",
        description="The number of rows of an optimizer step, on all devices together.",
        ge=1,
        le=65_536,
    )
    learning_rate: OptionalDecimal = Field(
        None,
        title="Learning rate",
        description="The peak learning rate, such as 2e-4 or 0.0002. LoRA usually works with 1e-5 to 1e-3.",
        gt=0,
        le=1,
    )
    rank: OptionalInt = Field(
        None,
        title="LoRA rank",
        description="The rank of the adapter's matrices. A higher rank can learn more, and needs more memory.",
        ge=1,
        le=1024,
    )
    alpha: OptionalInt = Field(
        None,
        title="LoRA alpha",
        description="The adapter's output is multiplied by alpha / rank.",
        ge=1,
        le=4096,
    )
    max_length: OptionalInt = Field(
        None,
        title="Longest row, in tokens",
        description="Longer rows are dropped, cut, or refused with an error, as the recipe's data.too_long says.",
        ge=8,
        le=1_048_576,
    )
    dataset_rev: OptionalText = Field(
        None,
        title="Dataset revision",
        description="Git commit, tag or branch from which the .dvc file is read.",
        min_length=1,
    )
    seed: OptionalInt = Field(
        None,
        title="Seed",
        description="Random seed of the adapter's initial weights and of the order of the rows.",
        ge=0,
        le=2**32 - 1,
    )
    loss_on: OptionalLossOn = Field(
        None,
        title="Learn from",
        description="What to learn. assistant: all answers; last_assistant: the last answer of a chat; all: everything.",
    )

    @model_validator(mode="after")
    def _one_length(self) -> Self:
        if self.epochs is not None and self.steps is not None:
            raise ValueError("fill in Epochs or Steps, not both")
        return self

    @model_serializer(mode="wrap")
    def _without_empty_fields(self, handler: SerializerFunctionWrapHandler) -> dict[str, JsonValue]:
        return {name: value for name, value in handler(self).items() if value is not None}

    def settings(self) -> dict[str, JsonValue]:
        """Return the changes as {dotted key of the recipe: value}."""
        out: dict[str, JsonValue] = {KEYS[name]: value for name, value in self if value is not None}
        if self.epochs is not None:
            out["training_config.max_steps"] = -1  # otherwise max_steps would take precedence over the epochs
        if self.batch_size is not None:
            # The batch is the product of both; on a CPU, the first one is also the number of rows in memory.
            rows = max(rows for rows in range(1, 9) if self.batch_size % rows == 0)
            out[KEYS["batch_size"]] = rows
            out["training_config.gradient_accumulation_steps"] = self.batch_size // rows
        if self.base is not None:
            out["base.revision"] = None  # a revision of the recipe's base
        return out


NO_OVERRIDES = Overrides()
# field of the form → dotted key of the recipe
KEYS = {
    "base": "base.model",
    "epochs": "training_config.num_train_epochs",
    "steps": "training_config.max_steps",
    "batch_size": "training_config.per_device_train_batch_size",
    "learning_rate": "training_config.learning_rate",
    "rank": "peft_config.r",
    "alpha": "peft_config.lora_alpha",
    "max_length": "training_config.max_length",
    "dataset_rev": "data.rev",
    "seed": "training_config.seed",
    "loss_on": "data.loss_on",
}
