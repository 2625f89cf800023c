"""Build the trainer of a training: choose how it runs on this machine, load the base, and add the adapter."""

from __future__ import annotations

from loraflow.hardware.device import device_name
from loraflow.training.base_model import load_base
from loraflow.training.choices import (
    EngineChoices,
    choose_attention,
    choose_engine,
    choose_sharding,
    refuse_mixed_devices,
    warn_of_slow_bfloat16,
)
from loraflow.training.setup import TrainingSetup
from loraflow.training.trainer import BuiltTrainer


def build_trainer(setup: TrainingSetup) -> BuiltTrainer:
    """Return a trainer that is ready to train, and the choices that were made for it.

    Raises:
        BadConfig: the recipe and the hardware do not fit together.
        MissingExtra: a package that was asked for is not installed.
    """
    from transformers import AutoConfig

    trust = setup.config.base.trust_remote_code
    attention = choose_attention(setup, AutoConfig.from_pretrained(setup.base, trust_remote_code=trust))
    refuse_mixed_devices(setup.group, setup.device)
    sharding = choose_sharding(setup)
    model = load_base(setup, attention, sharded=sharding.is_sharded)
    warn_of_slow_bfloat16(setup)
    choices = EngineChoices(
        base_sharded=sharding.is_sharded,
        base_sharded_why=sharding.why,
        engine=choose_engine(setup, model),
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
