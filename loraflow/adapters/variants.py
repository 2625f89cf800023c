"""PEFT's variants of LoRA: what they need before the first step, and how they become plain LoRA after training.

PiSSA and OLoRA take the initial product out of the base: W = W' + s·B₀A₀, and train B, A on W'. The saved adapter is the
difference, s·(BA − B₀A₀), as LoRA of twice the rank on W itself, so that it fits the published base.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from loraflow.adapters.adapter_config import AdapterConfig
from loraflow.adapters.targets import ALL_LINEAR, matches, selects
from loraflow.adapters.vocabulary import embedding_names, is_tied
from loraflow.config.lora import PeftConfig
from loraflow.failures import BadConfig

if TYPE_CHECKING:
    import torch
    from peft import PeftModel
    from transformers import PreTrainedModel

log = logging.getLogger(__name__)
EVA_FILE = "eva.safetensors"  # in the work folder, and with each checkpoint
EVA_ROWS = 256  # rows whose activations EVA decomposes; it repeats them until the vectors converge


def extracts_from_base(peft_config: PeftConfig) -> bool:
    """Tell whether an initialisation subtracts its initial product from the base's weights (PiSSA, OLoRA)."""
    return str(peft_config.init_lora_weights).startswith(("pissa", "olora"))


def check(model: PreTrainedModel, peft_config: PeftConfig) -> None:
    """Refuse, before training, what could be trained but not merged into one checkpoint.

    Raises:
        BadConfig: a fully trained module (modules_to_save) with tied weights, an embedding that PiSSA or OLoRA would have
            to decompose, or a token that is not in the vocabulary.
    """
    _check_modules_to_save(model, peft_config)
    _check_decomposed(model, peft_config)
    vocabulary = model.get_input_embeddings().get_parameter("weight").shape[0]
    tokens = peft_config.trainable_token_indices or []
    for index in tokens if isinstance(tokens, list) else [index for ids in tokens.values() for index in ids]:
        if not 0 <= index < vocabulary:
            raise BadConfig(
                "There is no such token.",
                where="peft_config.trainable_token_indices",
                expected=f"0 to {vocabulary - 1}",
                got=str(index),
                next_step="correct the id, or add the token to the base and resize its embeddings first",
            )
    names = embedding_names(model)
    if isinstance(tokens, list) and tokens and len(names) > 1 and not is_tied(model):
        log.warning(
            "peft_config.trainable_token_indices trains the rows of the embeddings alone: the model reads these tokens, but "
            "hardly learns to write them. To train the head's rows too: {%s}.",
            ", ".join(f"{name.rpartition('.')[2]}: {tokens}" for name in names),
        )


def _check_modules_to_save(model: PreTrainedModel, peft_config: PeftConfig) -> None:
    if not getattr(model.config, "tie_word_embeddings", False):
        return
    tied = {id(model.get_input_embeddings()), id(model.get_output_embeddings())}
    for name in peft_config.modules_to_save or []:
        if any(id(module) in tied and matches(full, name) for full, module in model.named_modules()):
            raise BadConfig(
                f"{name} cannot be fully trained in this base: its embedding and head are tied, and the merged model "
                "would need two weights.",
                where="peft_config.modules_to_save",
                next_step="leave it out, or train single tokens: peft_config.trainable_token_indices",
            )


def _check_decomposed(model: PreTrainedModel, peft_config: PeftConfig) -> None:
    import torch

    targets = peft_config.target_modules
    if not extracts_from_base(peft_config) or targets == ALL_LINEAR:
        return
    for name, module in model.named_modules():
        if isinstance(module, torch.nn.Embedding) and selects(targets, name):
            raise BadConfig(
                f"{peft_config.init_lora_weights} does not decompose embeddings.",
                where="peft_config.target_modules",
                got=name,
                next_step="leave it out, or set peft_config.init_lora_weights to true",
            )


def initialize(
    model: PeftModel,
    peft_config: PeftConfig,
    base: Path,
    work: Path,
    batches: Iterable[Mapping[str, torch.Tensor]],
) -> dict[str, torch.Tensor]:
    """Run the initialisations that need data or the base's own weights.

    Args:
        work: a folder that a resumed run finds again.
        batches: inputs of the model by name, from training rows, for EVA.

    Returns:
        The initial A and B by name, which `convert_to_plain_lora` needs; empty if the base's weights are unchanged.
    """
    how = str(peft_config.init_lora_weights)
    if how == "eva":
        from peft import initialize_lora_eva_weights

        # EVA's ranks are part of the result, and computing them again differs in the last bits: a run that resumes
        # from a checkpoint reads them.
        initialize_lora_eva_weights(model, eva_state_dict=_eva_state(model, work / EVA_FILE, batches))
    elif how == "loftq":
        from peft import replace_lora_weights_loftq

        file = base / "model.safetensors"
        # peft finds several files by the model's own path
        replace_lora_weights_loftq(model, str(file) if file.exists() else None)
    if not extracts_from_base(peft_config):
        return {}
    from peft import get_peft_model_state_dict

    state: dict[str, torch.Tensor] = get_peft_model_state_dict(model)
    return {name: tensor.detach().clone() for name, tensor in state.items() if ".lora_" in name}


def _eva_state(model: PeftModel, file: Path, batches: Iterable[Mapping[str, torch.Tensor]]) -> dict[str, torch.Tensor]:
    from peft import get_eva_state_dict
    from safetensors.torch import load_file, save_file

    if not file.exists():
        data = [{key: value.to(model.device) for key, value in batch.items()} for batch in batches]
        state = get_eva_state_dict(model, data, show_progress_bar=False)
        save_file({name: tensor.contiguous() for name, tensor in state.items()}, file.with_suffix(".part"))
        file.with_suffix(".part").replace(file)
    return load_file(file, device=str(model.device))


def convert_to_plain_lora(folder: Path, initial: Mapping[str, torch.Tensor]) -> None:
    """Rewrite a saved PiSSA or OLoRA adapter as LoRA on the base itself: A' = [A; A₀], B' = [B, −B₀].

    Args:
        initial: what `initialize` returned.
    """
    import torch
    from safetensors.torch import load_file, save_file

    file = folder / "adapter_model.safetensors"
    tensors = load_file(file)
    for name, tensor in initial.items():
        first = tensor.to("cpu", tensors[name].dtype)
        if name.endswith(".lora_A.weight"):
            tensors[name] = torch.cat([tensors[name], first])
        else:
            tensors[name] = torch.cat([tensors[name], -first], dim=1)
    save_file(tensors, file, metadata={"format": "pt"})
    config = AdapterConfig.read(folder)
    # alpha/r stays the same when both double; rsLoRA's scale is alpha/√r.
    growth = math.sqrt(2) if config.use_rslora else 2
    config.model_copy(
        update={
            "r": 2 * config.r,
            "lora_alpha": growth * config.lora_alpha,
            "rank_pattern": {key: 2 * rank for key, rank in (config.rank_pattern or {}).items()},
            "alpha_pattern": {key: growth * alpha for key, alpha in (config.alpha_pattern or {}).items()},
            "init_lora_weights": True,
        }
    ).write(folder)


def loraplus(optimizer: torch.optim.Optimizer, model: torch.nn.Module, ratio: float, embedding: float) -> None:
    """Split an optimizer's groups by LoRA+'s learning rates: B and vectors learn `ratio` times as fast as A.

    Source: https://arxiv.org/abs/2402.12354; which parameters are which follows peft's create_loraplus_optimizer.

    Args:
        optimizer: just built; its groups keep their other settings.
        ratio: the learning rate of B divided by that of A, 1 or more.
    """
    names = {id(parameter): name for name, parameter in model.named_parameters()}

    def kind(parameter: torch.nn.Parameter) -> str:
        name = names[id(parameter)]
        if "lora_embedding_" in name or "embed" in name.rsplit(".lora_", 1)[0].rsplit(".", 1)[-1]:
            return "embedding"
        return "B" if "lora_B" in name or parameter.ndim == 1 else "A"

    split = []
    for group in optimizer.param_groups:
        rates = {"A": group["lr"], "B": group["lr"] * ratio, "embedding": embedding}
        for group_kind, rate in rates.items():
            if parameters := [p for p in group["params"] if kind(p) == group_kind]:
                split.append({**group, "params": parameters, "lr": rate})
    optimizer.param_groups.clear()
    for group in split:
        optimizer.add_param_group(group)
