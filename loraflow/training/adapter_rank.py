"""The rank that counts for the memory of adapters whose ranks differ between modules. Arithmetic only, no torch."""

import re
from collections.abc import Iterator, Sequence
from typing import NamedTuple

from loraflow.adapters.targets import ALL_LINEAR, in_layers, matches, selects
from loraflow.config.lora import PeftConfig
from loraflow.training.memory import ModelShape, lora_weights


class Matrix(NamedTuple):
    """A linear layer, the embeddings or the head, by its full name and its size."""

    name: str
    into: int
    out: int


Spelling = tuple[Matrix, ...]  # the modules that compute a product: one that is fused, or several


def adapter_rank(shape: ModelShape, adapters: Sequence[PeftConfig]) -> float:
    """Return the rank r for which `lora_weights(shape, r)` is the number of weights that these adapters train together.

    It counts projections, embeddings and head, with adapters or trained fully (modules_to_save). It may be larger than
    all ranks: an adapter of q_proj, k_proj and v_proj has more weights than one of qkv_proj. Each module's rank is the
    largest of its adapters' ranks, since adapters that are trained in one pass are padded to it. Modules are found by the
    names that most architectures use. If the recipe names a module otherwise, all projections count with the largest
    rank.

    Args:
        adapters: the adapters that are trained in one pass; most trainings have one.
    """
    largest = max(rank for adapter in adapters for rank in (adapter.r, *adapter.rank_pattern.values()))
    products = [
        *(spellings for layer in range(shape.layers) for spellings in _projections(shape, layer)),
        *_vocabulary(shape),
    ]
    names = [matrix.name for spellings in products for spelling in spellings for matrix in spelling]
    if not all(_names_only(adapter, names) for adapter in adapters):
        return float(len(adapters) * largest)
    total = sum(max(_weights(adapters, modules) for modules in _named(adapters, spellings)) for spellings in products)
    return len(adapters) * (total / lora_weights(shape, 1) if total else largest)


def _names_only(adapter: PeftConfig, names: Sequence[str]) -> bool:
    """Tell whether all targets and patterns of a recipe select some of these modules."""
    targets = adapter.target_modules
    each = [] if targets == ALL_LINEAR else [targets] if isinstance(targets, str) else [[target] for target in targets]
    patterns = [f"(.*\\.)?({pattern})" for pattern in adapter.rank_pattern]
    return all(any(selects(target, name) for name in names) for target in [*each, *patterns])


def _projections(shape: ModelShape, layer: int) -> Iterator[tuple[Spelling, ...]]:
    """Yield the products of a layer, each with the modules that may compute it."""
    hidden, up = shape.hidden, shape.intermediate
    query, key = shape.heads * shape.head_dim, shape.kv_heads * shape.head_dim
    attention, mlp = f"model.layers.{layer}.self_attn", f"model.layers.{layer}.mlp"
    fused: Spelling = (Matrix(f"{attention}.qkv_proj", hidden, query + 2 * key),)
    split: Spelling = (
        Matrix(f"{attention}.q_proj", hidden, query),
        Matrix(f"{attention}.k_proj", hidden, key),
        Matrix(f"{attention}.v_proj", hidden, key),
    )
    yield (fused,) if shape.fused_attention else (fused, split)
    yield ((Matrix(f"{attention}.o_proj", query, hidden),),)
    fused = (Matrix(f"{mlp}.gate_up_proj", hidden, 2 * up),)
    split = (Matrix(f"{mlp}.gate_proj", hidden, up), Matrix(f"{mlp}.up_proj", hidden, up))
    yield (fused,) if shape.fused_mlp else (fused, split)
    yield ((Matrix(f"{mlp}.down_proj", up, hidden),),)


def _vocabulary(shape: ModelShape) -> list[tuple[Spelling, ...]]:
    """Return embeddings and head, which all-linear leaves out."""
    embeddings = Matrix("model.embed_tokens", shape.vocabulary, shape.hidden)
    return [((embeddings,),), ((Matrix("lm_head", shape.hidden, shape.vocabulary),),)]


def _named(adapters: Sequence[PeftConfig], spellings: Sequence[Spelling]) -> Sequence[Spelling]:
    """Return the spellings of a product that the base may have: those that a rank_pattern names, or else all."""

    def is_named(spelling: Spelling) -> bool:
        return any(_pattern_of(adapter, matrix.name) for adapter in adapters for matrix in spelling)

    return [spelling for spelling in spellings if is_named(spelling)] or spellings


def _weights(adapters: Sequence[PeftConfig], spelling: Spelling) -> int:
    """Return the weights of the largest of some adapters on a product's modules."""
    return sum(max(_trained(adapter, matrix) for adapter in adapters) for matrix in spelling)


def _trained(adapter: PeftConfig, matrix: Matrix) -> int:
    if any(matches(matrix.name, pattern) for pattern in adapter.modules_to_save or []):
        return matrix.into * matrix.out
    return _rank_of(adapter, matrix.name) * (matrix.into + matrix.out)


def _rank_of(adapter: PeftConfig, name: str) -> int:
    targets = adapter.target_modules
    is_adapted = "layers" in name.split(".") if targets == ALL_LINEAR else selects(targets, name)
    if not is_adapted or selects(adapter.exclude_modules, name) or not in_layers(name, adapter.layers_to_transform):
        return 0
    pattern = _pattern_of(adapter, name)
    return adapter.r if pattern is None else adapter.rank_pattern[pattern]


def _pattern_of(adapter: PeftConfig, name: str) -> str | None:
    """Return the first pattern that matches a module, as peft chooses it."""
    return next((pattern for pattern in adapter.rank_pattern if re.match(rf"(.*\.)?({pattern})$", name)), None)
