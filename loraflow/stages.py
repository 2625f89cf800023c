"""The table of stages: name, version, module, inputs and needs of each stage.

To add a stage: write its module with a `run` function, its config in `loraflow/config/stage_configs.py`, its task in
`tasks/stages.py`, and its row. `docs/design.md` has a worked example.

If a change to a stage's code can change its result, raise the stage's version. A golden test fails until you have either
raised it or recorded the new code as equivalent.
"""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Literal

from loraflow import stage_code
from loraflow.config import Recipe
from loraflow.config import stage_configs as configs
from loraflow.config.job_runtime import JobRuntime
from loraflow.config.stage_configs import RecipeContext, StageConfig
from loraflow.failures import BadConfig


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
    code: tuple[str, ...]  # modules whose code decides the result (`loraflow.stage_code`)
    inputs: Mapping[str, Input] = field(default_factory=dict)
    runtime: Callable[[Recipe, RecipeContext], JobRuntime] = JobRuntime.from_recipe
    in_worker: bool = True  # in a worker process; otherwise in the process of the flow
    worker_imports: tuple[str, ...] = ()  # what its worker imports beside `module`: the fork server imports it before
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
    module="loraflow.data.versions.version",
    config=configs.VersionDatasetConfig,
    runtime=JobRuntime.of_dataset,
    code=stage_code.VERSION_DATASET,
    in_worker=False,
)

CHECK_DATASET = Stage(
    name="check_dataset",
    # docs/upgrade.md lists what earlier versions of the stages changed.
    # 18: nulls in the schemas of tools are kept; a chat_history that is text is refused
    version=18,
    module="loraflow.data.checks.check",
    config=configs.CheckDatasetConfig,
    inputs={"dataset": _from(VERSION_DATASET)},
    code=stage_code.CHECK_DATASET,
    in_worker=False,
)

RESOLVE_BASE = Stage(
    name="resolve_base",
    version=5,  # 5: tokenizers whose class has another normalizer
    module="loraflow.base.resolve",
    config=configs.ResolveBaseConfig,
    runtime=JobRuntime.of_base,
    code=stage_code.RESOLVE_BASE,
    disk_estimate="origin",
    worker_imports=("transformers.modeling_utils",),
)

TOKENIZE = Stage(
    name="tokenize",
    version=5,  # 5: a learned answer begins where the tokens of the served prompt end
    module="loraflow.data.tokens.tokenization",
    config=configs.TokenizeConfig,
    inputs={"rows": _from(CHECK_DATASET, part="train"), "base": _from(RESOLVE_BASE, part="tokenizer")},
    code=stage_code.TOKENIZE,
    placeable=True,
)

TRAIN = Stage(
    name="train",
    version=4,  # 4: the stock engine's loss is that of the model's own logits, for architectures that trl does not know
    module="loraflow.training.train",
    config=configs.TrainConfig,
    inputs={"tokens": _from(TOKENIZE), "base": _from(RESOLVE_BASE)},
    runtime=JobRuntime.of_training,
    code=stage_code.TRAIN,
    uses_gpu=True,
    placeable=True,
    several_devices=True,
    several_nodes=True,
    oom_field="micro_batch",
    worker_imports=("peft", "loraflow.training.trainer", "loraflow.training.fast_engine"),
)

TRAIN_GROUP = Stage(
    name="train_group",
    version=1,
    module="loraflow.training.train_group",
    config=configs.TrainGroupConfig,
    inputs={"tokens": _from(TOKENIZE), "base": _from(RESOLVE_BASE)},
    runtime=JobRuntime.of_training,
    code=stage_code.TRAIN_GROUP,
    uses_gpu=True,
    worker_imports=("peft", "loraflow.training.group_trainer"),
)

MERGE = Stage(
    name="merge",
    version=6,  # 6: the stop tokens of config.json are in generation_config.json
    module="loraflow.adapters.merge",
    config=configs.MergeConfig,
    inputs={
        "base": _from(RESOLVE_BASE),
        "adapter": _from(TRAIN, part="adapter"),
        "tokens": _from(TOKENIZE, optional=True),  # rows to compare two ways of merging (Recipe.compares_merges)
    },
    code=stage_code.MERGE,
    placeable=True,
    disk_estimate="base",
    worker_imports=("loraflow.adapters.merge_folders",),
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
    code=stage_code.VERIFY,
    uses_gpu=True,
    placeable=True,
)

DEAL_ROWS = Stage(
    name="deal_rows",
    version=1,
    module="loraflow.data.checks.deal_rows",
    config=configs.DealRowsConfig,
    inputs={"rows": _from(CHECK_DATASET, part="heldout")},
    code=stage_code.DEAL_ROWS,
    in_worker=False,
)

EVALUATE = Stage(
    name="evaluate",
    version=11,  # 11: the tokens of prompts and answers as in tokenize 5
    module="loraflow.evaluation.score",
    config=configs.EvaluateConfig,
    inputs={"model": _from(RESOLVE_BASE, MERGE), "rows": _from(CHECK_DATASET, DEAL_ROWS, part="heldout")},
    code=stage_code.EVALUATE,
    uses_gpu=True,
    placeable=True,
    several_devices=True,
    oom_field="eval_batch_size",
    worker_imports=("evaluate", "scipy.stats"),
)

CHECK_GENERAL = Stage(
    name="check_general",
    version=10,  # 10: chats as check_dataset 18 reads them
    module="loraflow.data.checks.general",
    config=configs.CheckGeneralConfig,
    inputs={"rows": _from(CHECK_DATASET, part="train")},
    runtime=JobRuntime.of_general,
    code=stage_code.CHECK_GENERAL,
    in_worker=False,
)

SCORE_GENERAL = Stage(
    name="score_general",
    version=5,  # 5: the tokens of prompts and answers as in tokenize 5
    module="loraflow.evaluation.general",
    config=configs.ScoreGeneralConfig,
    inputs={"model": _from(RESOLVE_BASE, MERGE), "general": _from(CHECK_GENERAL, part="general")},
    code=stage_code.SCORE_GENERAL,
    uses_gpu=True,
    placeable=True,
    several_devices=True,
    oom_field="eval_batch_size",
    worker_imports=("scipy.stats",),
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
            "There is no such stage.",
            where=where,
            expected=f"one of {', '.join(STAGES)}",
            got=", ".join(unknown),
            next_step="correct the name",
        )
