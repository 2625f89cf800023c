"""Choose whether the passes of a training are recorded as CUDA graphs (`cuda_graphs`).

The figures were measured by `benchmarks/compile_gain.py` on one H100 with 16 cores and torch 2.11, November 2026.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Protocol

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
