"""Shard a frozen base over several devices: each stores a part of every layer's weights, and gathers a layer to compute it.

The adapter is not sharded. It is a hundredth of its base, and so its files, checkpoints and optimizer are the same as on a
single device. Frozen weights have no gradients, so they are only gathered, never reduced. Uses torch's FSDP2
(`fully_shard`), https://arxiv.org/abs/2304.11277.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from loraflow.config.stage_configs import TrainConfig
from loraflow.failures import BadConfig
from loraflow.hardware.device import Device

if TYPE_CHECKING:
    from transformers import PreTrainedModel


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
        device: cpu or cuda, the current device of this process.
        devices: how many there are.
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
