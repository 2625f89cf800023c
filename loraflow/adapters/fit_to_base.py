"""Make an adapter fit a base: keep its updates, split those of fused projections, or fuse those of split ones."""

from __future__ import annotations

from dataclasses import dataclass

from loraflow.adapters.base_shapes import BaseShapes
from loraflow.adapters.fused_projections import SPLIT, block_sizes
from loraflow.adapters.lora_updates import Adapter, LoraUpdate
from loraflow.failures import BadModel

_FUSED = {part: whole for whole, parts in SPLIT.items() for part in parts}  # q_proj → qkv_proj


@dataclass(frozen=True)
class FitFigures:
    """How many of an adapter's modules were kept or split, and how many fused ones were made."""

    kept: int
    split: int
    fused: int


def fit(adapter: Adapter, base: BaseShapes) -> tuple[Adapter, FitFigures]:
    """Return the same adapter for a base whose projections are fused, or split, and what was done.

    Raises:
        BadModel: a module is in the base in no form, or a shape differs.
    """
    updates: dict[str, LoraUpdate] = {}
    groups: dict[str, dict[str, LoraUpdate]] = {}  # by the full name of the fused module, then by projection
    split = 0
    for name, update in adapter.updates.items():
        parent, _, own = name.rpartition(".")
        whole = f"{parent}.{_FUSED.get(own)}"
        if f"{name}.weight" in base.shapes:
            _check_shape(name, update, base)
            updates[name] = update
        elif f"{whole}.weight" in base.shapes:
            groups.setdefault(whole, {})[own] = update
        elif own in SPLIT and all(f"{parent}.{part}.weight" in base.shapes for part in SPLIT[own]):
            updates |= _split(parent, own, update, base)
            split += 1
        else:
            raise _missing(name, parent, base)
    for whole, parts in groups.items():
        updates[whole] = _fuse(whole, parts, base)
    for name in updates:
        _check_shape(name, updates[name], base)
    if adapter.biases and (groups or split):
        raise BadModel("Biases of split projections are not fused, nor the other way round.", where="bias")
    fitted = Adapter(updates, adapter.biases, adapter.bias, adapter.fan_in_fan_out)
    kept = len(adapter.updates) - split - sum(map(len, groups.values()))
    return fitted, FitFigures(kept, split, len(groups))


def _missing(name: str, parent: str, base: BaseShapes) -> BadModel:
    siblings = sorted({n.rsplit(".", 2)[-2] for n in base.shapes if n.startswith(parent + ".")})
    return BadModel(
        "The adapter adapts a module that the base does not have.",
        where=name,
        expected=f"among {', '.join(siblings)}" if siblings else f"one of {len(base.shapes)} tensors",
        next_step="give the base that it was trained on, or one with the same layers",
    )


def _check_shape(name: str, update: LoraUpdate, base: BaseShapes) -> None:
    if update.kind == "conv":
        return
    got = (update.up.shape[0], update.down.shape[1])
    if got != base.weight_shape(name):
        raise BadModel(
            "An adapter's matrix does not fit the base's.",
            where=name,
            expected=str(list(base.shapes[f"{name}.weight"])),
            got=str(list(got)),
            next_step="give the base that it was trained on",
        )


def _split(parent: str, own: str, update: LoraUpdate, base: BaseShapes) -> dict[str, LoraUpdate]:
    """Cut B by rows; each part has the whole A."""
    sizes = [base.shapes[f"{parent}.{part}.weight"][0] for part in SPLIT[own]]
    if sum(sizes) != update.up.shape[0]:
        raise BadModel(
            "The blocks do not add up.", where=f"{parent}.{own}", expected=str(update.up.shape[0]), got=str(sizes)
        )
    parts: dict[str, LoraUpdate] = {}
    start = 0
    for part, size in zip(SPLIT[own], sizes, strict=True):
        rows = slice(start, start + size)
        magnitude = None if update.magnitude is None else update.magnitude[rows]
        parts[f"{parent}.{part}"] = LoraUpdate(update.down, update.up[rows], update.scale, magnitude=magnitude)
        start += size
    return parts


def _fuse(whole: str, parts: dict[str, LoraUpdate], base: BaseShapes) -> LoraUpdate:
    """Stack the A's, and put each B on its block of a block-diagonal B; the rank is the sum of the ranks.

    Parts that were cut from one update (the same A and scale) become that update again.
    """
    import torch

    own = whole.rsplit(".", 1)[-1]
    rows = base.shapes[f"{whole}.weight"][0]
    sizes, names = block_sizes(base.heads, own, rows), SPLIT[own]
    if sizes is None or any(
        name in parts and parts[name].up.shape[0] != size for name, size in zip(names, sizes, strict=True)
    ):
        raise BadModel(
            "The parts do not fit the fused projection.",
            where=whole,
            expected=f"{', '.join(names)} of {sizes} rows",
            got=str({name: part.up.shape[0] for name, part in parts.items()}),
        )
    present = [parts[name] for name in names if name in parts]
    first, complete = present[0], len(present) == len(names)
    magnitudes = [part.magnitude for part in present if part.magnitude is not None]
    if magnitudes and (len(magnitudes) < len(present) or not complete):
        raise BadModel("DoRA on a part of a fused projection has no form of the whole.", where=whole)
    magnitude = torch.cat(magnitudes) if magnitudes else None
    if complete and all(part.scale == first.scale and torch.equal(part.down, first.down) for part in present):
        return LoraUpdate(first.down, torch.cat([part.up for part in present]), first.scale, magnitude=magnitude)
    up = first.up.new_zeros(rows, sum(part.rank for part in present))
    row = column = 0
    for name, size in zip(names, sizes, strict=True):
        if name in parts:
            part = parts[name]
            # One scale for all: where they differ, the ratio goes into B (exact for a power of two, else rounded once).
            up[row : row + size, column : column + part.rank] = part.up * (part.scale / first.scale)
            column += part.rank
        row += size
    return LoraUpdate(torch.cat([part.down for part in present]), up, first.scale, magnitude=magnitude)
