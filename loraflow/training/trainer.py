"""trl's SFTTrainer, given rows in our order, and with a loss that computes only what is learned.

`runtime.engine: stock` leaves trl's own loss in place; a test keeps the two equal.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch.nn.functional import cross_entropy
from torch.utils.checkpoint import checkpoint
from torch.utils.data import SequentialSampler
from trl import SFTTrainer

from loraflow.base.load import head_is_plain
from loraflow.data.mask import IGNORED
from loraflow.training.batches import Collator

HEAD_ROWS = 1024  # learned positions whose logits are in memory at a time


class OrderedTrainer(SFTTrainer):
    """SFTTrainer over row numbers: the collator fetches the tokens, the sampler keeps the order that it is given."""

    def __init__(
        self,
        *,
        train_rows: np.ndarray,
        validation_rows: int,
        collator: Collator,
        engine: str = "fast",
        loraplus: tuple[float, float] | None = None,
        **options: Any,
    ):
        from datasets import Dataset

        validation = None
        if validation_rows:
            validation = Dataset.from_dict(
                {"row": list(range(validation_rows)), "validation": [True] * validation_rows}
            )
        super().__init__(
            train_dataset=Dataset.from_dict({"row": train_rows.tolist()}),
            eval_dataset=validation,
            data_collator=collator,
            **options,
        )
        # A model whose logits are more than the head's product, or that has a router's loss beside, keeps trl's.
        plain = head_is_plain(self.model.get_base_model()) and not self.aux_loss_enabled
        self.engine = engine if plain else "stock"
        self.loraplus = loraplus

    def create_optimizer(self, model: Any = None) -> torch.optim.Optimizer:
        """Return the optimizer, with LoRA+'s learning rates where the recipe has them."""
        fresh = self.optimizer is None
        optimizer = super().create_optimizer(model)
        if fresh and self.loraplus is not None:
            from loraflow.adapters.variants import loraplus

            loraplus(optimizer, self.model if model is None else model, *self.loraplus)
        return optimizer

    def _get_train_sampler(self, train_dataset: Any = None) -> SequentialSampler:
        return SequentialSampler(train_dataset if train_dataset is not None else self.train_dataset)

    def compute_loss(
        self, model: Any, inputs: dict[str, Any], return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        """Return the mean -log p over learned tokens; the head is applied to their positions alone.

        trl's loss computes the entropy and the best token of each position too, which on a CPU takes half of a step.
        """
        if self.engine == "stock" or return_outputs:
            return super().compute_loss(model, inputs, return_outputs, num_items_in_batch)
        labels = inputs["labels"][:, 1:]
        learned = labels != IGNORED
        base = self.accelerator.unwrap_model(model).get_base_model()
        with self.accelerator.autocast():
            hidden = base.get_decoder()(
                **{key: value for key, value in inputs.items() if key != "labels"}, use_cache=False
            ).last_hidden_state[:, :-1][learned]
            total = head_loss(base.get_output_embeddings(), hidden, labels[learned])
        if self.model.training:
            self._total_train_tokens += int(inputs["input_ids"].numel())
        self._metrics["train" if self.model.training else "eval"]["num_tokens"] = [self._total_train_tokens]
        count = learned.sum() if num_items_in_batch is None else num_items_in_batch
        loss = total / torch.as_tensor(count, device=total.device).clamp(min=1)
        if self.args.average_tokens_across_devices and num_items_in_batch is not None:
            loss = loss * self.accelerator.num_processes
        return loss


def head_loss(head: Any, hidden: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
    """Return the sum of -log p of target [n] given hidden states [n, width], in fp32, some rows of logits at a time."""

    def part(states: torch.Tensor, wanted: torch.Tensor) -> torch.Tensor:
        return cross_entropy(head(states).float(), wanted, reduction="sum")

    if len(hidden) <= HEAD_ROWS:
        return part(hidden, target)
    # A vocabulary's width of logits for every learned token would be gigabytes: compute them twice instead.
    parts = [
        checkpoint(part, hidden[i : i + HEAD_ROWS], target[i : i + HEAD_ROWS], use_reentrant=False)
        for i in range(0, len(hidden), HEAD_ROWS)
    ]
    return torch.stack(parts).sum()
