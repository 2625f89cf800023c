"""The recipe's sections. `training_config` and `peft_config` are the two dictionaries of the Phi-3 LoRA guide.

Every field says whether it is part of identity by where `loraflow.stages` puts it; a test walks them all.
"""

from __future__ import annotations

from typing import Annotated, Literal, Self

from pydantic import Field, JsonValue, field_validator, model_validator

from loraflow.config.runtime import FrozenModel, Runtime

Share = Annotated[float, Field(ge=0, lt=1)]
Positive = Annotated[int, Field(ge=1)]

# What each metric of ours scores, so that a gate that names another is refused before anything runs.
SCORES = {
    "token_loss": {"token_loss"},
    "exact_match": {"exact_match"},
    "token_f1": {"token_f1"},
    "chrf": {"chrf"},
    "rouge": {"rouge1", "rouge2", "rougeL", "rougeLsum"},
    "json_fields": {"json_valid", "field_f1"},
}


COLUMNS = ("messages", "conversations", "instruction", "input", "output", "prompt", "completion", "system")


class Data(FrozenModel):
    """Which dataset, and which of its rows."""

    source: str = Field("data.dvc", description="A .dvc file, or a folder or file of chats.")
    repo: str = Field(".", description="Git repository (folder or URL) that holds the .dvc file.")
    rev: str | None = Field(None, description="Git revision or branch of the .dvc file; none is the work tree.")
    add: bool = Field(False, description="Version what is in the folder first: `dvc add` and push.")
    remote: str | None = Field(None, description="DVC remote to push to and to fetch from; none is the default one.")
    format: Literal["auto", "messages", "sharegpt", "alpaca", "prompt_completion"] = Field(
        "auto", description="How a row says who said what."
    )
    columns: dict[str, str] = Field({}, description="Columns of other names: {prompt: question, completion: answer}.")
    train: list[str] = Field(["train*"], description="Files of training rows: names or patterns below the source.")
    heldout: list[str] = Field([], description="Files of held-out rows; none takes heldout_fraction of the rest.")
    heldout_fraction: Share = Field(0.1, description="Share of rows held out, by a seeded hash of the row.")
    extra_heldout: dict[str, str] = Field({}, description="More held-out sets, by name, reported apart from the gate.")
    validation_fraction: Share = Field(0.0, description="Share of training rows kept to choose the best checkpoint.")
    system: str | None = Field(None, description="System message put before chats that have none.")
    loss_on: Literal["assistant", "last_assistant", "all"] = Field("assistant", description="Which tokens are learned.")
    too_long: Literal["error", "drop", "truncate"] = Field("error", description="Rows longer than max_length.")
    special_tokens: Literal["error", "drop", "allow"] = Field(
        "drop", description="Rows whose text holds one of the tokenizer's control tokens, such as <|end|>."
    )
    duplicates: Literal["drop", "keep"] = Field("drop", description="Training rows that stand twice.")
    max_quarantined: Share = Field(0.01, description="The run stops when a larger share of rows is malformed.")
    limit: Positive | None = Field(None, description="Take only this many training rows, for a quick look.")
    seed: int = Field(0, description="Seed of the split.")

    @field_validator("columns")
    @classmethod
    def _columns(cls, value: dict[str, str]) -> dict[str, str]:
        if unknown := value.keys() - set(COLUMNS):
            raise ValueError(
                f"{', '.join(sorted(unknown))}: a row has {', '.join(COLUMNS)}; yours stands behind the colon"
            )
        return value

    @field_validator("extra_heldout")
    @classmethod
    def _names(cls, value: dict[str, str]) -> dict[str, str]:
        if taken := {"heldout", "train", "validation"} & value.keys():
            raise ValueError(f"{', '.join(sorted(taken))} is the name of a set of its own; choose another")
        return value


class Base(FrozenModel):
    """Which model training starts from."""

    model: str = Field(description="`bundled:smollm2`, a folder, or a hub id such as microsoft/Phi-3-mini-4k-instruct.")
    revision: str | None = Field(None, description="Hub commit (40 hex digits) or branch; a branch is resolved once.")
    dtype: Literal["bfloat16", "float16", "float32"] = Field("bfloat16", description="Dtype of the frozen weights.")
    repack: Literal["phi3"] | None = Field(
        None, description="Write a Llama-shaped checkpoint with Phi-3's fused projections; logits stay the same."
    )
    quantization: Literal["nf4", "fp8"] | None = Field(
        None,
        description="Frozen weights in training. nf4: 4 bits (QLoRA), a fifth of the memory. fp8: products at twice the "
        "rate, same memory. Both need CUDA.",
    )
    double_quantization: bool = Field(True, description="Quantize nf4's constants as well.")
    use_cache: bool = Field(False, description="Key-value cache in the training forward pass; generation has its own.")
    trust_remote_code: bool = Field(False, description="Run Python code that comes with the model. Off is safe.")


class TrainingMath(FrozenModel):
    """The settings that decide which adapter training finds: always part of the fingerprint."""

    learning_rate: Annotated[float, Field(gt=0)] = 5.0e-6
    lr_scheduler_type: Literal[
        "linear", "cosine", "cosine_with_restarts", "polynomial", "constant", "constant_with_warmup", "inverse_sqrt"
    ] = "cosine"
    lr_scheduler_kwargs: dict[str, JsonValue] = {}
    warmup_steps: Annotated[float, Field(ge=0)] = 0.2
    num_train_epochs: Annotated[float, Field(gt=0)] = 1
    max_steps: int = -1
    optim: Literal["adamw_torch", "adamw_torch_fused", "adafactor", "sgd", "paged_adamw_32bit", "paged_adamw_8bit"] = (
        "adamw_torch"
    )
    adam_beta1: Share = 0.9
    adam_beta2: Share = 0.999
    adam_epsilon: Annotated[float, Field(gt=0)] = 1e-8
    weight_decay: Annotated[float, Field(ge=0)] = 0.0
    max_grad_norm: Annotated[float, Field(ge=0)] = 1.0
    neftune_noise_alpha: Annotated[float, Field(gt=0)] | None = None
    seed: int = 0
    bf16: bool = True
    fp16: bool = False


class BestCheckpoint(FrozenModel):
    """How the best checkpoint is chosen: part of the fingerprint only if `load_best_model_at_end` is set."""

    eval_strategy: Literal["steps", "epoch", "no"] = "no"
    eval_steps: Positive | None = None
    load_best_model_at_end: bool = False
    metric_for_best_model: str = "eval_loss"
    greater_is_better: bool = False
    early_stopping_patience: Positive | None = None


class TrainingRuntime(FrozenModel):
    """How training runs, logs and saves: not part of the fingerprint."""

    per_device_train_batch_size: Positive = 4
    gradient_accumulation_steps: Positive = 1
    per_device_eval_batch_size: Positive = 4
    gradient_checkpointing: bool | None = None  # None: as much as memory needs (runtime.checkpointing)
    gradient_checkpointing_kwargs: dict[str, JsonValue] = {"use_reentrant": False}
    logging_strategy: Literal["steps", "epoch", "no"] = "steps"
    logging_steps: Positive = 20
    logging_first_step: bool = False
    log_level: Literal["debug", "info", "warning", "error", "critical", "passive"] = "info"
    report_to: str | list[str] = "none"
    run_name: str | None = None
    save_strategy: Literal["steps", "epoch", "no"] = "steps"
    save_steps: Positive = 100
    save_total_limit: Positive | None = 1
    dataloader_num_workers: Annotated[int, Field(ge=0)] = 0


class TrainerSettings(TrainingRuntime, BestCheckpoint, TrainingMath):
    """Everything that the trainer is configured with. The train stage puts it together from its config and runtime."""

    @model_validator(mode="after")
    def _check_combinations(self) -> Self:
        if self.bf16 and self.fp16:
            raise ValueError("bf16 and fp16 exclude each other")
        if self.max_steps == 0 or self.max_steps < -1:
            raise ValueError(f"max_steps is -1 (by epochs) or at least 1, not {self.max_steps}")
        if self.warmup_steps >= 1 and not float(self.warmup_steps).is_integer():
            raise ValueError(f"warmup_steps is a share below 1 or a whole number of steps, not {self.warmup_steps}")
        if self.load_best_model_at_end and self.eval_strategy == "no":
            raise ValueError("load_best_model_at_end needs eval_strategy: steps or epoch")
        if self.load_best_model_at_end and self.save_strategy != self.eval_strategy:
            raise ValueError("load_best_model_at_end needs save_strategy to be eval_strategy")
        if self.load_best_model_at_end and self.eval_strategy == "steps":
            every = self.eval_steps or self.logging_steps
            if self.save_steps % every:
                raise ValueError(f"load_best_model_at_end needs save_steps to be a multiple of eval_steps ({every})")
        if self.load_best_model_at_end and self.metric_for_best_model not in ("eval_loss", "loss"):
            raise ValueError("metric_for_best_model is eval_loss: nothing else is measured on validation rows")
        if self.early_stopping_patience and not self.load_best_model_at_end:
            raise ValueError("early_stopping_patience needs load_best_model_at_end: true")
        return self


class TrainingConfig(TrainerSettings):
    """The guide's training_config: names of trl.SFTConfig, defaults of the Phi-3 model card."""

    max_length: Positive = 2048
    packing: bool = False

    @property
    def global_batch(self) -> int:
        """Rows per optimizer step. Memory decides only how many of them go into one forward pass."""
        return self.per_device_train_batch_size * self.gradient_accumulation_steps


class EvaConfig(FrozenModel):
    """Names of peft.EvaConfig."""

    rho: Annotated[float, Field(ge=1)] = Field(2.0, description="Ranks are handed out again, up to rho·r; 1 keeps r.")
    tau: Annotated[float, Field(gt=0, le=1)] = Field(0.99, description="How still singular vectors must stand.")


class PeftConfig(FrozenModel):
    """The guide's peft_config: names of peft.LoraConfig, and LoRA+'s two learning rates."""

    r: Positive = 16
    lora_alpha: Annotated[float, Field(gt=0)] = 32
    lora_dropout: Share = 0.05
    target_modules: list[str] | Literal["all-linear"] = "all-linear"
    exclude_modules: list[str] = []
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
        None, description="LoRA+: learning rate of B over that of A; its authors take 16."
    )
    loraplus_lr_embedding: Annotated[float, Field(gt=0)] = Field(
        1e-6, description="LoRA+: learning rate of adapters on embeddings."
    )
    rank_pattern: dict[str, int] = {}
    alpha_pattern: dict[str, float] = {}
    layers_to_transform: list[int] | None = None

    @field_validator("target_modules")
    @classmethod
    def _some(cls, value: list[str] | str) -> list[str] | str:
        if not value:
            raise ValueError("name at least one module, or all-linear")
        return value

    @model_validator(mode="after")
    def _initialisation(self) -> PeftConfig:
        how = str(self.init_lora_weights)
        if how.startswith(("pissa", "olora")) and self.use_dora:
            raise ValueError(f"init_lora_weights {how} and use_dora have no adapter that the base can take: choose one")
        if how == "orthogonal" and any(r % 2 for r in (self.r, *self.rank_pattern.values())):
            raise ValueError("init_lora_weights orthogonal needs even ranks")
        if self.eva_config != EvaConfig() and how != "eva":
            raise ValueError("eva_config needs init_lora_weights: eva")
        return self


class LoralibConfig(FrozenModel):
    """What loralib has beside peft_config, whose r, lora_alpha, lora_dropout, bias and names of modules it shares."""

    enable_lora: dict[str, list[Literal["q", "k", "v", "gate", "up"] | bool]] = Field(
        {},
        description="Fused module → its blocks that get an update of rank r each (q, k, v; gate, up; or true and false "
        "for each of equal blocks), such as {qkv_proj: [q, v]}. A module that is not named gets one update as a whole.",
    )
    merge_weights: bool = Field(False, description="Merge for evaluation during training, and back after it.")


class Evaluation(FrozenModel):
    """How models are scored on held-out rows: one protocol for base, tuned and champion."""

    metrics: list[str] = Field(
        ["token_loss", "exact_match", "token_f1", "rouge", "chrf"],
        description="Metrics of loraflow by name, or a folder with an `evaluate` module.",
    )
    max_rows: Positive | None = Field(None, description="Score at most this many rows of each set.")
    max_new_tokens: Positive = Field(256, description="Longest answer, in tokens.")
    dtype: Literal["bfloat16", "float16", "float32"] = Field(
        "float32", description="In 16 bits batching changes answers; float32 scores repeat exactly."
    )
    confidence: Annotated[float, Field(gt=0.5, lt=1)] = Field(0.95, description="Level of the reported intervals.")
    samples: Annotated[int, Field(ge=0)] = Field(5, description="Answers shown in the run's report.")
    seed: int = Field(0, description="Seed of the bootstrap.")


class Merge(FrozenModel):
    """How the adapter becomes part of the weights."""

    dtype: Literal["bfloat16", "float16", "float32"] | None = Field(None, description="Default: the base's own.")
    onto: Literal["auto", "base", "dequantized"] = Field(
        "auto",
        description="After base.quantization nf4: onto the base's own weights, or onto those that training saw, unpacked; "
        "auto takes the one whose answers are nearer to the trained model's (KL on training rows).",
    )
    max_shard_size_gb: Annotated[float, Field(gt=0)] = Field(5.0, description="Largest file of the merged model.")
    max_kl: Annotated[float, Field(ge=0)] = Field(
        0.05, description="The run stops when merged and adapter model differ by more (mean KL, nats per token)."
    )
    verify_prompts: Positive = Field(8, description="Held-out prompts on which they are compared.")


class Gate(FrozenModel):
    """What a challenger has to show against base and champion."""

    primary: str = Field("token_loss", description="The metric that must gain.")
    min_gain: Annotated[float, Field(ge=0)] = Field(0.0, description="By more than this, in the metric's unit.")
    guards: dict[str, Annotated[float, Field(ge=0)]] = Field({}, description="Metrics and the loss each may show.")
    lower_is_better: list[str] = Field([], description="Metrics of your own modules of which less is better.")
    confidence: Annotated[float, Field(gt=0.5, lt=1)] = Field(0.95, description="One-sided level of the bounds.")


class Register(FrozenModel):
    """Where the decision is written down."""

    model: str = Field("default", pattern=r"^[a-z0-9][a-z0-9._-]*$", description="Name in the registry.")


class Publish(FrozenModel):
    """Whether a promoted model goes to the hub, and where. Off as long as no repository is named."""

    repo: str | None = Field(
        None, pattern=r"^[\w.-]+/[\w.-]+$", description="ORG/NAME on the hub; none: not published."
    )
    what: Literal["merged", "adapter"] = Field("merged", description="Weights as a whole, or the adapter alone.")
    private: bool = Field(True, description="A repository that is made is private.")


class Recipe(FrozenModel):
    """Everything that decides what comes out, and beside it the runtime, which does not."""

    name: str = Field(pattern=r"^[a-z0-9][a-z0-9._-]*$", description="Name of the recipe, in runs and reports.")
    data: Data = Data()
    base: Base
    method: Literal["peft", "loralib"] = Field("peft", description="Whose layers the adapter is trained with.")
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
                "training_config.eval_strategy needs data.validation_fraction: held-out rows are the gate's alone"
            )
        if all(name in SCORES for name in self.evaluation.metrics):
            scored = set().union(*(SCORES[name] for name in self.evaluation.metrics))
            for name in (self.gate.primary, *self.gate.guards):
                if name not in scored:
                    raise ValueError(
                        f"the gate names {name}, which evaluation.metrics does not score; it scores "
                        f"{', '.join(sorted(scored))}"
                    )
        if self.base.quantization == "nf4" and self.base.dtype == "float32":
            raise ValueError("base.quantization nf4 computes in 16 bits: set base.dtype to bfloat16 or float16")
        if self.merge.onto == "dequantized" and self.base.quantization != "nf4":
            raise ValueError("merge.onto dequantized needs base.quantization: nf4; nothing else was packed")
        self._check_method()
        return self

    @property
    def compares_merges(self) -> bool:
        """Whether the merge tries two bases, and needs rows to compare them on."""
        return self.base.quantization == "nf4" and self.merge.onto == "auto"

    def _check_method(self) -> None:
        how = str(self.peft_config.init_lora_weights)
        if self.base.quantization and how.startswith(("pissa", "olora")):
            raise ValueError(
                f"peft_config.init_lora_weights {how} changes the weights, which nf4 has fixed; take loftq"
            )
        if how == "loftq" and self.base.quantization != "nf4":
            raise ValueError(
                "peft_config.init_lora_weights loftq makes up for quantization: set base.quantization: nf4"
            )
        if how == "loftq" and self.merge.onto == "base":
            raise ValueError("merge.onto base would count twice what loftq makes up for: set it to auto or dequantized")
        if self.method == "peft":
            if self.loralib_config != LoralibConfig():
                raise ValueError("loralib_config needs method: loralib; peft has one update for a whole fused module")
            return
        if self.base.quantization:
            raise ValueError("method loralib adds to plain weights: leave base.quantization out, or set method: peft")
        shared = {"r", "lora_alpha", "lora_dropout", "target_modules", "exclude_modules", "layers_to_transform", "bias"}
        own = self.peft_config.model_dump(exclude=shared)
        alone = [key for key, value in PeftConfig().model_dump(exclude=shared).items() if own[key] != value]
        if alone:
            raise ValueError(f"peft_config.{alone[0]} is peft's alone: leave it out with method: loralib")
