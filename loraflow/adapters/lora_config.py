"""The recipe's peft_config as peft's LoraConfig, with every requested target matched, or an error."""

from __future__ import annotations

import re
from typing import Any

from loraflow.config.recipe import PeftConfig
from loraflow.failures import BadConfig


def lora_config(peft_config: PeftConfig) -> Any:
    """Return peft's LoraConfig."""
    from peft import EvaConfig, LoraConfig

    ours = {"loraplus_lr_ratio", "loraplus_lr_embedding", "eva_config"}
    values = {
        key: value for key, value in peft_config.model_dump().items() if value not in (None, [], {}) and key not in ours
    }
    if values["init_lora_weights"] == "eva":
        values["eva_config"] = EvaConfig(**peft_config.eva_config.model_dump())
    elif values["init_lora_weights"] == "loftq":
        values["init_lora_weights"] = True  # drawn first; `variants.begin` replaces A and B
    return LoraConfig(**values)


def check_targets(model: Any, peft_config: PeftConfig) -> None:
    """Refuse names that match no module: peft says nothing as long as one of them matches.

    The guide's notebooks ask Phi-3 for q_proj, k_proj, …; it has qkv_proj, and so they trained half of what they meant.

    Raises:
        BadConfig: a name matches nothing; the message lists what the model has.
    """
    import torch

    named = dict(model.named_modules())
    for field in ("target_modules", "modules_to_save", "exclude_modules"):
        wanted = getattr(peft_config, field)
        if not isinstance(wanted, list):
            continue
        for target in wanted:
            if not any(name == target or name.endswith(f".{target}") for name in named):
                have = sorted({name.rsplit(".", 1)[-1] for name, m in named.items() if isinstance(m, torch.nn.Linear)})
                raise BadConfig(
                    f"No module of the base is called {target}.",
                    where=f"peft_config.{field}",
                    expected=f"among {', '.join(have)}",
                    got=target,
                    next_step=_hint(target, have),
                )


def check_reach(model: Any, peft_config: PeftConfig) -> None:
    """Refuse what peft would ignore, or what cannot be trained or merged: before any token is trained.

    Raises:
        BadConfig: a target that carries no adapter, a pattern that matches nothing, a layer that is not there.
    """
    import torch
    from transformers.pytorch_utils import Conv1D

    named = dict(model.named_modules())
    kinds = (torch.nn.Linear, torch.nn.Embedding, torch.nn.Conv2d, Conv1D)
    targets = peft_config.target_modules if isinstance(peft_config.target_modules, list) else []
    tied = getattr(model.config, "tie_word_embeddings", False)
    for target in targets:
        for name, module in named.items():
            if name != target and not name.endswith(f".{target}"):
                continue
            is_head, is_embedding = module is model.get_output_embeddings(), module is model.get_input_embeddings()
            if is_head or (is_embedding and tied) or not isinstance(module, kinds):
                why = "the loss is computed from the head's weight" if is_head else (
                    "its weight is the head's too" if is_embedding else f"it is a {type(module).__name__}"
                )  # fmt: skip
                raise BadConfig(
                    f"{target} cannot carry an adapter in this base: {why}.",
                    where="peft_config.target_modules",
                    next_step="leave it out; modules_to_save trains a whole module",
                )
    for field in ("rank_pattern", "alpha_pattern"):
        for pattern in getattr(peft_config, field) or {}:
            if not any(re.match(rf"(.*\.)?({pattern})$", name) for name in named):
                raise BadConfig(
                    f"No module matches {pattern}.", where=f"peft_config.{field}", next_step="mend the name"
                )
    layers = peft_config.layers_to_transform
    count = model.config.get_text_config().num_hidden_layers
    if layers and not targets:
        raise BadConfig(
            "layers_to_transform needs target_modules by name.",
            where="peft_config.layers_to_transform",
            next_step="name the modules instead of all-linear",
        )
    if layers and not all(0 <= layer < count for layer in layers):
        raise BadConfig(
            "There is no such layer.",
            where="peft_config.layers_to_transform",
            expected=f"0 to {count - 1}",
            got=str(layers),
        )


def _hint(target: str, have: list[str]) -> str:
    fused = {"q_proj": "qkv_proj", "k_proj": "qkv_proj", "v_proj": "qkv_proj", "gate_proj": "gate_up_proj"}
    fused |= {"up_proj": "gate_up_proj"}
    if fused.get(target) in have:
        return f"this model fuses it: name {fused[target]}, or set target_modules: all-linear"
    return "set target_modules: all-linear, or name modules of the list"
