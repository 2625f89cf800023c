"""trl's SFTTrainer, given rows in our order."""

from __future__ import annotations

from typing import Any

import numpy as np
from torch.utils.data import SequentialSampler
from trl import SFTTrainer

from loraflow.training.batches import Collator


class OrderedTrainer(SFTTrainer):
    """SFTTrainer over row numbers: the collator fetches the tokens, the sampler keeps the order that it is given."""

    def __init__(self, *, train_rows: np.ndarray, validation_rows: int, collator: Collator, **options: Any):
        from datasets import Dataset

        validation = None
        if validation_rows:
            validation = Dataset.from_dict({"row": list(range(validation_rows)), "validation": [True] * validation_rows})
        super().__init__(
            train_dataset=Dataset.from_dict({"row": train_rows.tolist()}),
            eval_dataset=validation,
            data_collator=collator,
            **options,
        )

    def _get_train_sampler(self, train_dataset: Any = None) -> SequentialSampler:
        return SequentialSampler(train_dataset if train_dataset is not None else self.train_dataset)
