"""The loss at learned positions alone: the head is applied to a chunk of them at a time, and its gradient made on the way.

A vocabulary's width of logits for every position would be gigabytes; trl's own loss computes entropy and best token
beside -log p, which takes as long again.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy
from torch.utils.checkpoint import checkpoint

CHUNK = 1024  # positions whose logits are in memory at a time


class FrozenHeadLoss(torch.autograd.Function):
    """Sum of -log p of the targets under a head that is not trained. Hidden states [n, width], targets [n]."""

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, weight: Tensor, bias: Tensor | None, targets: Tensor) -> Tensor:
        """Return the sum in fp32, and keep the gradient of the hidden states."""
        gradient = torch.empty_like(hidden)
        total = torch.zeros((), dtype=torch.float32, device=hidden.device)
        for at in range(0, len(hidden), CHUNK):
            part = hidden[at : at + CHUNK]
            logits = torch.nn.functional.linear(part, weight, bias)
            loss, slope = nll_and_slope(logits, targets[at : at + CHUNK])
            total += loss
            torch.mm(slope, weight, out=gradient[at : at + CHUNK])
        ctx.save_for_backward(gradient)
        return total

    @staticmethod
    def backward(ctx: Any, up: Tensor) -> tuple[Tensor, None, None, None]:
        """Return the gradient of the hidden states."""
        (gradient,) = ctx.saved_tensors
        return (gradient.float() * up).to(gradient.dtype), None, None, None  # fp16's loss scale does not fit fp16


def nll_and_slope(logits: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
    """Return the sum of -log p in fp32, and its derivative by the logits in their dtype."""
    wide = logits.float()
    log_p = wide - wide.logsumexp(-1, keepdim=True)
    chosen = targets[:, None]
    loss = -log_p.gather(1, chosen).sum()
    slope = log_p.exp()
    slope.scatter_add_(1, chosen, torch.full_like(chosen, -1, dtype=slope.dtype))
    return loss, slope.to(logits.dtype)


def head_loss(head: Any, hidden: Tensor, targets: Tensor) -> Tensor:
    """Return the sum of -log p of targets [n] given hidden states [n, width], in fp32."""
    plain = type(head) is torch.nn.Linear and not head.weight.requires_grad and head.weight.dtype == hidden.dtype
    learning = torch.is_grad_enabled() and hidden.requires_grad
    if plain and learning and not torch.is_autocast_enabled(hidden.device.type):
        return FrozenHeadLoss.apply(hidden, head.weight, head.bias, targets)

    def part(states: Tensor, wanted: Tensor) -> Tensor:
        return cross_entropy(head(states).float(), wanted, reduction="sum")

    if len(hidden) <= CHUNK:
        return part(hidden, targets)
    chunks = [(hidden[i : i + CHUNK], targets[i : i + CHUNK]) for i in range(0, len(hidden), CHUNK)]
    if not learning:
        return torch.stack([part(*chunk) for chunk in chunks]).sum()
    # The head is trained, or another module: compute the logits twice rather than keep them.
    return torch.stack([checkpoint(part, *chunk, use_reentrant=False) for chunk in chunks]).sum()
