"""Write a Llama-shaped model as Phi-3: q,k,v in one `qkv_proj`, gate and up in one `gate_up_proj`.

Phi-3 is Llama with fused projections, so that concatenating rows gives a model with identical logits.
"""

from __future__ import annotations

from typing import Any

from loraflow.failures import BadModel


def as_phi3(model: Any, bos: int | None, eos: int | None, pad: int | None) -> Any:
    """Return a Phi3ForCausalLM with a Llama-shaped model's weights.

    Raises:
        BadModel: the model has something that Phi-3 cannot say (biases, scaled rotary embeddings, another head size).
    """
    import torch
    from transformers import Phi3Config, Phi3ForCausalLM

    config = model.config
    rope = dict(config.rope_parameters)
    obstacles = [
        what
        for what, there in {
            f"model type {config.model_type}": config.model_type not in ("llama", "mistral"),
            "attention biases": getattr(config, "attention_bias", False),
            "MLP biases": getattr(config, "mlp_bias", False),
            f"rotary embeddings of type {rope.get('rope_type')}": rope.get("rope_type", "default") != "default",
            "a head size that is not hidden size / heads": getattr(config, "head_dim", None)
            not in (None, config.hidden_size // config.num_attention_heads),
        }.items()
        if there
    ]
    if obstacles:
        raise BadModel(
            "This model cannot be repacked as Phi-3.",
            where="base.repack",
            expected="a Llama-shaped model without biases",
            got=", ".join(obstacles),
            next_step="set base.repack to null: LoRA works on split projections as well",
        )
    phi3 = Phi3Config(
        vocab_size=config.vocab_size,
        hidden_size=config.hidden_size,
        intermediate_size=config.intermediate_size,
        num_hidden_layers=config.num_hidden_layers,
        num_attention_heads=config.num_attention_heads,
        num_key_value_heads=config.num_key_value_heads,
        hidden_act=config.hidden_act,
        max_position_embeddings=config.max_position_embeddings,
        original_max_position_embeddings=config.max_position_embeddings,
        rms_norm_eps=config.rms_norm_eps,
        rope_parameters={"rope_type": "default", "rope_theta": rope["rope_theta"]},
        sliding_window=getattr(config, "sliding_window", None),
        tie_word_embeddings=config.tie_word_embeddings,
        bos_token_id=bos,
        eos_token_id=eos,
        pad_token_id=pad,
    )
    source = model.state_dict()
    fused: dict[str, Any] = {}
    for key, value in source.items():
        if ".self_attn.q_proj." in key:
            parts = [source[key.replace("q_proj", name)] for name in ("q_proj", "k_proj", "v_proj")]
            fused[key.replace("q_proj", "qkv_proj")] = torch.cat(parts)
        elif ".mlp.gate_proj." in key:
            fused[key.replace("gate_proj", "gate_up_proj")] = torch.cat([value, source[key.replace("gate_", "up_")]])
        elif not any(name in key for name in (".k_proj.", ".v_proj.", ".up_proj.")):
            fused[key] = value
    with torch.device("meta"):
        out = Phi3ForCausalLM(phi3)
    out = out.to_empty(device="cpu").to(next(model.parameters()).dtype)
    # to_empty leaves rotary buffers without content: make them anew.
    out.model.rotary_emb = type(out.model.rotary_emb)(config=out.config)
    missing, unexpected = out.load_state_dict(fused, strict=False)
    if unexpected or [key for key in missing if key != "lm_head.weight"]:
        raise BadModel(
            "Repacking lost weights.", where="base.repack", got=f"missing {missing}, unexpected {unexpected}"
        )
    out.tie_weights()
    return out.eval()


def largest_difference(one: Any, other: Any, ids: list[int]) -> float:
    """Return the largest difference of two models' logits over a text."""
    import torch

    with torch.no_grad():
        batch = torch.tensor([ids])
        return float((one(batch).logits - other(batch).logits).abs().max())
