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
    "bert": {"is_decoder": False},
    "deepseek_v3": {  # latent attention: keys and values are made from a few numbers of each token
        "kv_lora_rank": 32, "q_lora_rank": 32, "qk_rope_head_dim": 8, "qk_nope_head_dim": 8, "v_head_dim": 16,
        "num_key_value_heads": 4, "head_dim": 8, "n_routed_experts": 4, "num_experts_per_tok": 2, "n_group": 1,
        "topk_group": 1, "first_k_dense_replace": 1, "moe_intermediate_size": 32, "n_shared_experts": 1,
        "mlp_layer_types": ["dense", "sparse"],
    },
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
    "granite": {  # real ones divide logits by 8 and add 0.22 of a layer: for a width of 2048 and 40 layers
        "logits_scaling": 1 / 12, "residual_multiplier": 0.5, "embedding_multiplier": 12.0, "attention_multiplier": 0.1,
    },
    "granitemoe": EXPERTS,
    "granitemoehybrid": {
        "layer_types": ["mamba", "attention"], **MAMBA, "num_local_experts": 0, "shared_intermediate_size": 64,
        "mamba_expand": 2,
    },
    "falcon_h1": {"mamba_d_ssm": 128, **MAMBA},
    "lfm2": {"layer_types": ["conv", "full_attention"], "block_auto_adjust_ff_dim": False},
    "lfm3": {"layer_types": ["conv", "full_attention"]},
    "mamba": {"state_size": 8},
    "mamba2": {"state_size": 16, "num_heads": 8, "head_dim": 16, "n_groups": 1, "chunk_size": 8},
    "minimax": {"num_local_experts": 2, "layer_types": ["linear_attention", "full_attention"], "block_size": 16},
    "bloom": {"n_layer": 2, "n_head": 4},
    "ministral": {"sliding_window": 8},
    "mistral": {"sliding_window": 8},
    "mixtral": EXPERTS,
    "mpt": {"d_model": 64, "n_heads": 4, "n_layers": 2, "max_seq_len": 512, "expansion_ratio": 2},
    "olmo3": SLIDING,
    "modernbert-decoder": {"sliding_window": 8, "layer_types": ["full_attention", "sliding_attention"], "num_key_value_heads": 4},
    "opt": {"ffn_dim": 96, "word_embed_proj_dim": 64},
    "phi3": {"sliding_window": 8},
    "qwen3_5_text": LINEAR,
    "qwen3_moe": EXPERTS,
    "recurrent_gemma": {"lru_width": 64, "attention_window_size": 8, "block_types": ["recurrent", "attention"]},
    "rwkv": {"attention_hidden_size": 64, "context_length": 512},
    "qwen3_next": {**LINEAR, **EXPERTS, "shared_expert_intermediate_size": 32},
}  # fmt: skip


LONGROPE = {
    "rope_parameters": {
        "rope_type": "longrope", "rope_theta": 10000.0, "short_factor": [1.0] * 8, "long_factor": [2.0] * 8,
        "original_max_position_embeddings": 256,
    },
    "original_max_position_embeddings": 256,
}  # fmt: skip
LLAMA3_ROPE = {
    "rope_type": "llama3", "rope_theta": 500000.0, "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
    "original_max_position_embeddings": 256,
}  # fmt: skip
TIED = {"tie_word_embeddings": True}
VISION = {
    "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1, "num_attention_heads": 2, "image_size": 28,
    "patch_size": 14,
}  # fmt: skip
TEXT = {**COMMON, "sliding_window": 8, "layer_types": SLIDING["layer_types"]}

# The families that people bring: name → architecture, and what a tiny config takes over from the real one.
FAMILIES: dict[str, tuple[str, dict[str, Any]]] = {
    "Phi-3 mini 4k": ("phi3", {"num_key_value_heads": 4}),
    "Phi-3 mini 128k": ("phi3", {"num_key_value_heads": 4, **LONGROPE}),
    "Phi-3.5 mini": ("phi3", {"num_key_value_heads": 4, "sliding_window": None, **LONGROPE}),
    "Phi-4": ("phi3", {"sliding_window": None}),
    "Phi-4 mini": ("phi3", {"sliding_window": None, "partial_rotary_factor": 1.0, **TIED, **LONGROPE}),
    "Llama 3.1": ("llama", {"rope_parameters": LLAMA3_ROPE}),
    "Llama 3.2": ("llama", {"rope_parameters": LLAMA3_ROPE, **TIED}),
    "Qwen2.5": ("qwen2", TIED),
    "Qwen3": ("qwen3", TIED),
    "Qwen3.5": ("qwen3_5_text", TIED),
    "Gemma 2": ("gemma2", TIED),
    "Gemma 3, text": ("gemma3_text", TIED),
    "Gemma 3, with vision": ("gemma3", {"text_config": TEXT, "vision_config": VISION, "mm_tokens_per_image": 4}),
    "Mistral": ("mistral", {}),
    "Ministral": ("ministral", {}),
    "Granite 3": ("granite", TIED),
    "Granite 4": ("granitemoehybrid", TIED),
    "OLMo 2": ("olmo2", {}),
    "OLMo 3": ("olmo3", {}),
    "SmolLM2": ("llama", TIED),
    "SmolLM3": ("smollm3", TIED),
    "Cohere": ("cohere", TIED),
    "Cohere 2": ("cohere2", TIED),
    "GLM-4": ("glm4", {}),
    "LFM2": ("lfm2", TIED),
    "Qwen3-MoE, experts left alone": ("qwen3_moe", {}),
    "Qwen3-MoE, experts adapted": ("qwen3_moe", {}),
    "Mixtral": ("mixtral", {}),
    "gpt-oss": ("gpt_oss", {}),
    "DeepSeek-V3": ("deepseek_v3", {}),
}


def family_config(family: str, **more: Any) -> PreTrainedConfig:
    """Return the config of a tiny model of a family of `FAMILIES`; `more` is for its text model."""
    architecture, options = FAMILIES[family]
    if "text_config" in options:
        options = {**options, "text_config": {**options["text_config"], **more}, **more}
    return AutoConfig.for_model(architecture, **{**COMMON, **OPTIONS.get(architecture, {}), **options, **more})


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
