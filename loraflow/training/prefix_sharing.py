"""What the documents of a micro-batch begin with, computed once: a system prompt that all chats share, most often.

The prefix and the rests of the documents lie end to end in one row; a token of a rest sees the prefix and its own rest
before it. Without dropout every document's prefix is the same numbers, so that loss and gradients are those of whole
documents, and there is no padding. The mask is dense, therefore it has to pay.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from loraflow.data.loss_mask import IGNORED
from loraflow.training.memory import Shape

WORTH = 0.95  # of the arithmetic of padded rows


@dataclass(frozen=True)
class Sharing:
    """What arithmetic costs in a layer."""

    token: int  # a token: weights of the layer's projections
    pair: int  # a token that looks at a token: numbers of queries and of what they take up

    @classmethod
    def of(cls, shape: Shape) -> Sharing:
        """Return the costs of a model."""
        return cls(shape.linear_weights // shape.layers, 2 * shape.heads * shape.head_dim)

    def prefix(self, documents: list[np.ndarray]) -> int:
        """Return how many ids the documents should share, 0 where padded rows are as cheap."""
        lengths = [len(ids) for ids in documents]
        most = min(lengths)
        head = np.stack([ids[:most] for ids in documents])
        apart = np.flatnonzero((head != head[0]).any(0))
        prefix = int(apart[0]) if len(apart) else most
        line = prefix + sum(lengths) - prefix * len(lengths)
        grid = len(lengths) * max(lengths)
        cheap = self._cost(line, line * line) < WORTH * self._cost(grid, grid * max(lengths))
        return prefix if prefix and cheap else 0

    def _cost(self, tokens: int, pairs: int) -> int:
        return tokens * self.token + pairs * self.pair


def obstacle(model: Any, longest: int) -> str:
    """Return why documents of a model cannot share what they begin with; empty if they can.

    Args:
        model: with its adapter.
        longest: tokens of the longest document.
    """
    import torch

    from loraflow.base.load import sees_all_before

    if any(isinstance(module, torch.nn.Dropout) and module.p > 0 for module in model.modules()):
        return "dropout differs from row to row"
    if getattr(model.config, "rope_parameters", None) is None or getattr(model.config, "alibi", False):
        return "positions are not told by rotary angles"
    if getattr(model.config, "_attn_implementation", None) != "sdpa":
        return "attention takes no mask of ours"
    return "" if sees_all_before(model, longest) else "the model does not see all tokens before one, and only these"


def shared(documents: list[tuple[np.ndarray, np.ndarray]], prefix: int) -> dict[str, Any]:
    """Return a prefix and the rests of documents in one row.

    Args:
        documents: ids and labels of each; all begin with the same ids.
        prefix: how many these are.

    Returns:
        input_ids and position_ids [1, tokens]; attention_mask bool [1, 1, tokens, tokens], what each token sees;
        loss_index and targets [learned], the positions that predict a learned token, and that token. A position that
        predicts one in several documents is there as often.
    """
    import torch

    rests = [len(ids) - prefix for ids, _ in documents]
    begins = prefix + np.cumsum([0, *rests])[:-1]
    ids = np.concatenate([documents[0][0][:prefix], *(ids[prefix:] for ids, _ in documents)]).astype(np.int64)
    positions = np.concatenate([np.arange(prefix), *(np.arange(prefix, prefix + rest) for rest in rests)])
    owner = np.repeat(np.arange(len(documents) + 1), [prefix, *rests])
    index, targets = [], []
    for begin, (_, labels) in zip(begins, documents, strict=True):
        learned = np.flatnonzero(labels[1:] != IGNORED)
        index.append(np.where(learned < prefix, learned, learned - prefix + begin))
        targets.append(labels[1:][learned].astype(np.int64))
    of, at = torch.from_numpy(owner), torch.arange(len(ids))
    sees = (at[:, None] >= at) & ((of[:, None] == of) | (of == 0))
    return {
        "input_ids": torch.from_numpy(ids)[None],
        "position_ids": torch.from_numpy(positions)[None],
        "attention_mask": sees[None, None],
        "loss_index": torch.from_numpy(np.concatenate(index)),
        "targets": torch.from_numpy(np.concatenate(targets)),
    }
