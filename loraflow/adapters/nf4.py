"""The weights that QLoRA trains on: the base quantized to NF4 and dequantized, as bitsandbytes does it, on any device.

Source: https://arxiv.org/abs/2305.14314. A block of 64 weights has one quantization constant. Double quantization
quantizes the constants too, in blocks of 256.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING

from loraflow.failures import MissingExtra

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel
    from transformers.pytorch_utils import Conv1D

ROWS = 256  # quantized at a time: of any width, they are a whole number of blocks


@dataclass(frozen=True)
class Nf4:
    """How a base was quantized for training.

    Args:
        dtype: bfloat16 or float16, in which the products were computed.

    Raises:
        MissingExtra: bitsandbytes is not installed.
    """

    dtype: str
    double: bool

    def __post_init__(self) -> None:
        if find_spec("bitsandbytes") is None:
            raise MissingExtra(
                "Merging and verifying an adapter that was trained in NF4 needs the package bitsandbytes, also on a CPU.",
                where="base.quantization",
                got="bitsandbytes missing",
                next_step="pip install 'loraflow[gpu]', or bitsandbytes alone",
            )

    def quantize_and_dequantize(self, blocks: Iterable[torch.Tensor]) -> Iterator[torch.Tensor]:
        """Yield a weight's blocks with the values that training saw.

        Args:
            blocks: blocks of ROWS rows each; the last block may have fewer. All are read before the first result is yielded.
        """
        import torch
        from bitsandbytes import functional

        quantized = [
            functional.quantize_4bit(block.to(getattr(torch, self.dtype)).contiguous(), quant_type="nf4")
            for block in blocks
        ]
        constants = torch.cat([state.absmax for _, state in quantized])
        if self.double:
            mean = constants.mean()
            codes, state = functional.quantize_blockwise(constants - mean, blocksize=256)
            constants = functional.dequantize_blockwise(codes, state) + mean
        parts = constants.split([len(state.absmax) for _, state in quantized])
        for (codes, state), part in zip(quantized, parts, strict=True):
            state.absmax = part.contiguous()
            yield functional.dequantize_4bit(codes, state)

    def apply(self, model: PreTrainedModel) -> None:
        """Set a model's quantized weights to the values that training saw; their dtype does not change."""
        import torch
        from transformers.pytorch_utils import Conv1D

        for module in quantized_modules(model).values():
            with torch.no_grad():
                weight = module.weight.T if isinstance(module, Conv1D) else module.weight
                blocks = weight.split(ROWS)
                for block, value in zip(blocks, self.quantize_and_dequantize(blocks), strict=True):
                    block.copy_(value)


def quantized_modules(model: PreTrainedModel) -> dict[str, torch.nn.Linear | Conv1D]:
    """Return the modules that transformers quantizes, by name: linear ones except the head and what is tied to it."""
    import torch
    from transformers.pytorch_utils import Conv1D
    from transformers.quantizers.base import HfQuantizer
    from transformers.quantizers.quantizers_utils import should_convert_module

    in_fp32 = model._keep_in_fp32_modules
    excluded = HfQuantizer.get_modules_to_not_convert(model, None, None if in_fp32 is None else list(in_fp32))
    return {
        name: module
        for name, module in model.named_modules()
        if (type(module) is torch.nn.Linear or isinstance(module, Conv1D)) and should_convert_module(name, excluded)
    }


def quantized_names(base: Path, *, trust: bool = False) -> frozenset[str] | None:
    """Return the names of a checkpoint's tensors that training quantizes; None if any is stored transposed."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    config = AutoConfig.from_pretrained(base, trust_remote_code=trust)
    with torch.device("meta"):
        model: PreTrainedModel = AutoModelForCausalLM.from_config(config, trust_remote_code=trust)
    modules = quantized_modules(model)
    if not all(isinstance(module, torch.nn.Linear) for module in modules.values()):
        return None
    return frozenset(f"{name}.weight" for name in modules)
