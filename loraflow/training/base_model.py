"""Load the base for training, and initialise its adapter."""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING

from loraflow.adapters import variants
from loraflow.adapters.lora_config import check_targets, check_trainable, lora_config
from loraflow.adapters.targets import find_targets
from loraflow.base.load import load_model
from loraflow.hardware.attention import Attention
from loraflow.training.choices import refuse_fp8, shard
from loraflow.training.collation import padded_documents
from loraflow.training.setup import TrainingSetup

if TYPE_CHECKING:
    from peft import LoraConfig
    from torch import Tensor
    from transformers import PreTrainedModel

    from loraflow.config.lora import PeftConfig
    from loraflow.training.trainer import LoraTrainer

log = logging.getLogger(__name__)


def load_base(setup: TrainingSetup, attention: Attention) -> PreTrainedModel:
    """Load the base with the chosen attention, with loralib's layers if the recipe's method is loralib.

    Raises:
        BadConfig: a target module matches nothing, or the device cannot compute in the base's format.
        MissingExtra: NF4 without CUDA or bitsandbytes.
    """
    base, peft_config = setup.config.base, setup.config.peft_config
    if base.quantization == "fp8":
        refuse_fp8(setup)
    model: PreTrainedModel = load_model(
        setup.base,
        base.dtype,
        setup.runtime,
        double_quantization=base.double_quantization if base.quantization == "nf4" else None,
        trust=base.trust_remote_code,
        attention=attention.implementation,
        weights_device="cpu" if setup.is_sharded else None,
    )
    model.config.use_cache = setup.runtime.use_cache
    check_adapter(model, peft_config)
    targets = find_targets(model, peft_config)
    (log.warning if targets.experts else log.info)("%s", targets.summary())
    if setup.config.method == "loralib":
        from loraflow.adapters.loralib.model import prepare
        from loraflow.adapters.loralib.swap import Settings

        settings = Settings.of(peft_config, setup.config.loralib_config)
        model = prepare(model, settings, setup.settings.seed, checkpointing=setup.uses_gradient_checkpointing)
    return shard(model, setup.device, setup.group.size) if setup.is_sharded else model


def check_adapter(model: PreTrainedModel, peft_config: PeftConfig) -> None:
    """Refuse, before training, an adapter of which a setting has no effect in the base, or that cannot be merged.

    Raises:
        BadConfig: see `check_targets`, `check_trainable` and `variants.check`.
    """
    check_targets(model, peft_config)
    check_trainable(model, peft_config)
    variants.check(model, peft_config)


def adapter_config(setup: TrainingSetup, model: PreTrainedModel) -> LoraConfig | None:
    """Return peft's config for a base; None for loralib, whose layers are in the model already."""
    return lora_config(setup.config.peft_config, model) if setup.config.method == "peft" else None


def initialise_adapter(setup: TrainingSetup, trainer: LoraTrainer) -> dict[str, Tensor]:
    """Run the initialisations that need data or the base's weights, and set LoRA+'s learning rates.

    Returns:
        the initial state of PiSSA and OLoRA, which is subtracted when the adapter is saved; empty for all others.
    """
    peft_config = setup.config.peft_config
    rows = (setup.rows[int(row)] for row in setup.order[: variants.EVA_ROWS])
    by_document = setup.longrope_switch is not None
    batches = padded_documents(rows, setup.tokenizer.pad_token_id, with_positions=by_document)
    initial: dict[str, Tensor] = variants.initialize(trainer.model, peft_config, setup.base, setup.work, batches)
    if peft_config.loraplus_lr_ratio:
        trainer.loraplus = (peft_config.loraplus_lr_ratio, peft_config.loraplus_lr_embedding)
    return initial
