"""PEFT's variants of LoRA around training: what they need before the first step, and how they become plain LoRA after it.

PiSSA and OLoRA take the initial product out of the base: W = W' + s·B₀A₀, and train B, A on W'. What is saved is the
difference, s·(BA − B₀A₀), as LoRA of twice the rank on W itself, so that the adapter fits the base that everybody has.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from loraflow.config.recipe import PeftConfig
from loraflow.failures import BadConfig

EVA_FILE = "eva.safetensors"  # in the work folder, and with each checkpoint
EVA_ROWS = 256  # rows whose activations EVA decomposes; it goes over them again until the vectors stand still


def changes_base(peft_config: PeftConfig) -> bool:
    """Tell whether an initialisation takes its product out of the base's weights."""
    return str(peft_config.init_lora_weights).startswith(("pissa", "olora"))


def check(model: Any, peft_config: PeftConfig) -> None:
    """Refuse what could be trained, but not merged into one checkpoint, before any token is trained.

    Raises:
        BadConfig: a whole module of tied weights, or an embedding that PiSSA or OLoRA would have to decompose.
    """
    import torch

    tied = getattr(model.config, "tie_word_embeddings", False)
    ends = {id(model.get_input_embeddings()), id(model.get_output_embeddings())}
    for name in peft_config.modules_to_save or []:
        if tied and any(id(m) in ends and (n == name or n.endswith(f".{name}")) for n, m in model.named_modules()):
            raise BadConfig(
                f"{name} cannot be trained as a whole in this base: embedding and head are one weight, and the merged "
                "model would have two.",
                where="peft_config.modules_to_save",
                next_step="leave it out, or train single tokens: peft_config.trainable_token_indices",
            )
    targets = peft_config.target_modules
    for name, module in model.named_modules() if changes_base(peft_config) and isinstance(targets, list) else ():
        if isinstance(module, torch.nn.Embedding) and any(name == t or name.endswith(f".{t}") for t in targets):
            raise BadConfig(
                f"{peft_config.init_lora_weights} does not decompose embeddings.",
                where="peft_config.target_modules",
                got=name,
                next_step="leave it out, or set peft_config.init_lora_weights to true",
            )
    vocabulary = model.get_input_embeddings().weight.shape[0]
    tokens = peft_config.trainable_token_indices or []
    for index in tokens if isinstance(tokens, list) else [one for ids in tokens.values() for one in ids]:
        if not 0 <= index < vocabulary:
            raise BadConfig(
                "There is no such token.",
                where="peft_config.trainable_token_indices",
                expected=f"0 to {vocabulary - 1}",
                got=str(index),
            )


def begin(
    model: Any, peft_config: PeftConfig, base: Path, work: Path, batches: Iterable[dict[str, Any]]
) -> dict[str, Any]:
    """Initialise what needs data or the base's own weights, and return the state that `as_lora` needs.

    Args:
        model: peft's, just built.
        peft_config: the recipe's.
        base: the base's folder, for LoftQ.
        work: folder that a resumed run finds again.
        batches: of training rows, for EVA: inputs of the model by name.
    """
    how = str(peft_config.init_lora_weights)
    if how == "eva":
        from peft import initialize_lora_eva_weights

        # Its ranks are part of the result, and a second computation differs in the last bits: a resumed run reads it.
        initialize_lora_eva_weights(model, eva_state_dict=_eva_state(model, work / EVA_FILE, batches))
    elif how == "loftq":
        from peft import replace_lora_weights_loftq

        replace_lora_weights_loftq(model, _one_file(base))
    if not changes_base(peft_config):
        return {}
    from peft import get_peft_model_state_dict

    state = get_peft_model_state_dict(model)
    return {name: tensor.detach().clone() for name, tensor in state.items() if ".lora_" in name}


def _eva_state(model: Any, file: Path, batches: Iterable[dict[str, Any]]) -> dict[str, Any]:
    from peft import get_eva_state_dict
    from safetensors.torch import load_file, save_file

    if not file.exists():
        data = [{key: value.to(model.device) for key, value in batch.items()} for batch in batches]
        state = get_eva_state_dict(model, data, show_progress_bar=False)
        save_file({name: tensor.contiguous() for name, tensor in state.items()}, file.with_suffix(".part"))
        file.with_suffix(".part").replace(file)
    return load_file(file, device=str(model.device))


def _one_file(base: Path) -> str | None:
    file = base / "model.safetensors"
    return str(file) if file.exists() else None  # several: peft finds them by the model's own path


def as_lora(folder: Path, initial: dict[str, Any]) -> None:
    """Rewrite a saved PiSSA or OLoRA adapter as LoRA on the base itself: A' = [A; A₀], B' = [B, −B₀].

    Args:
        folder: what peft saved.
        initial: the state of `begin`.
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
    config_file = folder / "adapter_config.json"
    config = json.loads(config_file.read_text(encoding="utf-8"))
    # alpha/r stays as it was when both double; rsLoRA's is alpha/√r.
    wider = math.sqrt(2) if config.get("use_rslora") else 2
    config["r"], config["lora_alpha"] = 2 * config["r"], wider * config["lora_alpha"]
    config["rank_pattern"] = {key: 2 * value for key, value in (config.get("rank_pattern") or {}).items()}
    config["alpha_pattern"] = {key: wider * value for key, value in (config.get("alpha_pattern") or {}).items()}
    config["init_lora_weights"] = True
    config_file.write_text(json.dumps(config, indent=2, sort_keys=True) + "\n", encoding="utf-8")


def loraplus(optimizer: Any, model: Any, ratio: float, embedding: float) -> None:
    """Give B, and what has one dimension, a learning rate `ratio` times A's, as LoRA+ does, and embeddings their own.

    Source: https://arxiv.org/abs/2402.12354; which parameters are which follows peft's create_loraplus_optimizer.

    Args:
        optimizer: just built; its groups are split, and keep all else.
        model: whose parameters it holds.
        ratio: of the two learning rates, 1 or more.
        embedding: learning rate of adapters on embeddings.
    """
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    rates = {
        "A": lambda rate: rate,
        "B": lambda rate: rate * ratio,
        "embedding": lambda rate: embedding,
    }

    def kind(parameter: Any) -> str:
        name = names[id(parameter)]
        if "lora_embedding_" in name or "embed" in name.rsplit(".lora_", 1)[0].rsplit(".", 1)[-1]:
            return "embedding"
        return "B" if "lora_B" in name or parameter.ndim == 1 else "A"

    split = []
    for group in optimizer.param_groups:
        for which, rate in rates.items():
            if parameters := [p for p in group["params"] if kind(p) == which]:
                split.append({**group, "params": parameters, "lr": rate(group["lr"])})
    optimizer.param_groups.clear()
    for group in split:
        optimizer.add_param_group(group)
