"""Choose the settings of a new recipe by the size of the dataset, so that a small one learns something visible."""

from __future__ import annotations

import math
from dataclasses import dataclass

ENOUGH_STEPS = 100  # optimizer steps after which a loss curve shows a trend; fewer need a smaller batch or more epochs
FEW_STEPS = 60  # what epochs are added for, up to MAX_EPOCHS
MAX_EPOCHS = 10
FEW_ROWS = 2000
SMALL_SET = 200  # below, a tenth is too few rows to score


@dataclass(frozen=True)
class SizeSettings:
    """The settings, and why."""

    heldout_fraction: float
    epochs: int
    accumulation: int  # batches of 4 rows per optimizer step
    packing: bool
    warmup_steps: float
    logging_steps: int
    steps: int  # estimated optimizer steps

    @property
    def batch(self) -> int:
        """Rows per optimizer step."""
        return 4 * self.accumulation

    def lines(self, rows: int) -> list[str]:
        """Return the recipe's lines that differ from those for many rows, with their reasons."""
        found = []
        if self.heldout_fraction != choose_heldout_fraction(FEW_ROWS):
            found.append(
                f"heldout_fraction: {self.heldout_fraction}   a tenth of {rows} rows is too few to compare models"
            )
        if self.accumulation != 4:
            found.append(f"gradient_accumulation_steps: {self.accumulation}   {self.batch} rows a step, for more steps")
        found.append(f"num_train_epochs: {self.epochs}   about {self.steps} optimizer steps in all")
        if self.warmup_steps == 0:
            found.append("warmup_steps: 0   a warm-up would spend the first of so few steps at rate 0")
        if self.logging_steps < 10:
            found.append(f"logging_steps: {self.logging_steps}   few steps: log their loss more often")
        return found


def choose_heldout_fraction(rows: int) -> float:
    """Return the share of rows to hold out."""
    return 0.2 if rows < SMALL_SET else 0.1


def choose_settings(
    rows: int, heldout_fraction: float, tokens: int, max_length: int, *, may_pack: bool
) -> SizeSettings:
    """Choose settings for a dataset.

    Args:
        rows: the number of chats, held-out ones included.
        heldout_fraction: the share of rows to hold out; 0 if whole files are held out.
        tokens: the number of tokens of all chats, roughly.
        max_length: tokens of a packed row.
        may_pack: whether several chats may share a row.
    """
    train = max(1, round(rows * (1 - heldout_fraction)))
    epochs = 3 if rows < FEW_ROWS else 1
    packed = max(1, math.ceil(tokens * (1 - heldout_fraction) / max_length))
    packing = may_pack and packed * epochs / 16 >= ENOUGH_STEPS
    per_epoch = packed if packing else train
    accumulation = 4
    while accumulation > 1 and per_epoch * epochs / (4 * accumulation) < ENOUGH_STEPS:
        accumulation //= 2
    batch = 4 * accumulation
    epochs = max(epochs, min(MAX_EPOCHS, math.ceil(FEW_STEPS / math.ceil(per_epoch / batch))))
    steps = math.ceil(per_epoch / batch) * epochs
    return SizeSettings(
        heldout_fraction=heldout_fraction,
        epochs=epochs,
        accumulation=accumulation,
        packing=packing,
        warmup_steps=0.1 if steps >= ENOUGH_STEPS else 0,
        logging_steps=10 if steps >= ENOUGH_STEPS else max(1, steps // 20),
        steps=steps,
    )
