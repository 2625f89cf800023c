"""The table of stages: version, code, place, and the slice of the recipe that is part of each one's identity.

A change to a stage that can change its result bumps its version here; a golden test asks for the decision.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from loraflow import identity
from loraflow.config import Recipe
from loraflow.job import Job
from loraflow.store import Ref

_CHECKPOINTING = {"gradient_checkpointing", "gradient_checkpointing_kwargs"}
_LOGGING = {"logging_strategy", "logging_steps", "logging_first_step", "log_level", "report_to", "run_name"}
_SAVING = {"save_strategy", "save_steps", "save_total_limit"}
_BATCHING = {"per_device_train_batch_size", "gradient_accumulation_steps", "per_device_eval_batch_size"}
_LOADING = {"dataloader_num_workers"}
_CHOOSING = {"eval_strategy", "eval_steps", "metric_for_best_model", "greater_is_better", "early_stopping_patience"}

_MASK = ("loraflow.data.loss_mask", "loraflow.data.alignment", "loraflow.data.template")

# training_config fields that are runtime in nature: they reach the trainer, but not identity.
TRAINING_RUNTIME = _CHECKPOINTING | _LOGGING | _SAVING | _BATCHING | _LOADING


@dataclass(frozen=True)
class Stage:
    """One step of the DAG."""

    name: str
    version: int
    function: str  # module:function, imported only where the stage runs
    child: bool  # in a worker process, or in the flow's own
    modules: tuple[str, ...]  # whose code makes the result
    slice: Callable[[Recipe, Mapping[str, Any]], dict[str, Any]]
    facets: tuple[tuple[str, str], ...] = ()  # (input, the part of it that the stage depends on)
    micro_batch: str | None = None  # the runtime field that is halved when memory does not suffice


def _version_dataset(recipe: Recipe, known: Mapping[str, Any]) -> dict[str, Any]:
    # A folder's id holds its files' names; a single file's does not.
    return {"md5": known["md5"]} | ({} if known["md5"].endswith(".dir") else {"name": known["name"]})


def _check_dataset(recipe: Recipe, known: Mapping[str, Any]) -> dict[str, Any]:
    data = recipe.data
    return data.model_dump(
        include={"format", "columns", "train", "heldout", "extra_heldout", "validation_fraction", "system"}
        | {"duplicates", "limit"}
        | ({"heldout_fraction"} if not data.heldout else set())
        | ({"seed"} if not data.heldout or data.validation_fraction else set())
    )


def _resolve_base(recipe: Recipe, known: Mapping[str, Any]) -> dict[str, Any]:
    base = recipe.base
    out = {"source": known["source"], "repack": base.repack, "trust_remote_code": base.trust_remote_code}
    return {**out, "dtype": base.dtype} if base.repack else out


def _tokenize(recipe: Recipe, known: Mapping[str, Any]) -> dict[str, Any]:
    data, training = recipe.data, recipe.training_config
    return {
        "loss_on": data.loss_on,
        "too_long": data.too_long,
        "special_tokens": data.special_tokens,
        "max_length": training.max_length,
        "packing": training.packing,
    }


def _train(recipe: Recipe, known: Mapping[str, Any]) -> dict[str, Any]:
    training = recipe.training_config
    leave = TRAINING_RUNTIME | {"max_length", "packing"}  # those two are in the tokens already
    if training.load_best_model_at_end:
        leave -= {"save_steps", "per_device_eval_batch_size"}  # the best checkpoint is one that was saved and measured
    else:
        leave |= _CHOOSING | {"load_best_model_at_end"}
    out = training.model_dump(exclude=leave)
    if training.load_best_model_at_end and training.eval_strategy == "steps" and training.eval_steps is None:
        out["eval_steps"] = training.logging_steps  # what transformers falls back to
    return {
        "method": recipe.method,
        "training_config": {**out, "global_batch": training.global_batch},
        "peft_config": recipe.peft_config.model_dump(),
        **({"loralib_config": recipe.loralib_config.model_dump()} if recipe.method == "loralib" else {}),
        "base": recipe.base.model_dump(
            include={"dtype", "quantization", "trust_remote_code"}
            | ({"double_quantization"} if recipe.base.quantization else set())
        ),
    }


def _evaluate(recipe: Recipe, known: Mapping[str, Any]) -> dict[str, Any]:
    out = recipe.evaluation.model_dump(exclude={"samples"})
    return {**out, "trust_remote_code": recipe.base.trust_remote_code, "modules": known.get("metric_modules", {})}


def _merge(recipe: Recipe, known: Mapping[str, Any]) -> dict[str, Any]:
    out = recipe.merge.model_dump(include={"dtype", "max_shard_size_gb"})
    if recipe.base.quantization != "nf4":
        return out
    return {**out, "nf4": {**_nf4(recipe), "onto": recipe.merge.onto, "trust": recipe.base.trust_remote_code}}


def _verify(recipe: Recipe, known: Mapping[str, Any]) -> dict[str, Any]:
    out = {"prompts": recipe.merge.verify_prompts, "trust_remote_code": recipe.base.trust_remote_code}
    return {**out, "nf4": _nf4(recipe)} if recipe.base.quantization == "nf4" else out


def _nf4(recipe: Recipe) -> dict[str, Any]:
    return {"dtype": recipe.base.dtype, "double": recipe.base.double_quantization}


STAGES: dict[str, Stage] = {
    stage.name: stage
    for stage in (
        Stage(
            "version_dataset",
            1,
            "loraflow.data.version:run",
            False,
            ("loraflow.data.version", "loraflow.data.dvc"),
            _version_dataset,
        ),
        Stage(
            "check_dataset",
            3,
            "loraflow.data.check:run",
            False,
            ("loraflow.data.check", "loraflow.data.readers", "loraflow.data.chat_formats", "loraflow.data.csv_reader",
             "loraflow.data.split"),
            _check_dataset,
        ),
        Stage(
            "resolve_base",
            1,
            "loraflow.base.resolve:run",
            True,
            ("loraflow.base.resolve", "loraflow.base.repack", *_MASK),
            _resolve_base,
        ),
        Stage(
            "tokenize",
            1,
            "loraflow.data.tokenization:run",
            True,
            ("loraflow.data.tokenization", *_MASK, "loraflow.data.packing"),
            _tokenize,
            facets=(("rows", "train"), ("base", "tokenizer")),
        ),
        Stage(
            "train",
            2,
            "loraflow.training.train:run",
            True,
            ("loraflow.training.train", "loraflow.training.trainer", "loraflow.training.batches",
             "loraflow.training.prefix_sharing", "loraflow.training.sharding",
             "loraflow.data.packing",
             "loraflow.training.engine", "loraflow.hardware.group", "loraflow.training.attention",
             "loraflow.training.flash4", "loraflow.training.lora_kernels",
             "loraflow.training.frozen_linear", "loraflow.training.loss_head", *_MASK, "loraflow.base.load",
             "loraflow.adapters.validation", "loraflow.adapters.lora_config", "loraflow.adapters.fused_projections",
             "loraflow.adapters.lora_updates", "loraflow.adapters.variants", "loraflow.adapters.loralib",
             "loraflow.adapters.loralib.layers", "loraflow.adapters.loralib.swap",
             "loraflow.adapters.loralib.model", "loraflow.adapters.loralib.export"),
            _train,
            micro_batch="micro_batch",
        ),
        Stage(
            "merge",
            2,
            "loraflow.adapters.merge:run",
            True,
            ("loraflow.adapters.merge", "loraflow.adapters.streaming_merge", "loraflow.adapters.validation",
             "loraflow.adapters.safetensors_files",
             "loraflow.adapters.lora_updates", "loraflow.adapters.fused_projections", "loraflow.adapters.merge_nf4",
             "loraflow.adapters.nf4",
             "loraflow.adapters.verify", "loraflow.base.load", "loraflow.training.batches",
             "loraflow.training.prefix_sharing",
             "loraflow.data.packing", *_MASK),
            _merge,
            facets=(("adapter", "adapter"),),
        ),
        Stage(
            "verify",
            1,
            "loraflow.adapters.verify:run",
            True,
            ("loraflow.adapters.verify", "loraflow.adapters.nf4", "loraflow.base.load", *_MASK),
            _verify,
            facets=(("adapter", "adapter"), ("rows", "heldout")),
        ),
        Stage(
            "evaluate",
            2,  # 2: what all prompts begin with is computed once; the last bits of a loss may differ
            "loraflow.evaluation.score:run",
            True,
            ("loraflow.evaluation.score", "loraflow.evaluation.generation", "loraflow.evaluation.prefix",
             "loraflow.evaluation.kv_cache", "loraflow.evaluation.greedy_decoding",
             "loraflow.evaluation.intervals", "loraflow.evaluation.metric_modules", "loraflow.hardware.group",
             "loraflow.base.load", *_MASK),
            _evaluate,
            facets=(("rows", "heldout"),),
            micro_batch="eval_batch_size",
        ),
    )
}  # fmt: skip


def make_job(name: str, recipe: Recipe, inputs: Mapping[str, Ref], known: Mapping[str, Any] | None = None) -> Job:
    """Build a stage's job. `known` holds what the outside world says, such as the dataset's md5."""
    stage = STAGES[name]
    runtime = recipe.runtime.model_dump()
    if name == "train":
        runtime["training_config"] = recipe.training_config.model_dump(
            include=TRAINING_RUNTIME
            | (set() if recipe.training_config.load_best_model_at_end else _CHOOSING | {"load_best_model_at_end"})
        )
        runtime["use_cache"] = recipe.base.use_cache
    if name in ("version_dataset", "resolve_base"):
        runtime["origin"] = dict((known or {}).get("origin", {}))
    return Job(
        stage=name,
        version=stage.version,
        inputs=dict(inputs),
        facets={facet[0]: facet[1] for facet in stage.facets if facet[0] in inputs},
        config=stage.slice(recipe, known or {}),
        runtime=runtime,
    )


def code_digest(name: str) -> str:
    """Return the digest of a stage's code."""
    return identity.code_digest(STAGES[name].modules)
