"""Whether an adapter is complete: it has each tensor that its configuration asks for in this base, and no other.

peft fills a missing tensor with its initial value and ignores an unexpected one; it only warns. So peft itself is asked
which tensors it would save: the adapter's configuration is applied to the base without weights.
"""

from __future__ import annotations

import json
import logging
import re
import warnings
from collections.abc import Iterable, Mapping
from dataclasses import fields
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING

from loraflow.adapters.adapter_config import FILE, AdapterConfig
from loraflow.adapters.lora_updates import FUSED, PREFIX, SPLIT, AttentionHeads, block_sizes
from loraflow.adapters.vocabulary import Shape, embedding_names
from loraflow.base.stored_weights import read_entries
from loraflow.failures import BadModel, first_line

if TYPE_CHECKING:
    import torch
    from peft import PeftConfig, PeftModel
    from torch import nn
    from transformers import PreTrainedModel

log = logging.getLogger(__name__)
WEIGHTS = "adapter_model.safetensors"
# What peft raises for settings that it does not know, or that need a package which is not installed.
_ERRORS = (
    ValueError, TypeError, KeyError, AttributeError, IndexError, RuntimeError, NotImplementedError, ImportError, re.error,
)  # fmt: skip
# What peft may save of embeddings and head beside what is trained: if the vocabulary was resized, or if they are targets.
_SAVED_WITH_EMBEDDINGS = (
    "weight", "bias", "base_layer.weight", "base_layer.bias", "original_module.weight", "original_module.bias",
    "modules_to_save.weight", "modules_to_save.bias", "token_adapter.base_layer.weight",
    "token_adapter.trainable_tokens_delta",
)  # fmt: skip
# What programs leave in the names of tensors that were saved without unwrapping the model first.
_WRAPPERS = (
    PREFIX, "_orig_mod.", "_fsdp_wrapped_module.", "_checkpoint_wrapped_module.", "module.", "language_model.", "model.",
)  # fmt: skip
_SAMPLER = ".lora_monteclora_sampler."  # MonteCLoRA's noise in training; peft does not load it to answer
_ADAPTER_NAME = re.compile(r"\.lora_[AB]\.([^.]+)\.weight$")


def check_complete(adapter: Path, config: AdapterConfig, model: PreTrainedModel) -> None:
    """Check that the tensors of an adapter are those that peft would save for its configuration on this base.

    Args:
        model: the base on the meta device, with the vocabulary of the adapter. peft changes it.

    Raises:
        BadModel: a tensor is missing, unexpected or of another shape; there is none; or peft cannot apply the
            configuration to this base.
    """
    entries = (entry for entry in read_entries(adapter / WEIGHTS) if _SAMPLER not in entry.name)
    found = {saved_name(entry.name): entry.shape for entry in entries}
    if not found:
        raise BadModel(
            "The adapter does not fit the base.",
            where=str(adapter / WEIGHTS),
            expected=f"the tensors of the modules that {FILE} names",
            got="no tensors",
            next_step="save or fetch the adapter again: its file is empty",
        )
    _refuse_other_projections(found, model)
    _name_unknown_settings(adapter, config)
    layers = embedding_names(model)
    expected, optional, wrapped = _expected(adapter, model, layers)
    if found.keys() - expected.keys() - optional.keys():
        found = renamed(found, wrapped)
    missing = sorted(expected.keys() - found.keys())
    unexpected = sorted(found.keys() - expected.keys() - optional.keys())
    known = {**optional, **expected}
    other = sorted(name for name, shape in found.items() if name in known and shape != known[name])
    if not (missing or unexpected or other):
        return
    _refuse_other_prefix(adapter, missing, unexpected)
    raise BadModel(
        "The adapter does not fit the base.",
        where=str(adapter),
        expected=f"the {len(expected)} tensors that {FILE} asks for in this base",
        got=_differences(missing, unexpected, other, found, known),
        next_step="save or fetch the adapter again: it is incomplete"
        if missing and not unexpected and not other
        else "name the base that it was trained on",
    )


def _refuse_other_prefix(adapter: Path, missing: list[str], unexpected: list[str]) -> None:
    """Refuse an adapter whose tensor names are right except for a part that a wrapper or a script added or left out.

    peft ignores such tensors, so that base and adapter answer as the base.
    """
    corrections = {
        f"remove {part!r} from their names": [tensor.replace(part, "", 1) for tensor in unexpected]
        for part in _WRAPPERS
    }
    corrections[f"put {PREFIX!r} before their names"] = [PREFIX + tensor for tensor in unexpected]
    corrections[f"put 'model.' behind {PREFIX!r}"] = [
        tensor.replace(PREFIX, f"{PREFIX}model.", 1) for tensor in unexpected
    ]
    of_adapters = {match[1] for tensor in unexpected if (match := _ADAPTER_NAME.search(tensor))}
    corrections |= {
        f"remove {f'.{name}'!r}, the adapter's name, from their names": [
            tensor.replace(f".{name}.", ".") for tensor in unexpected
        ]
        for name in of_adapters
    }
    for correction, names in corrections.items():
        if missing and sorted(names) == missing:
            raise BadModel(
                "The adapter's tensors have names that peft does not read.",
                where=str(adapter / WEIGHTS),
                expected=f"{len(missing)} tensors, such as {missing[0]}",
                got=unexpected[0],
                next_step=f"{correction}, with load_file and save_file of safetensors.torch",
            )


def _name_unknown_settings(adapter: Path, config: AdapterConfig) -> None:
    """Log a warning for settings that the installed peft does not know, and so leaves out of what it computes.

    Nothing tells whether they change the adapter's product.
    """
    from peft import PEFT_TYPE_TO_CONFIG_MAPPING, LoraConfig

    known = {field.name for field in fields(PEFT_TYPE_TO_CONFIG_MAPPING.get(str(config.peft_type), LoraConfig))}
    if unknown := sorted(config.enabled(config.model_fields_set - known)):
        log.warning(
            "%s: peft %s does not know these settings, so they are left out: %s. If they change what the adapter computes, "
            "install the peft that it was saved with.",
            adapter / FILE,
            version("peft"),
            ", ".join(f"{name}: {json.dumps(getattr(config, name))[:80]}" for name in unknown),
        )


def _differences(
    missing: list[str], unexpected: list[str], other: list[str], found: Mapping[str, Shape], known: Mapping[str, Shape]
) -> str:
    parts = []
    if missing:
        parts.append(f"{len(missing)} missing, such as {missing[0]}")
    if unexpected:
        parts.append(f"{len(unexpected)} unexpected, such as {unexpected[0]}")
    if other:
        name = other[0]
        parts.append(
            f"{len(other)} of another shape, such as {name}: {list(found[name])} instead of {list(known[name])}"
        )
    return "; ".join(parts)


def _expected(
    adapter: Path, model: PreTrainedModel, layers: Iterable[str]
) -> tuple[dict[str, Shape], dict[str, Shape], PeftModel]:
    """Return the tensors that peft would save, those of the embeddings that it may save as well, and peft's model."""
    from peft import get_peft_model_state_dict

    optional: dict[str, Shape] = {}
    for layer in layers:
        parameters = dict(model.get_submodule(layer).named_parameters())
        for suffix in _SAVED_WITH_EMBEDDINGS:
            parameter = parameters.get(suffix.rpartition(".")[2])
            if parameter is not None:
                optional[f"{PREFIX}{layer}.{suffix}"] = tuple(parameter.shape)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # about initial values and merging; neither is asked for here
        wrapped = _apply(adapter, model)
        with_ranks = _with_ranks_on_the_cpu(wrapped)
        state: dict[str, torch.Tensor] = get_peft_model_state_dict(wrapped, with_ranks, save_embedding_layers=False)
    expected: dict[str, Shape] = {name: tuple(tensor.shape) for name, tensor in state.items()}
    for name, shape in expected.items():  # peft may save the trained rows of tied weights twice
        if name.endswith(".trainable_tokens_delta"):
            optional |= {f"{PREFIX}{layer}.token_adapter.trainable_tokens_delta": shape for layer in layers}
    return expected, optional, wrapped


def _with_ranks_on_the_cpu(wrapped: PeftModel) -> dict[str, torch.Tensor] | None:
    """Return the tensors of which peft saves some ranks only (AdaLoRA): on the meta device, it cannot choose among them."""
    import torch

    if not any(getattr(config, "rank_pattern", None) for config in wrapped.peft_config.values()):
        return None
    return {
        name: torch.empty_like(tensor, device="cpu") if ".lora_" in name else tensor
        for name, tensor in wrapped.state_dict().items()
    }


def _apply(adapter: Path, model: PreTrainedModel) -> PeftModel:
    """Apply an adapter's configuration to a base on the meta device."""
    from peft import PeftConfig, PeftModel

    try:
        settings: PeftConfig = PeftConfig.from_pretrained(str(adapter))
    except _ERRORS as error:
        raise BadModel(
            "peft does not accept the adapter's configuration.",
            where=str(adapter / FILE),
            got=first_line(error),
            next_step="save or fetch the adapter again, or correct this file",
        ) from error
    if settings.is_prompt_learning:
        raise BadModel(
            "This adapter adds tokens before each prompt; loraflow does not support that.",
            where=str(adapter / FILE),
            expected="an adapter of the model's weights, such as LORA",
            got=str(settings.peft_type.value),
            next_step="serve base and adapter together, with peft",
        )
    try:
        settings.init_lora_weights = False  # an initialisation from the base's weights needs weights
        return PeftModel(model, settings, low_cpu_mem_usage=True)
    except _ERRORS as error:
        raise BadModel(
            "The adapter does not fit the base.",
            where=str(adapter / FILE),
            got=first_line(error),
            next_step="name the base that it was trained on",
        ) from error


def renamed(found: Mapping[str, Shape], wrapped: PeftModel) -> dict[str, Shape]:
    """Return an adapter's shapes by the names that its tensors have after loading.

    transformers has renamed and joined modules since some adapters were saved; peft converts them when it loads them.
    """
    import torch
    from peft.utils.transformers_weight_conversion import convert_peft_adapter_state_dict_for_transformers

    tensors = {name: torch.empty(shape, device="meta") for name, shape in found.items()}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            converted = convert_peft_adapter_state_dict_for_transformers(
                model=wrapped,
                peft_config=wrapped.peft_config["default"],
                adapter_state_dict=tensors,
                adapter_name="default",
            )
        except (ValueError, RuntimeError, KeyError) as error:
            log.debug("peft does not convert the adapter's names: %s", error)
            return dict(found)
    return {saved_name(name): tuple(tensor.shape) for name, tensor in converted.items()}


def saved_name(name: str) -> str:
    """Return a tensor's name as peft saves it: it also reads names of a model's own state, with `.default.`."""
    name = name.replace(".default.", ".")
    return name.removesuffix(".weight") if name.endswith("_vector.weight") else name


def _refuse_other_projections(found: Mapping[str, Shape], model: PreTrainedModel) -> None:
    """Refuse an adapter for split projections where the base has fused ones, or the reverse: it can be converted."""
    modules = {name for name, _ in model.named_modules()}
    for name in sorted(found):
        module = module_of(name)
        counterpart = None if module in modules else fused_or_split(module, modules)
        if counterpart:
            raise BadModel(
                "The adapter does not fit the base.",
                where=name,
                expected=f"{counterpart}, which the base has instead",
                got=module,
                next_step="run `loraflow adapters convert ADAPTER BASE OUT`, then use OUT instead of the adapter",
            )


def module_of(tensor: str) -> str:
    """Return the name of the module that a tensor of PEFT's file adapts."""
    name = tensor.removeprefix(PREFIX)
    for mark in (".lora_", ".base_layer.", ".modules_to_save.", ".original_module.", ".token_adapter."):
        name = name.split(mark)[0]
    return name


def fused_or_split(module: str, modules: Iterable[str]) -> str | None:
    """Return the module that holds this projection if the base fuses it, or one of several if the base splits it."""
    parent, _, own = module.rpartition(".")
    names = set(modules)
    for other in (*SPLIT.get(own, ())[:1], FUSED.get(own)):
        if other and f"{parent}.{other}" in names:
            return f"{parent}.{other}"
    return None


def give_projections_of(adapter: Iterable[str], model: PreTrainedModel) -> None:
    """Fuse or split a base's projections as an adapter has them; both are on the meta device, so no weight is computed.

    Args:
        model: the base without weights; it is changed.
    """
    adapted = {name.rpartition(".")[2] for name in adapter}
    heads = AttentionHeads.of(model.config.get_text_config())
    for fused, parts in SPLIT.items():
        for parent in [module for _, module in model.named_modules()]:
            if adapted & set(parts) and hasattr(parent, fused):
                _split(parent, fused, parts, heads)
            elif fused in adapted and all(hasattr(parent, part) for part in parts):
                _fuse(parent, fused, parts)


def _split(parent: nn.Module, fused: str, parts: tuple[str, ...], heads: AttentionHeads) -> None:
    from torch import nn

    whole = parent.get_submodule(fused)
    if not isinstance(whole, nn.Linear) or (sizes := block_sizes(heads, fused, whole.out_features)) is None:
        return
    delattr(parent, fused)
    for part, size in zip(parts, sizes, strict=True):
        setattr(parent, part, nn.Linear(whole.in_features, size, bias=whole.bias is not None, device="meta"))


def _fuse(parent: nn.Module, fused: str, parts: tuple[str, ...]) -> None:
    from torch import nn

    split = [parent.get_submodule(part) for part in parts]
    linears = [module for module in split if isinstance(module, nn.Linear)]
    if len(linears) < len(split):
        return
    for part in parts:
        delattr(parent, part)
    rows = sum(linear.out_features for linear in linears)
    setattr(parent, fused, nn.Linear(linears[0].in_features, rows, bias=linears[0].bias is not None, device="meta"))
