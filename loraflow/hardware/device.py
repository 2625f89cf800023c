"""The device of a stage, and its capabilities."""

import platform
from typing import Literal

from loraflow.config import Runtime
from loraflow.failures import MissingExtra

Device = Literal["cpu", "cuda"]


def pick_device(runtime: Runtime) -> Device:
    """Return the device that the runtime asks for.

    Raises:
        MissingExtra: cuda is asked for and there is no CUDA device.
    """
    import torch

    requested, has_cuda = runtime.device, torch.cuda.is_available()
    if requested == "cuda" and not has_cuda:
        raise MissingExtra(
            "There is no CUDA device.", where="runtime.device", next_step="set runtime.device to auto or cpu"
        )
    if requested == "auto":
        return "cuda" if has_cuda else "cpu"
    return requested


def device_name(device: Device) -> str:
    """Return the GPU's product name, or `cpu`."""
    import torch

    return torch.cuda.get_device_name() if device == "cuda" else "cpu"


def cpu_has_bfloat16() -> bool:
    """Return whether the CPU has instructions for bfloat16. Architectures other than x86 are assumed to have them."""
    import torch

    probes = (getattr(torch.cpu, name, None) for name in ("_is_avx512_bf16_supported", "_is_amx_tile_supported"))
    return platform.machine() not in ("x86_64", "AMD64") or any(probe() for probe in probes if probe is not None)


def gpu_has_fp8() -> bool:
    """Return whether the current GPU multiplies in fp8: Ada, Hopper and Blackwell do."""
    import torch

    return torch.cuda.get_device_capability() >= (8, 9)


def free_gpu_bytes() -> int:
    """Return the bytes of GPU memory that this process can use, including what it has allocated."""
    import torch

    return torch.cuda.mem_get_info()[0] + torch.cuda.memory_allocated()


def peak_gpu_gib() -> float | None:
    """Return the most GPU memory that this process has allocated, in GiB; None without a GPU."""
    import torch

    return round(torch.cuda.max_memory_allocated() / 2**30, 2) if torch.cuda.is_available() else None
