"""Several processes, one per device, that train or evaluate together.

In training, each process computes its share of a step's micro-batches, and one all-reduce at the end of the step adds up
the gradients. LoRA's gradients are a hundredth of the weights, so a single all-reduce costs less than hiding it behind
the backward pass would. That needs no wrapper and no hooks, and allows any number of micro-batches on each device.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING, TypeVar

from loraflow.hardware.device import Device

if TYPE_CHECKING:
    import torch

T = TypeVar("T")


@dataclass(frozen=True)
class ProcessGroup:
    """The processes that work together, seen from this one. The default is a single process."""

    rank: int = 0
    size: int = 1

    @property
    def is_main(self) -> bool:
        """Whether this is the process that writes files."""
        return self.rank == 0

    def barrier(self) -> None:
        """Wait until every process has reached this line."""
        if self.size > 1:
            import torch.distributed as dist

            dist.barrier()

    def broadcast(self, value: T) -> T:
        """Return the main process's value on every process."""
        if self.size == 1:
            return value
        import torch.distributed as dist

        values = [value]
        dist.broadcast_object_list(values, src=0)
        return values[0]

    def all_gather(self, value: T) -> list[T]:
        """Return the values of all processes on every process, in the order of ranks."""
        if self.size == 1:
            return [value]
        import torch.distributed as dist

        values = [value] * self.size
        dist.all_gather_object(values, value)
        return values

    def owns(self, index: int) -> bool:
        """Return whether this process computes a batch: batches are assigned in turn."""
        return index % self.size == self.rank

    def gather_results(self, results: list[T | None]) -> list[T | None]:
        """Return the results of all processes on every process.

        Args:
            results: one entry per item on every process; None if another process has the result.
        """
        if self.size == 1:
            return results
        columns = zip(*self.all_gather(results), strict=True)
        return [next((result for result in column if result is not None), None) for column in columns]

    def any_later(self, value: bool, device: Device) -> Callable[[], bool]:
        """Ask whether the value is true on any process, without waiting for the answer.

        Returns:
            a function that waits for the answer. Called after more work was given to a GPU, it leaves the GPU busy.
        """
        import torch
        import torch.distributed as dist

        total = torch.full((), float(value), device=device)  # unlike torch.tensor, this does not wait for the GPU
        dist.all_reduce(total)
        on_host = total.to("cpu", non_blocking=True)
        copied = torch.cuda.current_stream().record_event() if device == "cuda" else None

        def answer() -> bool:
            if copied is not None:
                copied.synchronize()
            return float(on_host) > 0

        return answer

    def all_reduce_gradients(
        self, parameters: Iterable[torch.nn.Parameter], *scalars: torch.Tensor
    ) -> list[torch.Tensor]:
        """Sum the gradients over all processes in place, and return the sums of the scalars.

        A process without micro-batches in this step has no gradients, and adds zeros.
        """
        import torch

        if self.size == 1:
            return list(scalars)
        import torch.distributed as dist

        owners = list(parameters)
        grads = [p.grad if p.grad is not None else torch.zeros_like(p) for p in owners]
        flat = torch.cat([*(grad.float().flatten() for grad in grads), *(x.float().reshape(1) for x in scalars)])
        dist.all_reduce(flat)
        start = 0
        for owner, grad in zip(owners, grads, strict=True):
            grad.copy_(flat[start : start + grad.numel()].view_as(grad))
            owner.grad = grad
            start += grad.numel()
        return list(flat[start:])


def join(device: Device) -> ProcessGroup:
    """Join the group that torchrun's environment variables describe. Without them, this process is a group of one."""
    if int(os.environ.get("WORLD_SIZE", "1")) == 1:
        return ProcessGroup()
    from accelerate import PartialState

    state = PartialState(cpu=device == "cpu")  # the process group that the trainer will use
    return ProcessGroup(state.process_index, state.num_processes)
