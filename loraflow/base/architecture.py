"""What an architecture allows in training, decided from the model's config before any weight is loaded.

Documents of a batch can share a row: packed, with position ids that start at 0 in each document, or concatenated, with
the document borders passed to a flash attention kernel. Both are right only if every layer keeps the documents apart.
Layers with a state (convolutions, state spaces, linear attention) do not, and some models ignore position ids.
`tests/families` compares every architecture of `FAST` with each of its documents computed alone. For all others, the
loaded model is asked (`training/document_check.py`).

A config is read as transformers reads it, or refused in one sentence.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from loraflow.failures import BadModel

if TYPE_CHECKING:
    from transformers import PreTrainedConfig


# Packed and concatenated documents stay apart, and the logits are the product of head and hidden state, times a factor.
FAST = frozenset({
    "arcee", "cohere", "cohere2", "ernie4_5", "exaone4", "gemma", "gemma3_text", "glm", "glm4", "gpt2", "gpt_neox",
    "granite", "helium", "hunyuan_v1_dense", "llama", "ministral", "ministral3", "mistral", "olmo", "olmo2", "olmo3", "phi",
    "phi3", "qwen2", "qwen3", "seed_oss", "smollm3", "starcoder2",
})  # fmt: skip
_ATTENTION_LAYERS = {"full_attention", "sliding_attention", "chunked_attention"}
# Names that models' configs have for a factor between the head's product and the logits.
_UNKNOWN_TO_TRL = ("logits_soft_cap", "output_logit_soft_cap", "logits_mup_width_multiplier")
# With these values a model may see later tokens, or all earlier ones: the fast engine's mask is another.
_OTHER_MASKS = {"is_causal": False, "use_bidirectional_attention": True, "sliding_window": 0}
LOGIT_SCALES = (
    "final_logit_softcapping", "logits_scaling", "logit_scale", "output_multiplier", "lm_head_multiplier", *_UNKNOWN_TO_TRL,
)  # fmt: skip


def stateful_layers(config: PreTrainedConfig) -> list[str]:
    """Return the types of a model's layers that pass a state from token to token, beside attention; sorted."""
    return sorted(set(getattr(config.get_text_config(), "layer_types", None) or []) - _ATTENTION_LAYERS)


def is_tested(config: PreTrainedConfig) -> bool:
    """Tell whether the model is one of the architectures in `FAST`, computed by transformers' own code."""
    text = config.get_text_config()
    return text is config and config.model_type in FAST and type(config).__module__.startswith("transformers.")


def ignored_keys(config: PreTrainedConfig, keys: tuple[str, ...]) -> list[str]:
    """Return which keys config.json has and transformers' class does not, as after a conversion to Llama.

    The model's code ignores them. trl and transformers' cache read them of any config.
    """
    text = config.get_text_config()
    kind = type(text)
    found = [key for key in keys if key in vars(text) and not hasattr(kind, key) and key not in text.attribute_map]
    if not found or not kind.__module__.startswith("transformers."):
        return []
    own = vars(kind())
    return [key for key in found if key not in own]


def ignored_windows(config: PreTrainedConfig) -> list[str]:
    """Return the keys of attention windows that config.json has and the model's code ignores.

    transformers' cache follows them: an answer that begins after more tokens than the window has comes from other logits.
    """
    text = config.get_text_config()
    found = ignored_keys(config, ("sliding_window", "attention_chunk_size", "layer_types"))
    is_full = set(getattr(text, "layer_types", None) or ()) == {"full_attention"}
    return [key for key in found if getattr(text, key) is not None and not is_full]


def class_of_another_type(config: PreTrainedConfig) -> str:
    """Return the class in `architectures` that transformers has for other model types only; "" without one."""
    from transformers.models.auto import modeling_auto as auto

    classes = {
        *auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.items(),
        *auto.MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES.items(),
    }
    of_others = {name for kind, name in classes if kind != config.model_type}
    of_others -= {name for kind, name in classes if kind == config.model_type}
    return next((name for name in config.architectures or () if name in of_others), "")


def _scales(
    config: PreTrainedConfig, keys: tuple[str, ...] = LOGIT_SCALES, *, ignored: bool = False
) -> dict[str, float]:
    text = config.get_text_config()
    values = {key: getattr(text, key, None) for key in keys}
    unused = ignored_keys(config, keys)
    return {key: float(value) for key, value in values.items() if value not in (None, 1) and (key in unused) == ignored}


def scales_logits_unlike_trl(config: PreTrainedConfig) -> bool:
    """Tell whether trl's loss leaves out a factor or cap, or applies one that the model's code ignores.

    Small logits would hardly show a cap.
    """
    return bool(_scales(config, _UNKNOWN_TO_TRL) or _scales(config, ignored=True))


def logit_factor(config: PreTrainedConfig) -> float | None:
    """Return the number that a model multiplies its head's product by; None if it changes the product in another way."""
    given, architecture = _scales(config), config.get_text_config().model_type
    if not given:
        return 1.0
    if architecture == "granite" and set(given) == {"logits_scaling"}:
        return 1.0 / given["logits_scaling"]
    if architecture in ("cohere", "cohere2") and set(given) == {"logit_scale"}:
        return given["logit_scale"]
    return None


def obstacle_to_fast_engine(config: PreTrainedConfig) -> str:
    """Return why the fast engine cannot train a model; empty if it can."""
    if stateful := stateful_layers(config):
        return f"the model has layers of type {', '.join(stateful)}"
    if logit_factor(config) is None:
        return "the model changes its head's logits"
    for key, value in _OTHER_MASKS.items():
        if (found := getattr(config.get_text_config(), key, None)) in (value,):
            return f"config.json has {key}: {json.dumps(found)}"
    if not is_tested(config):
        return f"the fast engine has not been tested with the architecture {config.model_type}"
    return ""


def obstacle_to_packing(config: PreTrainedConfig) -> str:
    """Return why a row of a model must hold one document; empty if it may hold several, or if that is not known."""
    if stateful := stateful_layers(config):
        return f"layers of type {', '.join(stateful)} carry a state from one document to the next"
    return ""


def obstacle_to_quantization(config: PreTrainedConfig, kind: Literal["nf4", "fp8"]) -> str:
    """Return why a model cannot be trained on quantized weights; empty if it can."""
    if stateful := stateful_layers(config):
        return f"layers of type {', '.join(stateful)} have kernels that read their weights directly"
    if kind == "fp8" and obstacle_to_fast_engine(config):
        return "it needs the fast engine"
    return ""


def config_errors() -> tuple[type[Exception], ...]:
    """Return what transformers raises for a configuration that it cannot use."""
    from huggingface_hub.errors import StrictDataclassError  # of wrong types, or values that contradict each other

    return (
        OSError, ValueError, KeyError, TypeError, AttributeError, ImportError, RuntimeError, IndexError, AssertionError,
        ZeroDivisionError, StrictDataclassError,
    )  # fmt: skip


def read_config(folder: Path, *, trust: bool = False) -> PreTrainedConfig:
    """Read a base's configuration.

    Raises:
        BadModel: transformers cannot use it, or cannot tell which part of it is the language model.
    """
    from transformers import AutoConfig

    try:
        config: PreTrainedConfig = AutoConfig.from_pretrained(folder, local_files_only=True, trust_remote_code=trust)
        config.get_text_config()
    except config_errors() as error:
        raise BadModel(
            "transformers cannot use the base's configuration.",
            where=str(folder / "config.json"),
            expected="config.json of a causal model",
            got=reason_of(error),
            next_step="fetch config.json again, or choose another base",
        ) from error
    return config


def reason_of(error: Exception) -> str:
    """Return an error's text in one line."""
    return " ".join(str(error).split())[:300] or type(error).__name__


def code_references(file: Path) -> list[str]:
    """Return the classes of own code that a JSON file's `auto_map` names; none if it cannot be read, which others refuse."""
    try:
        mapped = json.loads(file.read_text(encoding="utf-8"))["auto_map"]
    except (OSError, ValueError, RecursionError, KeyError, TypeError):
        return []
    values = mapped.values() if isinstance(mapped, dict) else [mapped]
    named = [name for value in values for name in (value if isinstance(value, list) else [value])]
    return [name for name in named if isinstance(name, str)]
