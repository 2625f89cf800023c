"""Convert adapters: loralib's checkpoints to PEFT's folders, and between split and fused projections.

An adapter for q_proj, k_proj and v_proj is converted for a base with qkv_proj, and the reverse.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from loraflow.adapters.fit_to_base import BaseShapes, FitFigures, fit
from loraflow.adapters.lora_updates import (
    FUSED_NAMES,
    Adapter,
    Bias,
    LoraUpdate,
    block_diagonal,
    block_sizes,
)
from loraflow.adapters.peft_folder import read_peft, refuse_unconvertible, write_peft
from loraflow.adapters.tokenizer_files import copy_tokenizer_files
from loraflow.adapters.validation import check_adapter, check_finite
from loraflow.base.stored_weights import refuse_damaged_settings
from loraflow.failures import BadModel

if TYPE_CHECKING:
    import torch

    _Loaded = Mapping[str, torch.Tensor | Mapping[str, torch.Tensor]]


class ConvertFigures(FitFigures):
    """What a conversion did to the adapter's modules."""

    ranks: list[int]  # the distinct ranks of the new adapter's modules


def convert(
    source: Path,
    base: Path,
    out: Path,
    *,
    lora_alpha: float | None = None,
    enable_lora: Mapping[str, list[str]] | None = None,
) -> ConvertFigures:
    """Write an adapter as PEFT's folder for this base.

    Args:
        source: a PEFT adapter's folder, or a file of loralib's `lora_state_dict`.
        base: folder of the model that the adapter is to fit; its weights are not read.
        lora_alpha: alpha of a loralib checkpoint, which does not contain it.
        enable_lora: the adapted blocks of fused modules in a loralib checkpoint, if not all blocks are adapted.

    Raises:
        BadModel: the adapter does not fit the base, split or fused; it is damaged, or contains more than LoRA.
    """
    refuse_damaged_settings(base)
    shapes = BaseShapes.read(base)
    if source.is_dir():
        refuse_unconvertible(source)
        refuse_unconvertible(source, check_adapter(source, base, convertible=True))
        adapter = read_peft(source)
    elif lora_alpha is None:
        raise BadModel(
            "A loralib checkpoint does not contain alpha.", where=str(source), next_step="set it with --alpha"
        )
    else:
        adapter = from_loralib(read_tensors(source), shapes, LoralibSettings(lora_alpha, enable_lora or {}))
    fitted, done = fit(adapter, shapes)
    write_peft(fitted, out)
    if source.is_dir():
        copy_tokenizer_files(source, out)
    ranks = sorted({update.rank for update in fitted.updates.values()})
    return {**done, "ranks": ranks}


def parse_enabled(pairs: tuple[str, ...]) -> dict[str, list[str]]:
    """Parse options such as `qkv_proj=q,v`."""
    split = (pair.partition("=") for pair in pairs)
    return {module: [block for block in blocks.split(",") if block] for module, _, blocks in split}


@dataclass(frozen=True)
class LoralibSettings:
    """Settings that a loralib checkpoint does not contain.

    Args:
        enable_lora: the adapted blocks of fused modules, where not all are: `{"qkv_proj": ["q", "v"]}`.
    """

    lora_alpha: float
    enable_lora: Mapping[str, list[str]] = field(default_factory=dict)

    def blocks_of(self, module: str) -> list[str] | None:
        """Return the adapted blocks of a module, or None if `enable_lora` does not name it."""
        return next((self.enable_lora[key] for key in self.enable_lora if f".{module}".endswith(f".{key}")), None)


def read_tensors(file: Path) -> dict[str, torch.Tensor]:
    """Read a checkpoint in fp32, as safetensors or as `torch.save` wrote it, without running code of the file.

    Raises:
        BadModel: it holds anything but tensors by name, or a number that is not finite.
    """
    import pickle

    import torch
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    loaded: _Loaded
    try:
        if file.suffix == ".safetensors":
            loaded = load_file(file)
        else:
            loaded = torch.load(file, map_location="cpu", weights_only=True)
    except (pickle.UnpicklingError, RuntimeError, EOFError, SafetensorError, ValueError) as error:
        raise BadModel(
            "The checkpoint contains more than tensors, so it is not loaded.",
            where=str(file),
            expected="safetensors, or torch.save of lora_state_dict(model)",
            got=str(error).strip().splitlines()[0][:200],
            next_step="save it again where you trust it, with torch.save(lora_state_dict(model), FILE)",
        ) from error
    # loralib's examples save {"model_state_dict": state}.
    inner = loaded.get("model_state_dict") if isinstance(loaded, dict) and len(loaded) == 1 else None
    state = inner if isinstance(inner, dict) else loaded
    if not isinstance(state, dict) or not all(isinstance(value, torch.Tensor) for value in state.values()):
        raise BadModel(
            "The checkpoint is not a dictionary of tensors.",
            where=str(file),
            got=type(state).__name__,
            next_step="save it with torch.save(lora_state_dict(model), FILE)",
        )
    tensors = {name: value for name, value in state.items() if isinstance(value, torch.Tensor)}
    check_finite(tensors.items(), file)
    return {name: tensor.float() for name, tensor in tensors.items()}


def from_loralib(state: Mapping[str, torch.Tensor], base: BaseShapes, settings: LoralibSettings) -> Adapter:
    """Return a loralib checkpoint's tensors as an adapter of a base.

    Raises:
        BadModel: a tensor does not fit a module of the base, or the rows of the blocks do not add up.
    """
    stems = {name.rsplit(".lora_", 1)[0] for name in state if name.endswith((".lora_A", ".lora_B"))}
    pairs = {f"{stem}.lora_{side}" for stem in stems for side in "AB"}
    biases = {name.replace(".conv.bias", ".bias"): state[name] for name in state if name.endswith(".bias")}
    unmatched = sorted((state.keys() - pairs - {n for n in state if n.endswith(".bias")}) | (pairs - state.keys()))
    if unmatched or not stems:
        raise BadModel(
            "This is not a checkpoint of loralib's lora_state_dict.",
            where=unmatched[0] if unmatched else "",
            expected="pairs of x.lora_A and x.lora_B, and biases",
            got=f"{len(state)} tensors, {len(unmatched)} without a counterpart",
            next_step="save it with torch.save(lora_state_dict(model), FILE)",
        )
    updates = {stem: _update(stem, state[f"{stem}.lora_A"], state[f"{stem}.lora_B"], base, settings)
               for stem in sorted(stems)}  # fmt: skip
    for name, tensor in biases.items():
        if base.shapes.get(name) != tuple(tensor.shape):
            raise BadModel(
                "The base has no such bias.",
                where=name,
                expected=str(base.shapes.get(name)),
                next_step="name the base that it was trained on",
            )
    adapted = {f"{stem}.bias" for stem in stems}
    bias: Bias = "none" if not biases else "lora_only" if biases.keys() <= adapted else "all"
    return Adapter(updates, biases, bias, bool(base.transposed & stems))


def _update(
    module: str, down: torch.Tensor, up: torch.Tensor, base: BaseShapes, settings: LoralibSettings
) -> LoraUpdate:
    weight = base.shapes.get(f"{module}.weight")
    if weight is None or down.ndim != 2 or up.ndim != 2:
        raise _unfit(module, list(weight) if weight else "a weight of this name in the base", down, up)
    if len(weight) != 2:
        raise _unfit(module, list(weight), down, up)
    rows, columns = base.weight_shape(module)
    rank, rest = up.shape[1], down.shape[0] % up.shape[1]
    if rest or down.shape[1] != columns:
        raise _unfit(module, [rows, columns], down, up)
    blocks, scale = down.shape[0] // rank, settings.lora_alpha / rank
    if module in base.embeddings:
        if blocks != 1 or up.shape[0] != rows:
            raise _unfit(module, [rows, columns], down, up)
        return LoraUpdate(down, up, scale, "embedding")
    named = settings.blocks_of(module)
    if named is None and blocks == 1 and up.shape[0] == rows:
        return LoraUpdate(down, up, scale)
    return LoraUpdate(down, _fused_up(module, blocks, up, base, rows, named), scale)


def _fused_up(
    module: str, blocks: int, up: torch.Tensor, base: BaseShapes, rows: int, named: list[str] | None
) -> torch.Tensor:
    """Return B over all rows of a fused module, of which `blocks` blocks are adapted: those that are named, or all."""
    own = module.rsplit(".", 1)[-1]
    names = FUSED_NAMES.get(own, ())
    enabled = [named is None or name in named for name in names]
    sizes = block_sizes(base.heads, own, rows) if names else None
    if named is not None and not set(named) <= set(names):
        sizes = None
    adapted = sum(size for size, on in zip(sizes or [], enabled, strict=False) if on)
    if sizes is None or sum(enabled) != blocks or adapted != up.shape[0]:
        raise BadModel(
            f"The checkpoint adapts {blocks} blocks of {own}, but does not say which."
            if named is None
            else f"The named blocks of {own} do not match the checkpoint.",
            where=module,
            expected=f"B with {up.shape[0]} rows in {blocks} of {', '.join(names) or 'no known blocks'} {sizes or ''}",
            got=str(named) if named else f"all {len(names)}",
            next_step=f"name them, for example --enable-lora {own}=q,v",
        )
    return block_diagonal(up, sizes, enabled)


def _unfit(module: str, expected: Sequence[int] | str, down: torch.Tensor, up: torch.Tensor) -> BadModel:
    return BadModel(
        "The shape of an adapter's matrix does not match the base.",
        where=module,
        expected=str(expected),
        got=f"A {list(down.shape)}, B {list(up.shape)}",
        next_step="use the base that it was trained on",
    )
