"""The sections `peft_config` and `loralib_config` of a recipe: the LoRA layers.

`peft_config` is the dictionary of that name in the Phi-3 LoRA guide.
"""

from __future__ import annotations

import re
from typing import Annotated, Literal

from pydantic import Field, field_validator, model_validator

from loraflow.frozen import FrozenModel, Positive, Share


class EvaConfig(FrozenModel):
    """Settings of EVA, with the names of peft.EvaConfig."""

    rho: Annotated[float, Field(ge=1)] = Field(
        2.0, description="Ranks are redistributed, up to rho·r per layer; 1 keeps r everywhere."
    )
    tau: Annotated[float, Field(gt=0, le=1)] = Field(
        0.99, description="Similarity of singular vectors at which they count as converged."
    )


class PeftConfig(FrozenModel):
    """The guide's peft_config, with the names of peft.LoraConfig, and the two learning rates of LoRA+."""

    r: Positive = 16
    lora_alpha: Annotated[float, Field(gt=0)] = 32
    lora_dropout: Share = 0.05
    target_modules: list[str] | str = Field(
        "all-linear",
        description="Names of modules, or a regular expression for full names, or all-linear: every linear "
        "layer of the language model, except the head, the routers of experts, and the towers for images and "
        "sound.",
    )
    exclude_modules: list[str] | str = []
    bias: Literal["none", "all", "lora_only"] = "none"
    task_type: Literal["CAUSAL_LM"] = "CAUSAL_LM"
    modules_to_save: list[str] | None = None
    use_rslora: bool = False
    use_dora: bool = False
    init_lora_weights: (
        bool | Annotated[str, Field(pattern=r"^(gaussian|orthogonal|pissa(_niter_[1-9]\d*)?|olora|eva|loftq)$")]
    ) = True
    eva_config: EvaConfig = EvaConfig()
    trainable_token_indices: list[int] | dict[str, list[int]] | None = None
    loraplus_lr_ratio: Annotated[float, Field(ge=1)] | None = Field(
        None, description="LoRA+: ratio of the learning rates of B and A; its authors use 16."
    )
    loraplus_lr_embedding: Annotated[float, Field(gt=0)] = Field(
        1e-6, description="LoRA+: learning rate of adapters on embeddings."
    )
    rank_pattern: dict[str, Annotated[int, Field(ge=1)]] = {}
    alpha_pattern: dict[str, Annotated[float, Field(allow_inf_nan=False)]] = {}
    layers_to_transform: list[int] | None = None
    target_parameters: list[str] | None = Field(
        None,
        description="Weights that are not modules, such as those of experts: [mlp.experts.gate_up_proj, "
        "mlp.experts.down_proj]. Needs lora_dropout: 0.",
    )

    @field_validator("target_modules")
    @classmethod
    def _some(cls, value: list[str] | str) -> list[str] | str:
        if not value:
            raise ValueError("name at least one module, or all-linear")
        return value

    @field_validator("target_modules", "exclude_modules")
    @classmethod
    def _expression(cls, value: list[str] | str) -> list[str] | str:
        if isinstance(value, str):
            try:
                re.compile(value)
            except re.error as error:
                raise ValueError(f"{value} is not a regular expression: {error}") from error
        return value

    @field_validator("rank_pattern", "alpha_pattern")
    @classmethod
    def _patterns(cls, value: dict[str, int | float]) -> dict[str, int | float]:
        for pattern in value:
            try:
                re.compile(f"({pattern})$")
            except re.error as error:
                raise ValueError(f"{pattern} is not a regular expression: {error}") from error
        return value

    @model_validator(mode="after")
    def _parameters(self) -> PeftConfig:
        if self.target_parameters and (self.lora_dropout or self.use_dora):
            raise ValueError("target_parameters needs lora_dropout: 0 and use_dora: false; peft has neither for them")
        return self

    @model_validator(mode="after")
    def _initialisation(self) -> PeftConfig:
        how = str(self.init_lora_weights)
        if how.startswith(("pissa", "olora")) and self.use_dora:
            raise ValueError(
                f"init_lora_weights {how} and use_dora exclude each other: the result would not be an adapter of the "
                "base; choose one of them"
            )
        if how == "orthogonal" and any(r % 2 for r in (self.r, *self.rank_pattern.values())):
            raise ValueError("init_lora_weights orthogonal needs even ranks")
        if self.eva_config != EvaConfig() and how != "eva":
            raise ValueError("eva_config needs init_lora_weights: eva")
        return self


class LoralibConfig(FrozenModel):
    """Settings of loralib only. It shares r, lora_alpha, lora_dropout, bias and the module names with peft_config."""

    enable_lora: dict[str, list[Literal["q", "k", "v", "gate", "up"] | bool]] = Field(
        {},
        description="{fused module: blocks that get an update of rank r each}, such as {qkv_proj: [q, v]}. Blocks are "
        "q, k, v; gate, up; or true and false for equal blocks. A module that is not named gets a single update.",
    )
    merge_weights: bool = Field(False, description="Merge for evaluation during training, and unmerge after it.")
