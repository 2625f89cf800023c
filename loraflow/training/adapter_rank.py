"""The rank that counts for the memory of adapters whose ranks differ between modules. Arithmetic only, no torch."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence

from loraflow.adapters.targets import ALL_LINEAR, in_layers, selects
from loraflow.config.lora import PeftConfig
from loraflow.training.memory import ModelShape

Spelling = tuple[tuple[str, int], ...]  # the modules of a product, with their shares of its adapter's weights


def adapter_rank(shape: ModelShape, adapters: Sequence[PeftConfig]) -> float:
    """Return the rank at which adapters on all projections have as many weights as these adapters together.

    Each module's rank is the largest of its adapters' ranks, since adapters that are trained in one pass are padded to
    it. Modules are found by the names that most architectures use (q_proj or qkv_proj). If the recipe names a module
    otherwise, all projections count with the largest rank.

    Args:
        shape: the base's.
        adapters: those that are trained in one pass; one in most trainings.
    """
    largest = max(rank for one in adapters for rank in (one.r, *one.rank_pattern.values()))
    products = [product for layer in range(shape.layers) for product in _products(shape, layer)]
    names = [name for spellings, _ in products for spelling in spellings for name, _ in spelling]
    if not all(_names_only(one, names) for one in adapters):
        return float(len(adapters) * largest)
    total = sum(size * max(_rank_of_product(one, spellings) for one in adapters) for spellings, size in products)
    weights = sum(size for _, size in products)
    return len(adapters) * (total / weights if total else largest)


def _names_only(adapter: PeftConfig, names: Sequence[str]) -> bool:
    """Tell whether all targets and patterns of a recipe select some of these modules."""
    targets = adapter.target_modules
    each = [] if targets == ALL_LINEAR else [targets] if isinstance(targets, str) else [[one] for one in targets]
    patterns = [f"(.*\\.)?({pattern})" for pattern in adapter.rank_pattern]
    return all(any(selects(one, name) for name in names) for one in [*each, *patterns])


def _products(shape: ModelShape, layer: int) -> Iterator[tuple[tuple[Spelling, ...], int]]:
    """Yield the products of a layer: how their modules may be called, and the weights of an adapter of rank 1."""
    query, key, up = shape.heads * shape.head_dim, shape.kv_heads * shape.head_dim, shape.intermediate
    attention, mlp = f"model.layers.{layer}.self_attn", f"model.layers.{layer}.mlp"
    split = ((f"{attention}.q_proj", query), (f"{attention}.k_proj", key), (f"{attention}.v_proj", key))
    yield (((f"{attention}.qkv_proj", 1),), split), shape.hidden + query + 2 * key
    yield (((f"{attention}.o_proj", 1),),), query + shape.hidden
    gated = ((f"{mlp}.gate_proj", up), (f"{mlp}.up_proj", up))
    yield (((f"{mlp}.gate_up_proj", 1),), gated), shape.hidden + 2 * up
    yield (((f"{mlp}.down_proj", 1),),), up + shape.hidden


def _rank_of_product(adapter: PeftConfig, spellings: Sequence[Spelling]) -> float:
    """Return the mean rank of a product's modules. Of two spellings, the recipe means the one that a pattern names."""
    for spelling in spellings:
        if any(_pattern_of(adapter, name) for name, _ in spelling):
            return _mean_rank(adapter, spelling)
    return max(_mean_rank(adapter, spelling) for spelling in spellings)


def _mean_rank(adapter: PeftConfig, spelling: Spelling) -> float:
    return sum(share * _rank_of(adapter, name) for name, share in spelling) / sum(share for _, share in spelling)


def _rank_of(adapter: PeftConfig, name: str) -> int:
    """Return a module's rank; 0 without an adapter."""
    targets = adapter.target_modules
    is_adapted = targets == ALL_LINEAR or selects(targets, name)
    if not is_adapted or selects(adapter.exclude_modules, name) or not in_layers(name, adapter.layers_to_transform):
        return 0
    pattern = _pattern_of(adapter, name)
    return adapter.r if pattern is None else adapter.rank_pattern[pattern]


def _pattern_of(adapter: PeftConfig, name: str) -> str | None:
    """Return the first pattern that matches a module, as peft chooses it."""
    return next((one for one in adapter.rank_pattern if re.match(rf"(.*\.)?({one})$", name)), None)
