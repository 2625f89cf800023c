"""Build the trainer of a training: choose how it runs on this machine, load the base, and add the adapter."""

from __future__ import annotations

from dataclasses import replace

from loraflow.hardware.device import device_name
from loraflow.training.angles import separate_angles
from loraflow.training.base_model import load_base
from loraflow.training.choices import (
    EngineChoices,
    choose_attention,
    choose_engine,
    choose_sharding,
    refuse_mixed_devices,
    refuse_packing,
    refuse_quantization,
    warn_of_slow_bfloat16,
)
from loraflow.training.document_check import refuse_leaking_documents
from loraflow.training.setup import TrainingSetup
from loraflow.training.trainer import BuiltTrainer


def build_trainer(setup: TrainingSetup) -> BuiltTrainer:
    """Return a trainer that is ready to train, and the choices that were made for it.

    Raises:
        BadConfig: the recipe and the hardware do not fit together.
        MissingExtra: a package that was asked for is not installed.
    """
    import torch
    from transformers import AutoConfig

    config = AutoConfig.from_pretrained(setup.base, trust_remote_code=setup.config.base.trust_remote_code)
    engine = choose_engine(setup, config)
    setup = replace(setup, runtime=setup.runtime.model_copy(update={"engine": engine}))
    attention = choose_attention(setup, config)
    refuse_packing(setup, config)
    refuse_quantization(setup, config)
    refuse_mixed_devices(setup.group, setup.device)
    sharding = choose_sharding(setup)
    model = load_base(setup, attention, sharded=sharding.is_sharded)
    if setup.longrope_switch is not None:
        separate_angles(model, setup)
    if (attention.concatenated or setup.rows.row_length is not None) and not sharding.is_sharded:
        refuse_leaking_documents(
            model,
            setup.tokenizer.pad_token_id,
            is_concatenated=attention.concatenated,
            compute_dtype=getattr(torch, setup.compute_dtype),
        )
    warn_of_slow_bfloat16(setup)
    choices = EngineChoices(
        base_sharded=sharding.is_sharded,
        base_sharded_why=sharding.why,
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
