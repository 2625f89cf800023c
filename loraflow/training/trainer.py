"""trl's SFTTrainer, given rows in our order. `runtime.engine` chooses between two:

- stock: plain trl and peft, a padded or packed grid at a time, trl's own loss.
- fast: an optimizer step is one item of the dataset; its micro-batches, the loss at learned positions alone, LoRA's
  passes, compiled layers and the sum over devices are ours. A test keeps the two equal.
"""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from torch.utils.checkpoint import checkpoint
from torch.utils.data import DataLoader, SequentialSampler
from transformers.trainer_utils import EvalLoopOutput
from trl import SFTTrainer

from loraflow.hardware.group import Group
from loraflow.training.batches import Collator, Steps
from loraflow.training.callbacks import Stopper
from loraflow.training.lora_kernels import set_token_keys
from loraflow.training.loss_head import head_loss

log = logging.getLogger(__name__)


class RatedTrainer(SFTTrainer):
    """SFTTrainer with LoRA+'s learning rates where the recipe has them: (ratio of B's to A's, embeddings' own)."""

    loraplus: tuple[float, float] | None = None

    def create_optimizer(self, model: Any = None) -> torch.optim.Optimizer:
        """Return the optimizer."""
        fresh = self.optimizer is None
        optimizer = super().create_optimizer(model)
        if fresh and self.loraplus is not None:
            from loraflow.adapters.variants import loraplus

            loraplus(optimizer, self.model if model is None else model, *self.loraplus)
        return optimizer


class StockTrainer(RatedTrainer):
    """SFTTrainer over row numbers: the collator fetches the tokens, the sampler keeps the order that it is given."""

    def __init__(self, *, train_rows: np.ndarray, validation_rows: int, collator: Collator, **options: Any):
        super().__init__(
            train_dataset=_numbers(len(train_rows), row=train_rows.tolist()),
            eval_dataset=_numbers(
                validation_rows, row=list(range(validation_rows)), validation=[True] * validation_rows
            ),
            data_collator=collator,
            **options,
        )

    def _get_train_sampler(self, train_dataset: Any = None) -> SequentialSampler:
        return SequentialSampler(train_dataset if train_dataset is not None else self.train_dataset)


def _numbers(count: int, **columns: list[Any]) -> Any:
    from datasets import Dataset

    return Dataset.from_dict(columns) if count else None


class FastTrainer(RatedTrainer):
    """SFTTrainer that takes a whole optimizer step at a time.

    Args:
        steps: what to train on.
        validation: what to measure on, in the same form; none measures nothing.
        group: the devices that train together.
        stopper: knows whether this process was asked to end.
        autocast: dtype of autocast, where the base's own is not the one to compute in.
        options: SFTTrainer's.
    """

    def __init__(
        self,
        *,
        steps: Steps,
        validation: Steps | None,
        group: Group,
        stopper: Stopper,
        autocast: torch.dtype | None = None,
        **options: Any,
    ):
        super().__init__(
            train_dataset=_numbers(len(steps), row=list(range(len(steps)))),
            eval_dataset=_numbers(len(validation or ()), row=list(range(len(validation or ())))),
            data_collator=_only,
            **options,
        )
        self.steps, self.validation, self.group, self.stopper = steps, validation, group, stopper
        self.autocast_dtype = autocast
        peft = getattr(self.model, "get_base_model", None)
        causal = peft() if peft is not None else self.model
        self.decoder, self.head = causal.get_decoder(), causal.get_output_embeddings()
        self.embed = causal.get_input_embeddings()
        self.trained = [p for p in self.model.parameters() if p.requires_grad]
        self.loras: list[Any] = []  # modules that want to know which tokens come next
        self.compiled: list[tuple[Any, Any]] = []  # layers, with their forward as it was
        self._asked: torch.Tensor | None = None  # how many devices were asked to end, one step ago

    def get_train_dataloader(self) -> DataLoader:
        """Return the steps, in their order, the same number on every device."""
        workers = self.args.dataloader_num_workers
        return DataLoader(
            self.steps,  # type: ignore[arg-type]
            batch_size=1,
            collate_fn=_only,
            num_workers=workers,
            persistent_workers=workers > 0,
            pin_memory=self.args.device.type == "cuda",
        )

    def _wrap_model(self, model: Any, training: bool = True, dataloader: Any = None) -> Any:
        # Anything but the model itself keeps accelerate from wrapping it: no DDP, no autocast around the whole.
        return _Bare(model) if training and model is self.model else model

    def training_step(self, model: Any, inputs: dict[str, Any], num_items_in_batch: Any = None) -> torch.Tensor:
        """Run a step's micro-batches forward and backward; return its loss, the mean -log p over learned tokens."""
        if not self.decoder.training:  # it was loaded for evaluation; peft's wrapper around it says nothing of that
            self.model.train()
        total = torch.zeros((), device=self.args.device)
        with self.maybe_activation_offload_context:
            for micro in inputs["micro"]:
                loss = self._compiled_or_not(micro) / max(1, inputs["learned"])
                self.accelerator.backward(loss)
                total += loss.detach()
        if self.group.size > 1:
            asked = torch.tensor(float(self.stopper.asked), device=total.device)
            total, asked = self.group.sum_up(self.trained, total, asked)
            # Read a step late: the device is done with it, so that nothing waits, and all devices end at the same step.
            self.stopper.asked = self._asked is not None and float(self._asked) > 0
            self._asked = asked
        self._total_train_tokens += inputs["tokens"]
        self._metrics["train"]["num_tokens"] = [self._total_train_tokens]
        return total

    def _compiled_or_not(self, micro: dict[str, Any]) -> torch.Tensor:
        """Return a micro-batch's loss; when the compiler fails, say so and go on without it."""
        try:
            return self.nll(micro)
        except Exception as error:
            if not self.compiled or not type(error).__module__.startswith(("torch._dynamo", "torch._inductor")):
                raise
            log.warning("compiling failed, and is left out: %s: %s", type(error).__name__, str(error)[:500])
            for layer, plain in self.compiled:
                again = layer.forward.__closure__ is not None and layer.forward.__name__ == "recomputed"
                layer.forward = _twice(layer, plain, True) if again else plain
            self.compiled = []
            return self.nll(micro)

    def nll(self, micro: dict[str, Any]) -> torch.Tensor:
        """Return the sum of -log p over a micro-batch's learned tokens."""
        device = self.args.device
        batch = {
            key: value.to(device, non_blocking=True) if torch.is_tensor(value) else value
            for key, value in micro.items()
        }
        set_token_keys(self.loras, batch.pop("token_keys", None))
        index, targets = batch.pop("loss_index"), batch.pop("targets")
        with self._precision():
            embedded = self.embed(batch.pop("input_ids"))
            if self.compiled and self.decoder.training and not embedded.requires_grad:
                embedded.requires_grad_()  # the first layer then needs the same code as the others
            hidden = self.decoder(inputs_embeds=embedded, **{"attention_mask": None, **batch}, use_cache=False)
            states = hidden.last_hidden_state.flatten(0, 1).index_select(0, index)
            return head_loss(self.head, states, targets)

    def _precision(self) -> Any:
        if self.autocast_dtype is None:
            return contextlib.nullcontext()
        return torch.autocast(self.args.device.type, self.autocast_dtype)

    def evaluation_loop(self, *args: Any, metric_key_prefix: str = "eval", **options: Any) -> EvalLoopOutput:
        """Measure the mean -log p over the learned tokens of the validation rows."""
        assert self.validation is not None
        self.model.eval()
        total, learned = torch.zeros((), device=self.args.device), 0
        with torch.no_grad():
            for item in self._validation_items():
                total += sum(self.nll(micro) for micro in item["micro"])
                learned += item["learned"]
        if self.group.size > 1:
            (total,) = self.group.sum_up([], total)
        metrics = {f"{metric_key_prefix}_loss": float(total) / max(1, learned)}
        return EvalLoopOutput(None, None, metrics, len(self.validation.rows))  # type: ignore[arg-type]

    def _validation_items(self) -> Iterator[dict[str, Any]]:
        assert self.validation is not None
        return (self.validation[i] for i in range(len(self.validation)))


class _Bare(torch.nn.Module):
    """A model as it is, under a name of its own."""

    def __init__(self, module: Any):
        super().__init__()
        self.module = module


def _only(items: list[Any]) -> Any:
    (item,) = items
    return item


def prepare_layers(trainer: FastTrainer, *, compiled: bool, recomputed: float) -> int:
    """Compile each decoder layer by itself, and let a share of them compute their activations twice.

    With fixed shapes one graph serves all layers. Recomputing stands around the compiled code: inside of it, what our
    own passes keep would be kept all the same.

    Returns:
        how many layers are compiled.
    """
    layers = list(getattr(trainer.decoder, "layers", []))
    torch._dynamo.config.recompile_limit = max(64, torch._dynamo.config.recompile_limit)
    draws = any(isinstance(module, torch.nn.Dropout) and module.p > 0 for module in trainer.decoder.modules())
    for i, layer in enumerate(layers):
        plain = layer.forward
        forward = torch.compile(plain, fullgraph=True, dynamic=False) if compiled else plain
        if compiled:
            trainer.compiled.append((layer, plain))
        # Spread over the depth: which layers they are makes no difference to memory or time.
        if int((i + 1) * recomputed) > int(i * recomputed):
            forward = _twice(layer, forward, draws)
        layer.forward = forward
    return len(trainer.compiled)


def _twice(layer: Any, forward: Any, draws: bool) -> Any:
    def recomputed(*args: Any, **options: Any) -> Any:
        if not (layer.training and torch.is_grad_enabled()):
            return forward(*args, **options)
        return checkpoint(forward, *args, use_reentrant=False, preserve_rng_state=draws, **options)

    return recomputed
