"""Write a Llama-shaped model as Phi-3: q, k, v in one `qkv_proj`, gate and up in one `gate_up_proj`.

Phi-3 is Llama with fused projections, so concatenating rows gives a model with the same logits.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from loraflow.failures import BadModel

if TYPE_CHECKING:
    import torch
    from transformers import Phi3Config, Phi3ForCausalLM, PreTrainedConfig, PreTrainedModel


def as_phi3(model: PreTrainedModel, bos: int | None, eos: int | None, pad: int | None) -> Phi3ForCausalLM:
    """Return a Phi3ForCausalLM with a Llama-shaped model's weights.

    Args:
        model: a Llama or Mistral.
        bos: id of the token that begins a text.
        eos: id of the token that ends one.
        pad: id of the pad token.

    Raises:
        BadModel: Phi-3 has no form for a part of the model, such as biases or scaled rotary embeddings.
    """
    import torch
    from transformers import Phi3ForCausalLM

    if obstacles := _obstacles(model.config):
        raise BadModel(
            "This model cannot be repacked as Phi-3.",
            where="base.repack",
            expected="a Llama-shaped model without biases",
            got=", ".join(obstacles),
            next_step="set base.repack to null: LoRA works on split projections as well",
        )
    with torch.device("meta"):
        phi3 = Phi3ForCausalLM(_phi3_config(model.config, bos, eos, pad))
    # The rotary buffers are not in the state, so compute them.
    phi3.model.rotary_emb = type(phi3.model.rotary_emb)(config=phi3.config)
    # assign: what is not fused is shared with the model, which saves a copy of all weights.
    missing, unexpected = phi3.load_state_dict(_fused_weights(model.state_dict()), strict=False, assign=True)
    if unexpected or [key for key in missing if key != "lm_head.weight"]:
        raise BadModel(
            "Repacking lost weights.",
            where="base.repack",
            got=f"missing {missing}, unexpected {unexpected}",
            next_step="set base.repack to null: LoRA works on split projections as well",
        )
    phi3.tie_weights()
    phi3.eval()
    return phi3


def _obstacles(config: PreTrainedConfig) -> list[str]:
    """Return the model's features that Phi-3 lacks."""
    rope_type = config.rope_parameters.get("rope_type", "default")
    head_dim = getattr(config, "head_dim", None)
    found = {
        f"model type {config.model_type}": config.model_type not in ("llama", "mistral"),
        "attention biases": getattr(config, "attention_bias", False),
        "MLP biases": getattr(config, "mlp_bias", False),
        f"rotary embeddings of type {rope_type}": rope_type != "default",
        "a head size that is not hidden size / heads": head_dim
        not in (None, config.hidden_size // config.num_attention_heads),
    }
    return [obstacle for obstacle, present in found.items() if present]


def _phi3_config(config: PreTrainedConfig, bos: int | None, eos: int | None, pad: int | None) -> Phi3Config:
    from transformers import Phi3Config

    return Phi3Config(
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
        rope_parameters={"rope_type": "default", "rope_theta": config.rope_parameters["rope_theta"]},
        sliding_window=getattr(config, "sliding_window", None),
        tie_word_embeddings=config.tie_word_embeddings,
        bos_token_id=bos,
        eos_token_id=eos,
        pad_token_id=pad,
    )


def _fused_weights(weights: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Return Llama's weights under Phi-3's names, the rows of split projections one after another."""
    import torch

    fused: dict[str, torch.Tensor] = {}
    for key, value in weights.items():
        if ".self_attn.q_proj." in key:
            parts = [weights[key.replace("q_proj", name)] for name in ("q_proj", "k_proj", "v_proj")]
            fused[key.replace("q_proj", "qkv_proj")] = torch.cat(parts)
        elif ".mlp.gate_proj." in key:
            fused[key.replace("gate_proj", "gate_up_proj")] = torch.cat([value, weights[key.replace("gate_", "up_")]])
        elif not any(name in key for name in (".k_proj.", ".v_proj.", ".up_proj.")):
            fused[key] = value
    return fused


def largest_difference(first: PreTrainedModel, second: PreTrainedModel, ids: list[int]) -> float:
    """Return the largest difference between two models' logits over a text."""
    import torch

    with torch.no_grad():
        batch = torch.tensor([ids])
        return float((first(batch).logits - second(batch).logits).abs().max())
