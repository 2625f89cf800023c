"""Load a base or merged model from an artifact, as the recipe and the runtime say."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, TypedDict, cast

from loraflow.base.architecture import (
    code_references,
    is_tested,
    logit_factor,
    read_config,
    stateful_layers,
)
from loraflow.config import Runtime
from loraflow.failures import BadConfig, BadModel, MissingExtra
from loraflow.hardware.attention import attention_with_mask, choose_for_loading
from loraflow.hardware.device import Device, pick_device

if TYPE_CHECKING:
    import torch
    from transformers import BitsAndBytesConfig, PreTrainedModel, PreTrainedTokenizerBase


class _LoadOptions(TypedDict, total=False):
    """Keyword arguments of `from_pretrained`."""

    dtype: torch.dtype
    attn_implementation: str
    trust_remote_code: bool
    quantization_config: BitsAndBytesConfig
    device_map: dict[str, str | int]


def load_model(
    folder: Path,
    dtype: str,
    runtime: Runtime,
    *,
    double_quantization: bool | None = None,
    trust: bool = False,
    attention: str | None = None,
    weights_device: str | None = None,
) -> PreTrainedModel:
    """Load a causal language model.

    Args:
        dtype: bfloat16, float16 or float32. It is set while loading: a later `.to()` would round the rotary buffers.
        double_quantization: None loads plain weights; otherwise they are quantized to NF4, and for True their constants.
        attention: transformers' name of the attention implementation; the default is the runtime's.
        weights_device: the device that holds the weights, if it is not the device that computes.

    Raises:
        MissingExtra: NF4 without CUDA or bitsandbytes.
        BadConfig: the device cannot compute in this dtype.
        BadModel: the model's files lack weights.
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
    options: _LoadOptions = {
        "dtype": getattr(torch, dtype),
        "attn_implementation": attention or _attention(folder, runtime, device, dtype, trust=trust),
        "trust_remote_code": trust,
    }
    if double_quantization is not None:
        options["quantization_config"] = _nf4(device, dtype, double_quantization)
    if device == "cuda":
        # cuDNN's attention builds a plan for each padded shape, which takes seconds per step on Hopper.
        torch.backends.cuda.enable_cudnn_sdp(False)
        options["device_map"] = {"": weights_device or int(os.environ.get("LOCAL_RANK", "0"))}
    loaded = AutoModelForCausalLM.from_pretrained(folder, output_loading_info=True, **options)
    model, report = cast("tuple[PreTrainedModel, Mapping[str, set[str]]]", loaded)
    refuse_missing_weights(folder, report)
    model.eval()
    return model


def refuse_missing_weights(folder: Path, report: Mapping[str, set[str]]) -> None:
    """Refuse a model that transformers loaded with random numbers for some weights, which it only warns of.

    Raises:
        BadModel: the model's files lack a weight, or have it under a name that its class does not know.
    """
    if missing := sorted(report["missing_keys"]):
        raise BadModel(
            "The base's files lack weights, which transformers would fill with random numbers.",
            where=str(folder),
            expected="every weight of the language model",
            got=", ".join(missing[:3]) + (f" and {len(missing) - 3} more" if len(missing) > 3 else ""),
            next_step="fetch the base again, or choose another one; if embeddings and head share a weight, config.json "
            "needs tie_word_embeddings: true",
        )


def _attention(folder: Path, runtime: Runtime, device: Device, dtype: str, *, trust: bool) -> str:
    """Return the attention of a model that is loaded to generate or to score, in transformers' name."""
    chosen = choose_for_loading(runtime, device, dtype)
    if chosen != "sdpa" or runtime.attn_implementation == "sdpa":
        return chosen
    return attention_with_mask(read_config(folder, trust=trust))


def _nf4(device: str, dtype: str, double: bool) -> BitsAndBytesConfig:
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


def has_linear_head(model: PreTrainedModel) -> bool:
    """Tell whether a model's logits are the product of its head and its last hidden state, and nothing else.

    Configs have many names for factors and caps of logits, so that architectures which are not tested compute a few.
    """
    if logit_factor(model.config) != 1.0 or model.get_output_embeddings() is None or model.get_decoder() is None:
        return False
    return is_tested(model.config) or _is_head_times_state(model)


def _is_head_times_state(model: PreTrainedModel) -> bool:
    import torch
    from transformers import PreTrainedModel as Model

    decoder, head = model.get_decoder(), model.get_output_embeddings()
    if not isinstance(decoder, Model):
        return False
    ids = torch.arange(8, device=model.device)[None]
    with torch.inference_mode():
        state = getattr(decoder(input_ids=ids, use_cache=False), "last_hidden_state", None)
        if state is None or state.shape[-1] != getattr(head, "in_features", state.shape[-1]):
            return False  # RemBERT has a layer between both
        logits, product = model(input_ids=ids, use_cache=False).logits.float(), head(state).float()
    return logits.shape == product.shape and torch.allclose(logits, product, rtol=1e-5, atol=1e-5)


# Names that models' configs have for the length of an attention window, in positions.
_WINDOWS = ("sliding_window", "attention_chunk_size", "window_size", "attention_window_size")


def sees_all_before(model: PreTrainedModel, positions: int) -> bool:
    """Tell whether each token of a row attends to every token before it, and depends on nothing else.

    False for models with a recurrent state, with an attention window shorter than the row, or with code of their own.
    """
    config = model.config
    wrapped: PreTrainedModel = getattr(model, "get_base_model", lambda: model)()
    if config is not config.get_text_config() or getattr(wrapped, "_is_stateful", False):
        return False
    if wrapped.get_decoder() is None or not type(wrapped).__module__.startswith("transformers."):
        return False
    windows = [getattr(config, name, None) for name in _WINDOWS]
    return not stateful_layers(config) and all(w is None or w >= positions for w in windows)


def load_tokenizer(folder: Path) -> PreTrainedTokenizerBase:
    """Load a tokenizer. Its pad token is not its stop token, unless the vocabulary has no other token for it.

    A tokenizer with a class of its own is read from tokenizer.json without it: resolve_base proved that both give equal ids.

    Raises:
        BadModel: see `choose_pad_token`.
    """
    from transformers import AutoTokenizer, PreTrainedTokenizerFast

    has_code = bool(code_references(folder / "tokenizer_config.json"))
    reader = PreTrainedTokenizerFast if has_code else AutoTokenizer
    tokenizer: PreTrainedTokenizerBase = reader.from_pretrained(folder)
    choose_pad_token(tokenizer, folder)
    return tokenizer


def choose_pad_token(tokenizer: PreTrainedTokenizerBase, folder: Path) -> None:
    """Give a tokenizer a pad token that the embeddings have a row for; another one than the stop token, if there is one.

    Many people add a token such as [PAD] to a tokenizer, and not to the model.

    Args:
        tokenizer: is changed.

    Raises:
        BadModel: the tokenizer names neither a pad token nor an unknown token nor a stop token with a row, and the model's
            configuration no stop token.
    """
    from loraflow.data.tokens.loss_mask import eos_ids, vocabulary_of

    rows = vocabulary_of(folder)
    ids = [tokenizer.pad_token_id, tokenizer.unk_token_id, tokenizer.eos_token_id, *sorted(eos_ids(folder))]
    if ids[0] == ids[2]:
        del ids[0]
    usable = [
        token
        for token in ids
        if token is not None and (rows is None or token < rows) and tokenizer.convert_ids_to_tokens(token) is not None
    ]
    if not usable:
        raise BadModel(
            "The tokenizer has no token for padding.",
            where=str(folder / "tokenizer_config.json"),
            expected="pad_token, unk_token or eos_token" + ("" if rows is None else f", with an id below {rows}"),
            got=str(tokenizer.pad_token) if tokenizer.pad_token else "none of them",
            next_step="name the token that ends an answer as eos_token in tokenizer_config.json",
        )
    if usable[0] != tokenizer.pad_token_id:
        tokenizer.pad_token = tokenizer.convert_ids_to_tokens(usable[0])


def stop_ids(folder: Path) -> list[int]:
    """Return the ids that end an answer, sorted: those of the generation config and those of the chat template."""
    from loraflow.data.tokens.loss_mask import ChatTemplate, eos_ids

    return sorted(ChatTemplate(folder).stop_ids() | eos_ids(folder))
