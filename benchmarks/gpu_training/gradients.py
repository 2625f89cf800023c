"""LoRA's gradients of each case against peft's in eager fp32."""

from __future__ import annotations

import itertools
import math
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias

from gpu_training.cases import CASES, LENGTH, PHI3, TINY, Case, Setting, recipe_of
from gpu_training.model import base_folder

if TYPE_CHECKING:
    import torch

    from loraflow.training.batches import StepItem
    from loraflow.training.trainer import FastTrainer

    Gradients: TypeAlias = dict[str, torch.Tensor]

DEVICE = "cpu" if TINY else "cuda"


def check_gradients(work: Path, names: list[str]) -> None:
    """Compare LoRA's gradients on one micro-batch of 4k tokens with peft's in eager fp32."""
    import torch

    torch.backends.cuda.matmul.allow_tf32 = False
    item = first_step(work)
    loss, exact = eager_gradients(work, torch.float32, item)
    report_error("eager bf16", eager_gradients(work, torch.bfloat16, item), loss, exact)
    for case in CASES:
        if case.name in names and case.baseline is None and case.shape is PHI3:
            report_error(case.name, loraflow_gradients(work, case, item), loss, exact)


def first_step(work: Path) -> StepItem:
    """Return a step of two rows, as one micro-batch."""
    from loraflow.data.tokens.token_files import TokenRows
    from loraflow.training.batches import StepDataset, concatenated_layout
    from loraflow.training.setup import row_order

    rows = TokenRows(work / "tokens" / "train", work / "tokens" / "packing.parquet")
    steps = row_order(len(rows), 2, 0).reshape(1, 2)
    return StepDataset(rows, steps, concatenated_layout(rows, steps, 2 * LENGTH), 0)[0]


def eager_gradients(work: Path, dtype: torch.dtype, item: StepItem) -> tuple[float, Gradients]:
    """Return loss and gradients of peft's model with eager attention, one document at a time."""
    model = build_eager_model(work, dtype)
    total = 0.0
    for micro in item["micro_batches"]:
        targets = position_targets(micro)
        for start, end in itertools.pairwise(sorted(set(micro["cu_seq_lens_q"].tolist()))):
            if (targets[start:end] != -100).any():
                loss = (
                    document_loss(model, micro["input_ids"][:, start:end], targets[start:end])
                    / item["num_supervised_tokens"]
                )
                loss.backward()
                total += float(loss)
    gradients = gradients_of(model)
    del model
    free_memory()
    return total, gradients


def build_eager_model(work: Path, dtype: torch.dtype) -> Any:
    """Return the base with peft's LoRA in training mode."""
    import torch
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(
        base_folder(work, CASES[0]), dtype=torch.bfloat16, attn_implementation="eager"
    )
    # The rotary frequencies stay fp32: .to(bfloat16) would round them.
    model = model.to(dtype).to(DEVICE) if dtype == torch.float32 else model.to(DEVICE)
    lora = LoraConfig(r=16, lora_alpha=32, task_type="CAUSAL_LM", target_modules=list(PHI3.targets))
    model = get_peft_model(model, lora, autocast_adapter_dtype=False)
    randomize_adapter(model)
    model.train()
    model.gradient_checkpointing_enable({"use_reentrant": False})
    model.enable_input_require_grads()
    return model


def position_targets(micro: Any) -> torch.Tensor:
    """Return the target of each position of a micro-batch, -100 where there is none."""
    import torch

    targets = torch.full((micro["input_ids"].numel(),), -100)
    targets[micro["loss_index"]] = micro["targets"]
    return targets


def document_loss(model: Any, ids: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    """Return the summed cross entropy of one document."""
    import torch

    base = model.get_base_model()
    hidden = base.model(ids.to(DEVICE), use_cache=False).last_hidden_state
    positions = (targets != -100).nonzero()[:, 0]
    logits = base.lm_head(hidden[0, positions.to(DEVICE)]).float()
    return torch.nn.functional.cross_entropy(logits, targets[positions].to(DEVICE), reduction="sum")


def loraflow_gradients(work: Path, case: Case, item: StepItem) -> tuple[float, Gradients]:
    """Return loss and gradients of the train stage's trainer with a case's settings."""
    settings = {**case.settings, "peft_config.lora_dropout": 0.0, "runtime.compile": "off" if TINY else "on"}
    trainer = build_case_trainer(work, Case("check", "", rows=2, settings=settings))
    randomize_adapter(trainer.model)
    trainer.model.train()
    total = 0.0
    for micro in item["micro_batches"]:
        loss = trainer.micro_batch_loss(micro) / item["num_supervised_tokens"]
        loss.backward()
        total += float(loss)
    gradients = gradients_of(trainer.model)
    del trainer
    free_memory()
    return total, gradients


def gradients_of(model: torch.nn.Module) -> Gradients:
    """Return the gradients by parameter name, in fp32 on the CPU."""
    named = ((name.replace(".default", ""), parameter.grad) for name, parameter in model.named_parameters())
    return {name: gradient.float().cpu() for name, gradient in named if gradient is not None}


def report_error(name: str, result: tuple[float, Gradients], loss: float, exact: Gradients) -> None:
    """Print the error of a case's loss and gradients against the exact ones."""
    import torch

    own_loss, own = result
    a = torch.cat([own[key].flatten() for key in sorted(exact)]).double()
    b = torch.cat([exact[key].flatten() for key in sorted(exact)]).double()
    error, cosine = float((a - b).norm() / b.norm()), float(a @ b / a.norm() / b.norm())
    loss_error = abs(own_loss - loss) / loss
    print(f"{name:16s} gradient error {error:.4f}, cosine {cosine:.5f}, loss error {loss_error:.1e}", flush=True)


def free_memory() -> None:
    """Release the memory and the compiled code of the last model."""
    import gc

    import torch

    gc.collect()
    torch.cuda.empty_cache()
    torch._dynamo.reset()


def build_case_trainer(work: Path, case: Case, **overrides: Setting) -> FastTrainer:
    """Build the trainer of the train stage in this process."""
    import logging

    from loraflow.job import Inputs, Progress
    from loraflow.store import Ref
    from loraflow.training.setup import prepare_training
    from loraflow.training.train import build_trainer
    from tests.job_factory import make_job

    logging.basicConfig(level=logging.WARNING)
    ref = Ref(stage="s", fingerprint="f", digest="d", uri="")
    job = make_job("train", recipe_of(case, **overrides), {"tokens": ref, "base": ref})
    inputs = Inputs({"tokens": work / "tokens", "base": base_folder(work, case)})
    setup = prepare_training(job, inputs, Progress(work=Path(tempfile.mkdtemp(dir=work))))
    return build_trainer(setup).trainer


def randomize_adapter(model: torch.nn.Module) -> None:
    """Give A and B the same random values in every model. If B were zero, A would have no gradient."""
    import zlib

    import torch

    for name, parameter in model.named_parameters():
        if "lora_B" in name or "lora_A" in name:
            plain_name = name.replace(".default", "")
            generator = torch.Generator().manual_seed(zlib.crc32(plain_name.encode()))
            scale = 0.02 if "lora_B" in name else 1 / math.sqrt(parameter.shape[1])
            parameter.data.copy_(torch.randn(parameter.shape, generator=generator) * scale)
