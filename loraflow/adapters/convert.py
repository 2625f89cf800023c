"""Adapters made elsewhere, or for the other way to store a base: loralib's checkpoints, split and fused projections.

An adapter for q_proj, k_proj, v_proj fits a base with qkv_proj, and the other way round; which way follows from the base.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from loraflow.adapters.fused_projections import SPLIT, block_sizes
from loraflow.adapters.lora_updates import PREFIX, Adapter, Update, from_loralib, write_peft
from loraflow.adapters.streaming_merge import by_pattern, check_rank
from loraflow.adapters.validation import (
    changed_base,
    check_adapter,
    check_config,
    read_config,
    refuse_bad_numbers,
    refuse_pickles,
)
from loraflow.failures import BadModel


@dataclass(frozen=True)
class Skeleton:
    """A base without its weights: shapes, configuration, and which modules are more than linear."""

    shapes: dict[str, tuple[int, ...]]
    config: dict[str, Any]
    embeddings: frozenset[str]
    transposed: frozenset[str]


def convert(
    source: Path,
    base: Path,
    out: Path,
    *,
    lora_alpha: float | None = None,
    enable_lora: Mapping[str, list[str]] | None = None,
) -> dict[str, Any]:
    """Write an adapter as PEFT's folder for this base.

    Args:
        source: a PEFT adapter's folder, or a file of loralib's `lora_state_dict`. A file of `torch.save` is read by
            torch's `weights_only` reader, which builds tensors and refuses everything else; safetensors need no such care.
        base: folder of the model that it is to fit; its weights are not read.
        out: a folder that does not exist yet.
        lora_alpha: of a loralib checkpoint, which does not say it.
        enable_lora: of a loralib checkpoint, the adapted blocks of fused modules, where not all are.

    Returns:
        Figures: how many `modules` were `kept`, `split`, `fused`, and their `rank`s.

    Raises:
        BadModel: it fits the base in no way, is damaged, or holds more than LoRA.
    """
    skeleton = read_skeleton(base)
    if source.is_dir():
        adapter = read_peft(source)
    else:
        if lora_alpha is None:
            raise BadModel(
                "A loralib checkpoint does not say its alpha.", where=str(source), next_step="give it with --alpha"
            )
        adapter = from_loralib(
            read_tensors(source), skeleton.shapes, skeleton.config, lora_alpha=lora_alpha, enable_lora=enable_lora,
            embeddings=skeleton.embeddings, transposed=skeleton.transposed,
        )  # fmt: skip
    fitted, figures = fit(adapter, skeleton)
    write_peft(fitted, out)
    return {**figures, "ranks": sorted({update.rank for update in fitted.updates.values()})}


def read_skeleton(base: Path) -> Skeleton:
    """Build a base's model without its weights.

    Raises:
        BadModel: the folder has no configuration that transformers knows.
    """
    import torch
    from torch import nn
    from transformers import AutoConfig, AutoModelForCausalLM
    from transformers.pytorch_utils import Conv1D

    try:
        config = AutoConfig.from_pretrained(base, local_files_only=True)
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(config)
    except (OSError, ValueError, KeyError) as error:
        raise BadModel(
            "The base's configuration cannot be read.", where=str(base), expected="config.json of a causal model",
            got=str(error).splitlines()[0][:200],
        ) from error  # fmt: skip
    modules = dict(model.named_modules())
    return Skeleton(
        {name: tuple(parameter.shape) for name, parameter in model.named_parameters(remove_duplicate=False)},
        config.get_text_config().to_dict(),
        frozenset(name for name, module in modules.items() if isinstance(module, nn.Embedding)),
        frozenset(name for name, module in modules.items() if isinstance(module, Conv1D)),
    )


def read_tensors(file: Path) -> dict[str, Any]:
    """Read a loralib checkpoint, as safetensors or as what `torch.save` wrote, without running code of the file.

    Raises:
        BadModel: it holds anything but tensors by name, or a number that is not finite.
    """
    import pickle

    import torch
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        if file.suffix == ".safetensors":
            state: Any = load_file(file)
        else:
            state = torch.load(file, map_location="cpu", weights_only=True)
    except (pickle.UnpicklingError, RuntimeError, EOFError, SafetensorError, ValueError) as error:
        raise BadModel(
            "The checkpoint cannot be read as tensors, and nothing else is read from it.",
            where=str(file),
            expected="safetensors, or torch.save of lora_state_dict(model)",
            got=str(error).strip().splitlines()[0][:200],
        ) from error
    if isinstance(state, dict) and set(state) == {"model_state_dict"}:  # as loralib's examples save it
        state = state["model_state_dict"]
    if not isinstance(state, dict) or not all(isinstance(one, torch.Tensor) for one in state.values()):
        raise BadModel("The checkpoint is no dictionary of tensors.", where=str(file), got=type(state).__name__)
    refuse_bad_numbers(state.items(), file)
    return {name: tensor.float() for name, tensor in state.items()}


def read_peft(folder: Path) -> Adapter:
    """Read a PEFT adapter of LoRA, rsLoRA or DoRA.

    Raises:
        BadModel: a pickle, damaged, or it holds more than that.
    """
    from safetensors.torch import load_file

    refuse_pickles(folder)
    config = read_config(folder)
    more = [key for key in ("modules_to_save", "trainable_token_indices", "target_parameters", "lora_bias", "fan_in_fan_out")
            if config.get(key)]  # fmt: skip
    if config.get("peft_type") != "LORA" or more or config.get("bias", "none") != "none":
        raise BadModel(
            "Only LoRA, rsLoRA and DoRA adapters without biases are converted.",
            where=str(folder),
            got=", ".join(more) or f"{config.get('peft_type')}, bias {config.get('bias')}",
            next_step="merge it into its own base instead: loraflow merge",
        )
    if changed_base(config):
        raise BadModel(
            "The adapter was trained on weights that its initialisation changed.",
            where=str(folder / "adapter_config.json"),
            expected="init_lora_weights: true",
            got=str(config["init_lora_weights"]),
            next_step="save it again where it was trained, with peft's path_initial_model_for_weight_conversion",
        )
    check_config(config, folder)
    check_adapter(folder)
    tensors = load_file(folder / "adapter_model.safetensors")
    updates, used = {}, set()
    for name in sorted(tensors):
        if not name.endswith(".lora_A.weight"):
            continue
        stem = name.removesuffix(".lora_A.weight")
        up, magnitude = tensors.get(f"{stem}.lora_B.weight"), tensors.get(f"{stem}.lora_magnitude_vector")
        used |= {name, f"{stem}.lora_B.weight"} | (
            {f"{stem}.lora_magnitude_vector"} if magnitude is not None else set()
        )
        if up is None or up.ndim != 2 or up.shape[1] != tensors[name].shape[0]:
            raise BadModel("A has no B that fits it.", where=f"{folder}: {stem}")
        module, rank = stem.removeprefix(PREFIX), up.shape[1]
        check_rank(config, module, rank)
        alpha = by_pattern(config.get("alpha_pattern") or {}, module, config.get("lora_alpha", 8))
        scale = alpha / (math.sqrt(rank) if config.get("use_rslora") else rank)
        updates[module] = Update(tensors[name].float(), up.float(), scale, magnitude=magnitude)
    if rest := sorted(tensors.keys() - used):
        raise BadModel(
            "The adapter holds more than LoRA.", where=f"{folder}: {rest[0]}", got=f"{len(rest)} other tensors"
        )
    return Adapter(updates)


def fit(adapter: Adapter, base: Skeleton) -> tuple[Adapter, dict[str, int]]:
    """Make an adapter's modules those of a base: kept, split or fused.

    Raises:
        BadModel: a module is in the base in no form, or a shape differs.
    """
    fused_name = {part: whole for whole, parts in SPLIT.items() for part in parts}
    updates: dict[str, Update] = {}
    groups: dict[str, dict[str, Update]] = {}
    split = 0
    for name, update in adapter.updates.items():
        parent, _, own = name.rpartition(".")
        whole = f"{parent}.{fused_name.get(own)}"
        if f"{name}.weight" in base.shapes:
            _check_shape(name, update, base)
            updates[name] = update
        elif f"{whole}.weight" in base.shapes:
            groups.setdefault(whole, {})[own] = update
        elif own in SPLIT and all(f"{parent}.{part}.weight" in base.shapes for part in SPLIT[own]):
            updates |= {f"{parent}.{part}": one for part, one in _split(parent, own, update, base).items()}
            split += 1
        else:
            near = sorted({n.rsplit(".", 2)[-2] for n in base.shapes if n.startswith(parent + ".")})
            raise BadModel(
                "The adapter adapts a module that the base does not have.",
                where=name,
                expected=f"among {', '.join(near)}" if near else f"one of {len(base.shapes)} tensors",
                next_step="give the base that it was trained on, or one with the same layers",
            )
    for whole, parts in groups.items():
        updates[whole] = _fuse(whole, parts, base)
    for name in updates:
        _check_shape(name, updates[name], base)
    if adapter.biases and (groups or split):
        raise BadModel("Biases of split projections are not fused, nor the other way round.", where="bias")
    done = Adapter(updates, adapter.biases, adapter.bias, adapter.fan_in_fan_out)
    return done, {
        "kept": len(adapter.updates) - split - sum(map(len, groups.values())),
        "split": split,
        "fused": len(groups),
    }


def _check_shape(name: str, update: Update, base: Skeleton) -> None:
    want = base.shapes[f"{name}.weight"]
    if update.kind == "conv":
        return
    got = (update.up.shape[0], update.down.shape[1])
    if got != (want[::-1] if name in base.transposed or name in base.embeddings else want):
        raise BadModel(
            "An adapter's matrix does not fit the base's.", where=name, expected=str(list(want)), got=str(list(got)),
            next_step="give the base that it was trained on",
        )  # fmt: skip


def _split(parent: str, own: str, update: Update, base: Skeleton) -> dict[str, Update]:
    """Cut B by rows; A serves each part."""
    out, at = {}, 0
    sizes = [base.shapes[f"{parent}.{part}.weight"][0] for part in SPLIT[own]]
    if sum(sizes) != update.up.shape[0]:
        raise BadModel(
            "The blocks do not add up.", where=f"{parent}.{own}", expected=str(update.up.shape[0]), got=str(sizes)
        )
    for part, size in zip(SPLIT[own], sizes, strict=True):
        rows = slice(at, at + size)
        magnitude = None if update.magnitude is None else update.magnitude[rows]
        out[part] = Update(update.down, update.up[rows], update.scale, magnitude=magnitude)
        at += size
    return out


def _fuse(whole: str, parts: dict[str, Update], base: Skeleton) -> Update:
    """Stack the A's, and put each B on its block of a block-diagonal one; the rank is the sum.

    Parts that were cut from one update (the same A and scale) become that update again.
    """
    import torch

    own = whole.rsplit(".", 1)[-1]
    rows = base.shapes[f"{whole}.weight"][0]
    sizes = block_sizes(base.config, own, rows)
    names = SPLIT[own]
    if sizes is None or any(p.up.shape[0] != s for n, s in zip(names, sizes, strict=True) for p in [parts.get(n)] if p):
        raise BadModel(
            "The parts do not fit the fused projection.", where=whole, expected=f"{', '.join(names)} of {sizes} rows",
            got=str({name: part.up.shape[0] for name, part in parts.items()}),
        )  # fmt: skip
    present = [parts[name] for name in names if name in parts]
    first = present[0]
    magnitudes = [part.magnitude for part in present]
    if any(m is not None for m in magnitudes) and (len(present) < len(names) or any(m is None for m in magnitudes)):
        raise BadModel("DoRA on a part of a fused projection has no form of the whole.", where=whole)
    magnitude = torch.cat(magnitudes) if magnitudes[0] is not None else None
    same = all(part.scale == first.scale and torch.equal(part.down, first.down) for part in present)
    if same and len(present) == len(names):
        return Update(first.down, torch.cat([part.up for part in present]), first.scale, magnitude=magnitude)
    ups, at, column = first.up.new_zeros(rows, sum(part.rank for part in present)), 0, 0
    for name, size in zip(names, sizes, strict=True):
        if name in parts:
            part = parts[name]
            # One scale for all: where they differ, the ratio goes into B (exact for a power of two, else rounded once).
            ups[at : at + size, column : column + part.rank] = part.up * (part.scale / first.scale)
            column += part.rank
        at += size
    return Update(torch.cat([part.down for part in present]), ups, first.scale, magnitude=magnitude)


def parse_enabled(pairs: tuple[str, ...]) -> dict[str, list[str]]:
    """Read `qkv_proj=q,v` options."""
    return {key: [one for one in text.split(",") if one] for key, _, text in (pair.partition("=") for pair in pairs)}
