"""The table of stages: name, version, module, inputs and needs of each stage.

To add a stage: write its module with a `run` function, its config in `loraflow/config/stage_configs.py`, its task in
`tasks/stages.py`, and its row. `docs/design.md` has a worked example.

If a change to a stage's code can change its result, raise the stage's version. A golden test fails until you have either
raised it or recorded the new code as equivalent.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Literal

from loraflow.config import Recipe
from loraflow.config import stage_configs as configs
from loraflow.config.stage_configs import JobRuntime, RecipeContext, StageConfig
from loraflow.failures import BadConfig

_HARDWARE = ("loraflow.hardware.device", "loraflow.hardware.attention")
_TEMPLATE = (
    "loraflow.data.loss_mask",
    "loraflow.data.rendered_calls",
    "loraflow.data.answer_spans",
    "loraflow.data.alignment",
    "loraflow.data.template",
    "loraflow.data.template_child",
    "loraflow.data.template_process",
    "loraflow.data.tokenizer_config",
    "loraflow.data.chats",
)


@dataclass(frozen=True)
class Input:
    """An input of a stage: which stages' artifacts it may be, and which part of them the stage depends on."""

    source: tuple[str, ...]
    part: str | None = None  # a facet of the artifact; None is the complete artifact
    optional: bool = False


@dataclass(frozen=True)
class Stage:
    """One step of the pipeline: a pure function from artifacts and a config to one artifact."""

    name: str
    version: int
    module: str  # `run(job, inputs, out, progress)` in it does the work; imported only where the stage runs
    config: type[StageConfig]
    code: tuple[str, ...]  # modules whose code decides the result
    inputs: Mapping[str, Input] = field(default_factory=dict)
    runtime: Callable[[Recipe, RecipeContext], JobRuntime] = JobRuntime.from_recipe
    in_worker: bool = True  # in a worker process; otherwise in the process of the flow
    uses_gpu: bool = False  # waits for the GPU's lease
    placeable: bool = False  # may run on another work pool (runtime.placement)
    several_devices: bool = False  # shares its work between runtime.devices
    several_nodes: bool = False  # shares its work between runtime.rendezvous.nodes
    oom_field: Literal["micro_batch", "eval_batch_size"] | None = None  # runtime field to halve when memory runs out
    disk_estimate: Literal["base", "origin"] | None = None  # the result needs as much disk space as this

    def __str__(self) -> str:
        return self.name


def _from(*stages: Stage, part: str | None = None, optional: bool = False) -> Input:
    return Input(tuple(stage.name for stage in stages), part, optional)


VERSION_DATASET = Stage(
    name="version_dataset",
    version=1,
    module="loraflow.data.version",
    config=configs.VersionDatasetConfig,
    runtime=JobRuntime.of_dataset,
    code=(
        "loraflow.data.version",
        "loraflow.data.source_files",
        "loraflow.data.hidden_files",
        "loraflow.data.sqlite_reader",
        "loraflow.data.dvc",
        "loraflow.data.dvc_command",
        "loraflow.data.dataset_files",
        "loraflow.data.dvc_ignore",
        "loraflow.data.dvc_pin",
        "loraflow.data.dvc_storage",
        "loraflow.data.listing",
        "loraflow.data.git",
    ),
    in_worker=False,
)

CHECK_DATASET = Stage(
    name="check_dataset",
    # 4: marks that exclude answers are honoured, data.limit is a sample, one row at least is held out, and a row with
    # reasoning beside its content is malformed
    # 5: labels such as flase or nein are refused, judgements such as correct: false are honoured, weights are read;
    # `**` in a pattern selects files at any depth, as in a .gitignore
    # 6: training rows of a group that a held-out file has are left out; the group 7.0 of a Parquet file is 7; the sample of
    # data.limit is spread over groups or labels
    # 6, too: reasoning beside an answer's content is a part of the chat; rows of held-out files that cannot be held out make
    # no training row a leak
    # 7: marks in other spellings and in `metadata`, cells that are no texts (nan, #NAME?), lists that were written as text,
    # a second header, quotes that are not quotes; hidden files are no data
    # 8: two answers of a preference pair are no marks, and a rejected answer is refused; marks in JSON text and in opinions
    # such as `quality: bad`; data.profile looks at the rows that sources use
    # 9: rows that a column `split` keeps for tests are left out of training; false, -1, grades and a label in `metadata` are
    # opinions; images, corrected answers and choices are refused; systemPrompt and its like are system messages
    version=9,
    module="loraflow.data.check",
    config=configs.CheckDatasetConfig,
    inputs={"dataset": _from(VERSION_DATASET)},
    code=(
        "loraflow.data.check",
        "loraflow.data.check_report",
        "loraflow.data.chat_table",
        "loraflow.data.chat_profile",
        "loraflow.data.quarantine",
        "loraflow.data.row_drops",
        "loraflow.data.reasoning",
        "loraflow.data.thinking",
        "loraflow.data.readers",
        "loraflow.data.chat_formats",
        "loraflow.data.cell_values",
        "loraflow.data.sources",
        "loraflow.data.hidden_files",
        "loraflow.data.sqlite_reader",
        "loraflow.data.row_fields",
        "loraflow.data.labels",
        "loraflow.data.container_text",
        "loraflow.data.containers",
        "loraflow.data.judgements",
        "loraflow.data.marked_rows",
        "loraflow.data.marks",
        "loraflow.data.mark_names",
        "loraflow.data.preference_pairs",
        "loraflow.data.chats",
        "loraflow.data.csv_reader",
        "loraflow.data.json_reader",
        "loraflow.data.json_text",
        "loraflow.data.tools",
        "loraflow.data.split",
        "loraflow.data.sampling",
        "loraflow.data.similar",
        "loraflow.data.group_leaks",
        "loraflow.data.heldout_fields",
        "loraflow.data.near_prompts",
        "loraflow.data.findings",
        "loraflow.data.placeholders",
        "loraflow.config.data_profile",
        "loraflow.data.broken_text",
        "loraflow.data.personal_data",
        "loraflow.data.refusals",
        "loraflow.data.near_split",
        "loraflow.data.placement",
        "loraflow.data.near",
        "loraflow.data.shingles",
        "loraflow.data.sketch_process",
    ),
    in_worker=False,
)

RESOLVE_BASE = Stage(
    name="resolve_base",
    version=2,  # 2: a date is fixed in the template; special tokens as transformers reads them
    module="loraflow.base.resolve",
    config=configs.ResolveBaseConfig,
    runtime=JobRuntime.of_base,
    code=(
        "loraflow.base.resolve",
        "loraflow.base.gguf_file",
        "loraflow.base.base_checks",
        "loraflow.base.model_files",
        "loraflow.base.mask_check",
        "loraflow.base.template_check",
        "loraflow.data.served_template",
        "loraflow.base.hub",
        "loraflow.base.usable",
        "loraflow.base.model_config",
        "loraflow.base.weight_files",
        "loraflow.base.repack",
        *_TEMPLATE,
    ),
    disk_estimate="origin",
)

TOKENIZE = Stage(
    name="tokenize",
    version=3,  # 3: what a template leaves unmarked in an answer is learned; a question that it cuts is refused
    module="loraflow.data.tokenization",
    config=configs.TokenizeConfig,
    inputs={"rows": _from(CHECK_DATASET, part="train"), "base": _from(RESOLVE_BASE, part="tokenizer")},
    code=(
        "loraflow.data.tokenization",
        "loraflow.data.chunk_encoder",
        "loraflow.data.positions",
        "loraflow.data.token_cache",
        "loraflow.store.chunk_cache",
        "loraflow.data.token_files",
        "loraflow.data.token_report",
        "loraflow.data.mask_view",
        "loraflow.data.prompt_audit",
        *_TEMPLATE,
        "loraflow.data.packing",
    ),
    placeable=True,
)

TRAIN = Stage(
    name="train",
    # 3: longrope: each document has its own angles, whatever the padding of packed rows
    version=4,  # 4: the stock engine's loss is that of the model's own logits, for architectures that trl does not know
    module="loraflow.training.train",
    config=configs.TrainConfig,
    inputs={"tokens": _from(TOKENIZE), "base": _from(RESOLVE_BASE)},
    runtime=JobRuntime.of_training,
    code=(
        "loraflow.training.train",
        "loraflow.training.setup",
        "loraflow.data.positions",
        "loraflow.training.engine",
        "loraflow.training.choices",
        "loraflow.training.document_check",
        "loraflow.training.generation_check",
        "loraflow.base.forced_logits",
        "loraflow.base.generation_settings",
        "loraflow.training.base_model",
        "loraflow.training.stock_engine",
        "loraflow.training.stock_head",
        "loraflow.training.fast_engine",
        "loraflow.training.out_of_memory",
        "loraflow.training.arguments",
        "loraflow.training.trainer",
        "loraflow.training.schedule",
        "loraflow.training.batches",
        "loraflow.training.row_lengths",
        "loraflow.training.collation",
        "loraflow.training.prefix_sharing",
        "loraflow.training.sharding",
        "loraflow.training.compile_gain",
        "loraflow.training.graph_choice",
        "loraflow.training.cuda_graphs",
        "loraflow.training.layers",
        "loraflow.training.attention",
        "loraflow.training.angles",
        "loraflow.training.flash4",
        "loraflow.training.lora_kernels",
        "loraflow.training.frozen_linear",
        "loraflow.training.loss_head",
        "loraflow.training.loss_kernel",
        "loraflow.data.token_rows",
        "loraflow.data.packing",
        "loraflow.data.common_prefix",
        "loraflow.hardware.process_group",
        *_TEMPLATE,
        "loraflow.base.architecture",
        "loraflow.base.load",
        "loraflow.base.model_config",
        "loraflow.base.longrope",
        *_HARDWARE,
        "loraflow.base.weight_files",
        "loraflow.adapters.origin",
        "loraflow.adapters.tokenizer_files",
        "loraflow.adapters.lora_config",
        "loraflow.adapters.targets",
        "loraflow.adapters.fused_projections",
        "loraflow.adapters.lora_updates",
        "loraflow.adapters.adapter_config",
        "loraflow.adapters.validation",
        "loraflow.adapters.peft_folder",
        "loraflow.adapters.variants",
        "loraflow.adapters.loralib",
        "loraflow.adapters.loralib.mergeable_layer",
        "loraflow.adapters.loralib.layers",
        "loraflow.adapters.loralib.swap",
        "loraflow.adapters.loralib.checkpoint",
        "loraflow.adapters.loralib.model",
        "loraflow.adapters.loralib.export",
    ),
    uses_gpu=True,
    placeable=True,
    several_devices=True,
    several_nodes=True,
    oom_field="micro_batch",
)

TRAIN_GROUP = Stage(
    name="train_group",
    version=1,
    module="loraflow.training.train_group",
    config=configs.TrainGroupConfig,
    inputs={"tokens": _from(TOKENIZE), "base": _from(RESOLVE_BASE)},
    runtime=JobRuntime.of_training,
    code=(
        "loraflow.training.train_group",
        "loraflow.training.group_trainer",
        "loraflow.training.group_batches",
        "loraflow.training.group_lora",
        "loraflow.training.validation_loss",
        *TRAIN.code,
    ),
    uses_gpu=True,
)

MERGE = Stage(
    name="merge",
    version=5,  # 5: trained tokens of a tied head are merged into a head of its own
    module="loraflow.adapters.merge",
    config=configs.MergeConfig,
    inputs={
        "base": _from(RESOLVE_BASE),
        "adapter": _from(TRAIN, part="adapter"),
        "tokens": _from(TOKENIZE, optional=True),  # rows to compare two ways of merging (Recipe.compares_merges)
    },
    code=(
        "loraflow.adapters.merge",
        "loraflow.adapters.merge_folders",
        "loraflow.adapters.adapter_config",
        "loraflow.adapters.validation",
        "loraflow.adapters.origin",
        "loraflow.adapters.accept",
        "loraflow.adapters.completeness",
        "loraflow.adapters.vocabulary",
        "loraflow.adapters.tokenizer_files",
        "loraflow.base.meta",
        "loraflow.base.model_config",
        "loraflow.adapters.merge_plan",
        "loraflow.adapters.streaming_merge",
        "loraflow.adapters.safetensors_files",
        "loraflow.adapters.lora_updates",
        "loraflow.adapters.fused_projections",
        "loraflow.adapters.merge_with_peft",
        "loraflow.adapters.merge_nf4",
        "loraflow.adapters.nf4",
        "loraflow.adapters.logits",
        "loraflow.base.architecture",
        "loraflow.base.load",
        *_HARDWARE,
        "loraflow.base.weight_files",
        "loraflow.data.token_rows",
        "loraflow.data.packing",
        *_TEMPLATE,
    ),
    placeable=True,
    disk_estimate="base",
)

VERIFY = Stage(
    name="verify",
    version=2,  # 2: a seeded sample of the held-out rows, not the first ones
    module="loraflow.adapters.verify",
    config=configs.VerifyConfig,
    inputs={
        "base": _from(RESOLVE_BASE),
        "adapter": _from(TRAIN, part="adapter"),
        "merged": _from(MERGE),
        "rows": _from(CHECK_DATASET, part="heldout"),
    },
    code=(
        "loraflow.adapters.verify",
        "loraflow.data.sampling",
        "loraflow.data.split",
        "loraflow.adapters.logits",
        "loraflow.adapters.nf4",
        "loraflow.base.architecture",
        "loraflow.base.load",
        "loraflow.base.model_config",
        *_HARDWARE,
        *_TEMPLATE,
    ),
    uses_gpu=True,
    placeable=True,
)

DEAL_ROWS = Stage(
    name="deal_rows",
    version=1,
    module="loraflow.data.deal_rows",
    config=configs.DealRowsConfig,
    inputs={"rows": _from(CHECK_DATASET, part="heldout")},
    code=("loraflow.data.deal_rows", "loraflow.data.row_key", "loraflow.data.chats"),
    in_worker=False,
)

EVALUATE = Stage(
    name="evaluate",
    # 2: the common prefix of the prompts is computed once; the last bits of a loss may differ
    # 3: evaluation.max_rows is a seeded sample; intervals of token-weighted means, and of rows in groups; only the token
    # that closes an answer ends it
    # 4: attention logits are capped with transformers 5.17 too (Gemma 2)
    # 5: answers one at a time where padding changes them; logits as untested architectures compute them; the sample of
    # max_rows is spread over groups or labels
    # 6: no shared prefix for an architecture whose answers change with the padding behind it
    version=6,
    module="loraflow.evaluation.score",
    config=configs.EvaluateConfig,
    inputs={"model": _from(RESOLVE_BASE, MERGE), "rows": _from(CHECK_DATASET, DEAL_ROWS, part="heldout")},
    code=(
        "loraflow.evaluation.score",
        "loraflow.data.call_parser",
        "loraflow.data.sampling",
        "loraflow.data.split",
        "loraflow.evaluation.answers_file",
        "loraflow.evaluation.generation",
        "loraflow.evaluation.padding_check",
        "loraflow.base.forced_logits",
        "loraflow.base.generation_settings",
        "loraflow.data.positions",
        "loraflow.evaluation.likelihood",
        "loraflow.evaluation.prefix_cache",
        "loraflow.data.common_prefix",
        "loraflow.evaluation.kv_cache",
        "loraflow.evaluation.row_batches",
        "loraflow.evaluation.greedy_decoding",
        "loraflow.evaluation.intervals",
        "loraflow.evaluation.groups",
        "loraflow.evaluation.label_scores",
        "loraflow.evaluation.metric_modules",
        "loraflow.evaluation.values",
        "loraflow.hardware.process_group",
        "loraflow.base.architecture",
        "loraflow.base.load",
        "loraflow.base.model_config",
        "loraflow.base.longrope",
        *_HARDWARE,
        *_TEMPLATE,
    ),
    uses_gpu=True,
    placeable=True,
    several_devices=True,
    oom_field="eval_batch_size",
)

CHECK_GENERAL = Stage(
    name="check_general",
    version=1,
    module="loraflow.data.general",
    config=configs.CheckGeneralConfig,
    inputs={"rows": _from(CHECK_DATASET, part="train")},
    runtime=JobRuntime.of_general,
    code=(
        "loraflow.data.general",
        "loraflow.data.general_rows",
        *VERSION_DATASET.code,
        "loraflow.data.readers",
        "loraflow.data.json_reader",
        "loraflow.data.json_text",
        "loraflow.data.csv_reader",
        "loraflow.data.chat_formats",
        "loraflow.data.cell_values",
        "loraflow.data.row_fields",
        "loraflow.data.reasoning",
        "loraflow.data.tools",
        "loraflow.data.labels",
        "loraflow.data.preference_pairs",
        "loraflow.data.container_text",
        "loraflow.data.containers",
        "loraflow.data.judgements",
        "loraflow.data.marks",
        "loraflow.data.mark_names",
        "loraflow.data.row_key",
        "loraflow.data.split",
        "loraflow.data.chats",
    ),
    in_worker=False,
)

SCORE_GENERAL = Stage(
    name="score_general",
    version=1,
    module="loraflow.evaluation.general",
    config=configs.ScoreGeneralConfig,
    inputs={"model": _from(RESOLVE_BASE, MERGE), "general": _from(CHECK_GENERAL, part="general")},
    code=(
        "loraflow.evaluation.general",
        "loraflow.evaluation.choices",
        "loraflow.evaluation.generation",
        "loraflow.evaluation.answers_file",
        "loraflow.evaluation.padding_check",
        "loraflow.evaluation.greedy_decoding",
        "loraflow.evaluation.values",
        "loraflow.data.general_rows",
        "loraflow.evaluation.likelihood",
        "loraflow.evaluation.prefix_cache",
        "loraflow.data.common_prefix",
        "loraflow.evaluation.kv_cache",
        "loraflow.evaluation.row_batches",
        "loraflow.evaluation.intervals",
        "loraflow.data.positions",
        "loraflow.hardware.process_group",
        "loraflow.base.architecture",
        "loraflow.base.load",
        "loraflow.base.forced_logits",
        "loraflow.base.generation_settings",
        "loraflow.base.longrope",
        "loraflow.base.model_config",
        *_HARDWARE,
        *_TEMPLATE,
    ),
    uses_gpu=True,
    placeable=True,
    several_devices=True,
    oom_field="eval_batch_size",
)

STAGES: dict[str, Stage] = {
    stage.name: stage
    for stage in (
        VERSION_DATASET,
        CHECK_DATASET,
        CHECK_GENERAL,
        RESOLVE_BASE,
        TOKENIZE,
        TRAIN,
        TRAIN_GROUP,
        MERGE,
        VERIFY,
        DEAL_ROWS,
        EVALUATE,
        SCORE_GENERAL,
    )
}


def check_names(names: Iterable[str], where: str) -> None:
    """Check that names are stages.

    Raises:
        BadConfig: there is no such stage.
    """
    unknown = [name for name in names if name not in STAGES]
    if unknown:
        raise BadConfig(
            "There is no such stage.", where=where, expected=f"one of {', '.join(STAGES)}", got=", ".join(unknown)
        )
