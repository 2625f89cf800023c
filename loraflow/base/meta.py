"""A base's model without its weights, built on torch's meta device: its modules, and the shapes of its parameters."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from loraflow.base.model_config import config_errors, read_config, reason_of
from loraflow.failures import BadModel

if TYPE_CHECKING:
    from transformers import PreTrainedModel


def model_without_weights(base: Path, *, trust: bool = False) -> PreTrainedModel:
    """Build a base's model from its config.json. This takes well under a second and no memory for weights.

    Args:
        base: the model's folder; only its configuration is read.
        trust: run Python code that comes with the model.

    Raises:
        BadModel: the folder has no config of a causal model that transformers knows.
    """
    import torch
    from transformers import AutoModelForCausalLM

    config = read_config(base, trust=trust)
    try:
        with torch.device("meta"):
            model: PreTrainedModel = AutoModelForCausalLM.from_config(
                config,
                trust_remote_code=trust,
                attn_implementation="eager",  # the config's kernel may not be installed
            )
    except config_errors() as error:
        raise BadModel(
            "The base's model cannot be built from its configuration.",
            where=str(base),
            expected="config.json of a causal model",
            got=reason_of(error),
            next_step="fetch config.json again, or choose another base",
        ) from error
    return model
