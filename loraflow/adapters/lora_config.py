"""Convert the recipe's peft_config to peft's LoraConfig, and check that each setting has an effect in the model."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING

from loraflow.adapters.lora_updates import FUSED
from loraflow.adapters.targets import (
    ALL_LINEAR,
    expert_weights,
    find_targets,
    linear_names,
    matches,
    names_of_experts,
    obstacle_to_adapter,
    selects,
)
from loraflow.config.lora import PeftConfig
from loraflow.failures import BadConfig

if TYPE_CHECKING:
    from peft import LoraConfig
    from torch import nn
    from transformers import PreTrainedModel

# Keys of the recipe that are not keys of LoraConfig.
_NOT_PEFTS = {"loraplus_lr_ratio", "loraplus_lr_embedding", "eva_config"}


def lora_config(peft_config: PeftConfig, model: PreTrainedModel | None = None) -> LoraConfig:
    """Return peft's LoraConfig.

    Args:
        model: the base, whose modules all-linear means; None leaves the word to peft.
    """
    from peft import EvaConfig, LoraConfig

    values = {
        key: value
        for key, value in peft_config.model_dump().items()
        if value not in (None, [], {}) and key not in _NOT_PEFTS
    }
    if values["init_lora_weights"] == "eva":
        values["eva_config"] = EvaConfig(**peft_config.eva_config.model_dump())
    elif values["init_lora_weights"] == "loftq":
        values["init_lora_weights"] = True  # `variants.initialize` replaces A and B later
    if model is not None and values["target_modules"] == ALL_LINEAR:
        values["target_modules"] = linear_names(model)
    return LoraConfig(**values)


def check_targets(model: PreTrainedModel, peft_config: PeftConfig) -> None:
    """Refuse names that match no module. peft accepts a list if at least one of its names matches.

    The guide's notebooks name q_proj, k_proj, … for Phi-3, which has qkv_proj instead: they train half of what they list.

    Raises:
        BadConfig: a name matches nothing; the message lists the names that the model has.
    """
    import torch

    named = dict(model.named_modules())
    example = next((name for name in named if ".layers.0." in name or ".h.0." in name), [*named, ""][0])
    have = sorted({name.rsplit(".", 1)[-1] for name, m in named.items() if isinstance(m, torch.nn.Linear)})
    for field in ("target_modules", "modules_to_save", "exclude_modules"):
        names = getattr(peft_config, field)
        if names == ALL_LINEAR:
            continue
        for target in [names] if isinstance(names, str) else names or ():
            if isinstance(names, str) and any(selects(names, name) for name in named):
                continue
            if not any(matches(name, target) for name in named):
                raise BadConfig(
                    f"No module of the base is called {target}."
                    if isinstance(names, list)
                    else f"No module's full name matches the regular expression {target}.",
                    where=f"peft_config.{field}",
                    expected=f"among {', '.join(have)}" if isinstance(names, list) else f"such as {example}",
                    got=target,
                    next_step=_suggestion(target, have, expert_weights(model)),
                )
    _check_parameters(model, peft_config.target_parameters or [])


def _check_parameters(model: PreTrainedModel, targets: list[str]) -> None:
    names = [name for name, _ in model.named_parameters()]
    experts = sorted({".".join(name.split(".")[-3:]) for name in expert_weights(model)})
    for target in targets:
        if not any(matches(name, target) for name in names):
            raise BadConfig(
                f"No parameter of the base is called {target}.",
                where="peft_config.target_parameters",
                expected=f"among {', '.join(experts)}" if experts else "nothing: this base has no such experts",
                got=target,
                next_step="correct the name" if experts else "leave it out",
            )


def check_trainable(model: PreTrainedModel, peft_config: PeftConfig) -> None:
    """Refuse, before training, settings that peft would ignore, and modules that cannot be trained or merged.

    Raises:
        BadConfig: a target cannot carry an adapter, a pattern matches nothing, a layer does not exist, or nothing is
            adapted.
    """
    named = dict(model.named_modules())
    targets = [] if peft_config.target_modules == ALL_LINEAR else peft_config.target_modules
    experts = names_of_experts(model)
    for target in [targets] if isinstance(targets, str) else targets:
        for name, module in named.items():
            chosen = selects([target] if isinstance(targets, list) else target, name)
            chosen = chosen and not selects(peft_config.exclude_modules, name)
            reason = (_cannot_carry(model, module) or obstacle_to_adapter(model, name, module)) if chosen else ""
            if chosen and name.rpartition(".")[2] in experts:
                reason = "peft would adapt all experts instead; name them in target_parameters"
            if reason:
                raise BadConfig(
                    f"{target if isinstance(targets, list) else name} cannot carry an adapter in this base: {reason}.",
                    where="peft_config.target_modules",
                    next_step="leave it out; trainable_token_indices trains single tokens"
                    if getattr(model.config, "tie_word_embeddings", False)
                    else "leave it out; modules_to_save trains a whole module",
                )
    for field in ("rank_pattern", "alpha_pattern"):
        for pattern in getattr(peft_config, field) or {}:
            if not any(re.match(rf"(.*\.)?({pattern})$", name) for name in named):
                raise BadConfig(
                    f"No module matches {pattern}.", where=f"peft_config.{field}", next_step="correct the name"
                )
    _check_layers(model, peft_config.layers_to_transform, by_name=isinstance(peft_config.target_modules, list))
    found = find_targets(model, peft_config)
    if not found.modules and not found.parameters:
        raise BadConfig(
            "The recipe adapts no module of this base.",
            where="peft_config.target_modules",
            expected="at least one linear layer",
            got=found.summary(),
            next_step="name modules of the base, or leave out exclude_modules and layers_to_transform",
        )


def _cannot_carry(model: PreTrainedModel, module: nn.Module) -> str | None:
    """Return why a module cannot carry an adapter, or None if it can."""
    import torch
    from transformers.pytorch_utils import Conv1D

    if module is model.get_output_embeddings():
        return "the loss is computed from the head's weight"
    if module is model.get_input_embeddings() and getattr(model.config, "tie_word_embeddings", False):
        return "the head has the same weight"
    if not isinstance(module, torch.nn.Linear | torch.nn.Embedding | torch.nn.Conv2d | Conv1D):
        return f"it is a {type(module).__name__}"
    return None


def _check_layers(model: PreTrainedModel, layers: list[int] | None, *, by_name: bool) -> None:
    if not layers:
        return
    if not by_name:
        raise BadConfig(
            "layers_to_transform needs target_modules by name.",
            where="peft_config.layers_to_transform",
            next_step="name the modules instead of all-linear",
        )
    count = model.config.get_text_config().num_hidden_layers
    if not all(0 <= layer < count for layer in layers):
        raise BadConfig(
            "There is no such layer.",
            where="peft_config.layers_to_transform",
            expected=f"0 to {count - 1}",
            got=str(layers),
            next_step="correct the number; layers count from 0",
        )


def _suggestion(target: str, have: list[str], experts: list[str]) -> str:
    if parameter := next((name for name in experts if matches(name, target)), None):
        own = ".".join(parameter.split(".")[-3:])
        return f"experts' weights are parameters here: peft_config.target_parameters: [{own}]"
    if FUSED.get(target) in have:
        return f"this model fuses it: name {FUSED[target]}, or set target_modules: all-linear"
    return "set target_modules: all-linear, or name modules of the list"
