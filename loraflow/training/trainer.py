"""The fast engine's trainer, and what it shares with the stock engine's (`stock_engine`). Both subclass trl's SFTTrainer.

An item of FastTrainer's dataset is a whole optimizer step. Batches, loss, LoRA kernels, compiled layers and the all-reduce
are loraflow's own. A test checks that both engines give the same results.
"""

from __future__ import annotations

import contextlib
import logging
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, TypedDict, TypeVar

import torch
from torch import Tensor
from torch.utils.data import DataLoader
from transformers.trainer_utils import EvalLoopOutput
from trl import SFTTrainer

from loraflow.base.architecture import logit_factor
from loraflow.hardware.process_group import ProcessGroup
from loraflow.training.batches import StepDataset, StepItem
from loraflow.training.collation import MicroBatch, move_inputs
from loraflow.training.cuda_graphs import GraphedPass
from loraflow.training.layers import CompiledLayer
from loraflow.training.lora_kernels import FastLora, add_noise, set_token_keys
from loraflow.training.loss_head import head_loss

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence
    from typing import Unpack

    from datasets import Dataset
    from peft import LoraConfig
    from transformers import PreTrainedModel, PreTrainedTokenizerBase, TrainerCallback
    from trl import SFTConfig

    from loraflow.training.choices import EngineChoices
    from loraflow.training.memory import MicroBatchSize

log = logging.getLogger(__name__)
T = TypeVar("T")


class TrainerOptions(TypedDict):
    """What both engines' trainers pass on to SFTTrainer. The model is without peft's adapter."""

    model: PreTrainedModel
    args: SFTConfig
    processing_class: PreTrainedTokenizerBase
    peft_config: LoraConfig | None
    callbacks: list[TrainerCallback]


class LoraTrainer(SFTTrainer):  # type: ignore[misc]
    """SFTTrainer that trains an adapter: what both engines need.

    It writes no model cards. trl and peft write three for each checkpoint, which take longer than saving a small adapter,
    and `loraflow publish` writes the card of a model.
    """

    loraplus: tuple[float, float] | None = None  # LoRA+'s learning rates: ratio of B's to A's, rate of embeddings

    def __init__(self, *args: Any, **options: Any):
        super().__init__(*args, **options)
        if hasattr(self.model, "create_or_update_model_card"):  # peft's
            self.model.create_or_update_model_card = lambda folder: None

    def create_model_card(self, *args: object, **options: object) -> None:
        """Write no card."""

    def create_optimizer(self, model: torch.nn.Module | None = None) -> torch.optim.Optimizer:
        """Return the optimizer, and set LoRA+'s learning rates when it is first created."""
        is_new = self.optimizer is None
        optimizer: torch.optim.Optimizer = super().create_optimizer(model)
        if is_new and self.loraplus is not None:
            from loraflow.adapters.variants import loraplus

            loraplus(optimizer, self.model if model is None else model, *self.loraplus)
        return optimizer

    def causal_model(self) -> PreTrainedModel:
        """Return the model without peft's wrapper."""
        get_base_model = getattr(self.model, "get_base_model", None)
        causal: PreTrainedModel = self.model if get_base_model is None else get_base_model()
        return causal

    def evaluation_loop(self, *_: object, metric_key_prefix: str = "eval", **__: object) -> EvalLoopOutput:
        """Return the mean -log p of the supervised tokens of the validation rows, weighted as in training.

        Trainer's own loop returns the mean of the batches' means. Its sampler also repeats rows, so that all devices have
        equally many.
        """
        self.model.eval()
        with torch.no_grad():
            total, weight, rows = self.validation_nll()
        return EvalLoopOutput(None, None, {f"{metric_key_prefix}_loss": total / (weight or 1)}, rows)  # type: ignore[arg-type]

    def validation_nll(self) -> tuple[float, float, int]:
        """Return the weighted sum of -log p over the supervised tokens of the validation rows, the sum of the weights, and
        the number of rows.
        """
        raise NotImplementedError


def numbers_dataset(columns: Mapping[str, Sequence[int]]) -> Dataset | None:
    """Return the columns as a dataset; None if they are empty."""
    from datasets import Dataset

    return Dataset.from_dict(columns) if len(columns["row"]) else None


def retry_uncompiled(layers: list[CompiledLayer], compute: Callable[[], Tensor]) -> Tensor:
    """Return what `compute` returns. If the compiler fails, log it, undo the layers' compilation, and compute again."""
    try:
        return compute()
    except Exception as error:
        if not layers or not type(error).__module__.startswith(("torch._dynamo", "torch._inductor")):
            raise
        log.warning("compiling failed; training continues without it: %s: %s", type(error).__name__, str(error)[:500])
        for compiled in layers:
            compiled.undo()
        layers.clear()
        return compute()


class DecoderPass:
    """The pass of a micro-batch through a base with adapters, up to the states from which tokens are learned. A mixin."""

    decoder: PreTrainedModel
    embed: torch.nn.Module
    trained: Sequence[torch.nn.Parameter]
    loras: Sequence[FastLora] = ()  # layers that need the keys of the next tokens
    compiled_layers: list[CompiledLayer]
    graphs: GraphedPass | None = None
    autocast_dtype: torch.dtype | None = None  # None computes in the base's dtype
    noise_alpha: float | None = None  # the scale of NEFTune's noise; None trains without it

    def learned_states(self, micro: MicroBatch, device: torch.device | str) -> tuple[Tensor, Tensor, Tensor | None]:
        """Return the states [n, width] that predict a micro-batch's supervised tokens, these tokens, and their weights."""
        tensors, lengths = move_inputs(micro, device)
        index, targets, weights = tensors.pop("loss_index"), tensors.pop("targets"), tensors.pop("loss_weights", None)
        is_graphed = self.graphs is not None and self.decoder.training and torch.is_grad_enabled()
        hidden = self.graphs(tensors, lengths) if self.graphs and is_graphed else self.hidden_states(tensors, lengths)
        return hidden.flatten(0, 1).index_select(0, index), targets, weights

    def hidden_states(self, tensors: Mapping[str, Tensor], lengths: Mapping[str, int]) -> Tensor:
        """Return the decoder's last hidden states [rows, tokens, width].

        Args:
            tensors: the micro-batch's tensors on the device: ids, positions, document borders, keys for dropout and noise.
        """
        inputs = dict(tensors)
        keys, document_lengths = inputs.pop("token_keys", None), inputs.pop("document_lengths", None)
        set_token_keys(self.loras, keys)
        with self._autocast(tensors["input_ids"].device):
            embedded = self.embed(inputs.pop("input_ids"))
            if self.noise_alpha is not None and self.decoder.training and keys is not None:
                assert document_lengths is not None
                embedded = add_noise(embedded, keys, document_lengths, self.noise_alpha)
            if self.compiled_layers and self.decoder.training and not embedded.requires_grad:
                embedded.requires_grad_()  # so that the first layer uses the same compiled code as the others
            outputs = self.decoder(
                inputs_embeds=embedded, **{"attention_mask": None, **inputs, **lengths}, use_cache=False
            )
        hidden: Tensor = outputs.last_hidden_state
        return hidden

    def _autocast(self, device: torch.device) -> torch.autocast | contextlib.nullcontext[None]:
        if self.autocast_dtype is None:
            return contextlib.nullcontext()
        return torch.autocast(device.type, self.autocast_dtype)


class FastTrainer(DecoderPass, LoraTrainer):
    """SFTTrainer whose training step is a whole optimizer step.

    Args:
        autocast: dtype of autocast; None computes in the base's dtype.
        noise_alpha: the scale of NEFTune's noise; None trains without it.
    """

    def __init__(
        self,
        *,
        steps: StepDataset,
        validation: StepDataset | None,
        group: ProcessGroup,
        autocast: torch.dtype | None,
        noise_alpha: float | None = None,
        **options: Unpack[TrainerOptions],
    ):
        super().__init__(
            train_dataset=numbers_dataset({"row": list(range(len(steps)))}),
            eval_dataset=numbers_dataset({"row": list(range(len(validation) if validation is not None else 0))}),
            data_collator=_only,
            **options,
        )
        self.steps, self.validation, self.group = steps, validation, group
        self.autocast_dtype, self.noise_alpha = autocast, noise_alpha
        causal = self.causal_model()
        self.decoder = causal.get_decoder()  # type: ignore[no-untyped-call]
        self.head: torch.nn.Module = causal.get_output_embeddings()  # type: ignore[no-untyped-call]
        factor = logit_factor(causal.config)
        assert factor is not None, "another engine is chosen for such a model"
        self.logit_factor = factor
        self.embed = causal.get_input_embeddings()
        self.trained = [p for p in self.model.parameters() if p.requires_grad]
        self.compiled_layers = []

    def get_train_dataloader(self) -> DataLoader[StepItem]:
        """Return a loader of the steps in their order. Every device has the same number of them."""
        workers = self.args.dataloader_num_workers
        return DataLoader(
            self.steps,
            batch_size=1,
            collate_fn=_only,
            num_workers=workers,
            persistent_workers=workers > 0,
            pin_memory=self.args.device.type == "cuda",
        )

    def _wrap_model(
        self, model: torch.nn.Module, training: bool = True, dataloader: DataLoader[StepItem] | None = None
    ) -> torch.nn.Module:
        # accelerate wraps only the model itself. Given another module, it adds neither DDP nor autocast.
        return _Unwrapped(model) if training and model is self.model else model

    def training_step(
        self, model: torch.nn.Module, inputs: StepItem, num_items_in_batch: Tensor | int | None = None
    ) -> Tensor:
        """Run forward and backward of a step's micro-batches; return its loss: the mean -log p of the supervised tokens,
        weighted by their weights.
        """
        if not self.decoder.training:  # the base was loaded in evaluation mode, which peft's wrapper hides
            self.model.train()
        if self.graphs is not None and self.graphs.is_on:
            self.graphs.start_step()
        total = torch.zeros((), device=self.args.device)
        with self.maybe_activation_offload_context:
            for micro in inputs["micro_batches"]:
                loss = self.micro_batch_loss(micro) / (inputs["loss_weight"] or 1)
                self.accelerator.backward(loss)
                total += loss.detach()
        if self.group.size > 1:
            (total,) = self.group.all_reduce_gradients(self.trained, total)
        self._total_train_tokens += inputs["tokens"]
        self._metrics["train"]["num_tokens"] = [self._total_train_tokens]
        return total

    def micro_batch_loss(self, micro: MicroBatch) -> Tensor:
        """Return a micro-batch's `nll`. If the compiler fails, continue without compiled layers."""
        return retry_uncompiled(self.compiled_layers, lambda: self.nll(micro))

    def nll(self, micro: MicroBatch) -> Tensor:
        """Return the sum of -log p of a micro-batch's supervised tokens, times their weights."""
        states, targets, weights = self.learned_states(micro, self.args.device)
        with self._autocast(states.device):
            return head_loss(self.head, states, targets, self.logit_factor, weights)

    def validation_nll(self) -> tuple[float, float, int]:
        """Sum over the validation steps, whose micro-batches are divided among the devices."""
        assert self.validation is not None
        total, weight = torch.zeros((), device=self.args.device), 0.0
        for item in self.validation:
            total += sum((self.nll(micro) for micro in item["micro_batches"]), torch.zeros_like(total))
            weight += item["loss_weight"]
        if self.group.size > 1:
            (total,) = self.group.all_reduce_gradients([], total)
        return float(total), weight, len(self.validation.rows)


@dataclass(frozen=True)
class BuiltTrainer:
    """A trainer that is ready to train, with what the rest of the stage needs."""

    trainer: LoraTrainer
    choices: EngineChoices
    micro_batch: MicroBatchSize
    initial: dict[str, Tensor]  # see `initialise_adapter`

    def final_choices(self) -> EngineChoices:
        """Return the choices at the end of training: recording CUDA graphs may have failed."""
        graphs = self.trainer.graphs if isinstance(self.trainer, FastTrainer) else None
        if graphs is None or graphs.is_on:
            return self.choices
        return replace(self.choices, cuda_graphs=False, cuda_graphs_why="recording failed; the log says why")


class _Unwrapped(torch.nn.Module):
    """A module that only holds a model, so that accelerate does not wrap the model."""

    def __init__(self, module: torch.nn.Module):
        super().__init__()
        self.module = module


def _only(items: list[T]) -> T:
    (item,) = items
    return item
