"""Record the forward and backward pass of a small model as CUDA graphs, and replay them for each micro-batch.

A small model's pass has thousands of short kernels. Starting them one by one takes the host longer than the GPU needs to
compute them. A graph starts all of them at once. The kernels, their order and their results are those of an ordinary pass.

A graph is recorded for the shapes of a micro-batch's inputs. Its gradients are added to tensors that stay where they are,
because a graph writes to fixed addresses. If recording fails, or the replayed result differs from an ordinary pass,
training continues without graphs.

Graphs are chosen by an estimate of what compiling the layers saves: it costs once and saves in each pass (forward and
backward of a micro-batch). The figures were measured by `benchmarks/compile_gain.py` on one H200 with 16 cores and torch
2.11, November 2026; an H100 gave 5.0, 3.6 and 3.6 ms without dropout. Other cards were not measured: with slower kernels,
fewer launches save less, and fewer reads and writes save more.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import FunctionCtx

from loraflow.failures import first_line
from loraflow.training.layers import draws_in_passes
from loraflow.training.memory import GIB, USABLE, fixed_bytes, token_bytes

if TYPE_CHECKING:
    from transformers import PreTrainedConfig

    from loraflow.hardware.attention import Attention
    from loraflow.training.memory import MemoryFit, ModelShape
    from loraflow.training.setup import TrainingSetup
    from loraflow.training.trainer import DecoderPass


log = logging.getLogger(__name__)

Body = Callable[[Mapping[str, Tensor], Mapping[str, int]], Tensor]
Key = tuple[tuple[tuple[str, tuple[int, ...], torch.dtype], ...], tuple[tuple[str, int], ...]]

WARM_UP = 2  # ordinary passes before recording: libraries initialise, and compiled code is compiled
MAX_GRAPHS = 16  # further shapes are computed without a graph
TOLERANCE = 0.02  # relative, for the replayed result and its gradients; kernels that add in any order differ by less


class GraphedPass:
    """Run a function of tensors, and its backward pass, from CUDA graphs.

    Args:
        body: the function: tensors by name, and numbers by name → output. Its kernels may not depend on values of tensors.
        trained: the parameters whose gradients are computed. The body uses all of them.
        sums: where the gradients of the parameters are added up; new tensors by default.
    """

    def __init__(
        self,
        body: Body,
        trained: Sequence[torch.nn.Parameter],
        on_failure: Callable[[], None],
        sums: Sequence[Tensor] | None = None,
    ):
        self.body, self.trained, self.on_failure = body, trained, on_failure
        self.sums = [torch.zeros_like(parameter) for parameter in trained] if sums is None else list(sums)
        self.graphs: dict[Key, _Graph] = {}
        self.is_on = True
        self._pool = torch.cuda.graph_pool_handle()  # all graphs share their memory, because one runs at a time
        self._root = torch.zeros((), device=trained[0].device, requires_grad=True)  # so that autograd calls `_Replay`

    def start_step(self) -> None:
        """Set the gradients of all trained parameters to zero, in the tensors that the graphs add to."""
        torch._foreach_zero_(self.sums)
        for parameter, total in zip(self.trained, self.sums, strict=True):
            parameter.grad = total

    def __call__(self, inputs: Mapping[str, Tensor], numbers: Mapping[str, int]) -> Tensor:
        """Return the body's output. Its backward pass adds to the gradients of the trained parameters."""
        if not self.is_on:
            return self.body(inputs, numbers)
        shapes = tuple((name, tuple(value.shape), value.dtype) for name, value in sorted(inputs.items()))
        key = (shapes, tuple(sorted(numbers.items())))
        graph = self.graphs.get(key)
        if graph is None:
            if len(self.graphs) < MAX_GRAPHS:
                self._try(lambda: self.graphs.__setitem__(key, self._record(inputs, numbers)))
            return self.body(inputs, numbers)
        if not graph.is_checked:
            self._try(lambda: self._check(graph, inputs, numbers))
            if not self.is_on:
                return self.body(inputs, numbers)
        out: Tensor = _Replay.apply(self._root, graph, inputs)  # type: ignore[no-untyped-call]
        return out

    def _try(self, action: Callable[[], None]) -> None:
        """Record or check a graph. If that fails, give up graphs, and say why."""
        try:
            action()
        except Exception as error:
            if type(error).__module__.startswith(("torch._dynamo", "torch._inductor")):
                raise  # an error of the compiled layers, not of the graph
            log.warning("training continues without CUDA graphs: %s", first_line(error))
            self.is_on = False
            self.graphs.clear()
            torch.cuda.synchronize()
            torch.cuda.empty_cache()
            self.on_failure()

    def _record(self, inputs: Mapping[str, Tensor], numbers: Mapping[str, int]) -> _Graph:
        fixed = {name: value.clone() for name, value in inputs.items()}
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            for _ in range(WARM_UP):
                out = self.body(fixed, numbers)
                torch.autograd.grad(out, self.trained, torch.zeros_like(out))
            del out
        torch.cuda.current_stream().wait_stream(side)
        forward, backward = torch.cuda.CUDAGraph(), torch.cuda.CUDAGraph()
        # "thread_local": another thread may pin the next batch's memory meanwhile.
        with torch.cuda.graph(forward, pool=self._pool, capture_error_mode="thread_local"):
            out = self.body(fixed, numbers)
        slope = torch.zeros_like(out)
        with torch.cuda.graph(backward, pool=self._pool, capture_error_mode="thread_local"):
            torch._foreach_add_(self.sums, torch.autograd.grad(out, self.trained, slope))
        return _Graph(forward, backward, fixed, out.detach(), slope)

    def _check(self, graph: _Graph, inputs: Mapping[str, Tensor], numbers: Mapping[str, int]) -> None:
        """Compare a replay with an ordinary pass over other values than the recorded ones.

        A kernel that was started outside of the recorded stream would not run again.
        """
        kept = [total.clone() for total in self.sums]
        try:
            expected = self.body(inputs, numbers)
            # Random signs of size 1/√n: normalisation has no gradient along a constant, and fp16 cannot hold 1/n.
            generator = torch.Generator(expected.device).manual_seed(0)
            signs = torch.randint(0, 2, expected.shape, generator=generator, device=expected.device) * 2 - 1
            slope = (signs / expected.numel() ** 0.5).to(expected.dtype)
            gradients = torch.autograd.grad(expected, self.trained, slope)
            torch._foreach_zero_(self.sums)
            graph.replay_forward(inputs)
            graph.replay_backward(slope)
            _compare("output", [graph.out], [expected.detach()])
            _compare("gradient", self.sums, gradients)
        finally:
            torch._foreach_copy_(self.sums, kept)
        graph.is_checked = True


def _compare(what: str, found: Sequence[Tensor], expected: Sequence[Tensor]) -> None:
    """Raise ValueError if tensors differ by more than the tolerance, as a share of their common norm."""
    pairs = list(zip(found, expected, strict=True))
    error = torch.stack([(actual.float() - reference.float()).square().sum() for actual, reference in pairs]).sum()
    size = torch.stack([reference.float().square().sum() for _, reference in pairs]).sum()
    if not float(error) <= TOLERANCE**2 * float(size):
        raise ValueError(f"the replayed {what} differs from that of an ordinary pass")


@dataclass
class _Graph:
    """The two graphs of a shape, and the tensors at their fixed addresses."""

    forward: torch.cuda.CUDAGraph
    backward: torch.cuda.CUDAGraph
    inputs: Mapping[str, Tensor]
    out: Tensor
    slope: Tensor  # gradient of the loss with respect to the output
    is_checked: bool = False

    def replay_forward(self, inputs: Mapping[str, Tensor]) -> None:
        for name, value in inputs.items():
            self.inputs[name].copy_(value, non_blocking=True)
        self.forward.replay()

    def replay_backward(self, slope: Tensor) -> None:
        self.slope.copy_(slope)
        self.backward.replay()


class _Context(FunctionCtx):
    graph: _Graph


class _Replay(torch.autograd.Function):
    """A replayed forward pass, whose backward pass is replayed too. It adds to the parameters' gradients by itself."""

    @staticmethod
    def forward(ctx: _Context, root: Tensor, graph: _Graph, inputs: Mapping[str, Tensor]) -> Tensor:
        graph.replay_forward(inputs)
        ctx.graph = graph
        return graph.out.view_as(graph.out)

    @staticmethod
    def backward(ctx: _Context, slope: Tensor) -> tuple[None, None, None]:
        ctx.graph.replay_backward(slope)
        return None, None, None


LAUNCH_SECONDS = 4.3e-3  # to start the kernels of a compiled layer, both ways; uncompiled ones take twice that
# Operations per second of the frozen products, by the bytes of a number: bfloat16, and float32 (measured on one H200).
FLOPS = {2: 6e14, 4: 4.5e13}
RECORDING_PASSES = 10  # recording a shape takes as long
LEAST_PASSES = 50


def choose_graphs(
    setup: TrainingSetup, attention: Attention, fit: MemoryFit, trainer: DecoderPass, *, passes: int
) -> tuple[bool, str]:
    """Return whether passes are recorded, and why. A resumed training decides the same: the whole training counts.

    Args:
        passes: micro-batches of the whole training, on one device.
    """
    setting = setup.runtime.cuda_graphs
    if setting == "off":
        return False, "runtime.cuda_graphs is off"
    if setup.device != "cuda" or not attention.concatenated or setup.shape is None:
        return False, "only concatenated documents on a GPU have the fixed shapes that they need"
    if obstacle := _obstacle(setup, trainer, fit):
        return False, obstacle
    if setting == "on":
        return True, "runtime.cuda_graphs is on"
    if passes < LEAST_PASSES:
        return False, f"{passes} passes are too few to pay for recording"
    return _pays_off(setup, setup.shape, fit)


def _obstacle(setup: TrainingSetup, trainer: DecoderPass, fit: MemoryFit) -> str:
    """Return why a pass cannot be recorded; empty if it can."""
    if setup.is_sharded:
        return "the sharded base is gathered in each pass"
    if fit.recompute == "offload":
        return "activations are moved to main memory"
    if draws_in_passes(trainer.decoder):
        return "dropout draws other numbers in each pass"
    if switching := sorted({"longrope", "dynamic"} & _rope_types(trainer.decoder.config)):
        return f"rotary embeddings of type {switching[0]} depend on the positions of each pass"
    recorded = {id(parameter) for parameter in trainer.decoder.parameters()}
    recorded -= {id(parameter) for parameter in trainer.embed.parameters()}
    if any(id(parameter) not in recorded for parameter in trainer.trained):
        return "embedding or head are trained"
    return ""


def _rope_types(config: PreTrainedConfig) -> set[str]:
    """Return the types of a model's rotary embeddings. Some models have one for each type of layer."""
    parameters = getattr(config, "rope_parameters", None) or {}
    found = [parameters, *(value for value in parameters.values() if isinstance(value, dict))]
    return {str(value["rope_type"]) for value in found if "rope_type" in value}


def _pays_off(setup: TrainingSetup, shape: ModelShape, fit: MemoryFit) -> tuple[bool, str]:
    launching = shape.layers * LAUNCH_SECONDS
    # Forward, and the gradient of the activations.
    computing = 4 * shape.linear_weights * fit.tokens / FLOPS[setup.activation_width]
    if launching < computing:
        return False, f"starting a pass takes about {launching * 1e3:.0f} ms and its products {computing * 1e3:.0f} ms"
    # A recorded pass keeps the memory of its activations. The first passes of a shape are ordinary ones beside it.
    activations = fit.tokens * token_bytes(
        shape, fit.recompute, setup.activation_width, recomputed=fit.share, elementwise=fit.elementwise
    )
    needed = fixed_bytes(shape, setup.weight_format, setup.rank) + 2 * activations
    free = setup.free_bytes() * USABLE
    if needed > free:
        return False, f"a recorded and an ordinary pass need {needed / GIB:.1f} GiB, and {free / GIB:.1f} are free"
    return True, f"starting a pass takes about {launching * 1e3:.0f} ms, and its products {computing * 1e3:.0f} ms"


COMPILE_SECONDS = 30.0  # in a new process without a cache of compiled code; 5 to 12 s were measured in a warm process
LENGTH_SECONDS = 10.0  # to compile for one more length of micro-batches


class Saved(NamedTuple):
    """Milliseconds that a pass takes less for each compiled layer."""

    width: int
    without_dropout: float
    with_dropout: float


# The smallest that was measured: with 1,024 tokens instead of 8,192, the first width saved 6.0 with dropout.
TABLE = (Saved(576, 4.1, 3.2), Saved(2048, 5.5, 3.6), Saved(3072, 3.7, 5.2))
# Milliseconds for each layer, token and unit of width, where the passes are recorded as CUDA graphs: nothing but reads and
# writes is saved then. Measured 1.3e-7 to 1.5e-7 with 8,192 tokens, with and without dropout.
GRAPHED = 1.3e-7


def seconds_saved(width: int, layers: int, dropout: float, passes: int, tokens: int, *, graphed: bool = False) -> float:
    """Return the seconds that compiled layers save in a training, without the time to compile them.

    Args:
        width: the model's hidden size. Between and beyond the measured widths, the next narrower one counts.
        dropout: LoRA's dropout.
        tokens: of a pass, which count where passes are recorded. Otherwise, launching the kernels takes the time.
    """
    if graphed:
        return passes * layers * tokens * width * GRAPHED / 1e3
    row = max((row for row in TABLE if row.width <= width), default=TABLE[0])
    return passes * layers * (row.with_dropout if dropout > 0 else row.without_dropout) / 1e3
