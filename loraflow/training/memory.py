"""How much memory training takes, from a model's configuration alone: what decides how many tokens go in at a time.

Arithmetic only, no torch: `plan` shows it too. The figures were fitted on one H100 with Phi-3 mini's shape
(docs/performance.md): 2.7 MiB a token without recomputing, where this says 3.0.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

Recompute = Literal["none", "selective", "full", "offload"]
GIB = 2**30
RESERVE = 2.5 * GIB  # kernels' workspaces, the head's logits, fragments
SHARE = 0.92  # of the free memory that is planned with
WEIGHT_BYTES = {"float32": 4.0, "bfloat16": 2.0, "float16": 2.0, "fp8": 2.0, "nf4": 0.57}
# Tokens at a time that fill the chip: recomputing costs a third of the speed, fewer tokens far less.
GOOD = 4096
MOST = 16384  # tokens at a time: more of them were no faster


@dataclass(frozen=True)
class Shape:
    """What counts of a model."""

    hidden: int
    intermediate: int
    layers: int
    heads: int
    kv_heads: int
    head_dim: int
    vocabulary: int
    tied: bool

    @property
    def linear_weights(self) -> int:
        """Weights of the layers' projections."""
        attention = self.hidden * self.head_dim * (2 * self.heads + 2 * self.kv_heads)
        return self.layers * (attention + 3 * self.hidden * self.intermediate)

    @property
    def embedding_weights(self) -> int:
        """Weights of embedding and head."""
        return self.vocabulary * self.hidden * (1 if self.tied else 2)

    @property
    def kept(self) -> int:
        """Numbers that a layer keeps for each token: norms, residual, q, k, v, attention's output, gate, up, product."""
        attention = self.head_dim * (2 * self.heads + 2 * self.kv_heads)
        return 3 * self.hidden + attention + 3 * self.intermediate


def shape_of(config: dict[str, Any]) -> Shape | None:
    """Read a model's config.json; None where it does not look like a decoder of transformer layers."""
    text = config.get("text_config", config)
    try:
        heads = int(text["num_attention_heads"])
        return Shape(
            hidden=int(text["hidden_size"]),
            intermediate=int(text["intermediate_size"]),
            layers=int(text["num_hidden_layers"]),
            heads=heads,
            kv_heads=int(text.get("num_key_value_heads") or heads),
            head_dim=int(text.get("head_dim") or text["hidden_size"] // heads),
            vocabulary=int(text["vocab_size"]),
            tied=bool(text.get("tie_word_embeddings", config.get("tie_word_embeddings", False))),
        )
    except (KeyError, TypeError, ValueError, ZeroDivisionError):
        return None


def lora_weights(shape: Shape, rank: int) -> int:
    """Return the trainable weights of rank-r adapters on all projections of fused attention and MLP."""
    attention = shape.head_dim * (shape.heads + 2 * shape.kv_heads)
    modules = (
        (shape.hidden, attention),
        (shape.heads * shape.head_dim, shape.hidden),
        (shape.hidden, 2 * shape.intermediate),
        (shape.intermediate, shape.hidden),
    )
    return shape.layers * rank * sum(into + out for into, out in modules)


def fixed_bytes(shape: Shape, weights: str, rank: int, devices: int = 1) -> float:
    """Return what does not depend on the number of tokens: weights, adapter, its gradients, AdamW's two moments.

    Args:
        shape: the model's.
        weights: dtype of the frozen weights, or fp8, or nf4.
        rank: of the adapters.
        devices: that hold the frozen weights together; 1 if each holds all.
    """
    base = shape.linear_weights * WEIGHT_BYTES[weights] / devices
    if devices > 1:  # the layer that computes is whole, and so is the next one
        base += 2 * shape.linear_weights * WEIGHT_BYTES[weights] / shape.layers
    rest = shape.embedding_weights * WEIGHT_BYTES["bfloat16" if weights in ("nf4", "fp8") else weights]
    return base + rest + lora_weights(shape, rank) * 16 + RESERVE


def token_bytes(shape: Shape, recompute: Recompute, width: int = 2, recomputed: float | None = None) -> float:
    """Return what a token takes.

    Args:
        shape: the model's.
        recompute: none keeps all layers' activations; full keeps each layer's input, and one layer's at a time.
        width: bytes of a number.
        recomputed: share of the layers that are recomputed, where it is selective.
    """
    share = {"none": 0.0, "full": 1.0, "offload": 1.0}.get(recompute, recomputed if recomputed is not None else 0.5)
    layers = shape.layers * ((1 - share) * shape.kept + share * shape.hidden)
    working = 2 * shape.kept  # the layer at work, and its gradients
    return (layers + working) * width


def needed(shape: Shape, weights: str, rank: int, longest: int, width: int = 2) -> tuple[float, float]:
    """Return the bytes that training takes at least, and those with which it goes at full speed.

    Args:
        shape: the model's.
        weights: see `fixed_bytes`.
        rank: of the adapters.
        longest: tokens of the longest row; at least that many go in at a time, all layers recomputed.
        width: bytes of a number.
    """
    fixed = fixed_bytes(shape, weights, rank)
    fast = max(longest, GOOD) * token_bytes(shape, "none", width)
    return (fixed + longest * token_bytes(shape, "full", width)) / SHARE, (fixed + fast) / SHARE


@dataclass(frozen=True)
class Fit:
    """What goes into memory at a time."""

    tokens: int
    recompute: Recompute
    share: float  # of the layers that are recomputed
    why: str


def fit(
    shape: Shape,
    free: float,
    weights: str,
    rank: int,
    *,
    least: int,
    wanted: int,
    told: Recompute | None = None,
    width: int = 2,
    devices: int = 1,
) -> Fit:
    """Choose how many tokens go in at a time, and which layers are recomputed.

    Args:
        shape: the model's.
        free: bytes that there are, the model's own included.
        weights: see `fixed_bytes`.
        rank: of the adapters.
        least: tokens of the longest document, or of a packed row: fewer cannot go in.
        wanted: tokens of an optimizer step; more are of no use.
        told: what to recompute, if the recipe or the runtime says it.
        width: bytes of a number.
        devices: see `fixed_bytes`.
    """
    room = max(0.0, free * SHARE - fixed_bytes(shape, weights, rank, devices))
    enough = max(least, min(wanted, MOST))

    def most(recompute: Recompute, share: float | None = None) -> int:
        return int(room / token_bytes(shape, recompute, width, share))

    if told is not None:
        tokens = max(least, min(enough, most(told)))
        return Fit(tokens, told, {"none": 0.0, "selective": 0.5}.get(told, 1.0), "as told")
    good = max(least, min(enough, GOOD))
    if most("none") >= good:
        return Fit(max(least, min(enough, most("none"))), "none", 0.0, "activations fit")
    for eighth in range(1, 8):
        share = eighth / 8
        if most("selective", share) >= good:
            return Fit(good, "selective", share, f"with {share:.0%} of the layers recomputed, activations fit")
    return Fit(max(least, min(enough, most("full"))), "full", 1.0, "activations fit only when recomputed")
