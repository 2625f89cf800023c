"""Compile a model's layers one by one, and recompute the activations of a share of them in the backward pass."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch._functorch.config
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from loraflow.training.lora_kernels import FastLora

Forward = Callable[..., Tensor]


@dataclass(frozen=True)
class CompiledLayer:
    """A layer whose forward pass was replaced by its compiled code."""

    layer: torch.nn.Module
    plain: Forward  # the uncompiled forward pass
    is_recomputed: bool

    def undo(self) -> None:
        """Restore the layer's uncompiled forward pass. It is still recomputed if it was before."""
        forward = recomputing(self.layer, self.plain, True) if self.is_recomputed else self.plain
        self.layer.forward = forward


def prepare_layers(
    decoder: torch.nn.Module, *, compiled: bool, recomputed: float, elementwise: bool = False
) -> list[CompiledLayer]:
    """Compile each layer of a decoder by itself, and let a share of them recompute their activations.

    With fixed shapes, one graph serves all layers. Recomputation is put around the compiled code: inside of it,
    everything that our own backward passes save would be kept as well.

    Args:
        decoder: its `layers` are changed in place.
        recomputed: share of the layers that recompute their activations.
        elementwise: compiled layers recompute norms, activation functions, rotations and dropout masks instead of
            storing their results.

    Returns:
        the layers that are compiled.
    """
    layers = list(getattr(decoder, "layers", []))
    torch._dynamo.config.recompile_limit = max(64, torch._dynamo.config.recompile_limit)
    _recompute_elementwise(elementwise)
    draws = draws_in_passes(decoder)
    changed = []
    for i, layer in enumerate(layers):
        plain = layer.forward
        forward = torch.compile(plain, fullgraph=True, dynamic=False) if compiled else plain
        # Spread over the depth. Which layers they are makes no difference to memory or time.
        is_recomputed = int((i + 1) * recomputed) > int(i * recomputed)
        layer.forward = recomputing(layer, forward, draws) if is_recomputed else forward
        if compiled:
            changed.append(CompiledLayer(layer, plain, is_recomputed))
    return changed


def _recompute_elementwise(is_wanted: bool) -> None:
    """Say what the layers that are compiled from here on store for their backward pass.

    By default, the compiler stores the result of an elementwise operation where a matrix product of the backward pass
    reads it, and where operations that use it are far apart. Within one layer, all of them are cheap to compute again.
    """
    torch._functorch.config.ban_recompute_materialized_backward = not is_wanted
    torch._functorch.config.ban_recompute_used_far_apart = not is_wanted
    torch._functorch.config.ban_recompute_long_fusible_chains = not is_wanted


def draws_in_passes(decoder: torch.nn.Module) -> bool:
    """Tell whether a pass draws random numbers. The dropout of `FastLora` does not: its masks are a hash."""
    hashed: set[int] = set()
    for module in decoder.modules():
        if isinstance(module, FastLora):
            hashed.update(id(dropout) for dropout in module.lora_dropout.values())
    return any(
        isinstance(module, torch.nn.Dropout) and module.p > 0 and id(module) not in hashed
        for module in decoder.modules()
    )


def recomputing(layer: torch.nn.Module, forward: Forward, draws: bool) -> Forward:
    """Return a forward pass that keeps no activations in training and computes them again in the backward pass.

    Args:
        layer: the layer, whose `training` says whether to recompute.
        draws: whether it draws random numbers, which must be the same the second time.
    """

    def recomputed(*args: Tensor, **options: Tensor) -> Tensor:
        if not (layer.training and torch.is_grad_enabled()):
            return forward(*args, **options)
        out: Tensor = checkpoint(forward, *args, use_reentrant=False, preserve_rng_state=draws, **options)  # type: ignore[arg-type]
        return out

    return recomputed
