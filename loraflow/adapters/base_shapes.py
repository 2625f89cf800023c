"""What an adapter must fit: the shapes of a base's weights, without the weights."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from loraflow.adapters.fused_projections import AttentionHeads
from loraflow.base.meta import model_without_weights


@dataclass(frozen=True)
class BaseShapes:
    """Shapes of a base's parameters, and which of its modules are not plain linear layers."""

    shapes: Mapping[str, tuple[int, ...]]
    heads: AttentionHeads
    embeddings: frozenset[str]  # names of modules
    transposed: frozenset[str]  # names of modules whose weight is (in, out), as GPT-2's

    @classmethod
    def read(cls, base: Path) -> BaseShapes:
        """Build a base's model without its weights.

        Raises:
            BadModel: the folder has no config of a causal model that transformers knows.
        """
        from torch import nn
        from transformers.pytorch_utils import Conv1D

        model = model_without_weights(base)
        modules = dict(model.named_modules())
        return cls(
            {name: tuple(parameter.shape) for name, parameter in model.named_parameters(remove_duplicate=False)},
            AttentionHeads.of(model.config.get_text_config()),
            frozenset(name for name, module in modules.items() if isinstance(module, nn.Embedding)),
            frozenset(name for name, module in modules.items() if isinstance(module, Conv1D)),
        )

    def weight_shape(self, module: str) -> tuple[int, ...]:
        """Return the shape of a module's weight as (outputs, inputs); an embedding's is (width, vocabulary)."""
        shape = self.shapes[f"{module}.weight"]
        return shape[::-1] if module in self.transposed or module in self.embeddings else shape
