"""Build the stock trainer: trl and peft unchanged, with padded or packed rows."""

from __future__ import annotations

import functools
import logging
import types
from collections.abc import Callable
from dataclasses import replace
from typing import TYPE_CHECKING, Protocol

import torch
from torch import Tensor
from trl.trainer.utils import FusedCausalLMOutput

from loraflow.adapters.targets import has_routers
from loraflow.base.architecture import is_tested, scales_logits_unknown_to_trl
from loraflow.data.token_labels import IGNORED
from loraflow.failures import BadConfig
from loraflow.training.base_model import adapter_config, initialise_adapter
from loraflow.training.choices import EngineChoices
from loraflow.training.collation import NoiseKeys, RowCollator
from loraflow.training.out_of_memory import MicroBatchSize
from loraflow.training.setup import BatchSettings, TrainingSetup, micro_batch_rows
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
    noise_alpha = setup.settings.neftune_noise_alpha
    arguments.neftune_noise_alpha = None  # not transformers' noise, which depends on the batch, but `add_noise`
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


log = logging.getLogger(__name__)


class _Outputs(Protocol):
    """The outputs of a causal model."""

    logits: Tensor  # [rows, tokens, vocabulary]


_TOLERANCE = 0.01  # nats of a token
_ROUNDING = 0.1  # the same, of logits in 16 bits


def use_own_logits_where_trl_is_wrong(model: PreTrainedModel, compute_dtype: torch.dtype) -> bool:
    """Compare the log probabilities of trl's head with those of the model, and replace trl's if they differ.

    Some models scale or cap their logits, or transform the state before the head, in ways that trl does not know.

    Args:
        model: transformers' model after trl has patched it (`add_fused_lm_head`). Changed in place.
        compute_dtype: the dtype of matrix products.

    Returns:
        whether trl's were replaced. The model's own logits take more memory.
    """
    if is_tested(model.config) or not (scales_logits_unknown_to_trl(model.config) or _differs(model, compute_dtype)):
        return False
    log.info("The loss is computed from the model's own logits: trl's head computes others for this architecture.")
    fused = model.forward
    model.forward = types.MethodType(_with_own_logits(fused), model)
    return True


def _differs(model: PreTrainedModel, compute_dtype: torch.dtype) -> bool:
    ids = torch.arange(12, device=model.device)[None]
    was_training = model.training
    model.eval()
    try:
        with torch.no_grad(), torch.autocast(model.device.type, compute_dtype, enabled=model.dtype != compute_dtype):
            expected = _log_probs(model(input_ids=ids, use_cache=False).logits, ids[:, 1:])[0]
            try:
                found = model(input_ids=ids, labels=ids, fused_lm_head=True).log_probs
            except (AttributeError, TypeError, IndexError, RuntimeError) as error:
                if isinstance(error, torch.OutOfMemoryError):
                    raise
                log.info("trl's head does not fit this architecture: %s", error)
                return True
    finally:
        model.train(was_training)
    tolerance = _TOLERANCE if compute_dtype == torch.float32 else _ROUNDING
    return not bool((found - expected).abs().max() <= tolerance)


def _log_probs(logits: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """Return the log probabilities of labels, 0 where they are ignored, and those of all tokens; in float32."""
    everything = torch.log_softmax(logits[:, :-1].float(), -1)
    mask = labels != IGNORED
    chosen = everything.gather(-1, labels.clamp(min=0)[..., None])[..., 0]
    return chosen.masked_fill(~mask, 0), everything


def _with_own_logits(fused: Callable[..., _Outputs]) -> Callable[..., object]:
    @functools.wraps(fused)
    def forward(
        self: PreTrainedModel,
        *args: Tensor,
        fused_lm_head: bool = False,
        labels: Tensor | None = None,
        **kwargs: Tensor,
    ) -> object:
        if not fused_lm_head or labels is None:
            return fused(*args, **kwargs, **({} if labels is None else {"labels": labels}))
        items = kwargs.pop("num_items_in_batch", None)
        outputs = fused(*args, **kwargs)
        targets = labels[:, 1:]
        mask = targets != IGNORED
        chosen, everything = _log_probs(outputs.logits, targets)
        with torch.no_grad():
            entropy = -(everything.exp() * everything).sum(-1).masked_fill(~mask, 0)
            top = (everything.argmax(-1) == targets) & mask
        return FusedCausalLMOutput(
            loss=-chosen.sum() / (mask.sum().clamp(min=1) if items is None else items),
            log_probs=chosen,
            entropy=entropy,
            is_top1=top,
            label_mask=mask,
            aux_loss=getattr(outputs, "aux_loss", None),
        )

    return forward
