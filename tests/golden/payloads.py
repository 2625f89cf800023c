"""The payloads that a recipe's jobs are fingerprinted from, for every recipe in configs/ and for variants of them.

A changed payload changes a fingerprint, and every user's store recomputes. `tests/unit/execution/test_identity.py` compares them
with payloads.json, which was recorded before the code was reorganised in November 2026.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

from loraflow import identity
from loraflow.config import Recipe, load_recipe
from loraflow.config.locations import BaseLocation, DatasetLocation, FolderOrigin, HubOrigin
from loraflow.stages import STAGES
from loraflow.store import Ref
from tests.job_factory import Outside, make_job

REPOSITORY = Path(__file__).parent.parent.parent
BEST = {
    "data.validation_fraction": 0.1,
    "training_config.load_best_model_at_end": True,
    "training_config.eval_strategy": "steps",
}
# name -> (recipe, overrides)
VARIANTS: dict[str, tuple[str, dict[str, Any]]] = {
    "nf4": ("phi3-mini", {"base.quantization": "nf4"}),
    "nf4-single": ("phi3-mini", {"base.quantization": "nf4", "base.double_quantization": False}),
    "nf4-onto-dequantized": ("phi3-mini-qlora", {"merge.onto": "dequantized"}),
    "nf4-onto-base": ("phi3-mini-qlora", {"merge.onto": "base"}),
    "fp8": ("phi3-mini", {"base.quantization": "fp8"}),
    "loralib-qv": ("phi3-mini-loralib", {"loralib_config.enable_lora": {"qkv_proj": ["q", "v"]}}),
    "loralib-merge-weights": ("phi3-mini-loralib", {"loralib_config.merge_weights": True}),
    "best": ("quickstart", {**BEST, "training_config.eval_steps": 20, "training_config.save_steps": 20}),
    "best-logging-steps": ("quickstart", {**BEST, "training_config.save_steps": 10}),
    "best-epochs": (
        "quickstart",
        {**BEST, "training_config.eval_strategy": "epoch", "training_config.save_strategy": "epoch"},
    ),
    "best-patience": (
        "quickstart",
        {
            **BEST,
            "training_config.eval_steps": 20,
            "training_config.save_steps": 20,
            "training_config.early_stopping_patience": 3,
        },
    ),
    "validation": ("quickstart", {"data.validation_fraction": 0.2, "training_config.eval_strategy": "epoch"}),
    "heldout-fraction": ("quickstart", {"data.heldout": [], "data.heldout_fraction": 0.2, "data.seed": 7}),
    "columns": (
        "quickstart",
        {"data.format": "prompt_completion", "data.columns": {"prompt": "question", "completion": "answer"}},
    ),
    "limit-system": ("quickstart", {"data.limit": 100, "data.system": "Answer in JSON.", "data.duplicates": "keep"}),
    "variants-of-lora": (
        "phi3-mini",
        {
            "peft_config.use_rslora": True,
            "peft_config.use_dora": True,
            "peft_config.loraplus_lr_ratio": 16,
            "peft_config.rank_pattern": {"o_proj": 8},
            "peft_config.alpha_pattern": {"o_proj": 4.5},
            "peft_config.layers_to_transform": [0, 1],
            "peft_config.exclude_modules": ["lm_head"],
        },
    ),
    "slices": (
        "quickstart",
        {"evaluation.slices": ["length", "language"], "gate.slices": {"tone": {"exact_match": 0.1}}},
    ),
    "pissa": ("phi3-mini", {"peft_config.init_lora_weights": "pissa_niter_4"}),
    "eva": ("phi3-mini", {"peft_config.init_lora_weights": "eva", "peft_config.eva_config": {"rho": 1.5}}),
    "loftq": ("phi3-mini-qlora", {"peft_config.init_lora_weights": "loftq"}),
    "tokens-and-modules": (
        "phi3-mini",
        {"peft_config.trainable_token_indices": [1, 2], "peft_config.modules_to_save": ["lm_head"]},
    ),
    "scheduler-kwargs": (
        "phi3-mini",
        {
            "training_config.lr_scheduler_type": "cosine_with_restarts",
            "training_config.lr_scheduler_kwargs": {"num_cycles": 2},
            "training_config.neftune_noise_alpha": 5,
            "training_config.num_train_epochs": 1.5,
        },
    ),
    "runtime-changes-nothing": (
        "quickstart",
        {
            "runtime.micro_batch": 2,
            "runtime.engine": "stock",
            "runtime.threads": 1,
            "training_config.logging_steps": 3,
            "training_config.save_steps": 7,
            "training_config.per_device_eval_batch_size": 2,
            "training_config.report_to": ["tensorboard"],
        },
    ),
}


OUTSIDE = Outside(
    DatasetLocation(md5="1" * 32 + ".dir", name="data", origin=FolderOrigin(folder="data")),
    BaseLocation(
        source={"kind": "hub", "model": "a/b", "commit": "2" * 40}, origin=HubOrigin(hub="a/b", commit="2" * 40)
    ),
    {"exact_match": "3" * 64, "rouge": "4" * 64},
)


def _ref(stage: str, digit: str, **facets: str) -> Ref:
    return Ref(stage=stage, fingerprint=digit * 64, digest=digit.upper() * 64, uri="somewhere", facets=facets)


def inputs_of(stage: str, recipe: Recipe) -> dict[str, Ref]:
    """Return made-up inputs for a stage, with every facet that a stage can ask for."""
    dataset, base = _ref("version_dataset", "a"), _ref("resolve_base", "b", tokenizer="5" * 64)
    rows = _ref("check_dataset", "c", train="6" * 64, heldout="7" * 64)
    tokens, adapter = _ref("tokenize", "d"), _ref("train", "e", adapter="8" * 64)
    merged = _ref("merge", "f")
    return {
        "version_dataset": {},
        "check_dataset": {"dataset": dataset},
        "resolve_base": {},
        "tokenize": {"rows": rows, "base": base},
        "train": {"tokens": tokens, "base": base},
        "merge": {"base": base, "adapter": adapter, **({"tokens": tokens} if recipe.compares_merges else {})},
        "verify": {"base": base, "adapter": adapter, "merged": merged, "rows": rows},
        "evaluate": {"model": merged, "rows": rows},
    }[stage]


def payloads() -> dict[str, dict[str, str]]:
    """Return {recipe or variant: {stage: the canonical bytes of its payload, as text}}."""
    recipes = {path.stem: (path.stem, {}) for path in sorted((REPOSITORY / "configs").glob("*.yaml"))}
    found: dict[str, dict[str, str]] = {}
    for name, (recipe_name, overrides) in {**recipes, **VARIANTS}.items():
        recipe = load_recipe(REPOSITORY / "configs" / f"{recipe_name}.yaml", overrides)
        found[name] = {
            name: identity.canonical(make_job(name, recipe, inputs_of(name, recipe), OUTSIDE).payload).decode()
            for name in STAGES
            # Only recipes that ask for general rows have the last two; the configs of the others are not in a recipe.
            if name not in ("deal_rows", "train_group", "check_general", "score_general")
        }
    file = DatasetLocation(md5="9" * 32, name="chats.jsonl", origin=FolderOrigin(folder="chats.jsonl"))
    quickstart = load_recipe(REPOSITORY / "configs" / "quickstart.yaml")
    job = make_job("version_dataset", quickstart, {}, replace(OUTSIDE, dataset=file))
    found["one-file"] = {"version_dataset": identity.canonical(job.payload).decode()}
    return found
