"""An adapter as a list of updates ΔW = scale·B·A, and PEFT's folder and loralib's file as two ways to write it down."""

from __future__ import annotations

import json
import math
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from loraflow.adapters.fused_projections import NAMES, block_sizes
from loraflow.failures import BadModel

PREFIX = "base_model.model."
_SUFFIXES = {
    "linear": (".lora_A.weight", ".lora_B.weight"),
    "conv": (".lora_A.weight", ".lora_B.weight"),
    "embedding": (".lora_embedding_A", ".lora_embedding_B"),
}


@dataclass
class Update:
    """What is learned for one module: A [r, in], B [out, r] (a convolution's have the kernel's axes too), and the rest."""

    down: Any
    up: Any
    scale: float
    kind: str = "linear"  # linear, embedding, conv
    magnitude: Any = None  # DoRA's, [out]

    @property
    def rank(self) -> int:
        """Rank r."""
        return int(self.down.shape[0])


@dataclass
class Adapter:
    """Updates by module name, biases by parameter name, and what else peft wants to know."""

    updates: dict[str, Update]
    biases: dict[str, Any] = field(default_factory=dict)
    bias: str = "none"
    fan_in_fan_out: bool = False


def block_diagonal(down: Any, up: Any, sizes: list[int], enabled: list[bool]) -> tuple[Any, Any]:
    """Return A and B of one update over the whole fused matrix that does what an update of each block did.

    Args:
        down: loralib's A, [n·r, in] for n enabled blocks.
        up: loralib's B, [rows of the enabled blocks, r].
        sizes: rows of each block.
        enabled: which blocks have an update.

    Returns:
        A as it is, and B [sum of sizes, n·r]: B_g in the rows of block g and the columns of its part of A, zeros beside.
    """
    rank = up.shape[1]
    wide = up.new_zeros(sum(sizes), rank * sum(enabled))
    at = taken = number = 0
    for size, on in zip(sizes, enabled, strict=True):
        if on:
            wide[at : at + size, number * rank : (number + 1) * rank] = up[taken : taken + size]
            taken, number = taken + size, number + 1
        at += size
    return down, wide


def convolution(down: Any, up: Any, shape: tuple[int, ...]) -> tuple[Any, Any]:
    """Return a Conv2d's A [r·k², in, k, k] and B [out, r·k², 1, 1] from loralib's [r·k, in·k] and [out·k, r·k].

    loralib takes B·A's rows in the order of the kernel's memory: k rows of B·A make one output's kernel, so that each of
    them is a rank-r·k update of a k-th of it.

    Raises:
        BadModel: a convolution in groups, whose kernels share rows.
    """
    out, inner, k, _ = shape
    if up.shape[0] != out * k or down.shape[1] != inner * k:
        raise BadModel(
            "A loralib convolution in groups has no PEFT form.",
            expected=f"A [·, {inner * k}], B [{out * k}, ·]",
            got=f"A {list(down.shape)}, B {list(up.shape)}",
        )
    rank = down.shape[0]
    wide = down.new_zeros(k, rank, k, inner * k)
    for part in range(k):
        wide[part, :, part] = down
    ups = up.view(out, k, rank).reshape(out, k * rank, 1, 1)
    return wide.view(k * rank, inner, k, k), ups


def from_loralib(
    state: Mapping[str, Any],
    shapes: Mapping[str, tuple[int, ...]],
    config: Mapping[str, Any],
    *,
    lora_alpha: float,
    enable_lora: Mapping[str, list[str]] | None = None,
    embeddings: frozenset[str] = frozenset(),
    transposed: frozenset[str] = frozenset(),
) -> Adapter:
    """Read a loralib checkpoint, `lora_state_dict`: it names tensors, and says neither alpha nor which blocks are meant.

    Args:
        state: the checkpoint's tensors.
        shapes: of the base's tensors, by name.
        config: the base's, for the sizes of fused blocks.
        lora_alpha: with which it was trained.
        enable_lora: for fused modules of which not all blocks are adapted, their names: `{"qkv_proj": ["q", "v"]}`.
        embeddings: names of modules that are embeddings.
        transposed: names of modules whose weight is (in, out), as GPT-2's.

    Raises:
        BadModel: a tensor fits no module of the base, or blocks do not add up.
    """
    stems = {name.rsplit(".lora_", 1)[0] for name in state if name.endswith((".lora_A", ".lora_B"))}
    expected = {f"{stem}.lora_{side}" for stem in stems for side in "AB"}
    biases = {name.replace(".conv.bias", ".bias"): state[name] for name in state if name.endswith(".bias")}
    odd = sorted((state.keys() - expected - {n for n in state if n.endswith(".bias")}) | (expected - state.keys()))
    if odd or not stems:
        raise BadModel(
            "This is no checkpoint of loralib's lora_state_dict.",
            where=odd[0] if odd else "",
            expected="pairs of x.lora_A and x.lora_B, and biases",
            got=f"{len(state)} tensors, {len(odd)} without a partner",
        )
    updates = {}
    for stem in sorted(stems):
        weight = shapes.get(f"{stem}.weight")
        down, up = state[f"{stem}.lora_A"], state[f"{stem}.lora_B"]
        if weight is None or down.ndim != 2 or up.ndim != 2:
            raise _unfit(stem, list(weight) if weight else "a weight of this name in the base", down, up)
        updates[stem] = _update(stem, down, up, weight, config, lora_alpha, enable_lora or {}, embeddings, transposed)
    for name, tensor in biases.items():
        if shapes.get(name) != tuple(tensor.shape):
            raise BadModel("A bias is not one of the base's.", where=name, expected=str(shapes.get(name)))
    adapted = {f"{stem}.bias" for stem in stems}
    bias = "none" if not biases else "lora_only" if biases.keys() <= adapted else "all"
    return Adapter(updates, biases, bias, bool(transposed & stems))


def _update(
    stem: str,
    down: Any,
    up: Any,
    weight: tuple[int, ...],
    config: Mapping[str, Any],
    lora_alpha: float,
    enable_lora: Mapping[str, list[str]],
    embeddings: frozenset[str],
    transposed: frozenset[str],
) -> Update:
    own = stem.rsplit(".", 1)[-1]
    if len(weight) == 4:
        rank = down.shape[0] // weight[2]
        return Update(*convolution(down, up, weight), lora_alpha / rank, "conv")
    rows, columns = weight[::-1] if stem in transposed or stem in embeddings else weight
    rank, rest = up.shape[1], down.shape[0] % up.shape[1]
    if rest or down.shape[1] != columns:
        raise _unfit(stem, [rows, columns], down, up)
    blocks = down.shape[0] // rank
    if stem in embeddings:
        if blocks != 1 or up.shape[0] != rows:
            raise _unfit(stem, [rows, columns], down, up)
        return Update(down, up, lora_alpha / rank, "embedding")
    asked = next((enable_lora[key] for key in enable_lora if stem == key or stem.endswith(f".{key}")), None)
    if asked is None and blocks == 1 and up.shape[0] == rows:
        return Update(down, up, lora_alpha / rank)
    names = NAMES.get(own, ())
    sizes = block_sizes(config, own, rows) if names else None
    flags = [asked is None or name in asked for name in names]
    if asked is not None and not set(asked) <= set(names):
        sizes = None
    adapted = sum(size for size, on in zip(sizes or [], flags, strict=False) if on)
    if sizes is None or sum(flags) != blocks or adapted != up.shape[0]:
        raise BadModel(
            f"{blocks} blocks of {own} are adapted; which ones?"
            if asked is None
            else f"These are not its blocks of {own}.",
            where=stem,
            expected=f"B with {up.shape[0]} rows in {blocks} of {', '.join(names) or 'no known blocks'} {sizes or ''}",
            got=str(asked) if asked else f"all {len(names)}",
            next_step=f"say --enable-lora {own}=q,v (for example)",
        )
    return Update(*block_diagonal(down, up, sizes, flags), lora_alpha / rank)


def _unfit(stem: str, expected: Any, down: Any, up: Any) -> BadModel:
    return BadModel(
        "An adapter's matrix does not fit the base's.",
        where=stem,
        expected=str(expected),
        got=f"A {list(down.shape)}, B {list(up.shape)}",
        next_step="use the base that it was trained on",
    )


def write_peft(adapter: Adapter, folder: Path) -> None:
    """Write an adapter as `PeftModel.from_pretrained` reads it. Equal adapters have equal bytes."""
    from safetensors.torch import save_file

    tensors = {}
    for name, update in adapter.updates.items():
        first, second = _SUFFIXES[update.kind]
        tensors[f"{PREFIX}{name}{first}"] = update.down.contiguous()
        tensors[f"{PREFIX}{name}{second}"] = update.up.contiguous()
        if update.magnitude is not None:
            tensors[f"{PREFIX}{name}.lora_magnitude_vector"] = update.magnitude.contiguous()
    for name, tensor in adapter.biases.items():
        stem = name.removesuffix(".bias")
        inside = ".base_layer.bias" if stem in adapter.updates else ".bias"
        tensors[f"{PREFIX}{stem}{inside}"] = tensor.contiguous()
    folder.mkdir(parents=True, exist_ok=True)
    tensors = {name: tensor.clone() for name, tensor in tensors.items()}  # parts that were split share their A
    save_file(tensors, folder / "adapter_model.safetensors", metadata={"format": "pt"})
    (folder / "adapter_config.json").write_text(json.dumps(_config(adapter), indent=2, sort_keys=True) + "\n", "utf-8")


def _config(adapter: Adapter) -> dict[str, Any]:
    from peft import LoraConfig

    ranks = {name: update.rank for name, update in adapter.updates.items()}
    alphas = {name: update.scale * update.rank for name, update in adapter.updates.items()}
    rank, alpha = _commonest(ranks), _commonest(alphas)
    own = {name: name.rsplit(".", 1)[-1] for name in ranks}
    # A short name serves as the target where every module of that name that PEFT would find is one of ours; the whole
    # names are always right.
    config = LoraConfig(
        r=rank,
        lora_alpha=_number(alpha),
        target_modules=sorted(ranks),
        rank_pattern=_patterns(ranks, own, rank),
        alpha_pattern=_patterns({name: _number(value) for name, value in alphas.items()}, own, _number(alpha)),
        bias=adapter.bias,
        fan_in_fan_out=adapter.fan_in_fan_out,
        use_dora=any(update.magnitude is not None for update in adapter.updates.values()),
        task_type="CAUSAL_LM",
        inference_mode=True,
    ).to_dict()
    config["target_modules"] = sorted(config["target_modules"])
    return {key: value for key, value in config.items() if key != "runtime_config"}


def _commonest(values: Mapping[str, Any]) -> Any:
    return Counter(values.values()).most_common(1)[0][0]


def _patterns(values: Mapping[str, Any], own: Mapping[str, str], common: Any) -> dict[str, Any]:
    """Return PEFT's pattern for what differs from the common value: by a module's own name where all of that name agree."""
    found = {}
    for name, value in values.items():
        if value == common:
            continue
        agree = all(values[other] == value for other in values if own[other] == own[name])
        found[own[name] if agree else "^" + name.replace(".", r"\.")] = value
    return found


def _number(value: float) -> float | int:
    """Return a whole number as an int, as people write alphas."""
    nearest = round(value)
    return nearest if math.isclose(value, nearest, rel_tol=1e-12) else value
