"""NEFTune: noise on the embeddings of the training tokens. Jain et al. 2023, https://arxiv.org/abs/2310.05914

Each number of a token's embedding gets noise that is uniform in ±alpha / sqrt(L · d), for a document of L tokens and
embeddings of width d. transformers takes L from the batch: there, noise becomes weaker where rows are padded or several
documents are in one row, and another size of the micro-batch gets other noise. Here, with both engines, L is the document's
own length, as in the paper, and the noise is a function of (seed, step, token, feature), as dropout's masks are.
"""

from __future__ import annotations

import zlib

import torch
from torch import Tensor

from loraflow.training.lora_kernels import hash_features

_KEY = zlib.crc32(b"neftune") - 2**31  # as a module's name gives dropout a key
_STEPS = 2**24  # different values of the noise: what a float32 can tell apart


def add_noise(embedded: Tensor, token_keys: Tensor, document_lengths: Tensor, alpha: float) -> Tensor:
    """Return embeddings with noise.

    Args:
        embedded: of the tokens [rows, tokens, width].
        token_keys: of each token [rows · tokens], int32; see `token_keys`.
        document_lengths: the number of tokens of each token's document [rows · tokens]; 0 for padding, which has no noise.
        alpha: `training_config.neftune_noise_alpha`.
    """
    width = embedded.shape[-1]
    key = torch.tensor(_KEY, dtype=torch.int32, device=embedded.device)
    values = (hash_features(token_keys, key, width) & (_STEPS - 1)).float()
    uniform = (values + 0.5) * (2 / _STEPS) - 1
    largest = torch.where(document_lengths > 0, alpha * (document_lengths.clamp(min=1) * width).float().rsqrt(), 0.0)
    return embedded + (uniform * largest[:, None]).view_as(embedded).to(embedded.dtype)
