"""Which modules of a base are adapted: decided by names and shapes, so a model without weights is enough.

`all-linear` means the linear layers of the language model's decoder. It leaves out the head, vision and audio towers with
their projectors, and the routers of experts: they are small, and training them changes which experts answer.
"""

from __future__ import annotations

import copy
import logging
import re
from dataclasses import dataclass
from typing import TYPE_CHECKING

from loraflow.config.lora import PeftConfig

if TYPE_CHECKING:
    from torch import nn
    from transformers import PreTrainedConfig, PreTrainedModel

log = logging.getLogger(__name__)
ALL_LINEAR = "all-linear"
_ROUTERS = frozenset({"router", "gate", "wg", "shared_expert_gate"})
# peft refuses adapters of these modules in these architectures (`_check_lora_target_modules_mamba`).
_MAMBA = frozenset({"falcon_h1", "falcon_mamba", "mamba", "mamba2", "nemotron_h"})
_MAMBA_KERNEL = frozenset({"conv1d", "out_proj"})
_EXPERT_COUNTS = ("num_local_experts", "num_experts", "n_routed_experts", "moe_num_experts")


@dataclass(frozen=True)
class Targets:
    """What a recipe's peft_config adapts in a base."""

    modules: list[str]  # full names
    parameters: list[str]  # full names of those that target_parameters names
    left_out: dict[str, str]  # linear modules that all-linear leaves out, with the reason
    experts: list[str]  # full names of experts' weights without an adapter; they are parameters with three axes

    def summary(self) -> str:
        """Return what is adapted and what is not, in one line."""
        parts = [f"adapted: {counted([*self.modules, *self.parameters])}"]
        for reason in sorted(set(self.left_out.values())):
            parts.append(f"left out ({reason}): {counted([n for n, why in self.left_out.items() if why == reason])}")
        if self.experts:
            parts.append(
                f"experts without an adapter: {counted(self.experts)}; peft_config.target_parameters adapts what it names"
            )
        return "; ".join(parts)


def has_experts(config: PreTrainedConfig) -> bool:
    """Tell whether a model's config counts experts, by any of the names that architectures use. DBRX nests the count."""
    text = config.get_text_config()
    return any(
        getattr(part, name, None) for part in (text, getattr(text, "ffn_config", None)) for name in _EXPERT_COUNTS
    )


def find_targets(model: PreTrainedModel, peft_config: PeftConfig) -> Targets:
    """Return what a recipe adapts in a base, with or without weights."""
    left_out = not_adapted_by_all_linear(model) if peft_config.target_modules == ALL_LINEAR else {}
    modules = [
        name
        for name, module in model.named_modules()
        if name
        and name not in left_out
        and not selects(peft_config.exclude_modules, name)
        and in_layers(name, peft_config.layers_to_transform)
        and (
            is_linear(model, module)
            if peft_config.target_modules == ALL_LINEAR
            else selects(peft_config.target_modules, name)
        )
    ]
    patterns = peft_config.target_parameters or []
    parameters = [name for name, _ in model.named_parameters() if any(matches(name, target) for target in patterns)]
    experts = [name for name in expert_weights(model) if name not in parameters]
    return Targets(modules, parameters, left_out, experts)


def linear_names(model: PreTrainedModel) -> list[str] | str:
    """Return peft's target_modules for all-linear: the same word, or full names where peft would adapt too much.

    For mixtures whose files have one matrix for each expert, peft extends all-linear to experts and routers.
    """
    left_out = not_adapted_by_all_linear(model)
    if not left_out and not expert_weights(model):
        return ALL_LINEAR
    names = [name for name, module in model.named_modules() if is_linear(model, module) and name not in left_out]
    log.info("all-linear leaves out %s", ", ".join(left_out) or "the experts")
    return names


def not_adapted_by_all_linear(model: PreTrainedModel) -> dict[str, str]:
    """Return the linear modules, other than the head, that all-linear leaves out, with the reason."""
    text = model.config.get_text_config()
    decoder = "" if text is model.config else f"{_name_of(model, model.get_decoder())}."
    # Models in it that read no text, in architectures without a config of their own for the text (GIT, Phi-4 multimodal).
    towers = tuple(
        f"{n}." for n, part in model.named_modules() if "text" not in getattr(part, "input_modalities", "text")
    )
    routed = has_experts(model.config)
    experts = names_of_experts(model)
    found = {}
    for name, module in model.named_modules():
        if not is_linear(model, module):
            continue
        if not name.startswith(decoder) or name.startswith(towers):
            found[name] = "not the language model"
        elif routed and not _ROUTERS.isdisjoint(name.split(".")):
            found[name] = "router"
        elif name.rpartition(".")[2] in experts:
            found[name] = "peft would adapt the experts, which have the same name"
        elif reason := obstacle_to_adapter(model, name, module):
            found[name] = reason
    return found


def obstacle_to_adapter(model: PreTrainedModel, name: str, module: nn.Module) -> str:
    """Return why a linear module cannot carry an adapter: peft refuses it, or x W is not what it computes; else empty."""
    from torch import nn

    if model.config.model_type in _MAMBA and name.rpartition(".")[2] in _MAMBA_KERNEL:
        return "the kernel of a state space reads its weight"
    kind = type(module)
    is_of_a_model = kind.__module__.startswith("transformers.models.")
    changed = isinstance(module, nn.Linear) and is_of_a_model and kind.forward is not nn.Linear.forward
    if changed and not _multiplies_as_linear(module):
        return f"a {kind.__name__} computes another product"
    return ""


def _multiplies_as_linear(module: nn.Module) -> bool:
    """Tell whether a module's own forward pass is x W, tried on a copy with small weights: Falcon's is, in its own steps."""
    import torch

    small, draw = copy.copy(module), torch.Generator().manual_seed(0)
    weight, inputs, bias = (
        torch.randn(*shape, generator=draw, device="cpu")  # also where a model is built without weights
        for shape in ((3, 2), (1, 4, 2), (3,))
    )
    small._parameters = {"weight": torch.nn.Parameter(weight)}
    small._parameters["bias"] = None if module.bias is None else torch.nn.Parameter(bias)
    try:
        with torch.no_grad():
            found = small(inputs)
    except (RuntimeError, ValueError, TypeError, IndexError, AttributeError, ZeroDivisionError):
        return False  # a module that needs inputs of another shape
    expected = torch.nn.functional.linear(inputs, weight, None if module.bias is None else bias)
    return isinstance(found, torch.Tensor) and found.shape == expected.shape and torch.allclose(found, expected)


def names_of_experts(model: PreTrainedModel) -> frozenset[str]:
    """Return names of modules that peft takes for the experts of a mixture, whatever they are in this model.

    For adapters of transformers 4, which had a module for each expert, peft replaces these names in target_modules.
    """
    if not expert_weights(model):
        return frozenset()
    from peft.utils import transformers_weight_conversion as conversion

    kind = conversion._MODEL_TO_CONVERSION_PATTERN.get(model.config.model_type)
    replaced: dict[str, str] = conversion._MOE_TARGET_MODULE_MAPPING.get(kind) or {}
    return frozenset(replaced if conversion._MOE_FUSED_TARGETS.get(kind) else ())


def expert_weights(model: PreTrainedModel) -> list[str]:
    """Return the names of experts' weights that are parameters with three axes instead of modules."""
    return [name for name, p in model.named_parameters() if p.ndim == 3 and "experts" in name.split(".")]


def has_routers(model: PreTrainedModel) -> bool:
    """Tell whether a model has experts among which a router chooses."""
    routers = any("router" in name or name.endswith(".gate") for name, _ in model.named_modules())
    return routers or bool(expert_weights(model))


def is_linear(model: PreTrainedModel, module: nn.Module) -> bool:
    """Tell whether a module is a linear layer, and not the head."""
    from torch import nn
    from transformers.pytorch_utils import Conv1D

    return isinstance(module, nn.Linear | Conv1D) and module is not model.get_output_embeddings()


def matches(module: str, target: str) -> bool:
    """Tell whether a target names a module: by its full name, or by the last parts of it."""
    return module == target or module.endswith(f".{target}")


def selects(targets: list[str] | str, module: str) -> bool:
    """Tell whether a list of names, or a regular expression for full names, selects a module. As in peft."""
    if isinstance(targets, str):
        return re.fullmatch(targets, module) is not None
    return any(matches(module, target) for target in targets)


def in_layers(module: str, layers: list[int] | None) -> bool:
    """Tell whether a module is in one of some layers; with None, all layers count."""
    if layers is None:
        return True
    number = next((int(part) for part in module.split(".") if part.isdigit()), None)
    return number in layers


def _name_of(model: PreTrainedModel, module: nn.Module | None) -> str:
    return next((name for name, candidate in model.named_modules() if candidate is module), "")


def counted(names: list[str]) -> str:
    """Return the last parts of names, each once, with how many modules have it."""
    counts: dict[str, int] = {}
    for name in names:
        own = ".".join(part for part in name.split(".")[-2:] if not part.isdigit()) or name
        counts[own] = counts.get(own, 0) + 1
    return ", ".join(f"{count} {own}" for own, count in sorted(counts.items())) or "nothing"
