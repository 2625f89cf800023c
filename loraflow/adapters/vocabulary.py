"""Adapters with a vocabulary of another size than the base's: tokens were added, and the embeddings resized.

peft saves such embeddings with the adapter, but does not resize the base's when it loads them.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from loraflow.adapters.adapter_config import AdapterConfig
from loraflow.adapters.lora_updates import PREFIX
from loraflow.base.stored_weights import read_entries
from loraflow.failures import BadModel

if TYPE_CHECKING:
    from transformers import PreTrainedModel

Shape = tuple[int, ...]
# peft's names for whole embeddings and heads: after the module's name.
_WHOLE = ("weight", "base_layer.weight", "modules_to_save.weight", "token_adapter.base_layer.weight")


def embedding_names(model: PreTrainedModel) -> list[str]:
    """Return the names of the modules with the input embeddings and the head."""
    ids = {id(model.get_input_embeddings()), id(model.get_output_embeddings())}
    return [name for name, module in model.named_modules() if id(module) in ids]


def fit_vocabulary(model: PreTrainedModel, adapter: Path, config: AdapterConfig) -> None:
    """Resize a base's embeddings and head to the rows of an adapter, if the adapter contains all rows that differ.

    Raises:
        BadModel: the adapter does not contain the new rows, so they would be random.
    """
    found = {entry.name: entry.shape for entry in read_entries(adapter / "adapter_model.safetensors")}
    rows = _rows(model, found, config)
    before = _vocabulary(model)
    if rows is None or rows == before:
        return
    for name in _without_rows(model, found, config, before, rows):
        raise BadModel(
            "The adapter's vocabulary differs from the base's, and the adapter lacks embeddings of some tokens.",
            where=f"{adapter}: {name}",
            expected=f"{rows} rows, as the adapter's other embeddings",
            got=f"the base has {before}, the adapter none",
            next_step="save the resized base where the adapter was trained (save_pretrained), and name it as the base",
        )
    model.resize_token_embeddings(rows, mean_resizing=False)


def _vocabulary(model: PreTrainedModel) -> int:
    return int(model.get_input_embeddings().get_parameter("weight").shape[0])


def _rows(model: PreTrainedModel, found: Mapping[str, Shape], config: AdapterConfig) -> int | None:
    """Return the size of an adapter's vocabulary; None if it does not say."""
    for name in embedding_names(model):
        for suffix, axis in ((".lora_embedding_A", 1), *((f".{whole}", 0) for whole in _WHOLE)):
            shape = found.get(f"{PREFIX}{name}{suffix}")
            if shape is not None and len(shape) == 2:
                return shape[axis]
    added = [token for token in config.trained_tokens if token >= _vocabulary(model)]
    return max(added) + 1 if added else None


def _without_rows(
    model: PreTrainedModel, found: Mapping[str, Shape], config: AdapterConfig, before: int, rows: int
) -> list[str]:
    """Return which of embeddings and head would get random rows."""
    names = embedding_names(model)
    covered = set(range(before, rows)) <= set(config.trained_tokens)
    missing = []
    for name in names:
        whole = any(f"{PREFIX}{name}.{suffix}" in found for suffix in _WHOLE)
        by_token = covered and f"{PREFIX}{name}.token_adapter.trainable_tokens_delta" in found
        if not whole and not by_token:
            missing.append(name)
    # One weight for both: it is enough that the adapter contains it once.
    return [] if is_tied(model) and len(missing) < len(names) else missing


def is_tied(model: PreTrainedModel) -> bool:
    """Tell whether a model's embeddings and head are one weight."""
    head = model.get_output_embeddings()
    return head is not None and head.get_parameter("weight") is model.get_input_embeddings().get_parameter("weight")
