"""Build the stock trainer: trl and peft, with padded or packed rows."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

import torch

from loraflow.adapters.targets import has_routers
from loraflow.failures import BadConfig
from loraflow.training.arguments import BatchSettings
from loraflow.training.base_model import adapter_config, initialise_adapter
from loraflow.training.choices import EngineChoices
from loraflow.training.collation import NoiseKeys, RowCollator
from loraflow.training.out_of_memory import MicroBatchSize
from loraflow.training.schedule import micro_batch_rows
from loraflow.training.setup import TrainingSetup
from loraflow.training.stock_head import use_own_logits_where_trl_is_wrong
from loraflow.training.trainer import BuiltTrainer, StockTrainer

if TYPE_CHECKING:
    from transformers import PreTrainedModel


def build_stock_trainer(setup: TrainingSetup, model: PreTrainedModel, choices: EngineChoices) -> BuiltTrainer:
    """Build the trainer.

    Raises:
        BadConfig: the devices do not divide the global batch.
    """
    global_batch, devices = setup.config.training_config.global_batch, setup.group.size
    share = max(1, global_batch // devices)
    if share * devices != global_batch:
        raise BadConfig(
            "The stock engine needs a global batch that its devices divide.",
            where="runtime.devices",
            expected=f"a divisor of {global_batch}",
            got=str(devices),
            next_step="set runtime.engine to fast",
        )
    rows = micro_batch_rows(share, setup.runtime.micro_batch or setup.settings.per_device_train_batch_size)
    batch_settings = BatchSettings(
        rows=rows,
        accumulation=share // rows,
        gradient_checkpointing=setup.uses_gradient_checkpointing,
        gradient_checkpointing_kwargs=setup.settings.gradient_checkpointing_kwargs,
    )
    arguments = setup.trainer_arguments(batch_settings, setup.runtime.engine)
    noise_alpha, arguments.neftune_noise_alpha = (
        arguments.neftune_noise_alpha,
        None,
    )  # not transformers' noise: see `neftune`
    if not getattr(model.config.get_text_config(), "num_experts", 0) or not has_routers(model):
        # trl adds a loss of the router wherever a config has a coefficient for it: Granite 4's and Doge's have, also
        # without experts.
        arguments.router_aux_loss_coef = 0.0
    trainer = StockTrainer(
        model=model,
        args=arguments,
        train_rows=setup.order,
        validation_rows=len(setup.validation) if setup.validation is not None else 0,
        collator=RowCollator(
            setup.rows,
            setup.validation,
            setup.tokenizer.pad_token_id,
            with_positions=setup.longrope_switch is not None,
            noise=None if noise_alpha is None else NoiseKeys(setup.settings.seed, global_batch),
        ),
        noise_alpha=noise_alpha,
        processing_class=setup.tokenizer,
        peft_config=adapter_config(setup, model),
        callbacks=setup.callbacks,
    )
    wrapped = getattr(trainer.model, "get_base_model", None)
    use_own_logits_where_trl_is_wrong(
        trainer.model if wrapped is None else wrapped(), getattr(torch, setup.compute_dtype)
    )
    return BuiltTrainer(
        trainer,
        replace(choices, micro_batch_rows=rows),
        MicroBatchSize(setup.longest_row, rows=rows),
        initialise_adapter(setup, trainer),
    )
