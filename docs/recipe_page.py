"""Write docs/recipe.md: all keys of a recipe, from the models that validate it.

python docs/recipe_page.py            a test compares the page with the models
"""

from __future__ import annotations

import json
import re
import textwrap
import types
import typing
from collections.abc import Iterator
from pathlib import Path

from pydantic import BaseModel
from pydantic.fields import FieldInfo
from pydantic_core import PydanticUndefined

from loraflow.config import Recipe
from loraflow.config.load import section_model
from loraflow.config.renamed_keys import IGNORED, TRANSLATED

PAGE = Path(__file__).parent / "recipe.md"
# What a key without a description means.
SAME_AS = {
    "training_config": "[trl.SFTConfig](https://huggingface.co/docs/trl/sft_trainer#trl.SFTConfig)",
    "peft_config": "[peft.LoraConfig](https://huggingface.co/docs/peft/package_reference/lora#peft.LoraConfig)",
}
# Keys of these sections that do not mean exactly what the library documents.
NOTES = {
    "training_config.warmup_steps": "Below 1: a share of all steps. From 1: a number of steps.",
    "training_config.max_steps": "Optimizer steps; -1 trains num_train_epochs.",
    "training_config.per_device_train_batch_size": "Times gradient_accumulation_steps: the global batch. Only the "
    "product is part of the fingerprint; memory decides how many rows are computed at a time.",
    "training_config.gradient_accumulation_steps": "See per_device_train_batch_size.",
    "training_config.gradient_checkpointing": "null: as much as the memory requires (runtime.checkpointing).",
    "training_config.max_length": "Tokens of a row; data.too_long decides about longer rows.",
    "training_config.packing": "Put several chats into a row of max_length, by best fit. Attention stays within each chat.",
    "training_config.early_stopping_patience": "Stop after so many evaluations without improvement (transformers' "
    "EarlyStoppingCallback); needs load_best_model_at_end.",
    "training_config.metric_for_best_model": "eval_loss is the only metric.",
    "training_config.report_to": "none, or experiment trackers: tensorboard, wandb, mlflow, dvclive, trackio.",
    "training_config.seed": "Seed of the adapter's initial weights, dropout, and the order of rows.",
    "peft_config.target_modules": "all-linear, or names of modules. A name that matches no module is an error.",
    "peft_config.task_type": "Always CAUSAL_LM.",
}
INTRO = """\
# Recipe

<!-- Written by docs/recipe_page.py from the models in loraflow/config/. Do not edit it by hand. -->

A recipe is a YAML file in `configs/` with all settings of a run. `loraflow init` writes one, with a reason on every line;
[configs/quickstart.yaml](../configs/quickstart.yaml) is another example. Only `name` and `base.model` are required. An
unknown key or a wrong value is refused before anything runs, and the message lists all problems with their lines.

```bash
loraflow run configs/quickstart.yaml --set training_config.learning_rate=5e-4 --set runtime.threads=2
```

A stage is recomputed if a key that decides its result changes. Stages after it are recomputed only if its output changes
([identity](design.md#identity)).

| section | decides the result of | not part of any fingerprint |
|---|---|---|
| `data` | version_dataset, check_dataset, tokenize | `repo`, `rev`, `add`, `remote` (the md5 counts), `max_quarantined` |
| `base` | resolve_base, train; with `quantization: nf4` also merge, verify | `use_cache` |
| `training_config` | train; `max_length` and `packing`: tokenize | how often it logs and saves; trackers; recomputation |
| `method`, `peft_config`, `loralib_config` | train | |
| `evaluation` | evaluate | `samples` |
| `merge` | merge, verify | `max_kl` |
| `gate`, `register`, `publish` | | all: they are read after the stages |
| `runtime` | | all |
"""


def page() -> str:
    """Return the page's text."""
    parts = [INTRO]
    top = {name: field for name, field in fields(Recipe) if section_model(field) is None}
    parts.append(table("", top.items()))
    for name, field in fields(Recipe):
        model = section_model(field)
        if model is None:
            continue
        text = " ".join((model.__doc__ or "").split())
        if name in SAME_AS:
            text += f" Keys without a note have the meaning that {SAME_AS[name]} documents."
        text = textwrap.fill(text, 120, break_long_words=False, break_on_hyphens=False)
        parts.append(f"## {name}\n\n{text}\n\n{table(name, leaves(model))}")
        for key, item in fields(model):
            if (of_item := item_model(item)) is not None:
                doc = " ".join((of_item.__doc__ or "").split())
                parts.append(
                    f"### {name}.{key}\n\nEach item: {doc[0].lower()}{doc[1:]}\n\n{table('', fields(of_item))}"
                )
    parts.append(renamed())
    return "\n".join(parts)


def fields(model: type[BaseModel]) -> Iterator[tuple[str, FieldInfo]]:
    """Yield the keys of a model, as a recipe writes them."""
    for name, field in model.model_fields.items():
        yield field.alias or name, field


def item_model(field: FieldInfo) -> type[BaseModel] | None:
    """Return the model of the items of a list; None if the field is no list of models."""
    arguments = typing.get_args(field.annotation) if typing.get_origin(field.annotation) is list else ()
    return next((kind for kind in arguments if isinstance(kind, type) and issubclass(kind, BaseModel)), None)


def leaves(model: type[BaseModel], prefix: str = "") -> Iterator[tuple[str, FieldInfo]]:
    """Yield the keys below a section that have values of their own."""
    for name, field in fields(model):
        inner = section_model(field)
        if inner is None:
            yield prefix + name, field
        else:
            yield from leaves(inner, f"{prefix}{name}.")


def table(section: str, rows: typing.Iterable[tuple[str, FieldInfo]]) -> str:
    """Return the table of a section's keys."""
    lines = ["| key | default | values | meaning |", "|---|---|---|---|"]
    for name, field in rows:
        key = f"{section}.{name}" if section else name
        same = f"same meaning as {SAME_AS[section].split(']')[0][1:]}" if section in SAME_AS else ""
        meaning = field.description or NOTES.get(key, same)
        cells = (f"`{name}`", default(field), values(field), meaning)
        lines.append("| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |")
    return "\n".join(lines) + "\n"


def default(field: FieldInfo) -> str:
    """Return a field's default as YAML would have it."""
    if field.default is PydanticUndefined:
        return "required"
    return f"`{json.dumps(field.default, ensure_ascii=False)}`"


def values(field: FieldInfo) -> str:
    """Return what a field accepts: its type, its words, its bounds."""
    bounds = [text for item in field.metadata if (text := bound(item))]
    return ", ".join([kind(field.annotation), *bounds])


def bound(item: object) -> str:
    """Return a limit in words; empty if it is none."""
    for name, sign in (("ge", "≥"), ("gt", ">"), ("le", "≤"), ("lt", "<")):
        limit = getattr(item, name, None)
        if limit is not None:
            return f"{sign} {limit:g}"
    inner = getattr(item, "metadata", None)
    if inner:
        return ", ".join(text for part in inner if (text := bound(part)))
    pattern = getattr(item, "pattern", None)
    return f"`{pattern}`" if pattern else ""


def kind(annotation: object) -> str:
    """Return a type in the words of a recipe."""
    origin, arguments = typing.get_origin(annotation), typing.get_args(annotation)
    if origin is typing.Annotated:
        bounds = [text for item in arguments[1:] if (text := bound(item))]
        return " ".join([kind(arguments[0]), *bounds])
    if origin is typing.Literal:
        return ", ".join(f"`{value}`" for value in arguments)
    if origin in (typing.Union, types.UnionType):
        return " or ".join(kind(part) for part in arguments)
    if origin is list:
        return f"list of {kind(arguments[0])}"
    if origin is dict:
        return f"{{{kind(arguments[0])}: {kind(arguments[1])}}}"
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return "section"
    names = {bool: "true, false", int: "integer", float: "number", str: "text", type(None): "null"}
    return names.get(annotation, "any value") if isinstance(annotation, type) else "any value"


def renamed() -> str:
    """Return the table of old names."""
    lines = [
        "## Old names",
        "",
        "Names of older versions of transformers, trl and peft are translated with a warning, or have no effect:",
        "",
    ]
    lines += ["| key | is read as |", "|---|---|"]
    for section, names in TRANSLATED.items():
        lines += [f"| `{section}.{old}` | `{section}.{new}` |" for old, new in names.items()]
    for section, reasons in IGNORED.items():
        lines += [f"| `{section}.{old}` | no effect: {reason} |" for old, reason in reasons.items()]
    lines += ["", "Others are refused, and the message says what to set instead."]
    return re.sub(r"\n{3,}", "\n\n", "\n".join(lines)) + "\n"


if __name__ == "__main__":
    PAGE.write_text(page(), encoding="utf-8")
