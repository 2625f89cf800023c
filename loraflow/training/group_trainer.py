"""Train several adapters over one frozen base at once, in a loop like that of transformers' Trainer.

Each adapter has its own loss, clipping, optimizer and schedule, and ends by itself if its loss is not finite.
"""

from __future__ import annotations

import json
import logging
import math
import shutil
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

import torch
from torch import Tensor

from loraflow.store.checkpoints import finalize_checkpoint, step_of
from loraflow.training.group_batches import GroupMicroBatch, GroupStep, GroupSteps
from loraflow.training.group_lora import Adapters
from loraflow.training.loss_head import each_token_loss
from loraflow.training.trainer import DecoderPass, retry_uncompiled

if TYPE_CHECKING:
    from transformers import PreTrainedModel
    from trl import SFTConfig

log = logging.getLogger(__name__)
T = TypeVar("T")
STATE = "group.pt"  # in a checkpoint
Logs = dict[str, float]


def base_of(model: PreTrainedModel) -> PreTrainedModel:
    """Return the base inside peft's model."""
    get_base_model: Callable[[], PreTrainedModel] = model.get_base_model  # type: ignore[assignment]
    return get_base_model()


class GroupModel(DecoderPass):
    """The passes of a model with stacked adapters."""

    def __init__(self, model: PreTrainedModel, adapters: Adapters, logit_factor: float, device: str):
        self.model, self.adapters, self.logit_factor, self.device = model, adapters, logit_factor, device
        causal = base_of(model)
        self.decoder = causal.get_decoder()  # type: ignore[no-untyped-call]
        self.head: torch.nn.Linear = causal.get_output_embeddings()  # type: ignore[no-untyped-call]
        self.embed = causal.get_input_embeddings()
        self.compiled_layers = []
        self.trained, self.loras = adapters.parameters, adapters.modules

    def losses(self, micro: GroupMicroBatch) -> Tensor:
        """Return the sum of -log p of each adapter's supervised tokens, times their weights [K]."""
        return retry_uncompiled(self.compiled_layers, lambda: self._losses(micro))

    def _losses(self, micro: GroupMicroBatch) -> Tensor:
        states, targets, weights = self.learned_states(micro.batch, self.device)
        found = each_token_loss(self.head, states, targets, self.logit_factor)
        found = found if weights is None else found * weights
        # A sum over each adapter's own tokens only: one that became NaN leaves the others as they are.
        return torch.stack([part.sum() for part in found.split(micro.counts)])


@dataclass
class Member:
    """An adapter of the group: its settings, optimizer and schedule, and what it logged."""

    arguments: SFTConfig
    optimizer: torch.optim.Optimizer
    schedule: torch.optim.lr_scheduler.LRScheduler
    rate: float = 0.0  # the learning rate of the last step
    problem: str = ""  # why its training ended before the others
    logs: list[Logs] = field(default_factory=list)


def build_member(arguments: SFTConfig, values: Tensor, gradients: Tensor) -> Member:
    """Return an adapter's optimizer and schedule, which are those of transformers' Trainer.

    Args:
        values: the adapter's weights, as one vector.
    """
    from transformers import Trainer, get_scheduler

    weights = torch.nn.Parameter(values)
    weights.grad = gradients
    cls, options = Trainer.get_optimizer_cls_and_kwargs(arguments)
    optimizer: torch.optim.Optimizer = cls([{"params": [weights], "weight_decay": arguments.weight_decay}], **options)
    schedule = get_scheduler(
        arguments.lr_scheduler_type,
        optimizer=optimizer,
        num_warmup_steps=arguments.get_warmup_steps(arguments.max_steps),
        num_training_steps=arguments.max_steps,
        scheduler_specific_kwargs=arguments.lr_scheduler_kwargs,
    )
    return Member(arguments, optimizer, schedule)


class GroupTrainer:
    """The training loop of a group.

    Args:
        validation: the validation rows, as one step; None without any.
    """

    def __init__(
        self,
        model: GroupModel,
        members: Sequence[Member],
        steps: GroupSteps,
        validation: GroupSteps | None,
        checkpoints: Path,
        is_preempted: Callable[[], bool],
        on_step: Callable[[int], None],
    ):
        self.model, self.members, self.steps, self.validation = model, members, steps, validation
        self.checkpoints, self.is_preempted, self.on_step = checkpoints, is_preempted, on_step
        self.step = 0
        self._norms: Tensor | None = None
        limits = [member.arguments.max_grad_norm or math.inf for member in members]  # 0: not clipped
        self._limits = torch.tensor(limits, device=model.device)

    def train(self) -> None:
        """Train up to the last step, or until this process is asked to stop: then a checkpoint is saved."""
        with warnings.catch_warnings():  # gradients are parts of one tensor, as the weights are
            warnings.filterwarnings("ignore", message="grad and param do not obey the gradient layout contract")
            self._train()

    def _train(self) -> None:
        from transformers import TrainerControl, TrainerState
        from transformers.trainer_callback import DefaultFlowCallback

        arguments, total = self.members[0].arguments, len(self.steps)
        state, control, flow = TrainerState(max_steps=total), TrainerControl(), DefaultFlowCallback()
        state.compute_steps(arguments, total)
        since_log = torch.zeros(len(self.members), device=self.model.device)
        logged_at = self.step
        for item in _ahead((self.steps[step] for step in range(self.step, total)), self.model.device):
            since_log += self._optimizer_step(item)
            self.step += 1
            state.global_step = self.step
            control.should_log = control.should_evaluate = control.should_save = False
            control = flow.on_step_end(arguments, state, control)
            if control.should_log:
                self._log(since_log / (self.step - logged_at))
                logged_at = self.step
                since_log.zero_()
            if control.should_evaluate and self.validation is not None:
                self._evaluate(self.validation)
            self.on_step(self.step)
            stops = self.is_preempted()
            if control.should_save or stops:
                self.save()
            if stops or all(member.problem for member in self.members):
                return
        self._check_weights()

    def _optimizer_step(self, item: GroupStep) -> Tensor:
        """Compute gradients, clip, and update each adapter; return the mean losses [K]."""
        adapters = self.model.adapters
        if not self.model.decoder.training:
            self.model.model.train()
        adapters.gradients.zero_()
        weights = item.loss_weights.to(self.model.device, non_blocking=True)
        total = torch.zeros_like(weights)
        for micro in item.micro_batches:
            losses = self.model.losses(micro) / weights
            losses.sum().backward()  # type: ignore[no-untyped-call]
            total += losses.detach()
        # As torch.nn.utils.clip_grad_norm_, for each adapter by itself.
        self._norms = adapters.gradients.norm(dim=1)
        adapters.gradients.mul_((self._limits / (self._norms + 1e-6)).clamp(max=1.0)[:, None])
        for member in self.members:
            member.rate = float(member.schedule.get_last_lr()[0])
            member.optimizer.step()
            member.schedule.step()
        return total

    def _log(self, losses: Tensor) -> None:
        assert self._norms is not None
        for member, loss, norm in zip(self.members, losses.tolist(), self._norms.tolist(), strict=True):
            self._record(member, {"loss": loss, "grad_norm": norm, "learning_rate": member.rate})

    def _record(self, member: Member, values: Logs) -> None:
        """Log an adapter's values, unless it has ended; end it if one is not finite, as `NonFiniteGuard` does."""
        if member.problem:
            return
        member.logs.append({"step": self.step, **values})
        for key, value in values.items():
            if not math.isfinite(value):
                member.problem = f"{key} became {value} at step {self.step}"
                log.warning("one adapter of the group has ended: %s", member.problem)
                return

    def _evaluate(self, validation: GroupSteps) -> None:
        """Log the mean -log p of the supervised tokens of the validation rows, weighted as in training, of each adapter."""
        self.model.model.eval()
        total, weight = torch.zeros(len(self.members), device=self.model.device), 0.0
        with torch.no_grad():
            for item in validation:
                for micro in item.micro_batches:
                    total += self.model.losses(micro)
                weight += float(item.loss_weights[0])
        for member, loss in zip(self.members, (total / weight).tolist(), strict=True):
            self._record(member, {"eval_loss": loss})

    def _check_weights(self) -> None:
        finite = self.model.adapters.values.isfinite().all(dim=1).tolist()
        for member, is_finite in zip(self.members, finite, strict=True):
            if not is_finite and not member.problem:
                member.problem = f"its weights hold a NaN or an infinity at step {self.step}"

    def save(self) -> None:
        """Save a checkpoint, and remove all but the last two: weights, moments, and what was logged."""
        target = self.checkpoints / f"checkpoint-{self.step}"
        target.mkdir(parents=True, exist_ok=True)
        state = {
            "values": self.model.adapters.values.cpu(),
            "optimizers": [member.optimizer.state_dict() for member in self.members],
            "schedules": [member.schedule.state_dict() for member in self.members],
        }
        torch.save(state, target / STATE)
        logs = [{"problem": member.problem, "logs": member.logs} for member in self.members]
        (target / "logs.json").write_text(json.dumps(logs), encoding="utf-8")
        finalize_checkpoint(target)
        others = sorted((step_of(path.name) or 0, path) for path in self.checkpoints.glob("checkpoint-*"))
        for _, path in others[:-2]:
            shutil.rmtree(path)

    def resume(self, checkpoint: Path, step: int) -> None:
        """Continue from a checkpoint, whose hashes were compared with its manifest before."""
        state = torch.load(checkpoint / STATE, map_location=self.model.device, weights_only=True)
        logs = json.loads((checkpoint / "logs.json").read_text(encoding="utf-8"))
        self.model.adapters.values.copy_(state["values"])
        for member, optimizer, schedule, known in zip(
            self.members, state["optimizers"], state["schedules"], logs, strict=True
        ):
            member.optimizer.load_state_dict(optimizer)
            member.schedule.load_state_dict(schedule)
            member.problem, member.logs = known["problem"], known["logs"]
        self.step = step


def _ahead(items: Iterable[GroupStep], device: str) -> Iterator[GroupStep]:
    """Yield items. While one is used, a thread prepares the next."""
    iterator = iter(items)

    def following() -> GroupStep | None:
        item = next(iterator, None)
        if item is not None and device != "cpu":
            for micro in item.micro_batches:
                for key, value in micro.batch.items():
                    if isinstance(value, Tensor):
                        micro.batch[key] = value.pin_memory()  # type: ignore[literal-required]
            item = replace(item, loss_weights=item.loss_weights.pin_memory())
        return item

    with ThreadPoolExecutor(1) as pool:
        pending = pool.submit(following)
        while (item := pending.result()) is not None:
            pending = pool.submit(following)
            yield item
