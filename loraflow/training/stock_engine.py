"""The stock engine: its trainer is trl's and peft's, unchanged, with padded or packed rows."""

from __future__ import annotations

import functools
import logging
import types
from collections.abc import Callable
from dataclasses import replace
from typing import TYPE_CHECKING, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.utils.data import SequentialSampler
from trl.trainer.utils import FusedCausalLMOutput

from loraflow.adapters.targets import has_routers
from loraflow.base.architecture import is_tested, scales_logits_unlike_trl
from loraflow.data.tokens.token_labels import IGNORED
from loraflow.failures import BadConfig
from loraflow.training.base_model import adapter_config, initialise_adapter
from loraflow.training.choices import EngineChoices
from loraflow.training.collation import Grid, NoiseKeys, RowCollator, label_weights
from loraflow.training.document_check import evaluating
from loraflow.training.lora_kernels import add_noise
from loraflow.training.memory import MicroBatchSize
from loraflow.training.setup import BatchSettings, TrainingSetup, micro_batch_rows, trainer_arguments
from loraflow.training.trainer import BuiltTrainer, LoraTrainer, TrainerOptions, numbers_dataset

if TYPE_CHECKING:
    from typing import Unpack

    from datasets import Dataset
    from transformers import PreTrainedModel

log = logging.getLogger(__name__)


def build_stock_trainer(setup: TrainingSetup, model: PreTrainedModel, choices: EngineChoices) -> BuiltTrainer:
    """Build the trainer.

    Raises:
        BadConfig: the devices do not divide the global batch.
    """
    global_batch, devices = setup.config.training_config.global_batch, setup.group.size
    share = max(1, global_batch // devices)
    if share * devices != global_batch:
        raise BadConfig(
            "The stock engine needs a global batch that is a multiple of the number of devices.",
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
    arguments = trainer_arguments(setup, batch_settings, setup.runtime.engine)
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
    use_own_logits_where_trl_is_wrong(trainer.causal_model(), getattr(torch, setup.compute_dtype))
    return BuiltTrainer(
        trainer,
        replace(choices, micro_batch_rows=rows),
        MicroBatchSize(setup.longest_row, rows=rows),
        initialise_adapter(setup, trainer),
    )


class _FusedOutputs(Protocol):
    """The outputs of a model with trl's fused head."""

    log_probs: Tensor  # log p of all labels but the first [rows, tokens - 1]


class StockTrainer(LoraTrainer):
    """SFTTrainer whose dataset is row numbers. The collator fetches the tokens; the sampler keeps the given order.

    Args:
        train_rows: row numbers in the order of training.
        noise_alpha: the scale of NEFTune's noise; None trains without it.
    """

    def __init__(
        self,
        *,
        train_rows: NDArray[np.int64],
        validation_rows: int,
        collator: RowCollator,
        noise_alpha: float | None = None,
        **options: Unpack[TrainerOptions],
    ):
        validation = list(range(validation_rows))
        super().__init__(
            train_dataset=numbers_dataset({"row": train_rows.tolist(), "position": list(range(len(train_rows)))}),
            eval_dataset=numbers_dataset({"row": validation, "validation": [True] * validation_rows}),
            data_collator=collator,
            **options,
        )
        self._noise: tuple[Tensor, Tensor] | None = None  # keys and documents' lengths of the next batch's tokens
        if noise_alpha is not None:
            self.causal_model().get_input_embeddings().register_forward_hook(
                functools.partial(self._with_noise, noise_alpha)
            )

    def _with_noise(
        self, alpha: float, module: torch.nn.Module, inputs: tuple[Tensor, ...], embedded: Tensor
    ) -> Tensor:
        """Return the embeddings of a training batch with NEFTune's noise. A forward hook."""
        if self._noise is None or not module.training:
            return embedded
        keys, document_lengths = self._noise
        return add_noise(embedded, keys, document_lengths, alpha)

    def _get_num_items_in_batch(self, batch_samples: list[Grid], device: torch.device) -> Tensor | int | None:
        """Return the number of supervised tokens of an optimizer step on all devices; with weights, their sum."""
        if not any("loss_weights" in batch for batch in batch_samples):
            count: Tensor | int | None = super()._get_num_items_in_batch(batch_samples, device)
            return count
        weight = sum(float(label_weights(batch).sum(dtype=torch.float64)) for batch in batch_samples)
        total = torch.tensor(weight, dtype=torch.float32, device=device)
        if self.args.average_tokens_across_devices and self.args.world_size > 1:
            total = self.accelerator.gather(total).sum()
        return total

    def compute_loss(
        self,
        model: Callable[..., _FusedOutputs],
        inputs: Grid,
        return_outputs: bool = False,
        num_items_in_batch: Tensor | None = None,
    ) -> Tensor | tuple[Tensor, _FusedOutputs]:
        """Return trl's loss. With weights, it is the weighted mean over the tokens of the optimizer step."""
        keys, document_lengths = inputs.pop("token_keys", None), inputs.pop("document_lengths", None)
        self._noise = None if keys is None or document_lengths is None else (keys, document_lengths)
        if "loss_weights" in inputs:
            weights = label_weights(inputs)
            count = (inputs["labels"][:, 1:] != IGNORED).sum()
            # trl divides by the number of labels of this batch in evaluation, by that of the whole step in training.
            share = weights * count / weights.sum() if num_items_in_batch is None else weights / num_items_in_batch
            model = _with_weights(model, share)
            num_items_in_batch = None if num_items_in_batch is None else weights.new_ones(())
            del inputs["loss_weights"]
        loss: Tensor | tuple[Tensor, _FusedOutputs] = super().compute_loss(
            model, inputs, return_outputs=return_outputs, num_items_in_batch=num_items_in_batch
        )
        return loss

    def validation_nll(self) -> tuple[float, float, int]:
        """Sum over the batches of the validation rows. Each device computes all of them."""
        assert self.eval_dataset is not None
        total, weight, rows = 0.0, 0.0, len(self.eval_dataset)
        for first in range(0, rows, self.args.per_device_eval_batch_size):
            last = min(rows, first + self.args.per_device_eval_batch_size)
            inputs = self._prepare_inputs(self.data_collator([self.eval_dataset[row] for row in range(first, last)]))
            if "loss_weights" in inputs:
                share = float(label_weights(inputs).sum(dtype=torch.float64))
            else:
                share = float((inputs["labels"][:, 1:] != IGNORED).sum())
            with self.compute_loss_context_manager():
                loss = self.compute_loss(self.model, inputs)
            assert isinstance(loss, torch.Tensor)
            total += float(loss) * share if share else 0.0
            weight += share
        return total, weight, rows

    def _get_train_sampler(self, train_dataset: Dataset | None = None) -> SequentialSampler:
        return SequentialSampler(train_dataset if train_dataset is not None else self.train_dataset)


def _with_weights(model: Callable[..., _FusedOutputs], factors: Tensor) -> Callable[..., _FusedOutputs]:
    """Return a model whose log probabilities of the labels are multiplied by factors."""

    def weighted(**inputs: object) -> _FusedOutputs:
        outputs = model(**inputs)
        if inputs.get("fused_lm_head"):
            outputs.log_probs = outputs.log_probs * factors
        return outputs

    return weighted


class _Outputs(Protocol):
    """The outputs of a causal model."""

    logits: Tensor  # [rows, tokens, vocabulary]


_TOLERANCE = 0.01  # largest difference of a token's log probability, in nats
_TOLERANCE_16_BITS = 0.1  # the same, for logits in 16 bits


def use_own_logits_where_trl_is_wrong(model: PreTrainedModel, compute_dtype: torch.dtype) -> bool:
    """Compare the log probabilities of trl's head with those of the model, and replace trl's if they differ.

    Some models scale or cap their logits, or transform the state before the head, in ways that trl does not know.

    Args:
        model: transformers' model after trl has patched it (`add_fused_lm_head`). Changed in place.

    Returns:
        whether trl's were replaced. The model's own logits take more memory.
    """
    config = model.config
    if not scales_logits_unlike_trl(config) and (is_tested(config) or not _differs(model, compute_dtype)):
        return False
    log.info("trl's head computes other logits than this model, so the loss is computed from the model's logits.")
    fused = model.forward
    model.forward = types.MethodType(_with_own_logits(fused), model)
    return True


def _differs(model: PreTrainedModel, compute_dtype: torch.dtype) -> bool:
    ids = torch.arange(12, device=model.device)[None]
    with evaluating(model, compute_dtype):
        expected = _log_probs(model(input_ids=ids, use_cache=False).logits, ids[:, 1:])[0]
        try:
            found = model(input_ids=ids, labels=ids, fused_lm_head=True).log_probs
        except (AttributeError, TypeError, IndexError, RuntimeError) as error:
            if isinstance(error, torch.OutOfMemoryError):
                raise
            log.info("trl's head does not fit this architecture: %s", error)
            return True
    tolerance = _TOLERANCE if compute_dtype == torch.float32 else _TOLERANCE_16_BITS
    return not bool((found - expected).abs().max() <= tolerance)


def _log_probs(logits: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """Return the log probabilities of labels, 0 where they are ignored, and those of all tokens; in float32."""
    of_all = torch.log_softmax(logits[:, :-1].float(), -1)
    of_labels = of_all.gather(-1, labels.clamp(min=0)[..., None])[..., 0]
    return of_labels.masked_fill(labels == IGNORED, 0), of_all


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
        of_labels, of_all = _log_probs(outputs.logits, targets)
        with torch.no_grad():
            entropy = -(of_all.exp() * of_all).sum(-1).masked_fill(~mask, 0)
            top = (of_all.argmax(-1) == targets) & mask
        return FusedCausalLMOutput(
            loss=-of_labels.sum() / (mask.sum().clamp(min=1) if items is None else items),
            log_probs=of_labels,
            entropy=entropy,
            is_top1=top,
            label_mask=mask,
            aux_loss=getattr(outputs, "aux_loss", None),
        )

    return forward
