"""Merge with peft, in memory: for trained single tokens, transposed weights, and other updates that are not W + ΔW."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, cast

from loraflow.adapters.adapter_config import AdapterConfig
from loraflow.adapters.completeness import renamed, saved_name
from loraflow.adapters.lora_updates import PREFIX
from loraflow.adapters.nf4 import Nf4
from loraflow.adapters.streaming_merge import require_finite
from loraflow.adapters.vocabulary import embedding_names, fit_vocabulary
from loraflow.base.load import refuse_missing_weights
from loraflow.failures import BadModel

if TYPE_CHECKING:
    from peft import PeftModel
    from torch import nn
    from transformers import PreTrainedModel


def merge_with_peft(
    base: Path, adapter: Path, out: Path, dtype: str | None, max_shard_bytes: int, nf4: Nf4 | None
) -> int:
    """Write the merged model to `out` and return the number of adapted modules.

    Raises:
        BadModel: the adapter does not fit the base, or peft cannot merge it.
    """
    import torch
    from transformers import AutoModelForCausalLM

    loaded = AutoModelForCausalLM.from_pretrained(
        base, dtype="auto", use_safetensors=True, output_loading_info=True, attn_implementation="eager"
    )
    model, report = cast("tuple[PreTrainedModel, dict[str, set[str]]]", loaded)
    refuse_missing_weights(base, report)
    fit_vocabulary(model, adapter, AdapterConfig.read(adapter))
    embeddings = {f"{PREFIX}{name}.weight" for name in embedding_names(model)}
    if nf4 is not None:
        nf4.apply(model)
    wrapped = _load_adapter(model, adapter)
    adapted = _check_all_loaded(wrapped, adapter, embeddings)
    _untie(model)
    try:
        merged = wrapped.merge_and_unload(safe_merge=False)
    except (RuntimeError, ValueError, NotImplementedError) as error:
        if _out_of_memory(error):
            raise
        raise BadModel(
            "peft cannot merge this adapter.",
            where=str(adapter),
            got=str(error).strip()[:300],
            next_step="serve base and adapter together, with peft",
        ) from error
    _check_unloaded(merged, adapter)
    if dtype is not None:
        merged = merged.to(getattr(torch, dtype))
    for name, tensor in merged.state_dict().items():
        if tensor.is_floating_point():
            require_finite(name, tensor)
    merged.save_pretrained(out, max_shard_size=max_shard_bytes)
    return adapted


def _untie(model: PreTrainedModel) -> None:
    """Give embeddings and head two weights before the merge, if one has an update that the other has not.

    In training, each has its own update. peft would add both to the one weight, and so to both modules:
    https://github.com/huggingface/peft/issues/2777. Trained tokens of the embeddings are those of a tied head too,
    unless the adapter names other tokens for it.
    """
    import torch
    from peft.tuners.lora import LoraLayer
    from peft.utils import TrainableTokensWrapper

    layers = model.get_input_embeddings(), model.get_output_embeddings()
    trains_tokens = any(isinstance(layer, TrainableTokensWrapper) for layer in layers)
    if not any(isinstance(layer, LoraLayer) for layer in layers) and not (trains_tokens and not _follows(layers[1])):
        return
    embeddings, head = (_innermost(layer) for layer in layers)
    if head is not None and getattr(head, "weight", None) is getattr(embeddings, "weight", None):
        head.weight = torch.nn.Parameter(head.get_parameter("weight").detach().clone(), requires_grad=False)
        for config in (model.config, model.config.get_text_config()):
            config.tie_word_embeddings = False


def _follows(head: nn.Module | None) -> bool:
    """Tell whether a head's trained tokens are those of the embeddings."""
    from peft.utils import TrainableTokensWrapper

    return isinstance(head, TrainableTokensWrapper) and head.token_adapter.tied_adapter is not None


def _innermost(layer: nn.Module | None) -> nn.Module | None:
    """Return a layer of the base, which peft may have wrapped several times."""
    from peft.tuners.lora import LoraLayer
    from peft.utils import TrainableTokensWrapper

    while isinstance(layer, LoraLayer | TrainableTokensWrapper):
        layer = layer.get_base_layer() if isinstance(layer, LoraLayer) else layer.token_adapter.base_layer
    return layer


def _check_unloaded(merged: PreTrainedModel, adapter: Path) -> None:
    """Refuse a model in which peft left parts of the adapter: it merges one update of a module, not one in another."""
    from peft.tuners.tuners_utils import BaseTunerLayer
    from peft.utils import AuxiliaryTrainingWrapper

    for name, module in merged.named_modules():
        if isinstance(module, BaseTunerLayer | AuxiliaryTrainingWrapper):
            raise BadModel(
                f"peft cannot merge this adapter: {name} has two kinds of updates.",
                where=str(adapter),
                expected="one of trainable_token_indices, modules_to_save and target_modules; tokens of tied embeddings "
                "are trained in the head too",
                next_step="serve base and adapter together, with peft",
            )


def _load_adapter(model: PreTrainedModel, adapter: Path) -> PeftModel:
    from peft import PeftModel

    try:
        return PeftModel.from_pretrained(model, str(adapter))
    except (RuntimeError, ValueError, KeyError) as error:
        if _out_of_memory(error):
            raise
        raise BadModel(
            "The adapter does not fit the base.",
            where=str(adapter),
            got=str(error).strip()[:300],
            next_step="merge it into the base that it was trained on",
        ) from error


def _out_of_memory(error: Exception) -> bool:
    """Tell whether memory ran out. torch raises a RuntimeError for that too, and the adapter is not the cause."""
    return type(error).__name__ == "OutOfMemoryError" or "can't allocate memory" in str(error).lower()


def _check_all_loaded(wrapped: PeftModel, adapter: Path, embeddings: set[str]) -> int:
    """Check that every tensor of the adapter was loaded, and return the number of adapted modules.

    peft neither reports a tensor that the file lacks, which keeps its initial value, nor an entry that fits no tensor.
    """
    from peft import get_peft_model_state_dict, load_peft_weights
    from peft.tuners.tuners_utils import BaseTunerLayer

    shapes = {name: tuple(tensor.shape) for name, tensor in load_peft_weights(str(adapter), device="cpu").items()}
    stored, loaded = ({saved_name(name) for name in names} for names in (shapes, get_peft_model_state_dict(wrapped)))
    if stored - loaded - embeddings:  # an older transformers had other names for them
        stored = set(renamed(shapes, wrapped))
    unmatched = sorted(stored - loaded - embeddings) + sorted(name for name in loaded - stored if "lora_" in name)
    if unmatched:
        raise BadModel(
            "The adapter's tensors do not fit the base.",
            where=str(adapter),
            got=f"{len(unmatched)} without a counterpart, such as {unmatched[0]}",
            next_step="merge it into the base that it was trained on",
        )
    return sum(isinstance(module, BaseTunerLayer) for module in wrapped.modules())
