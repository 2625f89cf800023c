"""Choose whether the passes of a training are recorded as CUDA graphs (`cuda_graphs`).

It estimates what compiling the layers saves, too: compiling costs once and saves in each pass (forward and backward of a
micro-batch). The figures were measured by `benchmarks/compile_gain.py` on one H100 with 16 cores and torch 2.11, November
2026. Other cards were not measured: with slower kernels, fewer launches save less, and fewer reads and writes save more.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, NamedTuple, Protocol

from loraflow.training.layers import draws_in_passes
from loraflow.training.memory import GIB, USABLE, fixed_bytes, token_bytes

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedConfig, PreTrainedModel

    from loraflow.hardware.attention import Attention
    from loraflow.training.memory import MemoryFit, ModelShape
    from loraflow.training.setup import TrainingSetup


LAUNCH_SECONDS = (
    4.3e-3  # to start the kernels of a compiled layer, forward and backward; uncompiled ones take twice that
)
FLOPS = 6e14  # operations per second of the frozen products in bfloat16
RECORDING_PASSES = 10  # recording a shape takes as long
LEAST_PASSES = 50


class Recordable(Protocol):
    """What passes through a model: its decoder, its embedding, and the parameters whose gradients are computed."""

    @property
    def decoder(self) -> PreTrainedModel:
        """The decoder."""

    @property
    def embed(self) -> torch.nn.Module:
        """The embedding of the input."""

    @property
    def trained(self) -> Sequence[torch.nn.Parameter]:
        """The trained parameters."""


def choose_graphs(
    setup: TrainingSetup, attention: Attention, fit: MemoryFit, trainer: Recordable, *, sharded: bool, passes: int
) -> tuple[bool, str]:
    """Return whether passes are recorded, and why. A resumed training decides the same: the whole training counts.

    Args:
        setup: the training.
        attention: the attention that was chosen.
        fit: the micro-batch that was chosen.
        trainer: the trainer, with its adapter.
        sharded: whether the base is sharded over the devices.
        passes: micro-batches of the whole training, on one device.
    """
    setting = setup.runtime.cuda_graphs
    if setting == "off":
        return False, "runtime.cuda_graphs is off"
    if setup.device != "cuda" or not attention.concatenated or setup.shape is None:
        return False, "only concatenated documents on a GPU have the fixed shapes that they need"
    if obstacle := _obstacle(trainer, fit, sharded=sharded):
        return False, obstacle
    if setting == "on":
        return True, "runtime.cuda_graphs is on"
    if passes < LEAST_PASSES:
        return False, f"{passes} passes are too few to pay for recording"
    return _pays_off(setup, setup.shape, fit)


def _obstacle(trainer: Recordable, fit: MemoryFit, *, sharded: bool) -> str:
    """Return why a pass cannot be recorded; empty if it can."""
    if sharded:
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
    computing = 4 * shape.linear_weights * fit.tokens / FLOPS  # forward, and the gradient of the activations
    if launching < computing:
        return False, f"starting a pass takes about {launching * 1e3:.0f} ms and its products {computing * 1e3:.0f} ms"
    # A recorded pass keeps the memory of its activations. The first passes of a shape are ordinary ones beside it.
    activations = fit.tokens * token_bytes(shape, fit.recompute, recomputed=fit.share, elementwise=fit.elementwise)
    needed = fixed_bytes(shape, setup.weight_format, setup.rank) + 2 * activations
    free = setup.free_bytes() * USABLE
    if needed > free:
        return False, f"a recorded and an ordinary pass need {needed / GIB:.1f} GiB, and {free / GIB:.1f} are free"
    return True, f"starting a pass takes about {launching * 1e3:.0f} ms, and its products {computing * 1e3:.0f} ms"


COMPILE_SECONDS = 30.0  # in a new process without a cache of compiled code; 5 to 12 s were measured in a warm process
LENGTH_SECONDS = 10.0  # to compile for one more length of micro-batches
MEASURED_TOKENS = 8192


class Saved(NamedTuple):
    """Milliseconds that a pass takes less for each compiled layer."""

    width: int
    without_dropout: float
    with_dropout: float


TABLE = (Saved(576, 5.0, 9.7), Saved(2048, 3.6, 17.7), Saved(3072, 3.6, 24.3))
# A pass of 1,024 tokens saved as much as one of 8,192 at width 576: there, launching the kernels takes the time.
LAUNCHES_WITH_DROPOUT = TABLE[0].with_dropout
# Milliseconds for each layer, token and unit of width, where the passes are recorded as CUDA graphs: nothing but reads and
# writes is saved then. Measured 1.6e-7 to 5.9e-7 without dropout and 8.9e-7 to 14.6e-7 with it.
GRAPHED, GRAPHED_WITH_DROPOUT = 1.6e-7, 8.9e-7


def seconds_saved(width: int, layers: int, dropout: float, passes: int, tokens: int, *, graphed: bool = False) -> float:
    """Return the seconds that compiled layers save in a training, without the time to compile them.

    Args:
        width: the model's hidden size. Between and beyond the measured widths, the next narrower one counts.
        layers: the number of the model's layers.
        dropout: LoRA's dropout. Its masks are most of what an uncompiled layer computes in addition.
        passes: micro-batches of the whole training, on one device.
        tokens: the tokens of a pass.
        graphed: whether the passes are recorded as CUDA graphs.
    """
    if graphed:
        return passes * layers * tokens * width * (GRAPHED_WITH_DROPOUT if dropout > 0 else GRAPHED) / 1e3
    row = max((row for row in TABLE if row.width <= width), default=TABLE[0])
    milliseconds = row.without_dropout
    if dropout > 0:
        share = min(1.0, tokens / MEASURED_TOKENS)
        milliseconds = LAUNCHES_WITH_DROPOUT + (row.with_dropout - LAUNCHES_WITH_DROPOUT) * share
    return passes * layers * milliseconds / 1e3
