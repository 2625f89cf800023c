"""Choose attention, sharding and engine of a training on this machine, and record the choices.

The record goes into the artifact's telemetry. None of the choices is part of a fingerprint.

A sharded base is frozen: each device stores a part of every layer's weights and gathers a layer to compute it, with torch's
FSDP2 (`fully_shard`), https://arxiv.org/abs/2304.11277. The adapter, a hundredth of its base, is on every device.
"""

from __future__ import annotations

import logging
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Literal

import torch
from pydantic import JsonValue

from loraflow.base.architecture import obstacle_to_fast_engine, obstacle_to_packing, obstacle_to_quantization
from loraflow.config.stage_configs import TrainConfig
from loraflow.failures import BadConfig
from loraflow.hardware.attention import Attention, attention_with_mask
from loraflow.hardware.device import Device, cpu_has_bfloat16, device_name, gpu_has_fp8
from loraflow.hardware.process_group import ProcessGroup
from loraflow.training import memory
from loraflow.training.attention import choose
from loraflow.training.memory import Recompute
from loraflow.training.setup import TrainingSetup

if TYPE_CHECKING:
    from transformers import PreTrainedConfig, PreTrainedModel

log = logging.getLogger(__name__)


def refuse_unshardable(config: TrainConfig, engine: str) -> None:
    """Refuse what cannot be combined with a sharded base.

    Raises:
        BadConfig: quantized weights, layers other than peft's plain ones, or the stock engine.
    """
    if config.base.quantization:
        got, step = f"base.quantization: {config.base.quantization}", "set base.quantization to null"
    elif config.method != "peft" or config.peft_config.use_dora:
        got, step = "loralib's layers, or DoRA", "set method to peft, and peft_config.use_dora to false"
    elif isinstance(config.peft_config.init_lora_weights, str):
        got, step = f"init_lora_weights: {config.peft_config.init_lora_weights}", "set it to true"
    elif config.peft_config.modules_to_save:
        got, step = "peft_config.modules_to_save", "leave it out"
    elif config.peft_config.bias != "none" or config.peft_config.trainable_token_indices:
        got, step = "trained biases, or tokens", "set peft_config.bias to none, and leave trainable_token_indices out"
    elif engine != "fast":
        got, step = "runtime.engine: stock", "set runtime.engine to fast"
    else:
        return
    raise BadConfig(
        "A sharded base works only with plain LoRA on 16- or 32-bit weights, and with the fast engine.",
        where="runtime.shard_base",
        got=got,
        next_step=f"{step}, or set runtime.shard_base to off",
    )


def shard(model: PreTrainedModel, device: Device, devices: int) -> PreTrainedModel:
    """Shard the weights of a model's layers over all devices, layer by layer, and copy the rest to this one.

    Args:
        model: without adapters, in main memory; nothing of it is trained.
    """
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    decoder = model.get_decoder()  # type: ignore[no-untyped-call]
    model.requires_grad_(False)
    mesh = init_device_mesh(device, (devices,))
    for layer in decoder.layers:
        fully_shard(layer, mesh=mesh, reshard_after_forward=True)
    # With a common root, the layers share streams, so that the next layer is gathered while this one computes.
    sharded = {id(parameter) for layer in decoder.layers for parameter in layer.parameters()}
    replicated = {parameter for parameter in decoder.parameters() if id(parameter) not in sharded}
    fully_shard(decoder, mesh=mesh, ignored_params=replicated)
    placed: PreTrainedModel = model.to(device)  # type: ignore[arg-type]
    return placed


def frozen_bytes(model: torch.nn.Module) -> tuple[int, int]:
    """Return the bytes of a model's frozen weights on this device, and how many of them are replicated on every device."""
    from torch.distributed.tensor import DTensor

    total = unsharded = 0
    for parameter in model.parameters():
        if parameter.requires_grad or parameter.device.type == "meta":
            continue
        local = parameter.to_local() if isinstance(parameter, DTensor) else parameter
        size = local.numel() * local.element_size()
        total += size
        unsharded += 0 if isinstance(parameter, DTensor) else size
    return total, unsharded


EngineName = Literal["fast", "stock"]


@dataclass(frozen=True)
class EngineChoices:
    """A record of what was chosen for a training, and why: the artifact's telemetry/engine.json."""

    base_sharded: bool
    base_sharded_why: str
    engine: EngineName
    attention: str
    attention_why: str
    device: str
    dtype: str
    micro_batch_rows: int | None = None
    micro_batch_tokens: int | None = None
    recompute: Recompute | None = None
    recompute_why: str | None = None
    layers_recomputed: float | None = None
    elementwise_recomputed: bool | None = None
    shared_prefix: str | None = None
    frozen_bytes: int | None = None
    replicated_bytes: int | None = None
    fast_loras: int | None = None
    compiled_layers: int | None = None
    compiled_why: str | None = None
    cuda_graphs: bool | None = None
    cuda_graphs_why: str | None = None

    def to_json(self) -> dict[str, JsonValue]:
        """Return the choices that apply."""
        return {name: value for name, value in asdict(self).items() if value is not None}


def choose_engine(setup: TrainingSetup, config: PreTrainedConfig) -> EngineName:
    """Choose the engine from the model's config, before anything is loaded."""
    if setup.runtime.engine == "stock":
        return "stock"
    obstacle = obstacle_to_fast_engine(config)
    if not obstacle:
        return "fast"
    log.info("the stock engine is used, with padded rows: %s", obstacle)
    return "stock"


def choose_attention(setup: TrainingSetup, config: PreTrainedConfig) -> Attention:
    """Choose the attention. Padded rows with a mask are used where documents cannot be concatenated."""
    grid = attention_with_mask(config)
    if setup.runtime.engine == "stock" and setup.runtime.attn_implementation == "auto":
        return Attention(grid, False, grid, "the stock engine's rows are padded")
    attention = choose(setup.runtime, setup.device, setup.compute_dtype, config)
    # trl's collator pads, or packs with position ids; these attentions build a mask for both.
    if attention.concatenated and setup.runtime.engine == "stock":
        return Attention(grid, False, grid, "the stock engine's rows are padded")
    if attention.concatenated and setup.config.peft_config.init_lora_weights == "eva":
        return Attention(grid, False, grid, "EVA reads padded rows first")
    return attention


def refuse_unsupported(
    config: PreTrainedConfig, *, is_packed: bool, quantization: Literal["nf4", "fp8"] | None
) -> None:
    """Refuse packed rows or a quantized base where the architecture does not allow them.

    Raises:
        BadConfig: the rows are packed, and a layer carries a state over the borders of documents; or the weights cannot
            be trained in this quantization. (For the GPU's part of fp8, see `refuse_fp8`.)
    """
    where, asked, instead = "training_config.packing", "true", "false"
    obstacle = obstacle_to_packing(config) if is_packed else ""
    if not obstacle and quantization:
        where, asked, instead = "base.quantization", quantization, "null"
        obstacle = obstacle_to_quantization(config, quantization)
    if obstacle:
        raise BadConfig(
            f"The base's architecture {config.model_type} does not allow {where}: {asked}.",
            where=where,
            got=obstacle,
            next_step=f"set {where} to {instead}",
        )


def choose_sharding(setup: TrainingSetup) -> tuple[bool, str]:
    """Return whether the frozen base is sharded over the devices, and why.

    Raises:
        BadConfig: the recipe cannot be combined with a sharded base.
    """
    asked = setup.runtime.shard_base
    if setup.group.size == 1 or asked == "off":
        return False, "turned off" if asked == "off" else "there is one device"
    is_sharded, why = asked == "on", "asked for"
    if not is_sharded:
        if setup.device == "cpu" or setup.shape is None:
            return False, "not asked for"
        least = memory.least_bytes(
            setup.shape, setup.weight_format, setup.rank, setup.longest_row, setup.activation_width
        )
        free = setup.free_bytes()
        is_sharded = least > free
        why = f"one device needs {least / memory.GIB:.1f} GiB, and has {free / memory.GIB:.1f}"
    if is_sharded:
        refuse_unshardable(setup.config, setup.runtime.engine)
    return is_sharded, why


def refuse_mixed_devices(group: ProcessGroup, device: Device) -> None:
    """Refuse GPUs of several types: the slowest sets the speed, and the smallest the memory.

    Raises:
        BadConfig: the GPUs differ.
    """
    names = sorted(set(group.all_gather(device_name(device))))
    if len(names) > 1:
        raise BadConfig(
            "The devices that train together are of several types.",
            where="runtime.devices",
            expected="one type of GPU",
            got=", ".join(names),
            next_step="choose GPUs of one type by CUDA_VISIBLE_DEVICES, and set runtime.devices to their number",
        )


def refuse_fp8(setup: TrainingSetup) -> None:
    """Refuse an fp8 base where it cannot be trained.

    Raises:
        BadConfig: the GPU has no fp8, or the recipe does not train in bfloat16 with the fast engine.
    """
    if setup.device != "cuda" or not gpu_has_fp8():
        raise BadConfig(
            "An fp8 base needs a GPU that computes in fp8.",
            where="base.quantization",
            expected="compute capability 8.9 or newer (Ada, Hopper, Blackwell)",
            got=device_name(setup.device),
            next_step="set base.quantization to null (bfloat16), or nf4 to save memory",
        )
    if setup.compute_dtype != "bfloat16" or setup.runtime.engine != "fast":
        raise BadConfig(
            "An fp8 base needs bfloat16 and the fast engine.",
            where="base.quantization",
            got=f"{setup.compute_dtype}, engine {setup.runtime.engine}",
            next_step="set training_config.bf16: true, base.dtype: bfloat16 and runtime.engine: fast",
        )


def warn_of_slow_bfloat16(setup: TrainingSetup) -> None:
    """Log a warning if the CPU only emulates bfloat16."""
    if setup.device == "cpu" and setup.compute_dtype == "bfloat16" and not cpu_has_bfloat16():
        log.warning(
            "this CPU has no bfloat16 units: base.dtype: float32 with training_config.bf16: false is far faster"
        )
