"""Load a base or merged model from an artifact, as the recipe and the runtime say."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

from loraflow.config import Runtime
from loraflow.failures import BadConfig, MissingExtra
from loraflow.hardware.attention import choose_for_loading
from loraflow.hardware.device import pick_device


def load_model(
    folder: Path,
    dtype: str,
    runtime: Runtime,
    *,
    double_quantization: bool | None = None,
    trust: bool = False,
    attention: str | None = None,
    place: str | None = None,
) -> Any:
    """Load a causal language model.

    Args:
        folder: its artifact.
        dtype: bfloat16, float16 or float32. Given at loading: a later `.to()` would round the rotary buffers.
        runtime: device and attention.
        double_quantization: packs the weights in NF4, with or without its constants; None leaves them as they are.
        trust: run Python code that comes with the model.
        attention: transformers' name of it; default is what the runtime says.
        place: where the weights go, if not where they compute.

    Raises:
        MissingExtra: NF4 without CUDA or bitsandbytes.
        BadConfig: the device cannot compute in this dtype.
    """
    import torch
    from transformers import AutoModelForCausalLM

    device = pick_device(runtime)
    if dtype == "bfloat16" and device == "cuda" and not torch.cuda.is_bf16_supported(including_emulation=False):
        raise BadConfig(
            "This GPU does not compute in bfloat16.",
            where="base.dtype",
            got=torch.cuda.get_device_name(),
            next_step="set base.dtype to float16, and training_config.bf16 to false, fp16 to true",
        )
    options: dict[str, Any] = {
        "dtype": getattr(torch, dtype),
        "attn_implementation": attention or choose_for_loading(runtime, device, dtype),
        "trust_remote_code": trust,
    }
    if double_quantization is not None:
        options["quantization_config"] = _nf4(device, dtype, double_quantization)
    if device == "cuda":
        torch.backends.cuda.enable_cudnn_sdp(False)  # it plans anew for each padded shape: steps of seconds on Hopper
        options["device_map"] = {"": place or int(os.environ.get("LOCAL_RANK", "0"))}
    model = AutoModelForCausalLM.from_pretrained(folder, **options)
    return model.eval()


def _nf4(device: str, dtype: str, double: bool) -> Any:
    from importlib.util import find_spec

    import torch

    if device != "cuda" or find_spec("bitsandbytes") is None:
        raise MissingExtra(
            "NF4 quantization needs a CUDA device and the package bitsandbytes.",
            where="base.quantization",
            got=f"device {device}, bitsandbytes {'installed' if find_spec('bitsandbytes') else 'missing'}",
            next_step="pip install 'loraflow[gpu]' on a GPU machine, or set base.quantization to null",
        )
    from transformers import BitsAndBytesConfig

    return BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=double,
        bnb_4bit_compute_dtype=getattr(torch, dtype),
    )


# What models call a factor between their head's product and their logits.
_SCALES = ("final_logit_softcapping", "logits_scaling", "logit_scale", "output_multiplier", "lm_head_multiplier")


def head_is_plain(model: Any) -> bool:
    """Tell whether a model's logits are its head times its last hidden state, and nothing more."""
    config = model.config.get_text_config()
    scaled = any(getattr(config, key, None) not in (None, 1, 1.0) for key in _SCALES)
    return not scaled and model.get_output_embeddings() is not None and model.get_decoder() is not None


# A window counts places: what lies between a token and the beginning of its row can push that out of it.
_WINDOWS = ("sliding_window", "attention_chunk_size", "window_size", "attention_window_size")


def sees_all_before(model: Any, places: int) -> bool:
    """Tell whether a token of a row of so many places attends to all before it, and nothing else reaches it.

    Not so in models with a recurrent state, with a window that is shorter, or with code of their own.
    """
    config = model.config
    own = getattr(model, "get_base_model", lambda: model)()
    if config is not config.get_text_config() or getattr(own, "_is_stateful", False) or own.get_decoder() is None:
        return False
    if not type(own).__module__.startswith("transformers."):
        return False
    kinds = set(getattr(config, "layer_types", None) or ["full_attention"])
    windows = [getattr(config, name, None) for name in _WINDOWS]
    return kinds <= {"full_attention", "sliding_attention"} and all(w is None or w >= places for w in windows)


def load_tokenizer(folder: Path) -> Any:
    """Load a tokenizer with a pad token that is not its stop token, where the vocabulary has one to spare."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(folder)
    if tokenizer.pad_token is None or tokenizer.pad_token_id == tokenizer.eos_token_id:
        tokenizer.pad_token = tokenizer.unk_token or tokenizer.eos_token
    return tokenizer


def stop_ids(folder: Path) -> list[int]:
    """Return every id that ends an answer: the generation config's, and those that the template ends answers with."""
    from loraflow.data.loss_mask import ChatTemplate

    found = ChatTemplate(folder).stop_ids()
    for name in ("generation_config.json", "config.json"):
        if (folder / name).exists():
            eos = json.loads((folder / name).read_text(encoding="utf-8")).get("eos_token_id")
            found |= set(eos if isinstance(eos, list) else [] if eos is None else [eos])
    return sorted(found)
