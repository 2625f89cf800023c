"""Read and write an adapter as PEFT's folder: adapter_model.safetensors and adapter_config.json."""

from __future__ import annotations

import json
import math
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

from pydantic import JsonValue

from loraflow.adapters.adapter_config import FILE, AdapterConfig
from loraflow.adapters.completeness import saved_name
from loraflow.adapters.lora_updates import PREFIX, Adapter, Kind, LoraUpdate
from loraflow.adapters.validation import check_config
from loraflow.base.stored_weights import refuse_pickles
from loraflow.failures import BadModel

if TYPE_CHECKING:
    import torch

_SUFFIXES: dict[Kind, tuple[str, str]] = {
    "linear": (".lora_A.weight", ".lora_B.weight"),
    "embedding": (".lora_embedding_A", ".lora_embedding_B"),
}
_NOT_CONVERTED = ("modules_to_save", "trainable_token_indices", "target_parameters", "lora_bias", "fan_in_fan_out")
_Value = TypeVar("_Value", int, float)


def read_peft(folder: Path) -> Adapter:
    """Read a PEFT adapter of LoRA, rsLoRA or DoRA, which `check_adapter` has accepted.

    Raises:
        BadModel: it holds more than that.
    """
    from safetensors.torch import load_file

    config = AdapterConfig.read(folder)
    stored = load_file(folder / "adapter_model.safetensors")
    tensors = {saved_name(name): tensor for name, tensor in stored.items()}
    updates: dict[str, LoraUpdate] = {}
    used: set[str] = set()
    for name in sorted(tensors):
        if not name.endswith(".lora_A.weight"):
            continue
        stem = name.removesuffix(".lora_A.weight")
        names = (name, f"{stem}.lora_B.weight", f"{stem}.lora_magnitude_vector")
        used.update(names)
        down, up, magnitude = tensors[name], tensors[names[1]], tensors.get(names[2])
        module = stem.removeprefix(PREFIX)
        scale = config.scale_of(module, up.shape[1])
        updates[module] = LoraUpdate(down.float(), up.float(), scale, magnitude=magnitude)
    if rest := sorted(tensors.keys() - used):
        raise BadModel(
            "The adapter holds more than LoRA.",
            where=f"{folder}: {rest[0]}",
            got=f"{len(rest)} other tensors",
            next_step="merge it into its own base instead: loraflow merge",
        )
    return Adapter(updates)


def refuse_unconvertible(folder: Path, config: AdapterConfig | None = None) -> AdapterConfig:
    """Return an adapter's configuration, by default the file's, if it is of a kind that can be converted.

    Raises:
        BadModel: it is a pickle, or by its configuration more than LoRA, rsLoRA or DoRA.
    """
    refuse_pickles(folder)
    config = config or AdapterConfig.read(folder)
    check_config(config, folder)
    _refuse_more_than_lora(config, folder)
    return config


def _refuse_more_than_lora(config: AdapterConfig, folder: Path) -> None:
    more = config.enabled(_NOT_CONVERTED)
    if more or config.bias != "none":
        raise BadModel(
            "Only LoRA, rsLoRA and DoRA adapters without biases are converted.",
            where=str(folder),
            got=", ".join(more) or f"bias {config.bias}",
            next_step="merge it into its own base instead: loraflow merge",
        )
    if config.base_was_modified:
        raise BadModel(
            "The adapter was trained on weights that its initialisation changed.",
            where=str(folder / FILE),
            expected="init_lora_weights: true",
            got=str(config.init_lora_weights),
            next_step="save it again where it was trained, with peft's path_initial_model_for_weight_conversion",
        )


def write_peft(adapter: Adapter, folder: Path) -> None:
    """Write an adapter as `PeftModel.from_pretrained` reads it. Equal adapters have equal bytes."""
    from safetensors.torch import save_file

    tensors: dict[str, torch.Tensor] = {}
    for name, update in adapter.updates.items():
        first, second = _SUFFIXES[update.kind]
        tensors[f"{PREFIX}{name}{first}"] = update.down
        tensors[f"{PREFIX}{name}{second}"] = update.up
        if update.magnitude is not None:
            tensors[f"{PREFIX}{name}.lora_magnitude_vector"] = update.magnitude
    for name, tensor in adapter.biases.items():
        module = name.removesuffix(".bias")
        suffix = ".base_layer.bias" if module in adapter.updates else ".bias"
        tensors[f"{PREFIX}{module}{suffix}"] = tensor
    folder.mkdir(parents=True, exist_ok=True)
    # Updates that were split share one A, which save_file refuses: so each tensor gets its own memory.
    tensors = {name: tensor.contiguous().clone() for name, tensor in tensors.items()}
    save_file(tensors, folder / "adapter_model.safetensors", metadata={"format": "pt"})
    (folder / FILE).write_text(json.dumps(_config_values(adapter), indent=2, sort_keys=True) + "\n", "utf-8")


def _config_values(adapter: Adapter) -> dict[str, JsonValue]:
    """Return the content of adapter_config.json. Modules are named in full, which is always unambiguous."""
    from peft import LoraConfig

    ranks = {name: update.rank for name, update in adapter.updates.items()}
    alphas = {name: update.scale * update.rank for name, update in adapter.updates.items()}
    rank, alpha = _most_common(ranks), _integer_if_whole(_most_common(alphas))
    config = LoraConfig(
        r=rank,
        lora_alpha=alpha,
        target_modules=sorted(ranks),
        rank_pattern=_patterns(ranks, rank),
        alpha_pattern=_patterns({name: _integer_if_whole(value) for name, value in alphas.items()}, alpha),
        bias=adapter.bias,
        fan_in_fan_out=adapter.fan_in_fan_out,
        use_dora=any(update.magnitude is not None for update in adapter.updates.values()),
        task_type="CAUSAL_LM",
        inference_mode=True,
    ).to_dict()
    config["target_modules"] = sorted(config["target_modules"])
    return {key: value for key, value in config.items() if key != "runtime_config"}


def _most_common(values: Mapping[str, _Value]) -> _Value:
    return Counter(values.values()).most_common(1)[0][0]


def _patterns(values: Mapping[str, _Value], common: _Value) -> dict[str, _Value]:
    """Return PEFT's pattern for the values that are not the common one.

    A pattern is a module's own name if all modules of that name have the same value, else its full name.
    """
    own = {name: name.rsplit(".", 1)[-1] for name in values}
    patterns: dict[str, _Value] = {}
    for name, value in values.items():
        if value == common:
            continue
        agree = all(values[other] == value for other in values if own[other] == own[name])
        patterns[own[name] if agree else "^" + name.replace(".", r"\.")] = value
    return patterns


def _integer_if_whole(value: float) -> float:
    """Return a whole number as an int, as alphas are usually written."""
    nearest = round(value)
    return nearest if math.isclose(value, nearest, rel_tol=1e-12) else value
