"""The model and the rows that all cases share, and the FLOPs of a token."""

from __future__ import annotations

import json
import math
import shutil
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from gpu_training.cases import LENGTH, PHI3, TINY, VOCABULARY, WARM_UP, Case, Shape

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedConfig


def base_folder(work: Path, case: Case) -> Path:
    """Return the folder of a case's model, which is built first where it is missing."""
    folder = work / f"base-{case.shape.name}"
    if not folder.exists():
        build_base(folder, case.shape)
    return folder


def build_base(folder: Path, shape: Shape = PHI3) -> None:
    """Write a model of random weights: Phi-3 mini's layers, or Llama's. The tokenizer is a small one."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig

    from tests.conftest import build_tokenizer

    folder.mkdir(parents=True)
    build_tokenizer(folder)
    eos = AutoTokenizer.from_pretrained(folder).eos_token_id
    torch.manual_seed(0)
    with torch.device("cpu" if TINY else "cuda"):
        model = AutoModelForCausalLM.from_config(model_config(shape, eos), dtype=torch.bfloat16)
    with torch.no_grad():  # like a trained network: small updates in each layer, embeddings of unit size
        for layer in model.model.layers:
            layer.self_attn.o_proj.weight.mul_(64**-0.5)
            layer.mlp.down_proj.weight.mul_(64**-0.5)
        if not shape.tied and shape.config is None:
            model.model.embed_tokens.weight.mul_(25.0)
    model.generation_config = GenerationConfig(eos_token_id=eos, pad_token_id=0)
    model.save_pretrained(folder)


def model_config(shape: Shape, eos: int, split: bool = False) -> PreTrainedConfig:
    """Return the configuration of a shape. `split` is Phi-3 with split projections, which is a Mistral."""
    import transformers
    from transformers import LlamaConfig, MistralConfig, Phi3Config

    sizes = {
        "vocab_size": shape.vocabulary,
        "hidden_size": shape.hidden,
        "intermediate_size": shape.inner,
        "num_hidden_layers": shape.layers,
        "num_attention_heads": shape.heads,
        "num_key_value_heads": shape.kv_heads,
        "rms_norm_eps": 1e-5,
        "bos_token_id": 1,
        "eos_token_id": eos,
        "pad_token_id": 0,
        "tie_word_embeddings": shape.tied,
        "max_position_embeddings": 4096,
    }
    if shape.head_dim is not None:
        sizes["head_dim"] = shape.head_dim
    if shape.config is not None:
        return getattr(transformers, shape.config)(**sizes, **dict(shape.options))
    if shape.targets != PHI3.targets:
        return LlamaConfig(**sizes)
    if split:
        return MistralConfig(sliding_window=2047, **sizes)
    return Phi3Config(original_max_position_embeddings=4096, sliding_window=2047, **sizes)


def split_base(work: Path, case: Case) -> Path:
    """Return the folder of a case's model with split projections: the same function under other names."""
    from safetensors.torch import load_file, save_file
    from transformers import AutoConfig

    source = base_folder(work, case)
    if case.shape.targets != PHI3.targets:
        return source
    folder = work / f"split-{case.shape.name}"
    if folder.exists():
        return folder
    shutil.copytree(source, folder, ignore=shutil.ignore_patterns("*.safetensors*"))
    tensors = {}
    for file in sorted(source.glob("*.safetensors")):
        for name, tensor in load_file(file).items():
            for part, value in split_tensor(name, tensor, case.shape).items():
                tensors[part] = value.contiguous()
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    config = model_config(case.shape, AutoConfig.from_pretrained(source).eos_token_id, split=True)
    config.architectures, config.dtype = ["MistralForCausalLM"], "bfloat16"
    config.save_pretrained(folder)
    return folder


def split_tensor(name: str, tensor: torch.Tensor, shape: Shape) -> dict[str, torch.Tensor]:
    """Return the tensors of a fused projection by name."""
    if "qkv_proj" in name:
        width = shape.hidden // shape.heads
        sizes, parts = (
            [width * n for n in (shape.heads, shape.kv_heads, shape.kv_heads)],
            ("q_proj", "k_proj", "v_proj"),
        )
        return {name.replace("qkv_proj", part): t for part, t in zip(parts, tensor.split(sizes), strict=True)}
    if "gate_up_proj" in name:
        parts = ("gate_proj", "up_proj")
        return {name.replace("gate_up_proj", part): t for part, t in zip(parts, tensor.chunk(2), strict=True)}
    return {name: tensor}


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
    from loraflow.data.tokens.packing import best_fit_decreasing
    from loraflow.data.tokens.token_files import TokenBatch, open_shard, write_packing

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


def flops_per_token(shape: Shape, lengths: np.ndarray, target_share: float) -> float:
    """Return the FLOPs of frozen products (forward and activation gradients), head at target tokens, LoRA and attention."""
    hidden, inner = shape.hidden, shape.inner
    attended = shape.heads * shape.head_width
    qkv = attended + 2 * shape.head_width * shape.kv_heads
    frozen = shape.layers * (hidden * qkv + attended * hidden + hidden * 2 * inner + inner * hidden)
    widths = {"down_proj": inner, "o_proj": attended}
    inputs = sum(widths.get(name, hidden) for name in shape.targets)
    lora = shape.layers * 16 * (inputs + qkv + hidden + 2 * inner + hidden)
    context = (lengths * (lengths + 1) / 2).sum() / lengths.sum()
    return 4 * frozen + 4 * shape.vocabulary * hidden * target_share + 6 * lora + shape.layers * 12 * attended * context


def step_tokens(work: Path, case: Case) -> np.ndarray:
    """Return the number of tokens in each step of a case."""
    from loraflow.data.tokens.token_files import TokenRows
    from loraflow.training.setup import row_order

    rows = TokenRows(work / "tokens" / "train", work / "tokens" / "packing.parquet")
    order = row_order(len(rows), (WARM_UP + case.timed) * case.rows, 0)
    return rows.tokens[order].reshape(-1, case.rows).sum(1)
