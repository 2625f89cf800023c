"""PEFT's `adapter_config.json`: what an adapter's matrices alone do not say, such as alpha."""

import json
import math
import re
from collections.abc import Iterable
from pathlib import Path
from typing import Annotated, Self, cast

from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    JsonValue,
    PlainValidator,
    ValidationError,
    ValidationInfo,
    ValidatorFunctionWrapHandler,
    field_validator,
)

from loraflow.failures import BadModel, first_line

FILE = "adapter_config.json"


_LARGEST = 1e30  # more is no alpha or rank of a trained adapter; float32 ends at 3e38


def _number(value: JsonValue) -> int | float:
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise ValueError("not a number")
    if not -_LARGEST < value < _LARGEST:  # json reads NaN and Infinity, too; neither is within the limits
        raise ValueError("not a finite number")
    return value


Number = Annotated[int | float, PlainValidator(_number)]  # an integer stays one: 16 is not written back as 16.0

# Initialisations that change the base's weights. When peft loads such an adapter, it changes them again: for the first
# two from the weights alone. The others need what the adapter does not contain: data, gradients, or a random state.
RECOMPUTED = ("pissa", "olora")
NOT_RECOMPUTED = ("pissa_niter", "corda", "loftq", "lora_ga")
# Initialisations that leave the base as it is: all others of peft 0.21.
_BASE_UNCHANGED = ("true", "false", "none", "gaussian", "eva", "orthogonal", "mica")

_NO_TEXT = ("true", "false", "none")  # these are values of JSON


class AdapterConfig(BaseModel):
    """The settings that loraflow computes with. All others are kept as they were read."""

    model_config = ConfigDict(frozen=True, extra="allow")
    __pydantic_extra__: dict[str, JsonValue] = Field(init=False)

    peft_type: JsonValue = "LORA"
    r: Number = 8
    lora_alpha: Number = 8
    rank_pattern: dict[str, Number] | None = None
    alpha_pattern: dict[str, Number] | None = None
    use_rslora: JsonValue = False
    use_dora: JsonValue = False
    bias: JsonValue = "none"
    init_lora_weights: JsonValue = None

    @field_validator("rank_pattern", "alpha_pattern", mode="wrap")
    @classmethod
    def _numbers_of_lora(
        cls, value: JsonValue, validate: ValidatorFunctionWrapHandler, info: ValidationInfo
    ) -> dict[str, int | float] | None:
        """Validate a pattern of LoRA; AdaLoRA's rank_pattern has a list of true and false for each tensor."""
        if info.data.get("peft_type") != "LORA":
            return cast("dict[str, int | float] | None", value)
        validated: dict[str, int | float] | None = validate(value)
        return validated

    @classmethod
    def read(cls, adapter: Path) -> Self:
        """Read the config in an adapter's folder.

        Raises:
            BadModel: the file is missing or not a JSON object, or a setting that must be a number is not.
        """
        file = adapter / FILE
        try:
            values = json.loads(file.read_text(encoding="utf-8"))
            if not isinstance(values, dict):
                raise TypeError(f"expected a JSON object, got {type(values).__name__}")
            config = cls.model_validate(values)
        except ValidationError as error:
            first = error.errors()[0]
            raise BadModel(
                "The adapter's configuration is damaged.",
                where=str(file),
                expected=f"a finite number at {'.'.join(map(str, first['loc']))}",
                got=repr(first["input"]),
                next_step="correct the number, or fetch the adapter again",
            ) from error
        except (OSError, ValueError, TypeError, RecursionError) as error:
            raise BadModel(
                "The adapter's configuration cannot be read.",
                where=str(file),
                expected="the JSON that peft writes beside adapter_model.safetensors",
                got=first_line(error),
                next_step="save or fetch the adapter again",
            ) from error
        config._check_patterns(file)
        config._check_tokens(file)
        return config

    def _check_patterns(self, file: Path) -> None:
        if self.peft_type != "LORA":  # AdaLoRA's rank_pattern is another thing
            return
        for setting in ("rank_pattern", "alpha_pattern"):
            # peft fails on it, without its name.
            if setting in self.model_fields_set and getattr(self, setting) is None:
                raise BadModel(
                    "A pattern of the adapter's configuration is null.",
                    where=f"{file}: {setting}",
                    expected="{} if no module has a value of its own",
                    got="null",
                    next_step="write {} in this file, or use the file that peft saved",
                )
            patterns: dict[str, int | float] = getattr(self, setting) or {}
            for pattern in patterns:
                try:
                    re.compile(_expression(pattern))
                except re.error as error:
                    raise BadModel(
                        "A pattern of the adapter's configuration is not a regular expression.",
                        where=f"{file}: {setting}",
                        expected="the end of a module's name, or a regular expression for it",
                        got=f"{pattern!r}: {error}",
                        next_step="correct the pattern in this file, or use the file that peft saved",
                    ) from error

    def _check_tokens(self, file: Path) -> None:
        for token in self.trained_tokens:
            if isinstance(token, bool) or not isinstance(token, int) or token < 0:
                raise BadModel(
                    "The adapter's configuration is damaged.",
                    where=f"{file}: trainable_token_indices",
                    expected="ids of tokens, 0 or more",
                    got=repr(token),
                    next_step="use the file that peft saved",
                )

    @property
    def trained_tokens(self) -> list[int]:
        """The ids of all tokens in trainable_token_indices."""
        tokens = getattr(self, "trainable_token_indices", None) or []
        lists = tokens.values() if isinstance(tokens, dict) else [tokens]
        return [token for ids in lists for token in (ids if isinstance(ids, list) else [ids])]

    def write(self, adapter: Path) -> None:
        """Write the settings that were read or set, sorted by name."""
        values = self.model_dump(exclude_unset=True, warnings=self.peft_type == "LORA")  # patterns: see above
        (adapter / FILE).write_text(json.dumps(values, indent=2, sort_keys=True) + "\n", encoding="utf-8")

    def enabled(self, names: Iterable[str]) -> list[str]:
        """Return those of the named settings that are neither missing nor false, null or empty."""
        return [name for name in names if getattr(self, name, None)]

    @property
    def initialisation(self) -> str:
        """The value of `init_lora_weights` in lower case."""
        return str(self.init_lora_weights).lower()

    @property
    def initialisation_is_known(self) -> bool:
        """Whether it is known if the initialisation changed the base's weights."""
        if isinstance(self.init_lora_weights, str) and self.initialisation in _NO_TEXT:
            return False  # peft does not load it
        return self.base_was_modified or self.initialisation in _BASE_UNCHANGED

    @property
    def base_was_modified(self) -> bool:
        """Whether the initialisation changed the base's weights, so that the adapter does not fit the original base."""
        return self.initialisation.startswith((*RECOMPUTED, *NOT_RECOMPUTED))

    def scale_of(self, module: str, rank: int) -> float:
        """Return the factor of a module's B·A.

        Raises:
            BadModel: the config has another rank, so it belongs to another adapter.
        """
        default = self.r if "r" in self.model_fields_set else rank
        configured = _by_pattern(self.rank_pattern, module, default)
        if configured != rank:
            raise BadModel(
                "The adapter's configuration does not belong to its weights.",
                where=module,
                expected=f"rank {configured}, by adapter_config.json",
                got=f"rank {rank}, in adapter_model.safetensors",
                next_step="use the two files that were saved together",
            )
        alpha = _by_pattern(self.alpha_pattern, module, self.lora_alpha)
        return alpha / (math.sqrt(rank) if self.use_rslora else rank)


def _by_pattern(patterns: dict[str, int | float] | None, module: str, default: int | float) -> int | float:
    """Look a module up as peft does: a pattern is the end of a name, or a regular expression for it."""
    for pattern, value in (patterns or {}).items():
        if re.match(_expression(pattern), module):
            return value
    return default


def _expression(pattern: str) -> str:
    return rf"(.*\.)?({pattern})$"
