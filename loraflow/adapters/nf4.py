"""What QLoRA trains on: the base after a way through NF4 and back, as bitsandbytes packs it. It runs on a CPU too.

Source: https://arxiv.org/abs/2305.14314. Blocks of 64 weights share a constant; of the constants, in turn, 256 share one.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from loraflow.failures import MissingExtra

ROWS = 256  # packed at a time: their weights are a whole number of blocks, whatever the width


@dataclass(frozen=True)
class Nf4:
    """How a base was packed for training: `dtype` (bfloat16 or float16) of its products, whether constants were, too."""

    dtype: str
    double: bool

    def __post_init__(self) -> None:
        if find_spec("bitsandbytes") is None:
            raise MissingExtra(
                "What was trained in NF4 is merged and verified with the package bitsandbytes; a CPU will do.",
                where="base.quantization",
                got="bitsandbytes missing",
                next_step="pip install 'loraflow[gpu]', or bitsandbytes alone",
            )

    def there_and_back(self, blocks: Iterable[Any]) -> Iterator[Any]:
        """Pack a weight and yield it again as training sees it.

        Args:
            blocks: of ROWS rows each, the last one may have fewer; all are read before the first comes out.
        """
        import torch
        from bitsandbytes import functional

        packed = [
            functional.quantize_4bit(block.to(getattr(torch, self.dtype)).contiguous(), quant_type="nf4")
            for block in blocks
        ]
        constants = torch.cat([state.absmax for _, state in packed])
        if self.double:
            mean = constants.mean()
            codes, state = functional.quantize_blockwise(constants - mean, blocksize=256)
            constants = functional.dequantize_blockwise(codes, state) + mean
        parts = constants.split([len(state.absmax) for _, state in packed])
        for (codes, state), part in zip(packed, parts, strict=True):
            state.absmax = part.contiguous()
            yield functional.dequantize_4bit(codes, state)

    def apply(self, model: Any) -> None:
        """Give a model's packed weights the values that training saw; they keep their own dtype."""
        import torch
        from transformers.pytorch_utils import Conv1D

        for module in packed_modules(model).values():
            with torch.no_grad():
                weight = module.weight.T if isinstance(module, Conv1D) else module.weight
                blocks = weight.split(ROWS)
                for block, value in zip(blocks, self.there_and_back(blocks), strict=True):
                    block.copy_(value)


def packed_modules(model: Any) -> dict[str, Any]:
    """Return the modules that transformers packs, by name: linear ones other than the head and what is tied to it."""
    import torch
    from transformers.pytorch_utils import Conv1D
    from transformers.quantizers.base import HfQuantizer
    from transformers.quantizers.quantizers_utils import should_convert_module

    kept = HfQuantizer.get_modules_to_not_convert(model, None, model._keep_in_fp32_modules)
    return {
        name: module
        for name, module in model.named_modules()
        if (type(module) is torch.nn.Linear or isinstance(module, Conv1D)) and should_convert_module(name, kept)
    }


def packed_names(base: Path, *, trust: bool = False) -> frozenset[str] | None:
    """Return the names of a checkpoint's tensors that training packs; None where one is stored the other way round."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    config = AutoConfig.from_pretrained(base, trust_remote_code=trust)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config, trust_remote_code=trust)
    found = packed_modules(model)
    if not all(isinstance(module, torch.nn.Linear) for module in found.values()):
        return None
    return frozenset(f"{name}.weight" for name in found)
