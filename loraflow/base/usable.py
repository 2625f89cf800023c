"""Refuse a base that cannot be trained, by its config.json alone: before weights are downloaded, copied or loaded."""

import math
import re
from collections.abc import Mapping
from pathlib import Path

from pydantic import JsonValue

from loraflow.base.architecture import code_references, read_config
from loraflow.base.stored_weights import PICKLES, refuse_damaged_settings
from loraflow.failures import BadModel

_GENERATES = ("ForCausalLM", "LMHeadModel", "ForConditionalGeneration")
_OTHER_TASKS = {
    "ForSequenceClassification": "a classification or reward model",
    "RewardModel": "a reward model",
    "ForMaskedLM": "an encoder",
    "ForPreTraining": "an encoder",
    "EncoderModel": "an encoder",
}
_WHERE = "base.model"
_HUB_ID = re.compile(r"\w[\w.-]*/\w[\w.-]*", re.ASCII)  # with its owner: the hub only redirects old names such as gpt2
_ANOTHER = "choose a model for text generation; its architecture ends in ForCausalLM"
# transformers lists these for masked language models too, but their class for causal language models is a decoder.
_WITH_DECODER = frozenset({"bart", "mbart", "mvp"})


def is_hub_id(model: str) -> bool:
    """Tell whether a text has the form of a hub id, OWNER/NAME."""
    return _HUB_ID.fullmatch(model) is not None


def require_base_name(model: str, where: str = _WHERE) -> None:
    """Check the name of a base, without the network.

    Raises:
        BadModel: it is neither `bundled:smollm2` nor a folder, and has not the form of a hub id.
    """
    if model == "bundled:smollm2" or Path(model).expanduser().is_dir() or is_hub_id(model):
        return
    raise BadModel(
        "There is no such base model.",
        where=where,
        expected="bundled:smollm2, a folder that exists, or a hub id as OWNER/NAME, such as "
        "microsoft/Phi-3-mini-4k-instruct",
        got=model,
        next_step=f"correct {where}",
    )


def refuse_unusable_folder(folder: Path, *, trust: bool, known_to_transformers: bool = False) -> None:
    """Refuse a base in a folder, or a GGUF file, that cannot be trained.

    Args:
        known_to_transformers: check also that the installed transformers has the architecture. This imports it.

    Raises:
        BadModel: see `refuse_unusable`, `refuse_unknown_architecture` and `read_config`; or all weights are GGUF files.
    """
    ggufs = [folder] if folder.suffix == ".gguf" and folder.is_file() else []
    if folder.is_dir() and not any(path.name.endswith((".safetensors", *PICKLES)) for path in folder.iterdir()):
        ggufs = sorted(folder.glob("*.gguf"))  # some publishers put config.json beside them
    if ggufs:
        raise BadModel(
            "A GGUF file cannot be trained: it is quantized for inference, and transformers reads few of its architectures.",
            where=_WHERE,
            expected="a folder with config.json and safetensors, or a hub id",
            got=str(ggufs[0]),
            next_step="name the model that the GGUF was made from",
        )
    refuse_adapter_folder(folder)
    if not (folder / "config.json").is_file():
        return  # the caller says that there is no model
    config = refuse_damaged_settings(folder, _WHERE)
    if (key := _key_of_nan(config)) is not None:
        raise BadModel(
            "A value in the base's config.json is NaN.",
            where=_WHERE,
            expected="a number: the model would compute NaN only",
            got=f"{key}: NaN",
            next_step="remove or correct the value in config.json",
        )
    if "quantization_config" not in config and (folder / "hf_quant_config.json").exists():
        config = {**config, "quantization_config": {"quant_method": "modelopt (hf_quant_config.json)"}}
    refuse_unusable(config, trust=trust)
    if known_to_transformers:
        refuse_unknown_architecture(config, trust=trust)
        if not trust and getattr(read_config(folder), "is_encoder_decoder", False):  # some classes say it, not the file
            raise _encoder_decoder(config)


def refuse_code_elsewhere(folder: Path) -> None:
    """Refuse a base whose own code is in another repository of the hub: transformers runs its newest version each time.

    Such a base is often a fine-tuned copy, whose config.json says `OWNER/NAME--modeling.Class`.

    Raises:
        BadModel: it is.
    """
    for name in ("config.json", "tokenizer_config.json"):
        elsewhere = [reference for reference in code_references(folder / name) if "--" in reference]
        if elsewhere:
            raise BadModel(
                "The base's code is in another repository without a pinned version, so it can change at any time.",
                where=f"auto_map in {name} of the base",
                expected="code in files of the base itself, such as modeling.Class",
                got=elsewhere[0],
                next_step="base.trust_remote_code: false, if transformers has the architecture; or copy the repository's "
                ".py files into the model's folder, and remove the part up to -- from auto_map",
            )


def refuse_adapter_folder(folder: Path) -> None:
    """Refuse an adapter, alone or beside a model: transformers would apply it to its base when it opens the folder.

    Raises:
        BadModel: the folder has adapter_config.json.
    """
    if not (folder / "adapter_config.json").is_file():
        return
    has_model = (folder / "config.json").is_file()
    raise BadModel(
        "The base's folder has an adapter beside the model, which transformers would apply to it."
        if has_model
        else "The base is an adapter without its model.",
        where=f"{_WHERE}: {folder / 'adapter_config.json'}",
        expected="a folder with a model only",
        next_step="loraflow merge ADAPTER BASE OUT makes one model of both; name OUT as base.model"
        + ("; or move the adapter's files elsewhere" if has_model else ""),
    )


def _key_of_nan(values: JsonValue) -> str | None:
    """Return the key of the first NaN, such as `rope_scaling.factor`; None if there is none."""
    items = values.items() if isinstance(values, dict) else enumerate(values) if isinstance(values, list) else ()
    for key, value in items:
        if isinstance(value, float) and math.isnan(value):
            return str(key)
        if (inner := _key_of_nan(value)) is not None:
            return f"{key}.{inner}"
    return None


def refuse_unusable(config: Mapping[str, JsonValue], *, trust: bool) -> None:
    """Refuse a base by the content of its config.json.

    Raises:
        BadModel: the model does not generate text, is quantized already, does not name its architecture, or returns its
            results in another form.
    """
    quantization = config.get("quantization_config") or config.get("compression_config")
    if quantization:
        named = quantization if isinstance(quantization, dict) else {}
        method = named.get("quant_method") or named.get("quant_algo")
        raise BadModel(
            "The base is quantized already, and an adapter cannot be merged into quantized weights.",
            where=_WHERE,
            expected="weights in bfloat16, float16 or float32",
            got=f"quantization_config: {method or 'a method that it does not name'}",
            next_step="name the original model; base.quantization: nf4 or fp8 quantizes it for the training only",
        )
    architectures = _architectures(config)
    if not architectures:
        raise BadModel(
            "The base's config.json does not say which model it is.",
            where=_WHERE,
            expected="architectures, such as [LlamaForCausalLM]",
            got=f"model_type {config.get('model_type')}, no architectures",
            next_step="add the name of the model's class to config.json, or choose another copy of the model",
        )
    if config.get("is_encoder_decoder") is True:
        raise _encoder_decoder(config)
    for key, wrong in (("return_dict", False), ("output_attentions", True)):
        if config.get(key) is wrong:
            raise BadModel(
                "config.json of the base changes what the model returns, so training cannot read its output.",
                where=_WHERE,
                expected=f"no {key} in config.json",
                got=f"{key}: {str(wrong).lower()}",
                next_step=f"remove {key} from config.json",
            )
    if any(name.endswith(_GENERATES) for name in architectures):
        return
    mapped = config.get("auto_map")
    if trust and isinstance(mapped, dict) and "AutoModelForCausalLM" in mapped:
        return
    kinds = [kind for name in architectures for suffix, kind in _OTHER_TASKS.items() if name.endswith(suffix)]
    raise BadModel(
        f"The base is {kinds[0] if kinds else 'a model without a head for text generation'}.",
        where=_WHERE,
        expected="an architecture that generates text, such as LlamaForCausalLM",
        got=", ".join(architectures),
        next_step="base.trust_remote_code: true runs the model's own code, if you trust it" if mapped else _ANOTHER,
    )


def _encoder_decoder(config: Mapping[str, JsonValue]) -> BadModel:
    return BadModel(
        "The base is an encoder-decoder; loraflow trains decoders.",
        where=_WHERE,
        got=f"{config.get('model_type')}: {', '.join(_architectures(config))}",
        next_step=_ANOTHER,
    )


def _architectures(config: Mapping[str, JsonValue]) -> list[str]:
    named = config.get("architectures")
    return [str(name) for name in named] if isinstance(named, list) else []


def refuse_unknown_architecture(config: Mapping[str, JsonValue], *, trust: bool) -> None:
    """Refuse a base whose architecture the installed transformers does not have.

    Raises:
        BadModel: it needs code that comes with the model and is not trusted, or a newer transformers; it is an encoder; or
            it reads images.
    """
    import transformers
    from transformers.models.auto.modeling_auto import (
        MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
        MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES,
        MODEL_FOR_MASKED_LM_MAPPING_NAMES,
    )

    kind = str(config.get("model_type"))
    encoders = MODEL_FOR_MASKED_LM_MAPPING_NAMES.keys() - _WITH_DECODER
    if kind in encoders and config.get("is_decoder") is not True and not trust:
        raise BadModel(
            "The base is an encoder with a head for text: its tokens see the tokens after them.",
            where=_WHERE,
            expected="a decoder; for this architecture, is_decoder: true in config.json",
            got=f"{kind}, is_decoder: {str(config.get('is_decoder')).lower()}",
            next_step=_ANOTHER,
        )
    has_code = bool(config.get("auto_map"))
    if kind in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES or (trust and has_code):
        return
    if kind in MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES:
        raise BadModel(
            "The base reads images, and transformers cannot load its language model alone.",
            where=_WHERE,
            expected="a model_type for text, or one whose language model is trained alone, such as gemma3",
            got=kind,
            next_step="choose another base, such as a text model of the same family",
        )
    raise BadModel(
        "The base needs Python code that comes with it."
        if has_code
        else "The base is not a causal language model that transformers supports.",
        where=_WHERE,
        expected=f"a model_type that transformers {transformers.__version__} has, such as phi3 or llama",
        got=kind,
        next_step="base.trust_remote_code: true runs it, if you trust it; or choose another base"
        if has_code
        else "choose another base, or a newer transformers; config.json names no code of the model's own (auto_map)",
    )
