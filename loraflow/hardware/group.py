"""Several devices: each computes its share of a step's micro-batches, and one sum over all of them ends the step.

LoRA's gradients are a hundredth of the weights, so that a single all-reduce at the end of a step costs less than
hiding it would: no wrapper, no hooks, and any number of micro-batches on each device.
"""

from __future__ import annotations

import os
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Group:
    """This process among those that train, or evaluate, together."""

    rank: int = 0
    size: int = 1

    @property
    def first(self) -> bool:
        """Tell whether this is the one that writes."""
        return self.rank == 0

    def wait(self) -> None:
        """Wait until all are here."""
        if self.size > 1:
            import torch.distributed as dist

            dist.barrier()

    def agree(self, value: Any) -> Any:
        """Return what the first one says."""
        if self.size == 1:
            return value
        import torch.distributed as dist

        said = [value]
        dist.broadcast_object_list(said, src=0)
        return said[0]

    def all_say(self, value: Any) -> list[Any]:
        """Return what each of them says, in the order of ranks."""
        if self.size == 1:
            return [value]
        import torch.distributed as dist

        said: list[Any] = [None] * self.size
        dist.all_gather_object(said, value)
        return said

    def takes(self, index: int) -> bool:
        """Tell whether a batch is this one's: they are dealt out in turn."""
        return index % self.size == self.rank

    def merge(self, found: list[Any]) -> list[Any]:
        """Return what all have found together, to all. Each holds the whole list, with None where it has nothing."""
        if self.size == 1:
            return found
        parts = self.all_say(found)
        return [next((one for one in row if one is not None), None) for row in zip(*parts, strict=True)]

    def sum_up(self, parameters: Iterable[Any], *extra: Any) -> list[Any]:
        """Add up the gradients of all devices in place, and scalars beside; return the sums of the scalars.

        A device that had nothing to compute in this step has no gradients; it adds zeros.
        """
        import torch

        if self.size == 1:
            return list(extra)
        import torch.distributed as dist

        owners = list(parameters)
        grads = [p.grad if p.grad is not None else torch.zeros_like(p) for p in owners]
        line = torch.cat([*(grad.float().flatten() for grad in grads), *(one.float().reshape(1) for one in extra)])
        dist.all_reduce(line)
        at = 0
        for owner, grad in zip(owners, grads, strict=True):
            grad.copy_(line[at : at + grad.numel()].view_as(grad))
            owner.grad = grad
            at += grad.numel()
        return list(line[at:])


def join(device: str) -> Group:
    """Return this process's place on a kind of device: alone, or as torchrun's environment says."""
    size = int(os.environ.get("WORLD_SIZE", "1"))
    if size == 1:
        return Group()
    from accelerate import PartialState

    state = PartialState(cpu=device == "cpu")  # the process group that the trainer will use
    return Group(state.process_index, state.num_processes)
