"""The loss at the supervised positions only. The head and its gradient are computed for a chunk of them at a time.

Logits of the whole vocabulary for every position would take gigabytes. trl's own loss also computes the entropy and the
best token, which takes as long again.
"""

import logging
from collections.abc import Callable, Iterator
from functools import cache
from typing import TypeAlias

import torch
from torch import Tensor
from torch.autograd.function import FunctionCtx
from torch.nn.functional import cross_entropy
from torch.utils.checkpoint import checkpoint

from loraflow.failures import first_line

log = logging.getLogger(__name__)

Kernel: TypeAlias = Callable[[Tensor, Tensor, Tensor | None], tuple[Tensor, Tensor]]

CHUNK = 1024  # positions whose logits are in memory at a time


class _Context(FunctionCtx):
    saved_tensors: tuple[Tensor, ...]


class FrozenHeadLoss(torch.autograd.Function):
    """Weighted sum of -log p of the targets under a head that is not trained. Hidden states [n, width], targets [n].

    Granite and Cohere multiply the head's product by a constant factor.
    """

    @staticmethod
    def forward(
        ctx: _Context,
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        targets: Tensor,
        factor: float,
        loss_weights: Tensor | None,
    ) -> Tensor:
        """Return the sum in fp32, and save the gradient of the hidden states."""
        gradient = torch.empty_like(hidden)
        total = torch.zeros((), dtype=torch.float32, device=hidden.device)
        for losses in _losses_by_chunk(hidden, weight, bias, targets, factor, gradient, loss_weights):
            total += losses.sum()
        ctx.save_for_backward(gradient)
        return total

    @staticmethod
    def backward(ctx: _Context, up: Tensor) -> tuple[Tensor, None, None, None, None, None]:
        """Return the gradient of the hidden states."""
        (gradient,) = ctx.saved_tensors
        # In float, because fp16's loss scale does not fit into fp16.
        return (gradient.float() * up).to(gradient.dtype), None, None, None, None, None


def _losses_by_chunk(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    targets: Tensor,
    factor: float,
    gradient: Tensor,
    loss_weights: Tensor | None = None,
) -> Iterator[Tensor]:
    """Yield -log p of the targets, weighted, a chunk at a time. Write the gradient of the hidden states into `gradient`."""
    for at in range(0, len(hidden), CHUNK):
        logits = torch.nn.functional.linear(hidden[at : at + CHUNK], weight, bias)
        if factor != 1:
            logits *= factor
        weights = None if loss_weights is None else loss_weights[at : at + CHUNK]
        losses, slope = nll_and_slope(logits, targets[at : at + CHUNK], weights)
        if factor != 1:
            slope *= factor
        torch.mm(slope, weight, out=gradient[at : at + CHUNK])
        yield losses


def nll_and_slope(logits: Tensor, targets: Tensor, weights: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Return -log p of each target [n] in fp32, and its derivative with respect to its logits in their dtype.

    On a GPU the derivative is written over the logits. `weights` [n], fp32, multiply both.
    """
    if logits.is_cuda and (kernel := gpu_kernel()) is not None:
        return kernel(logits, targets, weights)
    wide = logits.float()
    log_p = wide - wide.logsumexp(-1, keepdim=True)
    chosen = targets[:, None]
    losses = -log_p.gather(1, chosen)
    slope = log_p.exp()
    slope.scatter_add_(1, chosen, torch.full_like(chosen, -1, dtype=slope.dtype))
    if weights is not None:
        losses *= weights[:, None]
        slope *= weights[:, None]
    return losses.squeeze(1), slope.to(logits.dtype)


@cache
def gpu_kernel() -> Kernel | None:
    """Return the Triton kernel of `nll_and_slope`, or None where it does not run.

    Triton builds its launcher with a C compiler when the first kernel starts; small images have none.
    """
    try:
        from loraflow.training.triton_kernels import nll_and_slope_in_place

        nll_and_slope_in_place(torch.zeros(1, 8, device="cuda"), torch.zeros(1, dtype=torch.int64, device="cuda"), None)
    except Exception as error:
        log.warning("the loss is computed without its Triton kernel, which takes longer: %s", first_line(error))
        return None
    return nll_and_slope_in_place


class EachTokenLoss(torch.autograd.Function):
    """-log p of each target under a head that is not trained: what `FrozenHeadLoss` adds up. In fp32."""

    @staticmethod
    def forward(
        ctx: _Context, hidden: Tensor, weight: Tensor, bias: Tensor | None, targets: Tensor, factor: float
    ) -> Tensor:
        """Return the losses [n], and save the gradient of the hidden states for each."""
        gradient = torch.empty_like(hidden)
        losses = torch.empty(len(hidden), dtype=torch.float32, device=hidden.device)
        chunks = _losses_by_chunk(hidden, weight, bias, targets, factor, gradient)
        for number, of_chunk in enumerate(chunks):
            losses[number * CHUNK : (number + 1) * CHUNK] = of_chunk
        ctx.save_for_backward(gradient)
        return losses

    @staticmethod
    def backward(ctx: _Context, up: Tensor) -> tuple[Tensor, None, None, None, None]:
        """Return the gradient of the hidden states."""
        (gradient,) = ctx.saved_tensors
        return (gradient.float() * up[:, None]).to(gradient.dtype), None, None, None, None


def each_token_loss(head: torch.nn.Linear, hidden: Tensor, targets: Tensor, factor: float = 1.0) -> Tensor:
    """Return -log p of each of the targets [n] given hidden states [n, width], in fp32; see `head_loss`."""
    if not torch.is_grad_enabled():
        parts = [
            cross_entropy((head(hidden[at : at + CHUNK]) * factor).float(), targets[at : at + CHUNK], reduction="none")
            for at in range(0, len(hidden), CHUNK)
        ]
        return torch.cat(parts) if parts else hidden.new_zeros(0, dtype=torch.float32)
    losses: Tensor = EachTokenLoss.apply(hidden, head.weight, head.bias, targets, factor)  # type: ignore[no-untyped-call]
    return losses


def head_loss(
    head: torch.nn.Module, hidden: Tensor, targets: Tensor, factor: float = 1.0, weights: Tensor | None = None
) -> Tensor:
    """Return the sum of -log p of targets [n] given hidden states [n, width], in fp32.

    Args:
        factor: what the model multiplies the head's product by.
        weights: the weight of each target's -log p [n], fp32; None is 1.
    """
    learning = torch.is_grad_enabled() and hidden.requires_grad
    if learning and is_frozen_linear(head, hidden.dtype) and not torch.is_autocast_enabled(hidden.device.type):
        loss: Tensor = FrozenHeadLoss.apply(hidden, head.weight, head.bias, targets, factor, weights)  # type: ignore[no-untyped-call]
        return loss

    def part(states: Tensor, following: Tensor, factors: Tensor | None) -> Tensor:
        logits = head(states) if factor == 1 else head(states) * factor
        if factors is None:
            return cross_entropy(logits.float(), following, reduction="sum")
        return (cross_entropy(logits.float(), following, reduction="none") * factors).sum()

    if len(hidden) <= CHUNK:
        return part(hidden, targets, weights)
    chunks = [
        (hidden[i : i + CHUNK], targets[i : i + CHUNK], None if weights is None else weights[i : i + CHUNK])
        for i in range(0, len(hidden), CHUNK)
    ]
    if not learning:
        return torch.stack([part(*chunk) for chunk in chunks]).sum()
    # The head is trained, or is another kind of module: compute the logits twice rather than keep them.
    return torch.stack([checkpoint(part, *chunk, use_reentrant=False) for chunk in chunks]).sum()


def is_frozen_linear(head: torch.nn.Module, dtype: torch.dtype) -> bool:
    """Tell whether a head is a linear layer in this dtype that is not trained."""
    return type(head) is torch.nn.Linear and not head.weight.requires_grad and head.weight.dtype == dtype
