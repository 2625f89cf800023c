"""Estimate the memory of a training from a model's config.json, and choose the tokens of a micro-batch.

Arithmetic only, no torch, because `loraflow plan` shows the estimate too. The figures were fitted on one H100 with
Phi-3 mini's shape (docs/performance.md), 16,384 tokens at a time.

The estimate by part can be compared with the measured peak: on a CPU the process's resident memory, with Python and its
libraries, on a GPU what torch allocates there. The CPU's constants were fitted by benchmarks/memory_estimate.py.
"""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass, fields
from typing import Literal

from pydantic import JsonValue

from loraflow.config.job_runtime import RetryWith
from loraflow.failures import OutOfMemory

Recompute = Literal["none", "elementwise", "selective", "full", "offload"]
GIB = 2**30
RESERVE = 2.5 * GIB  # workspaces of kernels, logits of the head, fragmentation
USABLE = 0.92  # share of the free memory
WEIGHT_BYTES = {"float32": 4.0, "bfloat16": 2.0, "float16": 2.0, "fp8": 2.0, "nf4": 0.57}
# For each trained weight in fp32: the weight and its gradient; AdamW's two moments.
ADAPTER_BYTES, OPTIMIZER_BYTES = 8, 8
# Micro-batches of this size use the GPU fully. Smaller ones cost little speed; recomputation costs a third.
ENOUGH_TOKENS = 4096
# Architectures of transformers whose layers have one module qkv_proj, or one gate_up_proj.
_FUSED_ATTENTION = frozenset({"phi3", "phi4_multimodal"})
_FUSED_MLP = frozenset({"phi3", "phi4_multimodal", "glm", "glm4", "glm4v_text", "glm_ocr_text"})
MAX_TOKENS = 16384  # tokens of a micro-batch; larger ones were not faster


@dataclass(frozen=True)
class ModelShape:
    """The sizes of a decoder-only transformer."""

    hidden: int
    intermediate: int
    layers: int
    heads: int
    kv_heads: int
    head_dim: int
    vocabulary: int
    tied: bool
    fused_attention: bool = False  # one module computes q, k and v
    fused_mlp: bool = False  # one module computes gate and up

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
    def activations(self) -> int:
        """Values that a layer stores per token: residual and norm twice, q, k, v, attention's output, gate, up, product."""
        return self.products + 2 * self.hidden + self.intermediate

    @property
    def products(self) -> int:
        """Values that a layer stores per token if it computes norms and the product of gate and up a second time."""
        attention = self.head_dim * (2 * self.heads + 2 * self.kv_heads)
        return 2 * self.hidden + attention + 2 * self.intermediate


def shape_of(config: Mapping[str, JsonValue]) -> ModelShape | None:
    """Return the shape in a model's config.json; None if it does not describe a decoder-only transformer."""
    text = config.get("text_config", config)
    if not isinstance(text, Mapping):
        return None
    try:
        hidden, heads = _integer(text["hidden_size"]), _integer(text["num_attention_heads"])
        return ModelShape(
            hidden=hidden,
            intermediate=_integer(text["intermediate_size"]),
            layers=_integer(text["num_hidden_layers"]),
            heads=heads,
            kv_heads=_integer(text.get("num_key_value_heads") or heads),
            head_dim=_integer(text.get("head_dim") or hidden // heads),
            vocabulary=_integer(text["vocab_size"]),
            tied=bool(text.get("tie_word_embeddings", config.get("tie_word_embeddings", False))),
            fused_attention=text.get("model_type") in _FUSED_ATTENTION,
            fused_mlp=text.get("model_type") in _FUSED_MLP,
        )
    except (KeyError, TypeError, ValueError, ZeroDivisionError):
        return None


def _integer(value: JsonValue) -> int:
    if not isinstance(value, int | float | str):
        raise TypeError(f"not a number: {value}")
    return int(value)


def lora_weights(shape: ModelShape, rank: float) -> int:
    """Return the number of trainable weights of rank-r adapters on all projections of fused attention and MLP.

    Of adapters with several ranks, or on some projections, `adapter_rank` has the rank.
    """
    attention = shape.head_dim * (shape.heads + 2 * shape.kv_heads)
    modules = (
        (shape.hidden, attention),
        (shape.heads * shape.head_dim, shape.hidden),
        (shape.hidden, 2 * shape.intermediate),
        (shape.intermediate, shape.hidden),
    )
    return round(shape.layers * rank * sum(into + out for into, out in modules))


def fixed_bytes(shape: ModelShape, weights: str, rank: float, devices: int = 1) -> float:
    """Return the bytes that do not depend on the number of tokens: weights, adapter, gradients, AdamW's two moments.

    Args:
        weights: dtype of the frozen weights, or fp8, or nf4.
        rank: the adapters' rank; see `lora_weights`.
    """
    adapters = lora_weights(shape, rank) * (ADAPTER_BYTES + OPTIMIZER_BYTES)
    return weight_bytes(shape, weights, devices) + adapters + RESERVE


def weight_bytes(shape: ModelShape, weights: str, devices: int = 1) -> float:
    """Return the bytes of the frozen weights on a device; the arguments are those of `fixed_bytes`."""
    base = shape.linear_weights * WEIGHT_BYTES[weights] / devices
    if devices > 1:  # the current layer and the next one are gathered
        base += 2 * shape.linear_weights * WEIGHT_BYTES[weights] / shape.layers
    return base + shape.embedding_weights * WEIGHT_BYTES["bfloat16" if weights in ("nf4", "fp8") else weights]


def token_bytes(
    shape: ModelShape,
    recompute: Recompute,
    width: int = 2,
    recomputed: float | None = None,
    *,
    elementwise: bool = False,
) -> float:
    """Return the bytes of a token's activations.

    Args:
        recompute: none keeps the activations of all layers; elementwise keeps those of matrix products and attention;
            full keeps the input of each layer, and the activations of one layer at a time.
        width: bytes of a number.
        recomputed: share of the layers that are recomputed, if recompute is selective.
        elementwise: if recompute is selective, the other layers recompute their elementwise operations.
    """
    share = {"none": 0.0, "elementwise": 0.0, "full": 1.0, "offload": 1.0}.get(
        recompute, recomputed if recomputed is not None else 0.5
    )
    kept = shape.products if elementwise or recompute == "elementwise" else shape.activations
    layers = shape.layers * ((1 - share) * kept + share * shape.hidden)
    working = 2 * shape.activations  # the layer that computes, and its gradients
    return (layers + working) * width


def least_bytes(shape: ModelShape, weights: str, rank: float, longest: int, width: int = 2) -> float:
    """Return the bytes that training needs at least.

    Args:
        longest: tokens of the longest row: the smallest micro-batch has as many, with all layers recomputed.
    """
    return (fixed_bytes(shape, weights, rank) + longest * token_bytes(shape, "full", width)) / USABLE


@dataclass(frozen=True)
class MemoryFit:
    """A micro-batch that fits into memory."""

    tokens: int
    recompute: Recompute
    share: float  # share of the layers that are recomputed
    why: str
    elementwise: bool = False  # the other layers recompute their elementwise operations, for which they are compiled


def fit_memory(
    shape: ModelShape,
    free: float,
    weights: str,
    rank: float,
    *,
    least: int,
    step_tokens: int,
    recompute: Recompute | None = None,
    devices: int = 1,
    compiled: bool = False,
    enough: int = ENOUGH_TOKENS,
    width: int = 2,
) -> MemoryFit:
    """Choose the tokens of a micro-batch, and how many layers are recomputed.

    Args:
        free: bytes of memory, including what the model itself takes.
        least: tokens of the longest document, or of a packed row: a micro-batch cannot have fewer.
        step_tokens: the tokens of an optimizer step: a micro-batch does not need more.
        recompute: what to recompute, if the recipe or the runtime asks for it.
        compiled: whether the layers can be compiled. Only compiled layers can recompute elementwise operations alone.
        enough: tokens of a micro-batch for which activations are recomputed if they do not fit.
        width: bytes of a number of the activations.
    """
    room = max(0.0, free * USABLE - fixed_bytes(shape, weights, rank, devices))
    useful = max(least, min(step_tokens, MAX_TOKENS))

    def most(how: Recompute, share: float | None = None) -> int:
        return int(room / token_bytes(shape, how, width, recomputed=share, elementwise=compiled and how == "selective"))

    def fit(how: Recompute, share: float, why: str, *, elementwise: bool = False) -> MemoryFit:
        return MemoryFit(max(least, min(useful, most(how))), how, share, why, elementwise)

    if recompute == "elementwise" and not compiled:
        return fit("none", 0.0, "elementwise is set, but the layers are not compiled")
    if recompute is not None:
        share = {"none": 0.0, "elementwise": 0.0, "selective": 0.5}.get(recompute, 1.0)
        is_elementwise = compiled and recompute in ("elementwise", "selective")
        return fit(recompute, share, "asked for", elementwise=is_elementwise)
    enough = max(least, min(useful, enough))
    if most("none") >= enough:
        return fit("none", 0.0, "activations fit")
    if compiled and most("elementwise") >= enough:
        return fit("elementwise", 0.0, "activations fit if elementwise operations are recomputed", elementwise=True)
    for eighth in range(1, 8):
        share = eighth / 8
        if most("selective", share) >= enough:
            why = f"activations fit if {share:.0%} of the layers are recomputed"
            return MemoryFit(enough, "selective", share, why, elementwise=compiled)
    return fit("full", 1.0, "activations fit only if all are recomputed")


PROGRAM = 512 * 2**20  # resident bytes of Python with torch, transformers, peft and trl, before a model is loaded
HEAD_ROWS = 1024  # positions whose logits are in memory at a time, as in loss_head.CHUNK
LOGITS = 3  # arrays of their size: logits, log-probabilities, and the gradient


@dataclass(frozen=True)
class MemoryParts:
    """Bytes of each part at the moment when the process needs most."""

    program: float  # CPU: Python and its libraries. GPU: workspaces of kernels, fragmentation
    weights: float  # frozen
    adapters: float = 0.0  # weights and gradients
    optimizer: float = 0.0
    activations: float = 0.0
    logits: float = 0.0
    generation: float = 0.0  # keys and values of the prompts and answers of a batch

    @property
    def total(self) -> float:
        """The sum."""
        return float(sum(asdict(self).values()))

    def as_bytes(self) -> dict[str, int]:
        """Return whole bytes by part, without the parts that are not needed."""
        return {field.name: round(size) for field in fields(self) if (size := getattr(self, field.name))}


@dataclass(frozen=True)
class StepMemory:
    """What a training step has in memory at a time."""

    tokens: int  # tokens, padding included
    learned: float = 1.0  # share of the tokens that count in the loss
    recompute: Recompute = "none"
    recomputed: float | None = None  # share of the layers, if recompute is selective
    elementwise: bool = False  # the other layers recompute their elementwise operations


def training_parts(
    shape: ModelShape,
    device: Literal["cpu", "cuda"],
    weights: str,
    rank: float,
    batch: StepMemory,
    *,
    width: int,
    devices: int = 1,
) -> MemoryParts:
    """Return the memory of a training process."""
    trained = lora_weights(shape, rank)
    logits = _logits(shape, min(HEAD_ROWS, batch.tokens * batch.learned))
    return MemoryParts(
        program=_program(device, logits),
        weights=weight_bytes(shape, weights, devices),
        adapters=trained * ADAPTER_BYTES,
        optimizer=trained * OPTIMIZER_BYTES,
        activations=batch.tokens
        * token_bytes(shape, batch.recompute, width, batch.recomputed, elementwise=batch.elementwise),
        logits=logits,
    )


def generation_parts(
    shape: ModelShape,
    device: Literal["cpu", "cuda"],
    weights: str,
    rows: int,
    prompt: int,
    answer: int,
    *,
    width: int,
    shared: int = 0,
) -> MemoryParts:
    """Return the memory of a process that generates answers.

    Args:
        width: bytes of a number of keys and values.
        shared: tokens that all prompts begin with, and that are computed once.
    """
    logits = 2 * rows * shape.vocabulary * 4
    return MemoryParts(
        program=_program(device, logits),
        weights=weight_bytes(shape, weights),
        # The layer that computes keeps nothing for a backward pass: residual, its norm, gate, up and their product.
        activations=rows * (prompt - shared) * (2 * shape.hidden + 3 * shape.intermediate) * width,
        logits=logits,
        generation=rows * (prompt + answer) * shape.layers * 2 * shape.kv_heads * shape.head_dim * width,
    )


def describe(parts: Mapping[str, int]) -> str:
    """Return a line of the parts, the largest first."""
    return ", ".join(f"{name} {size / 2**30:.2f}" for name, size in sorted(parts.items(), key=lambda part: -part[1]))


def _logits(shape: ModelShape, positions: float) -> float:
    return LOGITS * positions * shape.vocabulary * 4


def _program(device: str, logits: float) -> float:
    """Return the memory that is used beside the model. A GPU's reserve was measured with the logits included."""
    return PROGRAM if device == "cpu" else max(0.0, RESERVE - logits)


@dataclass(frozen=True)
class MicroBatchSize:
    """The size of a micro-batch."""

    longest_row: int  # tokens; a micro-batch cannot have fewer
    rows: int | None = None  # None: a micro-batch is measured in tokens
    tokens: int | None = None  # None: a micro-batch is measured in rows
    recompute: Recompute | None = None  # None: the engine does not choose it

    def retry_with(self) -> RetryWith:
        """Return the runtime settings of the next attempt, with the same result; no changes if nothing can be reduced."""
        if self.rows is not None and self.rows > 1:
            return RetryWith(micro_batch=self.rows // 2)
        if self.rows is None and self.tokens is not None and self.tokens > self.longest_row:
            return RetryWith(micro_tokens=max(self.longest_row, self.tokens // 2))
        if self.recompute not in (None, "full"):
            return RetryWith(checkpointing="full")
        return RetryWith()


@contextmanager
def explain_out_of_memory(where: str, retry_with: RetryWith) -> Iterator[None]:
    """Turn torch's out-of-memory error into a failure.

    Args:
        retry_with: runtime settings of the next attempt; without changes if there should be none.

    Raises:
        OutOfMemory: torch ran out of memory.
    """
    import torch

    try:
        yield
    except torch.OutOfMemoryError as error:
        raise OutOfMemory(
            "The GPU's memory is not enough.",
            where=f"train, {where}"[:600],
            got=str(error)[:300],
            next_step="lower training_config.max_length, or quantize the base (base.quantization: nf4)",
            retry_with=dict(retry_with.changes()),
        ) from error
