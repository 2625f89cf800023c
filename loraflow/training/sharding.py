"""A frozen base that several devices hold together: each has a part of every layer's weights, and asks for the rest.

What is trained stays whole on each device: an adapter is a hundredth of its base, and its files, checkpoints and
optimizer are those of one device. Frozen weights have no gradients, so that gathering a layer before it computes is
all there is to do. By torch's FSDP2 (`fully_shard`), https://arxiv.org/abs/2304.11277.
"""

from __future__ import annotations

from typing import Any

from loraflow.config.stage_configs import TrainConfig
from loraflow.failures import BadConfig


def refuse(config: TrainConfig, engine: str) -> None:
    """Refuse what does not go with a sharded base.

    Raises:
        BadConfig: packed weights, layers that are not peft's plain ones, or the stock engine.
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
        "A base that devices hold together goes with plain LoRA on 16- or 32-bit weights, and the fast engine.",
        where="runtime.shard_base", got=got, next_step=f"{step}, or runtime.shard_base to off",
    )  # fmt: skip


def shard(model: Any, device: str, devices: int) -> Any:
    """Spread the weights of a model's layers over all devices, layer by layer, and put the rest on this one.

    Args:
        model: without adapters, in the main memory; nothing of it is trained.
        device: cpu or cuda, this process's being current.
        devices: how many there are.
    """
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    decoder = model.get_decoder()
    model.requires_grad_(False)
    mesh = init_device_mesh(device, (devices,))
    for layer in decoder.layers:
        fully_shard(layer, mesh=mesh, reshard_after_forward=True)
    # The root shares streams among the layers, so that the next one is gathered while this one computes.
    spread = {id(parameter) for layer in decoder.layers for parameter in layer.parameters()}
    whole = {parameter for parameter in decoder.parameters() if id(parameter) not in spread}
    fully_shard(decoder, mesh=mesh, ignored_params=whole)
    return model.to(device)


def held(model: Any) -> dict[str, int]:
    """Return the bytes of a model's frozen weights on this device, `frozen_bytes`; `whole_bytes`: those all devices have."""
    from torch.distributed.tensor import DTensor

    frozen = [p for p in model.parameters() if not p.requires_grad and p.device.type != "meta"]
    parts = [(p.to_local() if (shared := isinstance(p, DTensor)) else p, shared) for p in frozen]
    sizes = [(one.numel() * one.element_size(), shared) for one, shared in parts]
    return {"frozen_bytes": sum(n for n, _ in sizes), "whole_bytes": sum(n for n, shared in sizes if not shared)}
