"""The model and the rows that all cases share, and the FLOPs of a token."""

from __future__ import annotations

import json
import math
from pathlib import Path

import numpy as np

from gpu_training.cases import LENGTH, SHAPE, TINY, VOCABULARY, WARM_UP, Case


def build_base(folder: Path) -> None:
    """Write a model of random weights in Phi-3 mini's shape, with a small tokenizer."""
    import torch
    from transformers import AutoTokenizer, GenerationConfig, Phi3Config, Phi3ForCausalLM

    from tests.conftest import build_tokenizer

    folder.mkdir(parents=True)
    build_tokenizer(folder)
    eos = AutoTokenizer.from_pretrained(folder).eos_token_id
    config = Phi3Config(
        vocab_size=VOCABULARY, num_key_value_heads=SHAPE["num_attention_heads"], max_position_embeddings=4096,
        original_max_position_embeddings=4096, sliding_window=2047, rms_norm_eps=1e-5, bos_token_id=1, eos_token_id=eos,
        pad_token_id=0, tie_word_embeddings=False, **SHAPE,
    )  # fmt: skip
    torch.manual_seed(0)
    with torch.device("cpu" if TINY else "cuda"):
        model = Phi3ForCausalLM._from_config(config, dtype=torch.bfloat16)
    with torch.no_grad():  # like a trained network: small updates in each layer, embeddings of unit size
        for layer in model.model.layers:
            layer.self_attn.o_proj.weight.mul_(64**-0.5)
            layer.mlp.down_proj.weight.mul_(64**-0.5)
        model.model.embed_tokens.weight.mul_(25.0)
    model.generation_config = GenerationConfig(eos_token_id=eos, pad_token_id=0)
    model.save_pretrained(folder)


def documents(count: int, seed: int = 1234) -> list[tuple[np.ndarray, np.ndarray]]:
    """Return (ids, labels) of random documents: lognormal lengths, half of the tokens with a label."""
    generator = np.random.default_rng(seed)
    median = 40 if TINY else 350
    lengths = np.clip(np.exp(generator.normal(math.log(median), 0.8, count)), 16, LENGTH - 1).astype(int)
    rows = []
    for length, masked in zip(lengths, generator.uniform(0.3, 0.7, count), strict=True):
        ids = generator.integers(3, VOCABULARY - 64 if not TINY else 500, length).astype(np.int32)
        labels = ids.copy()
        labels[: max(1, int(length * masked))] = -100
        rows.append((ids, labels))
    return rows


def build_tokens(folder: Path, rows: int) -> None:
    """Write documents as the tokenize stage does."""
    from loraflow.data.packing import best_fit_decreasing
    from loraflow.data.token_files import TokenBatch, open_shard, write_packing

    docs = documents(int(rows * LENGTH / (50 if TINY else 400)))
    lengths = np.array([len(ids) for ids, _ in docs], np.int32)
    folder.mkdir(parents=True, exist_ok=True)
    with open_shard(folder / "train") as append:
        append(
            TokenBatch(
                np.concatenate([ids for ids, _ in docs]), np.concatenate([labels for _, labels in docs]), lengths
            )
        )
    write_packing(folder / "packing.parquet", best_fit_decreasing(lengths, LENGTH))
    (folder / "report.json").write_text(json.dumps({"figures": {"train_tokens": int(lengths.sum())}}))


def flops_per_token(lengths: np.ndarray, target_share: float) -> float:
    """Return the FLOPs of frozen products (forward and activation gradients), head at target tokens, LoRA and attention."""
    hidden, inner, layers = SHAPE["hidden_size"], SHAPE["intermediate_size"], SHAPE["num_hidden_layers"]
    frozen = layers * (hidden * 3 * hidden + hidden * hidden + hidden * 2 * inner + inner * hidden)
    lora = layers * 16 * ((hidden + 3 * hidden) + 2 * hidden + (hidden + 2 * inner) + (inner + hidden))
    context = (lengths * (lengths + 1) / 2).sum() / lengths.sum()
    return 4 * frozen + 4 * VOCABULARY * hidden * target_share + 6 * lora + layers * 12 * hidden * context


def step_tokens(work: Path, case: Case) -> np.ndarray:
    """Return the number of tokens in each step of a case."""
    from loraflow.data.token_rows import TokenRows
    from loraflow.training.schedule import row_order

    rows = TokenRows(work / "tokens" / "train", work / "tokens" / "packing.parquet")
    order = row_order(len(rows), (WARM_UP + case.timed) * case.rows, 0)
    return rows.tokens[order].reshape(-1, case.rows).sum(1)
