"""The recipe's sections. `training_config` and `peft_config` are the two dictionaries of the Phi-3 LoRA guide.

`loraflow.config.stage_configs` decides which fields are part of a stage's fingerprint. A test checks every field.

The classes about training:

| class | contents |
|---|---|
| TrainingMath | settings that determine the adapter: always part of the fingerprint |
| BestCheckpoint | choice of the best checkpoint: part of the fingerprint with load_best_model_at_end |
| UnfingerprintedTraining | how training runs, logs and saves: not part of the fingerprint |
| TrainerSettings | these three together, with checks of their combinations: the trainer's input |
| TrainingConfig | TrainerSettings, max_length and packing: the recipe's section training_config |
| FingerprintedTraining (stage_configs) | the fingerprinted settings of a train job |
| JobTrainingRuntime (stage_configs) | the other settings of a train job |
| TrainConfig (stage_configs) | the config of the train stage: FingerprintedTraining, peft_config, base, method |
"""

from __future__ import annotations

import re
from typing import Annotated, Literal, Self

from pydantic import AfterValidator, Field, JsonValue, field_validator, model_validator

from loraflow.config.data_profile import ProfileCheckName, ProfileRule
from loraflow.config.data_sources import REPLACED, DataSource, RowFormat, checked_sources, known_columns
from loraflow.config.runtime import Runtime
from loraflow.frozen import FrozenModel

Share = Annotated[float, Field(ge=0, lt=1)]
Positive = Annotated[int, Field(ge=1)]
ShareOrCount = Annotated[int, Field(ge=1, strict=True)] | Annotated[float, Field(gt=0, lt=1)]
SliceBy = Annotated[str, Field(min_length=1)]  # of BUILT_IN_SLICES, or a field of the rows
BUILT_IN_SLICES = ("length", "script")

# The scores of each built-in metric, to check the names in the gate before anything runs.
SCORES = {
    "token_loss": {"token_loss"},
    "exact_match": {"exact_match"},
    "labels": {"accuracy"},
    "token_f1": {"token_f1"},
    "chrf": {"chrf"},
    "rouge": {"rouge1", "rouge2", "rougeL", "rougeLsum"},
    "json_fields": {"json_valid", "field_f1"},
    "tool_calls": {"tool_name", "tool_arguments_f1", "valid_call_rate"},
}


GENERAL_SETS = ("general chats", "general questions")  # of evaluation.general, in reports


class Data(FrozenModel):
    """The dataset, and the use of its rows."""

    source: str = Field("data.dvc", description="A .dvc file, or a folder or file of chats.")
    repo: str = Field(".", description="Git repository, a folder or URL, that has the .dvc file.")
    rev: str | None = Field(None, description="Git revision or branch of the .dvc file; the default is the work tree.")
    add: bool = Field(False, description="Version the folder before the run: `dvc add` and `dvc push`.")
    remote: str | None = Field(
        None, description="DVC remote to push to and fetch from; the default is DVC's default remote."
    )
    sources: list[DataSource] = Field(
        [],
        description="A mixture of several sources, each with its own files, format, columns and weight; instead of source.",
    )
    format: RowFormat = Field("auto", description="Format of the rows; auto detects it for each row by its keys.")
    columns: dict[str, str] = Field({}, description="Columns with other names: {prompt: question, completion: answer}.")
    tools: str | None = Field(
        None,
        description="A JSON file with the tools of all rows that have none of their own: a list of functions as in OpenAI's "
        "API.",
    )
    group: str | None = Field(
        None,
        description="Field of the rows whose value names a group, such as the document that a question is about. The "
        "gate does not count rows of a group as independent, and heldout_fraction keeps them together.",
    )
    train: list[str] = Field(
        ["train*"], description="Files with training rows: names or patterns, relative to the source."
    )
    heldout: list[str] = Field(
        [], description="Files with held-out rows; if empty, heldout_fraction of the training files is held out."
    )
    heldout_fraction: Share = Field(0.1, description="Share of rows to hold out, by a seeded hash of the prompt.")
    heldout_reserve: ShareOrCount | None = Field(
        None,
        description="Share or number of the held-out rows to keep in reserve. The first model is scored on the other rows. "
        "Each later model is scored on as many rows of the reserve, on which no model was scored before.",
    )
    extra_heldout: dict[str, str] = Field(
        {}, description="More held-out sets, {name: file}; reported, but not used by the gate."
    )
    validation_fraction: Share = Field(0.0, description="Share of training rows used to choose the best checkpoint.")
    system: str | None = Field(None, description="System message for chats that have none.")
    loss_on: Literal["assistant", "last_assistant", "all"] = Field("assistant", description="Tokens to learn.")
    thinking: Literal["keep", "strip", "empty"] | None = Field(
        None,
        description="Reasoning (<think> … </think>) in answers. By default, rows whose reasoning the chat template cuts are "
        "refused. keep: such answers are only context. strip: remove reasoning from all rows. empty: remove it, and "
        "train and serve with an empty think block (enable_thinking: false).",
    )
    too_long: Literal["error", "drop", "truncate"] = Field(
        "error", description="What to do with rows longer than max_length."
    )
    special_tokens: Literal["error", "drop", "allow"] = Field(
        "drop", description="What to do with rows whose text contains a control token, such as <|end|>."
    )
    duplicates: Literal["drop", "keep"] = Field("drop", description="What to do with duplicated training rows.")
    near_duplicates: Literal["off", "report", "drop", "refuse"] = Field(
        "off",
        description="What to do with rows whose text is nearly the same (Jaccard index of 5-grams of at least 0.8). report: "
        "count them. drop: never split them, and leave training rows out that are near to a held-out row. refuse: as "
        "drop, but stop the run if training rows are near to a held-out file.",
    )
    profile: dict[ProfileCheckName, ProfileRule] = Field(
        {},
        description="Checks of the rows' texts, {CHECK: {share: SHARE, action: warn | quarantine | fail}}. CHECK is "
        "refusals, openings, disputed, scripts, broken_text, control_tokens or personal.",
    )
    max_quarantined: Share = Field(0.01, description="Largest share of malformed rows; the run stops above it.")
    limit: Positive | None = Field(None, description="Use a seeded sample of this many training rows.")
    seed: int = Field(0, description="Seed of the split and of the sample of limit.")

    _columns = field_validator("columns")(known_columns)
    _sources = field_validator("sources")(checked_sources)

    @model_validator(mode="after")
    def _one_way(self) -> Self:
        changed = [name for name in REPLACED if getattr(self, name) != type(self).model_fields[name].default]
        if self.sources and changed:
            raise ValueError(f"{', '.join(changed)}: with sources, each source has its own; remove it here")
        return self

    @field_validator("extra_heldout")
    @classmethod
    def _names(cls, value: dict[str, str]) -> dict[str, str]:
        if taken := {"heldout", "train", "validation", *GENERAL_SETS} & value.keys():
            raise ValueError(f"{', '.join(sorted(taken))} is a reserved name; choose another")
        return value


class Base(FrozenModel):
    """The model that training starts from."""

    model: str = Field(description="`bundled:smollm2`, a folder, or a hub id such as microsoft/Phi-3-mini-4k-instruct.")
    revision: str | None = Field(
        None, description="Hub commit (40 hex digits) or branch; the commit of a branch is kept in loraflow.lock."
    )
    dtype: Literal["bfloat16", "float16", "float32"] = Field("bfloat16", description="Dtype of the frozen weights.")
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
        description="Names of modules, or a regular expression for full names, or all-linear: every linear layer of the "
        "language model, without head, routers of experts, and towers for images and sound.",
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


class Evaluation(FrozenModel):
    """How base, tuned model and champion are scored on held-out rows: all in the same way."""

    metrics: list[str] = Field(
        ["token_loss", "exact_match", "token_f1", "rouge", "chrf"],
        description="Names of built-in metrics, or paths of folders with an `evaluate` module, from the working directory.",
    )
    max_rows: Positive | None = Field(None, description="Score a seeded sample of at most this many rows of each set.")
    max_new_tokens: Positive = Field(256, description="Longest answer, in tokens.")
    dtype: Literal["bfloat16", "float16", "float32"] = Field(
        "float32", description="float32 scores repeat exactly; in 16 bits, answers depend on the batch size."
    )
    confidence: Annotated[float, Field(gt=0.5, lt=1)] = Field(
        0.95, description="Confidence level of the reported intervals."
    )
    general: str | None = Field(
        None,
        description="A JSONL file, or its .dvc file, with general chats and multiple-choice questions. Base, tuned model "
        "and champion are scored on them: the loss of the chats' last answers, and the share of questions that are right.",
    )
    samples: Annotated[int, Field(ge=0)] = Field(5, description="Number of answers shown in the run's report.")
    seed: int = Field(0, description="Seed of the bootstrap and of the sample of max_rows.")
    slices: list[SliceBy] = Field(
        [],
        description="Show the gate's scores for parts of the held-out rows. `length`: quarters by the reference's tokens; "
        "`script`: the script of most letters of the question; else a field of the rows, such as `language`. The gate "
        "does not use them.",
    )


class Merge(FrozenModel):
    """How the adapter is merged into the base's weights."""

    dtype: Literal["bfloat16", "float16", "float32"] | None = Field(
        None, description="Dtype of the merged weights; the default is the base's."
    )
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


Margin = Annotated[float, Field(ge=0, allow_inf_nan=False)]


def _increasing(ends: list[float]) -> list[float]:
    if not ends[0] < ends[1]:
        raise ValueError(f"the first number must be smaller than the second one, not {ends[0]:g} and {ends[1]:g}")
    return ends


_Finite = Annotated[float, Field(ge=-1e100, le=1e100, allow_inf_nan=False)]
ScoreRange = Annotated[list[_Finite], Field(min_length=2, max_length=2), AfterValidator(_increasing)]


class WorstRule(FrozenModel):
    """How many held-out rows may get worse by at least `drop`."""

    drop: Annotated[float, Field(gt=0, allow_inf_nan=False)] = Field(
        ..., description="A row counts if its score is worse by at least this, in the score's unit."
    )
    rows: Annotated[int, Field(ge=0)] | None = Field(None, description="Number of rows that may.")
    share: Annotated[float, Field(ge=0, lt=1)] | None = Field(None, description="Instead of it: share of the rows.")

    @model_validator(mode="after")
    def _one_limit(self) -> WorstRule:
        if (self.rows is None) == (self.share is None):
            raise ValueError("gate.worst needs `rows` or `share` for each score, and not both")
        return self


class BehaviourCheck(FrozenModel):
    """A condition on the tuned model's answers to a set of rows, and the share of them that must meet it."""

    set: str = Field("heldout", description="The rows: `heldout`, or a set of data.extra_heldout.")
    contains: list[str] | None = Field(None, description="Texts that an answer must contain, in any case.")
    matches: str | None = Field(None, description="A regular expression that must be found in an answer.")
    json_fields: list[str] | None = Field(None, description="An answer must be a JSON object with these fields.")
    refuses: bool | None = Field(None, description="true: an answer must refuse, in English; false: it must not.")
    consistent: Literal[True] | None = Field(
        None,
        description="true: answers to paraphrases must be the same. Paraphrases have the same value of data.group.",
    )
    share: Annotated[float, Field(gt=0, le=1)] = Field(1.0, description="Share of the answers that must meet it.")

    @model_validator(mode="after")
    def _one_condition(self) -> BehaviourCheck:
        conditions = ("contains", "matches", "json_fields", "refuses", "consistent")
        is_empty = self.contains == [] or "" in (self.contains or ()) or self.matches == ""  # any answer meets it
        if sum(getattr(self, name) is not None for name in conditions) != 1 or is_empty:
            raise ValueError(f"a check of gate.behaviour needs one of {', '.join(conditions)}")
        try:
            re.compile(self.matches or "")
        except re.error as error:
            raise ValueError(f"`matches` is not a regular expression: {error}") from None
        return self


class Gate(FrozenModel):
    """The conditions for a promotion: they are tested against the base and against the champion.

    Names of scores are checked before the run only if all metrics are built-in: the scores of your own metrics are not
    known before they have run.
    """

    primary: str = Field(
        "token_loss",
        description="The score that must improve. A score of your own metric is first checked when the gate decides.",
    )
    min_gain: Annotated[float, Field(ge=0, allow_inf_nan=False)] = Field(
        0.0, description="The improvement must be larger than this, in the score's unit."
    )
    guards: dict[str, Margin] = Field({}, description="{score: largest drop that is allowed, in the score's unit}.")
    worst: dict[str, WorstRule] = Field(
        {},
        description="{score: {drop: POINTS, rows: NUMBER}}, or `share` instead of `rows`: how many rows may get worse by at "
        "least `drop`. More of them reject the challenger; the report lists them.",
    )
    slices: dict[SliceBy, Annotated[dict[str, Margin], Field(min_length=1)]] = Field(
        {},
        description="{part: {score: largest drop that is allowed}}: guards for each part of the held-out rows. `part` is "
        "`length`, `script`, or a field of the rows, as in evaluation.slices.",
    )
    behaviour: dict[str, BehaviourCheck] = Field(
        {},
        description="{name: {set: SET, CONDITION, share: SHARE}}: what a set's answers must look like. CONDITION is one of "
        "`contains`, `matches`, `json_fields`, `refuses` and `consistent`. A check that fails rejects the challenger.",
    )
    forgetting: dict[
        Literal["loss", "accuracy", "accuracy_norm"], Annotated[float, Field(gt=0, allow_inf_nan=False)]
    ] = Field(
        {},
        description="{score: how much worse the tuned model may be on the rows of evaluation.general}: `loss` of the "
        "chats in nats per token; `accuracy` of the questions by the likelihood of a choice, `accuracy_norm` by its "
        "likelihood per character.",
    )
    lower_is_better: list[str] = Field([], description="Scores of your own metrics for which lower is better.")
    ranges: dict[str, ScoreRange] = Field(
        {},
        description="{score: [smallest, largest]}: the possible values of scores of your own metrics that are not only 0 "
        "and 1. Without it, a rare failure that no held-out row shows is not allowed for.",
    )
    error: Annotated[float, Field(gt=0, lt=0.5)] = Field(
        0.05, description="Probability of any false promotion in all looks of the model, whatever its held-out rows."
    )
    looks: Positive = Field(365, description="Number of challengers that share this error: a year of nights.")
    seeds: Annotated[int, Field(ge=1, le=20)] = Field(
        1,
        description="Number of models to train, with the seeds training_config.seed, seed + 1 and so on. The gate compares "
        "the mean of their scores. The model of the first seed is registered.",
    )
    confidence: Annotated[float, Field(gt=0.5, lt=1)] = Field(
        0.95, description="Confidence level of the guards, and of the one-sided bounds that are shown."
    )

    @property
    def score_ranges(self) -> dict[str, tuple[float, float]]:
        """The smallest and the largest value of scores, by `ranges`."""
        return {score: (ends[0], ends[1]) for score, ends in self.ranges.items()}

    @property
    def forgetting_margins(self) -> dict[str, float]:
        """The margins of `forgetting`, by the name of the score."""
        return {str(score): margin for score, margin in self.forgetting.items()}


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
        if all(name in SCORES for name in self.evaluation.metrics):
            scored = {"stops"}.union(*(SCORES[name] for name in self.evaluation.metrics))
            parts = [name for guards in self.gate.slices.values() for name in guards]
            for name in (self.gate.primary, *self.gate.guards, *self.gate.worst, *parts):
                if name == "macro_f1":
                    raise ValueError(
                        "the gate names macro_f1, which is no mean over rows, so models cannot be compared by it row by "
                        "row; use accuracy"
                    )
                if name not in scored:
                    raise ValueError(
                        f"the gate names {name}, which is not a score of evaluation.metrics; its scores are "
                        f"{', '.join(sorted(scored))}"
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
