"""Build the trainer of a training: choose how it runs on this machine, load the base, and add the adapter."""

from __future__ import annotations

import logging
from dataclasses import replace
from typing import TYPE_CHECKING

from loraflow.base.architecture import is_tested, read_config
from loraflow.base.longrope import compute_angles_per_document
from loraflow.failures import BadModel
from loraflow.hardware.device import device_name
from loraflow.training.base_model import load_base
from loraflow.training.choices import (
    EngineChoices,
    choose_attention,
    choose_engine,
    choose_sharding,
    refuse_mixed_devices,
    refuse_unsupported,
    warn_of_slow_bfloat16,
)
from loraflow.training.document_check import (
    refuse_leaking_documents,
    refuse_other_generation,
    refuse_padding_that_is_seen,
    refuse_seeing_later_tokens,
)
from loraflow.training.setup import TrainingSetup
from loraflow.training.trainer import BuiltTrainer

if TYPE_CHECKING:
    from transformers import PreTrainedModel

log = logging.getLogger(__name__)


def build_trainer(setup: TrainingSetup) -> BuiltTrainer:
    """Return a trainer that is ready to train, and the choices that were made for it.

    Raises:
        BadConfig: the recipe and the hardware do not fit together.
        MissingExtra: a package that was asked for is not installed.
    """
    config = read_config(setup.base, trust=setup.config.base.trust_remote_code)
    engine = choose_engine(setup, config)
    setup = replace(setup, runtime=setup.runtime.model_copy(update={"engine": engine}))
    attention = choose_attention(setup, config)
    refuse_unsupported(config, is_packed=setup.rows.row_length is not None, quantization=setup.config.base.quantization)
    refuse_mixed_devices(setup.group, setup.device)
    is_sharded, sharding_why = choose_sharding(setup)
    setup = replace(setup, is_sharded=is_sharded)
    model = load_base(setup, attention)
    if setup.longrope_switch is not None:
        separate_angles(model, setup)
    if not is_sharded:
        _check_model(setup, model, is_concatenated=attention.concatenated)
    warn_of_slow_bfloat16(setup)
    choices = EngineChoices(
        base_sharded=is_sharded,
        base_sharded_why=sharding_why,
        engine=engine,
        attention=attention.kernel,
        attention_why=attention.why,
        device=device_name(setup.device),
        dtype=setup.compute_dtype,
    )
    if choices.engine == "fast":
        from loraflow.training.fast_engine import build_fast_trainer

        return build_fast_trainer(setup, model, attention, choices)
    from loraflow.training.stock_engine import build_stock_trainer

    return build_stock_trainer(setup, model, choices)


def _check_model(setup: TrainingSetup, model: PreTrainedModel, *, is_concatenated: bool) -> None:
    """Compute some tokens, and refuse a model whose tokens depend on what they must not see."""
    import torch

    pad_id, dtype = setup.tokenizer.pad_token_id, getattr(torch, setup.compute_dtype)
    if not is_tested(model.config) and not is_concatenated:
        refuse_other_generation(model, pad_id, compute_dtype=dtype)
    refuse_seeing_later_tokens(model, pad_id, is_concatenated=is_concatenated, compute_dtype=dtype)
    if is_concatenated or setup.rows.row_length is not None:
        refuse_leaking_documents(model, pad_id, is_concatenated=is_concatenated, compute_dtype=dtype)
    elif not is_tested(model.config):
        refuse_padding_that_is_seen(model, pad_id, compute_dtype=dtype)


def separate_angles(model: PreTrainedModel, setup: TrainingSetup) -> None:
    """Compute a model's angles for each document, because a call has positions on both sides of the switch.

    Args:
        model: the base, changed in place.

    Raises:
        BadModel: the angles are computed by code that comes with the model.
    """
    switch = setup.longrope_switch
    assert switch is not None
    if not compute_angles_per_document(model, switch):
        raise BadModel(
            "Rows on both sides of the model's longrope switch cannot be computed together: the longest row of a batch "
            "would change the angles of the others.",
            where="base.model",
            expected="rotary embeddings of transformers",
            got=f"architecture {model.config.model_type}, with code of its own",
            next_step=f"set training_config.max_length to {switch}, and data.too_long to drop or truncate",
        )
    log.info("documents of more than %d tokens use longrope's long factors, the others its short factors", switch)
