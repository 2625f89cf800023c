"""Make an adapter fit a base: keep its updates, split those of fused projections, or fuse those of split ones."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TypedDict

from loraflow.adapters.lora_updates import FUSED, SPLIT, Adapter, AttentionHeads, LoraUpdate, block_sizes
from loraflow.base.stored_weights import model_without_weights
from loraflow.failures import BadModel


@dataclass(frozen=True)
class BaseShapes:
    """Shapes of a base's parameters, and which of its modules are not plain linear layers."""

    shapes: Mapping[str, tuple[int, ...]]
    heads: AttentionHeads
    embeddings: frozenset[str]  # names of modules
    transposed: frozenset[str]  # names of modules whose weight is (in, out), as GPT-2's

    @classmethod
    def read(cls, base: Path) -> BaseShapes:
        """Build a base's model without its weights.

        Raises:
            BadModel: the folder has no config of a causal model that transformers knows.
        """
        from torch import nn
        from transformers.pytorch_utils import Conv1D

        model = model_without_weights(base)
        modules = dict(model.named_modules())
        return cls(
            {name: tuple(parameter.shape) for name, parameter in model.named_parameters(remove_duplicate=False)},
            AttentionHeads.of(model.config.get_text_config()),
            frozenset(name for name, module in modules.items() if isinstance(module, nn.Embedding)),
            frozenset(name for name, module in modules.items() if isinstance(module, Conv1D)),
        )

    def weight_shape(self, module: str) -> tuple[int, ...]:
        """Return the shape of a module's weight as (outputs, inputs); an embedding's is (width, vocabulary)."""
        shape = self.shapes[f"{module}.weight"]
        return shape[::-1] if module in self.transposed or module in self.embeddings else shape


class FitFigures(TypedDict):
    """How many of an adapter's modules were kept or split, and how many fused ones were made."""

    kept: int
    split: int
    fused: int


def fit(adapter: Adapter, base: BaseShapes) -> tuple[Adapter, FitFigures]:
    """Convert an adapter for a base whose projections are fused or split; return it with the counts of modules.

    Raises:
        BadModel: the base has a module neither as it is, nor fused, nor split; or a shape differs.
    """
    updates: dict[str, LoraUpdate] = {}
    groups: dict[str, dict[str, LoraUpdate]] = {}  # by the full name of the fused module, then by projection
    split = 0
    for name, update in adapter.updates.items():
        parent, _, module_name = name.rpartition(".")
        fused_name = f"{parent}.{FUSED.get(module_name)}"
        if f"{name}.weight" in base.shapes:
            _check_shape(name, update, base)
            updates[name] = update
        elif f"{fused_name}.weight" in base.shapes:
            groups.setdefault(fused_name, {})[module_name] = update
        elif module_name in SPLIT and all(f"{parent}.{part}.weight" in base.shapes for part in SPLIT[module_name]):
            updates |= _split(parent, module_name, update, base)
            split += 1
        else:
            raise _missing(name, parent, base)
    for fused_name, projections in groups.items():
        updates[fused_name] = _fuse(fused_name, projections, base)
    for name in updates:
        _check_shape(name, updates[name], base)
    if adapter.biases and (groups or split):
        raise BadModel(
            "Biases of projections cannot be fused or split.",
            where="bias",
            next_step="merge the adapter into the base that it was trained on: loraflow merge",
        )
    fitted = Adapter(updates, adapter.biases, adapter.bias, adapter.fan_in_fan_out)
    kept = len(adapter.updates) - split - sum(map(len, groups.values()))
    return fitted, {"kept": kept, "split": split, "fused": len(groups)}


def _missing(name: str, parent: str, base: BaseShapes) -> BadModel:
    siblings = sorted({n.rsplit(".", 2)[-2] for n in base.shapes if n.startswith(parent + ".")})
    return BadModel(
        "The adapter adapts a module that the base does not have.",
        where=name,
        expected=f"among {', '.join(siblings)}" if siblings else f"one of {len(base.shapes)} tensors",
        next_step="give the base that it was trained on, or one with the same layers",
    )


def _check_shape(name: str, update: LoraUpdate, base: BaseShapes) -> None:
    got = (update.up.shape[0], update.down.shape[1])
    if got != base.weight_shape(name):
        raise BadModel(
            "The shape of an adapter's matrix does not match the base.",
            where=name,
            expected=str(list(base.shapes[f"{name}.weight"])),
            got=str(list(got)),
            next_step="give the base that it was trained on",
        )


def _split(parent: str, module_name: str, update: LoraUpdate, base: BaseShapes) -> dict[str, LoraUpdate]:
    """Split B by rows; each projection gets all of A."""
    sizes = [base.shapes[f"{parent}.{part}.weight"][0] for part in SPLIT[module_name]]
    if sum(sizes) != update.up.shape[0]:
        raise BadModel(
            "The rows of the base's projections do not add up to those of the fused projection.",
            where=f"{parent}.{module_name}",
            expected=str(update.up.shape[0]),
            got=str(sizes),
            next_step="give the base that it was trained on, or one with the same shapes",
        )
    parts: dict[str, LoraUpdate] = {}
    start = 0
    for part, size in zip(SPLIT[module_name], sizes, strict=True):
        rows = slice(start, start + size)
        magnitude = None if update.magnitude is None else update.magnitude[rows]
        parts[f"{parent}.{part}"] = LoraUpdate(update.down, update.up[rows], update.scale, magnitude=magnitude)
        start += size
    return parts


def _fuse(fused_name: str, projections: dict[str, LoraUpdate], base: BaseShapes) -> LoraUpdate:
    """Stack the A matrices, and place each B in its block of a block-diagonal B. The rank is the sum of the ranks.

    If all projections have the same A and scale, because they were split from one update, that update is restored.
    """
    import torch

    module_name = fused_name.rsplit(".", 1)[-1]
    rows = base.shapes[f"{fused_name}.weight"][0]
    sizes, names = block_sizes(base.heads, module_name, rows), SPLIT[module_name]
    if sizes is None or any(
        name in projections and projections[name].up.shape[0] != size for name, size in zip(names, sizes, strict=True)
    ):
        raise BadModel(
            "The shapes of the adapter's projections do not match the fused projection.",
            where=fused_name,
            expected=f"{', '.join(names)} of {sizes} rows",
            got=str({name: update.up.shape[0] for name, update in projections.items()}),
            next_step="give the base that it was trained on, or one with the same shapes",
        )
    present = [projections[name] for name in names if name in projections]
    first, complete = present[0], len(present) == len(names)
    magnitudes = [update.magnitude for update in present if update.magnitude is not None]
    if magnitudes and (len(magnitudes) < len(present) or not complete):
        raise BadModel(
            "DoRA adapters can be fused only if all projections have one.",
            where=fused_name,
            expected=f"DoRA on {', '.join(names)}",
            got=", ".join(name for name in names if name in projections and projections[name].magnitude is not None),
            next_step="merge the adapter into the base that it was trained on: loraflow merge",
        )
    magnitude = torch.cat(magnitudes) if magnitudes else None
    if complete and all(update.scale == first.scale and torch.equal(update.down, first.down) for update in present):
        return LoraUpdate(first.down, torch.cat([update.up for update in present]), first.scale, magnitude=magnitude)
    up = first.up.new_zeros(rows, sum(update.rank for update in present))
    row = column = 0
    for name, size in zip(names, sizes, strict=True):
        if update := projections.get(name):
            # The fused update has one scale. Where scales differ, B is multiplied by their ratio (exact for powers of two).
            up[row : row + size, column : column + update.rank] = update.up * (update.scale / first.scale)
            column += update.rank
        row += size
    return LoraUpdate(torch.cat([update.down for update in present]), up, first.scale, magnitude=magnitude)
