"""LongRoPE (Phi-3 128k, Phi-3.5, Phi-4-mini): short or long factors for each document, not for each call.

A model has two sets of rotary angles: one for documents of at most `original_max_position_embeddings` tokens, and one for
longer ones. transformers chooses the set for a whole call, by its largest position, so that neighbours and padding
change a document's angles. Here the angles of both sets come from transformers' own code, and each document takes its own.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Literal, TypeAlias

if TYPE_CHECKING:
    from torch import Tensor, nn
    from transformers import PreTrainedModel

# Which angles the rows of a call have: those of short or of long documents; unchanged is transformers' own choice.
Side: TypeAlias = Literal["short", "long", "unchanged"]
Angles: TypeAlias = "Callable[..., tuple[Tensor, Tensor]]"  # of a rotary module: cosines and sines


def longrope_modules(model: nn.Module) -> list[nn.Module]:
    """Return the modules that compute a model's LongRoPE angles; empty for other models and for code of their own."""
    found = []
    for module in model.modules():
        kinds = getattr(module, "rope_type", None)
        kinds = list(kinds.values()) if isinstance(kinds, dict) else [kinds]
        if "longrope" in kinds and type(module).__module__.startswith("transformers."):
            found.append(module)
    return found


def document_lengths(position_ids: Tensor) -> Tensor:
    """Return, for each token, how many tokens its document has.

    Args:
        position_ids: [rows, tokens]; a document begins where they are 0.
    """
    document = (position_ids == 0).long().cumsum(1)
    rows, tokens = position_ids.shape
    longest = position_ids.new_zeros((rows, tokens + 1)).scatter_reduce_(1, document, position_ids + 1, "amax")
    return longest.gather(1, document)


def compute_angles_per_document(model: nn.Module, switch: int) -> bool:
    """Let each document have the angles that it has when it is computed alone.

    The position ids of a call have to show the documents: each begins at 0, and padding repeats a document's last one.

    Args:
        model: changed in place.
        switch: tokens of the longest document with short factors.

    Returns:
        whether the model's angles are computed by transformers' own code, which can be changed.
    """
    modules = longrope_modules(model)
    for module in modules:
        module.forward = _per_document(module, switch)
    return bool(modules)


def _per_document(module: nn.Module, switch: int) -> Angles:
    import torch

    both: Angles = module.forward

    def forward(x: Tensor, position_ids: Tensor, **other: str) -> tuple[Tensor, Tensor]:
        is_long = document_lengths(position_ids) > switch
        # No position reaches the switch in the first call, and one does in the second.
        short = both(x, torch.where(is_long, 0, position_ids), **other)
        long = both(x, torch.where(is_long, position_ids, switch), **other)
        cos, sin = (torch.where(is_long[..., None], b, a) for a, b in zip(short, long, strict=True))
        return cos, sin

    return forward


@contextmanager
def fixed_angles(model: PreTrainedModel, switch: int, side: Side) -> Iterator[None]:
    """Give all rows of all calls the angles of one side, and restore transformers' choice afterwards.

    Nothing depends on positions then, so that a prefix can be computed by itself and a decoding step can be recorded.

    Args:
        switch: tokens of the longest document with short factors.
        side: unchanged does nothing.
    """
    modules = longrope_modules(model) if side != "unchanged" else []
    for module in modules:
        module.forward = _fixed(module, switch if side == "long" else 0)
    try:
        yield
    finally:
        for module in modules:
            del module.forward


def _fixed(module: nn.Module, deciding: int) -> Angles:
    """Return a forward pass with the angles of a call whose largest position is `deciding`."""
    import torch

    buffer = next(module.buffers())
    decide = torch.full((1, 1), deciding, device=buffer.device)
    module.forward(buffer.new_zeros(1), decide)  # sets the frequencies
    # Without transformers' decorator, which chooses the frequencies, in some versions by waiting for the GPU.
    plain: Angles = inspect.unwrap(type(module).forward)

    def forward(x: Tensor, position_ids: Tensor, **other: str) -> tuple[Tensor, Tensor]:
        # Some models choose a factor as well, by the largest position.
        seen = torch.cat([position_ids, position_ids.new_full((len(position_ids), 1), deciding)], 1)
        with torch.no_grad():
            cos, sin = plain(module, x, seen, **other)
        return cos[:, :-1], sin[:, :-1]

    return forward
