"""Checks of an adapter before anything is written: its config, its tensors and its tokenizer."""

from __future__ import annotations

import json
import logging
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING

from loraflow.adapters.adapter_config import FILE, NOT_RECOMPUTED, AdapterConfig
from loraflow.adapters.completeness import WEIGHTS, check_complete, give_projections_of, module_of
from loraflow.adapters.lora_updates import PREFIX
from loraflow.adapters.tokenizer_files import chat_template, check_origin, check_tokenizer_files, refuse_other_ids
from loraflow.adapters.vocabulary import embedding_names, fit_vocabulary
from loraflow.base.stored_weights import TensorEntry, model_without_weights, read_entries, refuse_pickles
from loraflow.data.templates.tokenizer_config import read_tokenizer
from loraflow.failures import BadModel

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel


log = logging.getLogger(__name__)
_MLX = "adapters.safetensors"
_NOT_MERGEABLE = {
    "layer_replication": "it adds layers to the base",
    "alora_invocation_tokens": "it applies only after certain tokens",
    "arrow_config": "it chooses among several adapters for each token",
    "megatron_config": "its layers are Megatron's",
}


def check_config(config: AdapterConfig, adapter: Path) -> None:
    """Refuse an adapter that cannot be merged into one checkpoint, by its config alone.

    Raises:
        BadModel: it is not LoRA, the weights that it was trained on are unknown, or no checkpoint can express its
            changes.
    """
    where = str(adapter / FILE)
    if config.peft_type != "LORA":
        raise BadModel(
            "This is not a LoRA adapter.",
            where=where,
            expected="peft_type: LORA",
            got=str(config.peft_type),
            next_step="serve base and adapter together, with peft; or merge it with peft's merge_and_unload, and name the "
            "merged model as base.model",
        )
    check_initialisation(config, adapter)
    for setting in config.enabled(_NOT_MERGEABLE):
        raise BadModel(
            f"This adapter cannot be merged: {_NOT_MERGEABLE[setting]}.",
            where=f"{where}: {setting}",
            got=str(getattr(config, setting))[:200],
            next_step="serve base and adapter together, with peft",
        )


def check_initialisation(config: AdapterConfig, adapter: Path) -> None:
    """Refuse an adapter of weights that the initialisation changed and that nothing can compute again.

    peft loads some of them without a word, and adds them to the base's own weights.

    Raises:
        BadModel: the initialisation changed the base's weights by data, gradients or a random state; or peft has no such
            initialisation, as MiLoRA's, which changes them too.
    """
    if not config.initialisation_is_known:
        value = config.init_lora_weights
        is_quoted = isinstance(value, str) and config.initialisation in ("true", "false", "none")
        raise BadModel(
            "The adapter's initialisation is unknown, so it may have changed the base's weights.",
            where=f"{adapter / FILE}: init_lora_weights",
            expected="one of peft's, such as true or gaussian",
            got=json.dumps(value)[:200],
            next_step="write it without quotation marks: true, false or null"
            if is_quoted
            else "save it again where it was trained, as LoRA on the published base with init_lora_weights: true",
        )
    if config.initialisation.startswith(NOT_RECOMPUTED):
        raise BadModel(
            "The adapter's initialisation changed the base's weights, and the adapter does not contain the changed weights.",
            where=str(adapter / FILE),
            expected="init_lora_weights: true",
            got=config.initialisation,
            next_step="merge it where it was trained"
            if config.initialisation == "loftq"
            else "save it again where it was trained, with peft's path_initial_model_for_weight_conversion, which makes "
            "it LoRA on the base itself",
        )


def check_tensors(adapter: Path) -> None:
    """Read each of an adapter's tensors once, one at a time.

    Raises:
        BadModel: the file is damaged or missing, or holds a number that is not finite.
    """
    from safetensors import SafetensorError, safe_open

    file = adapter / "adapter_model.safetensors"
    if not file.exists() and (adapter / _MLX).exists():
        raise BadModel(
            "This is an adapter of mlx-lm. Its matrices have other names, and are transposed.",
            where=str(adapter),
            expected=f"{file.name}, which peft writes",
            got=_MLX,
            next_step="merge it with mlx_lm.fuse and name the merged model as base.model, or save it in peft's format",
        )
    if not file.exists():
        parts = sorted(path.name for path in adapter.glob("adapter_model-*.safetensors"))
        raise BadModel(
            "The adapter's weights are missing.",
            where=str(adapter),
            expected=f"{file.name}: peft reads adapters from one file",
            got=", ".join(parts[:3]) or "no such file",
            next_step="join the parts where they were saved, with peft's save_pretrained"
            if parts
            else "fetch it again",
        )
    try:
        with safe_open(file, framework="pt") as tensors:
            check_finite(((name, tensors.get_tensor(name)) for name in tensors.keys()), adapter)  # noqa: SIM118
    except SafetensorError as error:
        raise BadModel(
            "A safetensors file is damaged.", where=str(file), got=str(error)[:200], next_step="fetch it again"
        ) from error


def check_finite(tensors: Iterable[tuple[str, torch.Tensor]], where: Path) -> None:
    """Refuse an adapter with NaN or infinity, which a merge would spread to every answer.

    Raises:
        BadModel: a tensor has one, or holds no floating-point numbers of 16 bits or more.
    """
    for name, tensor in tensors:
        if tensor.itemsize < 2 or not tensor.is_floating_point():
            raise BadModel(
                "The adapter contains numbers of a type that cannot be merged.",
                where=f"{where}: {name}",
                expected="bfloat16, float16, float32 or float64",
                got=str(tensor.dtype).removeprefix("torch."),
                next_step="save the adapter again in one of these types",
            )
        finite = tensor.isfinite()
        if not finite.all():
            raise BadModel(
                "The adapter contains numbers that are not finite.",
                where=f"{where}: {name}",
                got=f"{int((~finite).sum())} of {tensor.numel()}",
                next_step="train again, or use an earlier checkpoint",
            )


def check_vocabulary(base: Path, adapter: Path, rows: int) -> None:
    """Check that every token that a chat or the adapter uses has a row in the embeddings.

    Some published bases have unused tokens beyond their embeddings, such as gemma-3-1b's for images
    (https://github.com/huggingface/transformers/issues/37011). They are only logged.

    Raises:
        BadModel: tokens were added without resizing the embeddings.
    """
    unused, template = _tokens_beyond(base, rows), chat_template(base) or ""
    refused = {(base, token) for token in unused if token in template}
    refused |= {(adapter, token) for token in _tokens_beyond(adapter, rows) - unused}
    for folder, token in sorted(refused):
        raise BadModel(
            "The tokenizer has tokens without an embedding.",
            where=str(folder / "tokenizer.json"),
            expected=f"ids below {rows}",
            got=f"{token}, {len(refused)} in all",
            next_step="resize and save the base's embeddings first, then train on that base",
        )
    if unused:
        log.warning("The base's tokenizer has %d tokens without embeddings, such as %s.", len(unused), min(unused))


def _tokens_beyond(folder: Path, rows: int) -> set[str]:
    """Return the tokens of a folder's tokenizer whose ids are not below `rows`."""
    if not (folder / "tokenizer.json").exists():
        return set()
    vocabulary = read_tokenizer(folder).get_vocab(with_added_tokens=True)
    return {token for token, index in vocabulary.items() if index >= rows}


def check_adapter(
    adapter: Path, base: Path, *, base_digest: str | None = None, trust: bool = False, convertible: bool = False
) -> AdapterConfig:
    """Check that an adapter is complete and belongs to a base; return its configuration.

    Args:
        base: the model's folder; its weights are not read.
        base_digest: digest of the base's artifact, compared with the digest that the adapter records.
        convertible: compare with the base as if it had the adapter's projections, fused or split.

    Raises:
        BadModel: its weights are a pickle, damaged, incomplete or not finite; it does not fit the base; or its tokenizer
            or template does not.
    """
    from transformers.pytorch_utils import Conv1D

    refuse_pickles(adapter)
    config = AdapterConfig.read(adapter)
    check_initialisation(config, adapter)
    check_tensors(adapter)
    check_tokenizer_files(adapter)
    check_origin(adapter, base, base_digest)
    model = model_without_weights(base, trust=trust)
    entries = read_entries(adapter / WEIGHTS)
    names = [entry.name for entry in entries]
    if convertible:
        give_projections_of({module_of(name) for name in names}, model)
    _check_ranks(entries, config)
    fit_vocabulary(model, adapter, config)
    rows = int(model.get_input_embeddings().get_parameter("weight").shape[0])
    has_embeddings = _contains_embeddings(names, model)
    modules = dict(model.named_modules())
    if any(isinstance(modules.get(module_of(name)), Conv1D) for name in names):
        # As peft does: the file of some adapters says false.
        config = config.model_copy(update={"fan_in_fan_out": True})
    check_complete(adapter, config, model)
    check_vocabulary(base, adapter, rows)
    if not has_embeddings:
        refuse_other_ids(base, adapter)
    return config


def _check_ranks(entries: Iterable[TensorEntry], config: AdapterConfig) -> None:
    if getattr(config, "target_parameters", None):  # their matrices hold the ranks of all experts
        return
    for entry in entries:
        if entry.name.endswith(".lora_A.weight") and entry.shape:
            config.scale_of(module_of(entry.name), entry.shape[0])


def _contains_embeddings(tensors: Iterable[str], model: PreTrainedModel) -> bool:
    whole = {f"{PREFIX}{name}.weight" for name in embedding_names(model)}
    return not whole.isdisjoint(tensors)
