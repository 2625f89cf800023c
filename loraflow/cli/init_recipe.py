"""The text of the recipe that `loraflow init` writes, filled in from the lengths and formats of the chats."""

from __future__ import annotations

import json
import math
import re
from pathlib import Path
from typing import TYPE_CHECKING

from loraflow.cli.init_dataset import FEW_ROWS, SizeSettings, UserDataset, estimated_tokens, tokens_of
from loraflow.data.checks.split import label_values
from loraflow.data.templates.rendered_calls import call_text

if TYPE_CHECKING:
    from loraflow.data.chats import Message

RECIPE = """\
# {title}
#
#   loraflow plan {file}
#   loraflow run {file}
name: {name}

data:
  source: {source}                # pins every byte; a run refuses files that differ from it
  train: [{train}]{columns}
  {heldout}
  loss_on: assistant              # learn the answers, not the questions
  too_long: drop                  # rows beyond max_length are left out, and counted in the report
  near_duplicates: {near}         # {why_near}

base:
  model: {base}{repack}
  dtype: {dtype}

training_config:                  # the names of trl.SFTConfig
  learning_rate: 2.0e-4           # LoRA takes ten times the rate of full fine-tuning
  lr_scheduler_type: cosine
  warmup_steps: {warmup}               # {why_warmup}
  num_train_epochs: {epochs}             # {rows} rows: {why_epochs}
  per_device_train_batch_size: 4  # times the next line: the global batch, which decides the result
  gradient_accumulation_steps: {accumulation}
  max_length: {max_length}                # the longest of your chats has about {longest} tokens
  bf16: {bf16}
  packing: {packing}                  # {why_packing}
  gradient_checkpointing: null    # recompute activations only if memory needs it: a fifth slower
  logging_steps: {logging_steps}
  seed: 0

peft_config:                      # the names of peft.LoraConfig
  r: 16
  lora_alpha: 32                  # twice the rank, as in the Phi-3 model card
  lora_dropout: 0.05
  target_modules: all-linear      # every projection of every layer, by any name

evaluation:
  metrics: [{metrics}]
  max_rows: 200                   # a seeded sample of each held-out set
  max_new_tokens: {new_tokens}             # the longest of your answers has about {longest_answer} tokens
  dtype: float32                  # scores repeat exactly

gate:
  primary: {primary}             # must improve on base and champion
  guards: {guards}

register:
  model: {name}
"""


def recipe_text(name: str, file: Path, source: str, base: str, dataset: UserDataset) -> str:
    """Fill in the template from the lengths and formats of the chats."""
    chats, size = dataset.chats, dataset.size
    text = RECIPE.format(
        title=f"{name}: LoRA on {base}",
        name=name,
        file=file,
        source=source,
        rows=f"{size.rows:,}",
        **_data_values(dataset),
        **_base_values(base, size),
        **_training_values(chats, size),
        **_scoring_values(chats, dataset.heldout_rows or round(len(chats) * size.heldout_fraction)),
    )
    return "".join(map(align_comment, text.splitlines(keepends=True)))


def _data_values(dataset: UserDataset) -> dict[str, object]:
    columns, heldout, near = dataset.columns, dataset.heldout_files, dataset.near_duplicates
    fraction = dataset.size.heldout_fraction
    return {
        "train": ", ".join(map(_plain, dataset.train_files)),
        "heldout": f"heldout: [{', '.join(map(_plain, heldout))}]   # by their names; only the gate uses them"
        if heldout
        else f"heldout_fraction: {fraction}           # by a seeded hash of prompts; only the gate uses them",
        "columns": f"\n  columns: {json.dumps(columns)}  # loraflow's names: your columns" if columns else "",
        "near": near,
        "why_near": "nearly equal rows are on one side of the split, or are left out of training"
        if near == "drop"
        else "many of your rows are nearly equal; drop would put all of them on one side",
    }


def _base_values(base: str, size: SizeSettings) -> dict[str, object]:
    """Return the base and what depends on it: a bundled base is small, and is trained on any CPU."""
    small = base.startswith("bundled:")
    return {
        "base": base if re.fullmatch(r"[\w./:-]+", base) else json.dumps(base, ensure_ascii=False),
        "repack": "\n  repack: phi3                    # fused projections, as in Phi-3" if small else "",
        "dtype": "float32                  # any CPU computes in it" if small else "bfloat16",
        "bf16": "false                     # as the base" if small else "true                      # as the base",
        "packing": "true" if size.packing else "false",
        "why_packing": "several short chats share a row; attention stays inside each chat"
        if size.packing
        else "one chat a row; with true, several short chats share a row"
        if small
        else "packed, these chats would be too few rows for enough steps",
    }


def _training_values(chats: list[list[Message]], size: SizeSettings) -> dict[str, object]:
    why_epochs = "enough to train on each once"
    if size.rows < FEW_ROWS:
        why_epochs = "few, so train on each several times" if size.epochs > 3 else "few, so train on each three times"
    return {
        "epochs": size.epochs,
        "why_epochs": why_epochs,
        "warmup": f"{size.warmup_steps:g}",
        "why_warmup": "a share of the steps" if size.warmup_steps else "so few steps have no warm-up",
        "accumulation": size.accumulation,
        "logging_steps": size.logging_steps,
        "max_length": size.max_length,
        "longest": max(map(tokens_of, chats)),
    }


def _scoring_values(chats: list[list[Message]], heldout: int) -> dict[str, object]:
    """Return the settings of evaluation and gate for answers that are JSON, labels, or other texts."""
    answers = [chat[-1]["content"] for chat in chats]
    longest_answer = max(estimated_tokens(chat[-1]["content"] + call_text(chat[-1])) for chat in chats) + 8
    primary = "token_loss"
    if all(map(_is_object, answers)):
        metrics, primary = "token_loss, exact_match, json_fields", "field_f1"
        guards = f"{{json_valid: {_margin(heldout, 0.01)}}}"
    elif label_values(answers) is not None:  # few short answers: accuracy, macro-F1, confusions
        metrics, guards = "token_loss, labels", f"{{accuracy: {_margin(heldout, 0.02)}}}"
    else:
        metrics = "token_loss, exact_match, token_f1, rouge, chrf"
        guards = f"{{rougeL: {_margin(heldout, 0.02)}}}"
    return {
        "metrics": metrics,
        "primary": primary,
        "guards": guards,
        "new_tokens": min(1024, max(32, 1 << (longest_answer - 1).bit_length())),
        "longest_answer": longest_answer,
    }


COMMENT_COLUMN = 34


def align_comment(line: str) -> str:
    """Move the comment behind a setting to the column of the others, if the setting ends before it."""
    setting, hash_sign, comment = line.rpartition("  # ")
    if not hash_sign or line.startswith("#") or setting.count('"') % 2:  # in a quoted text, it is no comment
        return line
    return f"{setting.rstrip():<{COMMENT_COLUMN - 2}}  # {comment.lstrip()}"


def _margin(heldout: int, least: float) -> float:
    """Return a margin that an unchanged model passes. The recipe scores 200 rows at most."""
    from loraflow.evaluation.power import margin_of_unchanged

    of_unchanged = margin_of_unchanged(min(max(heldout, 1), 200), 0.95, "rougeL") or least
    return min(max(least, math.ceil(100 * of_unchanged + 0.5) / 100), 0.5)


def _plain(text: str) -> str:
    """Return a text as a YAML scalar, quoted if YAML would read it as another value."""
    return text if re.fullmatch(r"[A-Za-z_/.][\w./-]*", text) else json.dumps(text, ensure_ascii=False)


def _is_object(text: str) -> bool:
    try:
        return isinstance(json.loads(text), dict)
    except (ValueError, RecursionError):
        return False
