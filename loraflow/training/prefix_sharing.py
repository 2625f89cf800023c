"""Compute the common prefix of a micro-batch's documents only once. Most often it is a system prompt.

The prefix and the rest of each document are concatenated in one row. A token of a rest attends to the prefix and to the
earlier tokens of its own rest. Without dropout, the prefix has the same activations in every document, so loss and gradients
are the same as without sharing, and there is no padding. The mask is dense, so sharing is used only if it saves arithmetic.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import torch
from numpy.typing import NDArray

from loraflow.data.common_prefix import common_prefix_length
from loraflow.data.token_labels import IGNORED
from loraflow.data.token_rows import Document
from loraflow.training.collation import MicroBatch, Weights, has_weights, learned_weights
from loraflow.training.memory import ModelShape

if TYPE_CHECKING:
    from transformers import PreTrainedModel

MAX_COST = 0.95  # as a share of the arithmetic of padded rows


@dataclass(frozen=True)
class PrefixSharing:
    """The cost of one layer of a model, to decide between sharing and padding."""

    per_token: int  # weights of the layer's projections
    per_pair: int  # for a token that attends to a token: sizes of the queries and of the values

    @classmethod
    def of(cls, shape: ModelShape) -> PrefixSharing:
        """Return the costs of a model."""
        return cls(shape.linear_weights // shape.layers, 2 * shape.heads * shape.head_dim)

    def shared_length(self, documents: Sequence[NDArray[np.integer]]) -> int:
        """Return the length of the prefix to share; 0 if padded rows cost about the same."""
        lengths = [len(ids) for ids in documents]
        prefix = common_prefix_length(documents)
        line = prefix + sum(lengths) - prefix * len(lengths)
        grid = len(lengths) * max(lengths)
        is_cheaper = self._cost(line, line * line) < MAX_COST * self._cost(grid, grid * max(lengths))
        return prefix if prefix and is_cheaper else 0

    def _cost(self, tokens: int, pairs: int) -> int:
        return tokens * self.per_token + pairs * self.per_pair


def obstacle(model: PreTrainedModel, longest: int) -> str:
    """Return why a model cannot share the prefix of its documents; empty if it can.

    Args:
        model: with its adapter.
        longest: tokens of the longest document.
    """
    from loraflow.base.load import sees_all_before

    if any(isinstance(module, torch.nn.Dropout) and module.p > 0 for module in model.modules()):
        return "dropout differs from row to row"
    if getattr(model.config, "rope_parameters", None) is None or getattr(model.config, "alibi", False):
        return "positions are not given by rotary embeddings"
    if getattr(model.config, "_attn_implementation", None) != "sdpa":
        return "the attention kernel takes no custom mask"
    return "" if sees_all_before(model, longest) else "a token does not see exactly the tokens before it"


def share_prefix(documents: Sequence[Document], prefix: int, weights: Weights | None = None) -> MicroBatch:
    """Return the common prefix of documents, and the rest of each, in one row.

    The attention mask is bool [1, 1, tokens, tokens]: which tokens each token attends to. A position that predicts a
    supervised token in several documents is in `loss_index` once for each of them.

    Args:
        documents: ids and labels of each; all begin with the same ids.
        prefix: the number of common ids.
        weights: the weights of the documents' tokens, one row for each document.
    """
    rests = [len(ids) - prefix for ids, _ in documents]
    begins = prefix + np.cumsum([0, *rests])[:-1]
    ids = np.concatenate([documents[0][0][:prefix], *(ids[prefix:] for ids, _ in documents)]).astype(np.int64)
    positions = np.concatenate([np.arange(prefix), *(np.arange(prefix, prefix + rest) for rest in rests)])
    owner = torch.from_numpy(np.repeat(np.arange(len(documents) + 1), [prefix, *rests]))
    index, targets = [], []
    for begin, (_, labels) in zip(begins, documents, strict=True):
        learned = np.flatnonzero(labels[1:] != IGNORED)
        index.append(np.where(learned < prefix, learned, learned - prefix + begin))
        targets.append(labels[1:][learned].astype(np.int64))
    position = torch.arange(len(ids))
    visible = (position[:, None] >= position) & ((owner[:, None] == owner) | (owner == 0))
    batch: MicroBatch = {
        "input_ids": torch.from_numpy(ids)[None],
        "position_ids": torch.from_numpy(positions)[None],
        "attention_mask": visible[None, None],
        "loss_index": torch.from_numpy(np.concatenate(index)),
        "targets": torch.from_numpy(np.concatenate(targets)),
    }
    if has_weights(weights):
        batch["loss_weights"] = learned_weights([[document] for document in documents], weights)
    return batch
