"""Choose the attention kernel: for training, and for a model that is loaded to generate or to score.

A setting that cannot be satisfied is refused. `auto` takes the fastest kernel that is available and says why.
"""

from __future__ import annotations

import importlib.util
import logging
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal, TypeVar

from loraflow.config import Runtime
from loraflow.failures import BadConfig, MissingExtra, first_line
from loraflow.hardware.device import Device

if TYPE_CHECKING:
    from transformers import PreTrainedConfig

log = logging.getLogger(__name__)

DocumentKernelName = Literal["varlen", "efficient", "fa3", "fa4"]
K = TypeVar("K")

DOCUMENTS = "loraflow_varlen"  # transformers' name for the document kernels; see `loraflow.training.attention`
NO_FLOAT32 = "flash attention has no float32"
MAX_HEAD_DIM = 256  # widest head of flash attention
_ATTENTION_DROPOUT = ("attention_dropout", "attn_pdrop", "attn_dropout", "attention_probs_dropout_prob")  # in configs
_AUTO = "set runtime.attn_implementation to auto"


@dataclass(frozen=True)
class KernelPackage:
    """An attention kernel that comes with a Python package."""

    title: str  # for the log and the artifact's telemetry
    module: str  # imported to use it
    package: str  # installed to get it
    capabilities: tuple[int, ...] = ()  # major compute capabilities of the GPUs that it runs on; () is all

    @property
    def is_installed(self) -> bool:
        """Whether the module can be imported."""
        try:
            return importlib.util.find_spec(self.module) is not None
        except ModuleNotFoundError:  # its parent package is missing
            return False


# Kernels of packages. torch has its own: varlen (FlashAttention 2) and efficient (float32) over documents, sdpa and eager.
FLASH_ATTENTION_2 = KernelPackage("flash-attn 2", "flash_attn", "flash-attn")
DOCUMENT_KERNEL_PACKAGES: dict[DocumentKernelName, KernelPackage] = {  # fastest first
    "fa4": KernelPackage("FA4 (flash_attn.cute)", "flash_attn.cute", "flash-attn-4", (9, 10)),
    "fa3": KernelPackage("FA3 (flash_attn_interface)", "flash_attn_interface", "flash_attn_interface", (9,)),
}


@dataclass(frozen=True)
class Attention:
    """The attention of a training."""

    implementation: str  # transformers' name
    concatenated: bool  # documents are concatenated, and their borders are given; otherwise padded rows with a mask
    kernel: str  # for the log and the artifact's telemetry
    why: str


def choose_for_loading(runtime: Runtime, device: Device, dtype: str = "bfloat16") -> str:
    """Choose the attention of a model that is loaded to generate or to score; return transformers' name.

    Flash attention has no float32, so a model that computes in float32 takes sdpa instead.

    Raises:
        MissingExtra: flash_attention_2 is asked for and is not available.
    """
    requested = runtime.attn_implementation
    if requested == "varlen" or requested in DOCUMENT_KERNEL_PACKAGES:  # kernels of training
        requested = "auto"
    if requested == "flash_attention_2":
        _require(FLASH_ATTENTION_2, requested, device)
    if requested == "auto":
        return "flash_attention_2" if dtype != "float32" and _is_usable(FLASH_ATTENTION_2, device) else "sdpa"
    return "sdpa" if requested == "flash_attention_2" and dtype == "float32" else requested


def attention_with_mask(config: PreTrainedConfig) -> str:
    """Return the attention for padded rows: sdpa, or eager for architectures that transformers has no sdpa for."""
    from transformers import MODEL_FOR_CAUSAL_LM_MAPPING

    if getattr(config.get_text_config(), "attn_logit_softcapping", None):
        return "eager"  # sdpa leaves the cap out, without a word in some versions of transformers

    model_class = MODEL_FOR_CAUSAL_LM_MAPPING.get(type(config), None)  # None: code that comes with the model
    return "eager" if model_class is not None and not getattr(model_class, "_supports_sdpa", True) else "sdpa"


def choose_for_training(
    runtime: Runtime, device: Device, dtype: str, config: PreTrainedConfig, load: Callable[[DocumentKernelName], K]
) -> tuple[Attention, K | None]:
    """Choose the attention of a training; return it with its kernel for concatenated documents, if it uses one.

    Args:
        load: returns a document kernel, or raises if the kernel does not work on this GPU.

    Raises:
        MissingExtra: the kernel that is asked for is not available.
        BadConfig: the kernel that is asked for cannot compute this model, or does not work on this GPU.
    """
    requested = runtime.attn_implementation
    obstacle = _obstacle(device, config.get_text_config())
    if requested != "auto" and dtype == "float32":
        obstacle = obstacle or NO_FLOAT32
    if (requested == "varlen" or requested in DOCUMENT_KERNEL_PACKAGES) and obstacle:
        raise BadConfig(
            f"Attention {requested} is not available here.",
            where="runtime.attn_implementation",
            got=obstacle,
            next_step=_AUTO,
        )
    if requested == "flash_attention_2":
        _require(FLASH_ATTENTION_2, requested, device)
        return Attention(requested, True, FLASH_ATTENTION_2.title, "asked for"), None
    if requested in ("sdpa", "eager"):
        return Attention(requested, False, requested, "asked for"), None
    if not obstacle and dtype == "float32":
        try:
            return Attention(DOCUMENTS, True, "torch memory-efficient", NO_FLOAT32), load("efficient")
        except Exception as error:  # an operator that torch does not document: another version may raise anything
            obstacle = f"{NO_FLOAT32}, and torch's memory-efficient attention does not work here: {first_line(error)}"
    if obstacle:
        with_mask = attention_with_mask(config)
        return Attention(with_mask, False, with_mask, obstacle), None
    kernel, title, why = _fastest(requested, load)
    return Attention(DOCUMENTS, True, title, why), kernel


def _obstacle(device: Device, config: PreTrainedConfig) -> str:
    """Return why no document kernel can compute a model; empty if one can."""
    import torch

    if device != "cuda":
        return "no GPU"
    if torch.cuda.get_device_capability() < (8, 0):
        return f"{torch.cuda.get_device_name()} is older than Ampere"
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    if head_dim > MAX_HEAD_DIM:
        return f"heads are {head_dim} wide, flash attention's at most {MAX_HEAD_DIM}"
    if getattr(config, "attn_logit_softcapping", None):
        return "the model soft-caps its attention logits"
    if any(getattr(config, name, 0.0) for name in _ATTENTION_DROPOUT):
        return "the model uses attention dropout"
    return ""


def _fastest(requested: str, load: Callable[[DocumentKernelName], K]) -> tuple[K, str, str]:
    """Return (kernel, its title, why): the newest that is installed and works on this GPU, else torch's own."""
    import torch

    if requested == "varlen":
        return load("varlen"), "torch varlen (FA2)", "asked for"
    capability = torch.cuda.get_device_capability()[0]
    why = "no newer flash attention is installed"
    for name, kernel in DOCUMENT_KERNEL_PACKAGES.items():
        if requested == name:
            _require(kernel, requested, "cuda")
        if requested not in ("auto", name) or capability not in kernel.capabilities or not kernel.is_installed:
            continue
        try:
            return load(name), kernel.title, "installed, and agrees with torch's own kernel on this GPU"
        except Exception as error:  # another version of the package may raise anything; torch's own kernel remains
            reason = first_line(error)
            if requested == name:
                raise BadConfig(
                    f"{name.upper()} does not work here.",
                    where="runtime.attn_implementation",
                    got=reason,
                    next_step=_AUTO,
                ) from error
            log.warning("%s is installed, but does not work here: %s", kernel.module, reason)
            why = f"{kernel.module} is installed, but does not work here: {reason}"
    if requested in DOCUMENT_KERNEL_PACKAGES:
        raise BadConfig(
            f"{requested.upper()} does not run on this GPU.",
            where="runtime.attn_implementation",
            got=torch.cuda.get_device_name(),
            next_step=_AUTO,
        )
    return load("varlen"), "torch varlen (FA2)", why


def _is_usable(kernel: KernelPackage, device: Device) -> bool:
    return device == "cuda" and kernel.is_installed


def _require(kernel: KernelPackage, setting: str, device: Device) -> None:
    if not _is_usable(kernel, device):
        raise MissingExtra(
            f"{setting} needs a CUDA device and the package {kernel.package}.",
            where="runtime.attn_implementation",
            next_step=_AUTO,
        )
