"""The section `training_config` of a recipe: the dictionary of that name in the Phi-3 LoRA guide.

| class | contents |
|---|---|
| TrainingMath | settings that determine the adapter: always part of the fingerprint |
| BestCheckpoint | choice of the best checkpoint: part of the fingerprint with load_best_model_at_end |
| UnfingerprintedTraining | how training runs, logs and saves: not part of the fingerprint |
| TrainerSettings | these three together, with checks of their combinations: the trainer's input |
| TrainingConfig | TrainerSettings, max_length and packing: the recipe's section training_config |
| FingerprintedTraining (stage_configs) | the fingerprinted settings of a train job |
| JobTrainingRuntime (job_runtime) | the other settings of a train job |
| TrainConfig (stage_configs) | the config of the train stage: FingerprintedTraining, peft_config, base, method |
"""

from typing import Annotated, Literal, Self

from pydantic import Field, JsonValue, model_validator

from loraflow.frozen import FrozenModel, Positive, Share


class TrainingMath(FrozenModel):
    """The settings that determine the trained adapter: always part of the fingerprint."""

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
    neftune_noise_alpha: Annotated[float, Field(gt=0)] | None = Field(
        None,
        description="NEFTune: noise on the embeddings of training tokens, uniform up to alpha / sqrt(tokens of the document "
        "· width). For a padded batch, transformers uses the batch's length instead.",
    )
    seed: int = 0
    bf16: bool = True
    fp16: bool = False


class BestCheckpoint(FrozenModel):
    """How the best checkpoint is chosen: part of the fingerprint only if `load_best_model_at_end` is set."""

    eval_strategy: Literal["steps", "epoch", "no"] = "no"
    eval_steps: Positive | None = None
    load_best_model_at_end: bool = False
    metric_for_best_model: str = "eval_loss"
    greater_is_better: bool = Field(
        False, description="Must be false with load_best_model_at_end: a lower loss is better."
    )
    early_stopping_patience: Positive | None = None


class UnfingerprintedTraining(FrozenModel):
    """How training runs, logs and saves: not part of the fingerprint."""

    per_device_train_batch_size: Positive = 4
    gradient_accumulation_steps: Positive = 1
    per_device_eval_batch_size: Positive = 4
    gradient_checkpointing: bool | None = None  # None: runtime.checkpointing decides
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


class TrainerSettings(UnfingerprintedTraining, BestCheckpoint, TrainingMath):
    """All settings of the trainer. The train stage combines them from its config and runtime."""

    @model_validator(mode="after")
    def _check_combinations(self) -> Self:
        if self.bf16 and self.fp16:
            raise ValueError("bf16 and fp16 exclude each other")
        if self.max_steps == 0 or self.max_steps < -1:
            raise ValueError(f"max_steps should be -1 (train num_train_epochs) or at least 1, not {self.max_steps}")
        if self.warmup_steps >= 1 and not float(self.warmup_steps).is_integer():
            raise ValueError(
                f"warmup_steps should be a share below 1 or a whole number of steps, not {self.warmup_steps}"
            )
        if self.load_best_model_at_end and self.eval_strategy == "no":
            raise ValueError("load_best_model_at_end needs eval_strategy: steps or epoch")
        if self.load_best_model_at_end and self.save_strategy != self.eval_strategy:
            raise ValueError("load_best_model_at_end needs save_strategy to equal eval_strategy")
        if self.load_best_model_at_end and self.eval_strategy == "steps":
            every = self.eval_steps or self.logging_steps
            if self.save_steps % every:
                raise ValueError(f"load_best_model_at_end needs save_steps to be a multiple of eval_steps ({every})")
        if self.load_best_model_at_end and self.metric_for_best_model not in ("eval_loss", "loss"):
            raise ValueError("metric_for_best_model should be eval_loss: validation rows have no other metric")
        if self.load_best_model_at_end and self.greater_is_better:
            raise ValueError("greater_is_better: true would keep the checkpoint with the largest loss; leave it out")
        if self.early_stopping_patience and not self.load_best_model_at_end:
            raise ValueError("early_stopping_patience needs load_best_model_at_end: true")
        return self


class TrainingConfig(TrainerSettings):
    """The guide's training_config, with the names of trl.SFTConfig and the defaults of the Phi-3 model card."""

    max_length: Positive = 2048
    packing: bool = False

    @property
    def global_batch(self) -> int:
        """Rows per optimizer step. Memory limits only how many of them go into one forward pass."""
        return self.per_device_train_batch_size * self.gradient_accumulation_steps
