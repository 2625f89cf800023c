"""The optimizer steps of several trainings at once: in each micro-batch, the rows of every training, one after another.

Each training has the rows that it would have alone, in the same steps, with the same dropout keys. All parts of a
micro-batch have equally many tokens, so that a layer can divide it by its number of parts.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import cast

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from loraflow.data.tokens.token_files import Document
from loraflow.training.batches import Concatenated, StepDataset
from loraflow.training.collation import MicroBatch, concatenated


@dataclass(frozen=True)
class GroupMicroBatch:
    """A micro-batch of all trainings."""

    batch: MicroBatch
    counts: tuple[int, ...]  # supervised tokens of each training


@dataclass(frozen=True)
class GroupStep:
    """An optimizer step of all trainings."""

    micro_batches: tuple[GroupMicroBatch, ...]
    loss_weights: Tensor  # [trainings]: the sum of the weights of the supervised tokens of each
    tokens: int  # tokens of all trainings, without padding


class GroupSteps:
    """The optimizer steps of a group.

    Args:
        members: the steps of each training, with one layout.
    """

    def __init__(self, members: Sequence[StepDataset]):
        self.members, self.layout = members, members[0].layout
        # Length of a part → largest number of entries of its `cu_seq_lens_q`, over all steps.
        self.entries: dict[int, int] = {}
        if isinstance(self.layout, Concatenated):
            for step in range(len(self)):
                for parts, length in self._parts(step, self.layout):
                    needed = max(
                        self._documents(member, step, part, length, self.layout)
                        for member, part in zip(members, parts, strict=True)
                    )
                    self.entries[length] = max(self.entries.get(length, 0), needed + 1)

    def __len__(self) -> int:
        return len(self.members[0])

    def __iter__(self) -> Iterator[GroupStep]:
        return (self[step] for step in range(len(self)))

    def __getitem__(self, step: int) -> GroupStep:
        """Return a step."""
        if isinstance(self.layout, Concatenated):
            found = [self._concatenated(step, parts, length) for parts, length in self._parts(step, self.layout)]
        else:
            assignments = [member.assignment(step) for member in self.members]
            found = [self._grid(step, parts) for parts in zip(*assignments, strict=True)]
        chosen = [member.steps[step] for member in self.members]
        weights = [member.loss_weight(step) or 1.0 for member in self.members]
        tokens = sum(int(member.rows.tokens[rows].sum()) for member, rows in zip(self.members, chosen, strict=True))
        return GroupStep(tuple(found), torch.tensor(weights, dtype=torch.float32), tokens)

    def _parts(self, step: int, layout: Concatenated) -> list[tuple[list[list[int]], int]]:
        """Return for each micro-batch the rows of each training in it, and the length of its parts.

        A training that needs fewer micro-batches than another has parts without rows.
        """
        assignments = [member.assignment(step) for member in self.members]
        count = max(len(assignment) for assignment in assignments)
        found = []
        for number in range(count):
            parts = [assignment[number] if number < len(assignment) else [] for assignment in assignments]
            used = [
                int(member.rows.tokens[member.steps[step][part]].sum()) if part else 0
                for member, part in zip(self.members, parts, strict=True)
            ]
            found.append((parts, layout.fit(max(used))))
        return found

    @staticmethod
    def _documents(member: StepDataset, step: int, part: list[int], length: int, layout: Concatenated) -> int:
        """Return the number of documents of a training's part, with those of the padding behind them."""
        chosen = member.steps[step][part] if part else np.empty(0, np.int64)
        used = int(member.rows.tokens[chosen].sum())
        return int(np.diff(member.rows.offsets)[chosen].sum()) + -(-(length - used) // layout.longest)

    def _concatenated(self, step: int, parts: Sequence[list[int]], length: int) -> GroupMicroBatch:
        assert isinstance(self.layout, Concatenated)
        batches, keys = [], []
        for member, part in zip(self.members, parts, strict=True):
            rows, weights, token_keys = _rows(member, step, part)
            batches.append(
                concatenated(rows, length, self.entries[length], self.layout.longest, member.pad_id, weights)
            )
            flat = np.zeros(length, np.int32)
            flat[: sum(map(len, token_keys))] = np.concatenate([np.empty(0, np.int32), *token_keys])
            keys.append(flat)
        borders = torch.cat([batch["cu_seq_lens_q"] + k * length for k, batch in enumerate(batches)])
        merged: MicroBatch = {
            "input_ids": torch.cat([batch["input_ids"] for batch in batches], 1),
            "position_ids": torch.cat([batch["position_ids"] for batch in batches], 1),
            "cu_seq_lens_q": borders,
            "cu_seq_lens_k": borders,
            "max_length_q": self.layout.longest,
            "max_length_k": self.layout.longest,
            "loss_index": torch.cat([batch["loss_index"] + k * length for k, batch in enumerate(batches)]),
            "targets": torch.cat([batch["targets"] for batch in batches]),
        }
        if any("loss_weights" in batch for batch in batches):
            merged["loss_weights"] = torch.cat(
                [batch.get("loss_weights", torch.ones(len(batch["targets"]))) for batch in batches]
            )
        if any(member.dropout for member in self.members):
            merged["token_keys"] = torch.from_numpy(np.concatenate(keys))
        return GroupMicroBatch(merged, tuple(len(batch["targets"]) for batch in batches))

    def _grid(self, step: int, parts: Sequence[list[int]]) -> GroupMicroBatch:
        found = [_rows(member, step, part) for member, part in zip(self.members, parts, strict=True)]
        rows = [row for part, _, _ in found for row in part]
        weights = [of_row for _, part, _ in found for of_row in part]
        keys = [of_row for _, _, part in found for of_row in part]
        drops = any(member.dropout for member in self.members)
        batch = self.members[0].grid(rows, weights, keys if drops else None)
        part_size = batch["input_ids"].numel() // len(parts)
        counts = torch.bincount(batch["loss_index"] // part_size, minlength=len(parts))
        return GroupMicroBatch(batch, tuple(cast("list[int]", counts.tolist())))


def _rows(
    member: StepDataset, step: int, part: Sequence[int]
) -> tuple[list[list[Document]], list[list[NDArray[np.float32]] | None], list[NDArray[np.int32]]]:
    """Return the documents of a training's rows, and the loss weights and dropout keys of their tokens."""
    chosen = member.steps[step]
    rows = [int(chosen[index]) for index in part]
    return (
        [member.rows[row] for row in rows],
        [member.rows.weights(row) for row in rows],
        [member.token_keys(step, index, int(member.rows.tokens[chosen[index]])) for index in part],
    )
