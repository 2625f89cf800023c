"""The recipe, its small sections, and the checks that concern several sections.

The other sections have modules of their own: `data`, `training` (training_config), `lora` (peft_config, loralib_config),
`evaluation`, `gate` and `runtime`. `loraflow.config.stage_configs` decides which fields are part of a stage's fingerprint.
A test checks every field.
"""

from __future__ import annotations

import re
from typing import Annotated, Literal, Self

from pydantic import Field, model_validator

from loraflow.config.data import Data
from loraflow.config.evaluation import BUILT_IN_SLICES, Evaluation
from loraflow.config.gate import Gate
from loraflow.config.lora import LoralibConfig, PeftConfig
from loraflow.config.runtime import Runtime
from loraflow.config.training import TrainingConfig
from loraflow.frozen import Dtype, FrozenModel, Positive


class Base(FrozenModel):
    """The model that training starts from."""

    model: str = Field(description="`bundled:smollm2`, a folder, or a hub id such as microsoft/Phi-3-mini-4k-instruct.")
    revision: str | None = Field(
        None, description="Hub commit (40 hex digits) or branch; the commit of a branch is kept in loraflow.lock."
    )
    dtype: Dtype = Field("bfloat16", description="Dtype of the frozen weights.")
    repack: Literal["phi3"] | None = Field(
        None, description="Convert a Llama checkpoint to Phi-3's fused projections; the logits stay the same."
    )
    chat_template: str = Field(
        "auto",
        description="auto: the model's own chat template. Otherwise a file, or the name of a template that trl ships, such "
        "as qwen3. One with {% generation %} blocks only marks the answers, if the model has its own template.",
    )
    quantization: Literal["nf4", "fp8"] | None = Field(
        None,
        description="Quantization of the frozen weights in training. nf4: 4 bits (QLoRA), a fifth of the memory. fp8: "
        "matrix products at twice the speed, the same memory. Both need CUDA.",
    )
    double_quantization: bool = Field(True, description="Quantize the constants of nf4 as well.")
    use_cache: bool = Field(
        False, description="Use a key-value cache in the training forward pass; generation always uses its own."
    )
    trust_remote_code: bool = Field(
        False, description="Run Python code that comes with the model; unsafe unless you trust it."
    )


class Merge(FrozenModel):
    """How the adapter is merged into the base's weights."""

    dtype: Dtype | None = Field(None, description="Dtype of the merged weights; the default is the base's.")
    onto: Literal["auto", "base", "dequantized"] = Field(
        "auto",
        description="For base.quantization nf4: merge into the base's own weights, or into the dequantized weights that "
        "training used. auto takes the result that is closer to the trained model (KL on training rows).",
    )
    max_shard_size_gb: Annotated[float, Field(gt=0)] = Field(
        5.0, description="Largest file of the merged model, in GB."
    )
    max_kl: Annotated[float, Field(ge=0)] = Field(
        0.05,
        description="Largest allowed difference between the merged model and base plus adapter (mean KL, nats per token). "
        "The run stops above it.",
    )
    verify_prompts: Positive = Field(8, description="Number of held-out prompts for this comparison: a seeded sample.")


class Register(FrozenModel):
    """The registry entry of a promotion."""

    model: str = Field("default", pattern=r"^[a-z0-9][a-z0-9._-]*$", description="The model's name in the registry.")
    git_tags: bool = Field(
        False, description="Tag promotions and rollbacks in the project's git repository, in the format of GTO."
    )

    @model_validator(mode="after")
    def _taggable(self) -> Self:
        if self.git_tags and not re.fullmatch(r"[a-z0-9]([a-z0-9_-]*[a-z0-9])?", self.model):
            raise ValueError(
                "register.git_tags needs a model name of letters, digits, - and _ that ends with a letter or digit"
            )
        return self


class Publish(FrozenModel):
    """Publishing of promoted models on the hub. It is off unless a repository is named."""

    repo: str | None = Field(
        None, pattern=r"^[\w.-]+/[\w.-]+$", description="ORG/NAME on the hub; by default, nothing is published."
    )
    what: Literal["merged", "adapter"] = Field("merged", description="The merged weights, or the adapter only.")
    private: bool = Field(True, description="Create the repository as private.")


class Recipe(FrozenModel):
    """Everything that determines the result of a run, and the runtime, which does not."""

    name: str = Field(pattern=r"^[a-z0-9][a-z0-9._-]*$", description="Name of the recipe, in runs and reports.")
    data: Data = Data()
    base: Base
    method: Literal["peft", "loralib"] = Field("peft", description="Library whose LoRA layers are trained.")
    training_config: TrainingConfig = TrainingConfig()
    peft_config: PeftConfig = PeftConfig()
    loralib_config: LoralibConfig = LoralibConfig()
    evaluation: Evaluation = Evaluation()
    merge: Merge = Merge()
    gate: Gate = Gate()
    register_: Register = Field(Register(), alias="register")
    publish: Publish = Publish()
    runtime: Runtime = Runtime()

    @model_validator(mode="after")
    def _fit_together(self) -> Recipe:
        if self.training_config.eval_strategy != "no" and not self.data.validation_fraction:
            raise ValueError(
                "training_config.eval_strategy needs data.validation_fraction: held-out rows are for the gate only"
            )
        if self.gate.forgetting and self.evaluation.general is None:
            raise ValueError("gate.forgetting needs evaluation.general, a file with general rows")
        if self.base.quantization == "nf4" and self.base.dtype == "float32":
            raise ValueError("base.quantization nf4 computes in 16 bits: set base.dtype to bfloat16 or float16")
        if self.merge.onto == "dequantized" and self.base.quantization != "nf4":
            raise ValueError("merge.onto dequantized needs base.quantization: nf4; no other weights are dequantized")
        self._check_method()
        return self

    @property
    def seeds(self) -> tuple[int, ...]:
        """The training seeds of the models that the gate compares by their mean; the first one's model is registered."""
        first = self.training_config.seed
        return tuple(range(first, first + self.gate.seeds))

    def with_seed(self, seed: int) -> Self:
        """Return the recipe with another training seed."""
        training = self.training_config.model_copy(update={"seed": seed})
        return self.model_copy(update={"training_config": training})

    @property
    def slice_fields(self) -> tuple[str, ...]:
        """The fields of the rows that divide them into parts, sorted."""
        return tuple(sorted({*self.evaluation.slices, *self.gate.slices} - {*BUILT_IN_SLICES}))

    @property
    def compares_merges(self) -> bool:
        """Whether merge tries two ways, and needs token rows to compare their results."""
        return self.base.quantization == "nf4" and self.merge.onto == "auto"

    @property
    def deals_rows(self) -> bool:
        """Whether each model is scored on held-out rows of its own (data.heldout_reserve)."""
        return self.data.heldout_reserve is not None

    @property
    def scores_general(self) -> bool:
        """Whether models are scored on general rows too (evaluation.general)."""
        return self.evaluation.general is not None

    def _check_method(self) -> None:
        how = str(self.peft_config.init_lora_weights)
        if self.base.quantization and how.startswith(("pissa", "olora")):
            raise ValueError(
                f"peft_config.init_lora_weights {how} changes the base's weights, which quantization fixes; use loftq"
            )
        if how == "loftq" and self.base.quantization != "nf4":
            raise ValueError(
                "peft_config.init_lora_weights loftq compensates for quantization: set base.quantization: nf4"
            )
        if how == "loftq" and self.merge.onto == "base":
            raise ValueError("merge.onto base would apply loftq's compensation twice: set it to auto or dequantized")
        if self.method == "peft":
            if self.loralib_config != LoralibConfig():
                raise ValueError("loralib_config needs method: loralib; peft has one update for a fused module")
            return
        if self.base.quantization:
            raise ValueError("method loralib needs plain weights: leave base.quantization out, or set method: peft")
        shared = {"r", "lora_alpha", "lora_dropout", "target_modules", "exclude_modules", "layers_to_transform", "bias"}
        own = self.peft_config.model_dump(exclude=shared)
        alone = [key for key, value in PeftConfig().model_dump(exclude=shared).items() if own[key] != value]
        if alone:
            raise ValueError(f"peft_config.{alone[0]} is for method: peft only: leave it out with method: loralib")
