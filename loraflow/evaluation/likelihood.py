"""Likelihoods of reference answers in batches: sorted by length, padded, a shared prefix computed once."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

from loraflow.base.load import has_linear_head
from loraflow.base.longrope import fixed_angles
from loraflow.data.tokens.loss_mask import Encoded
from loraflow.data.tokens.token_labels import IGNORED
from loraflow.evaluation.generation import SINGLE_PROCESS
from loraflow.evaluation.prefix_cache import SharedPrefix, groups_of, shared_prefix
from loraflow.hardware.process_group import ProcessGroup

if TYPE_CHECKING:
    from torch import Tensor
    from transformers import DynamicCache, PreTrainedModel

HEAD_ROWS = 512  # positions whose logits are in memory at a time


def answer_losses(
    model: PreTrainedModel, rows: Sequence[Encoded], pad_id: int, batch_size: int, group: ProcessGroup = SINGLE_PROCESS
) -> list[tuple[float, int]]:
    """Return (sum of -log p in nats, number of tokens) over each row's learned tokens."""
    found: list[tuple[float, int] | None] = [None] * len(rows)
    head_is_linear = has_linear_head(model)
    number = 0
    for same in groups_of(model, [len(row.ids) for row in rows], batch_size):
        with fixed_angles(model, same.switch, same.side):
            of_group = [rows[i] for i in same.rows]
            # The hidden state before the first learned token must be computed in the batch itself.
            first = min((at for row in of_group if (at := _first_learned(row)) is not None), default=0)
            most = max(len(row.ids) for row in of_group)
            prefix = shared_prefix(model, [row.ids.tolist() for row in of_group], first, most, same.side)
            for batch in same.batches():
                number += 1
                if not group.owns(number - 1):
                    continue
                losses = _batch_losses(model, [rows[i] for i in batch], pad_id, prefix, head_is_linear)
                for i, loss in zip(batch, losses, strict=True):
                    found[i] = loss
    return [loss or (0.0, 0) for loss in group.gather_results(found)]


def _first_learned(row: Encoded) -> int | None:
    at = np.flatnonzero(row.labels[1:] != IGNORED)
    return int(at[0]) if len(at) else None


def _batch_losses(
    model: PreTrainedModel, rows: Sequence[Encoded], pad_id: int, prefix: SharedPrefix | None, head_is_linear: bool
) -> list[tuple[float, int]]:
    """Return (sum of -log p, number of tokens) of each row of a batch.

    With `head_is_linear`, the logits are the product of head and hidden state, so the head can be applied to few rows.
    """
    shared = len(prefix.ids) if prefix else 0
    ids, mask, labels = _pad_learned(rows, pad_id, shared)
    ids, mask = ids.to(model.device), mask.to(model.device)
    target_mask = (labels[:, 1:] != IGNORED).to(model.device)
    target = labels[:, 1:].to(model.device)[target_mask]
    if not len(target):
        return [(0.0, 0)] * len(rows)
    cache = prefix.cache(len(rows), shared + ids.shape[1]) if prefix else None
    losses = _token_losses(model, ids, mask, cache, target_mask, target, head_is_linear)
    owner = target_mask.nonzero()[:, 0]
    parts = [losses[owner == row] for row in range(len(rows))]
    return [(float(part.sum()), len(part)) for part in parts]


def _pad_learned(rows: Sequence[Encoded], pad_id: int, shared: int) -> tuple[Tensor, Tensor, Tensor]:
    """Return ids, mask and labels, padded on the right; without the shared prefix, except in the mask."""
    import torch

    width = max(len(row.ids) for row in rows) - shared
    ids = torch.full((len(rows), width), pad_id)
    mask = torch.zeros((len(rows), shared + width), dtype=torch.long)
    labels = torch.full((len(rows), width), IGNORED)
    for number, row in enumerate(rows):
        n = len(row.ids) - shared
        ids[number, :n], mask[number, : shared + n] = torch.from_numpy(row.ids[shared:].astype("int64")), 1
        labels[number, 1:n] = torch.from_numpy(row.labels[shared + 1 :].astype("int64"))
    return ids, mask, labels


def _token_losses(
    model: PreTrainedModel,
    ids: Tensor,
    mask: Tensor,
    cache: DynamicCache | None,
    target_mask: Tensor,
    target: Tensor,
    head_is_linear: bool,
) -> Tensor:
    """Return -log p of each learned token, in double precision.

    The head is applied only where a token is learned: a vocabulary's width of logits for every position of a batch
    would be gigabytes.
    """
    import torch

    cached = {} if cache is None else {"past_key_values": cache}
    values = {"input_ids": ids, "attention_mask": mask, "use_cache": cache is not None, **cached}
    with torch.inference_mode():
        if head_is_linear:
            source = model.get_decoder()(**values).last_hidden_state[:, :-1][target_mask]
            head = model.get_output_embeddings()
        else:
            source = model(**values).logits[:, :-1][target_mask]
            head = torch.nn.Identity()
        losses = [
            torch.nn.functional.cross_entropy(
                head(source[k : k + HEAD_ROWS]).float(), target[k : k + HEAD_ROWS], reduction="none"
            )
            for k in range(0, len(source), HEAD_ROWS)
        ]
        return torch.cat(losses).double()
