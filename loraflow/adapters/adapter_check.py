"""Accept or refuse an adapter for a base: the same checks for merge, convert, chat, predict, serve and publish."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING

from loraflow.adapters.adapter_config import AdapterConfig
from loraflow.adapters.completeness import WEIGHTS, check_complete, give_projections_of, module_of
from loraflow.adapters.lora_updates import PREFIX
from loraflow.adapters.origin import check_origin
from loraflow.adapters.tokenizer_files import check_tokenizer_files, refuse_other_ids
from loraflow.adapters.validation import check_initialisation, check_tensors, check_vocabulary
from loraflow.adapters.vocabulary import embedding_names, fit_vocabulary
from loraflow.base.stored_weights import TensorEntry, model_without_weights, read_entries, refuse_pickles

if TYPE_CHECKING:
    from transformers import PreTrainedModel


def check_adapter(
    adapter: Path, base: Path, *, base_digest: str | None = None, trust: bool = False, convertible: bool = False
) -> AdapterConfig:
    """Check that an adapter is complete and belongs to a base; return its configuration.

    Args:
        adapter: PEFT's folder.
        base: the model's folder; its weights are not read.
        base_digest: digest of the base's artifact, compared with the digest that the adapter records.
        trust: run code that comes with the base.
        convertible: compare with the base as if it had the adapter's projections, fused or split.

    Raises:
        BadModel: its weights are a pickle, damaged, incomplete or not finite; it does not fit the base; or its tokenizer
            or template does not.
    """
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
