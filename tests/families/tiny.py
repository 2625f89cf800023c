"""Tiny random models of real architectures: each has the layer types and the options that its family is known for."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel

COMMON: dict[str, Any] = {
    "vocab_size": 300, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "head_dim": 16, "max_position_embeddings": 512, "pad_token_id": 0, "bos_token_id": 1,
    "eos_token_id": 2,
}  # fmt: skip
SLIDING = {"sliding_window": 8, "layer_types": ["sliding_attention", "full_attention"]}
LINEAR = {
    "layer_types": ["linear_attention", "full_attention"], "linear_num_value_heads": 4, "linear_num_key_heads": 2,
    "linear_key_head_dim": 16, "linear_value_head_dim": 16,
}  # fmt: skip
MAMBA = {"mamba_n_heads": 8, "mamba_d_head": 16, "mamba_d_state": 16}
EXPERTS = {"num_experts": 4, "num_local_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32}
OPTIONS: dict[str, dict[str, Any]] = {
    "cohere2": SLIDING,
    "exaone4": SLIDING,
    "gemma2": {"sliding_window": 8},
    "gemma3_text": SLIDING,
    "gemma3n_text": {
        "num_hidden_layers": 4, "num_kv_shared_layers": 2, "layer_types": ["sliding_attention", "full_attention"] * 2,
        "intermediate_size": [96] * 4, "activation_sparsity_pattern": [0.0] * 4, "vocab_size_per_layer_input": 300,
        "hidden_size_per_layer_input": 8, "laurel_rank": 8, "sliding_window": 8,
    },
    "gemma4_text": SLIDING,
    "gpt2": {"n_embd": 64, "n_layer": 2, "n_head": 4, "n_positions": 512},
    "gpt_oss": {**SLIDING, **EXPERTS},
    "granite": {"logits_scaling": 8.0, "residual_multiplier": 0.2, "embedding_multiplier": 12.0, "attention_multiplier": 0.1},
    "granitemoe": EXPERTS,
    "granitemoehybrid": {
        "layer_types": ["mamba", "attention"], **MAMBA, "num_local_experts": 0, "shared_intermediate_size": 64,
        "mamba_expand": 2,
    },
    "falcon_h1": {"mamba_d_ssm": 128, **MAMBA},
    "lfm2": {"layer_types": ["conv", "full_attention"], "block_auto_adjust_ff_dim": False},
    "lfm3": {"layer_types": ["conv", "full_attention"]},
    "mamba": {"state_size": 8},
    "minimax": {"num_local_experts": 2, "layer_types": ["linear_attention", "full_attention"], "block_size": 16},
    "ministral": {"sliding_window": 8},
    "mistral": {"sliding_window": 8},
    "mixtral": EXPERTS,
    "olmo3": SLIDING,
    "opt": {"ffn_dim": 96, "word_embed_proj_dim": 64},
    "phi3": {"sliding_window": 8},
    "qwen3_5_text": LINEAR,
    "qwen3_moe": EXPERTS,
    "qwen3_next": {**LINEAR, **EXPERTS, "shared_expert_intermediate_size": 32},
}  # fmt: skip


def tiny_config(family: str) -> PreTrainedConfig:
    """Return the config of a tiny model of an architecture, named by its `model_type`."""
    return AutoConfig.for_model(family, **{**COMMON, **OPTIONS.get(family, {})})


def save_tiny(family: str, folder: Path, **options: Any) -> Path:
    """Save a tiny random model in float32, without a tokenizer, and return its folder."""
    torch.manual_seed(0)
    config = AutoConfig.for_model(family, **{**COMMON, **OPTIONS.get(family, {}), **options})
    AutoModelForCausalLM.from_config(config, dtype=torch.float32).save_pretrained(folder)
    return folder


def tiny_model(family: str, attention: str) -> PreTrainedModel:
    """Return a tiny random model in float32, in evaluation mode."""
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(tiny_config(family), attn_implementation=attention, dtype=torch.float32)
    return model.eval()
