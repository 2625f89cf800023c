"""Run a case with unsloth: its model, its patched SFTTrainer, its packing, its best attention for packed rows."""

from __future__ import annotations

import itertools
import json
import statistics
from pathlib import Path
from typing import Any

from gpu_training.cases import LENGTH, WARM_UP, Case
from gpu_training.model import split_base
from gpu_training.run import baseline_dataset, make_timed_trainer


def unsloth_main(case: Case, work: Path) -> None:
    """Train with unsloth in this process. Print the figures as JSON.

    Its environment must come first in PYTHONPATH (docs/performance.md), because it needs older trl and datasets.
    """
    # isort: off
    from unsloth import FastLanguageModel, is_bfloat16_supported  # patches transformers and trl, so it comes first
    import torch
    from trl import SFTConfig
    # isort: on

    folder = split_base(work, case)  # written by the parent process, without the patches
    switch_on_varlen()
    options = dict(case.baseline or {})
    model, tokenizer = FastLanguageModel.from_pretrained(
        str(folder), max_seq_length=LENGTH, dtype=torch.bfloat16, load_in_4bit=options.pop("load_in_4bit", False),
        use_gradient_checkpointing=False,
    )  # fmt: skip
    model = FastLanguageModel.get_peft_model(
        model, r=16, lora_alpha=32, lora_dropout=0.0, bias="none", target_modules=list(SPLIT_TARGETS),
        use_gradient_checkpointing=False, random_state=0,
    )  # fmt: skip
    steps = WARM_UP + case.timed
    timed_trainer, times, tokens = make_timed_trainer(wait_every=5)
    trainer = timed_trainer(
        model=model,
        args=SFTConfig(
            output_dir=str(work / "unsloth"), max_steps=steps, learning_rate=1e-4, lr_scheduler_type="cosine",
            bf16=is_bfloat16_supported(), max_length=LENGTH, save_strategy="no", report_to="none", logging_steps=20,
            seed=0, disable_tqdm=True, per_device_train_batch_size=case.rows, gradient_checkpointing=False, **options,
        ),
        train_dataset=baseline_dataset(int(steps * case.rows * LENGTH / 400 * 1.2) + 64),
        processing_class=tokenizer,
    )  # fmt: skip
    if not trainer.args.packing:
        raise RuntimeError("unsloth switched packing off")
    result = trainer.train()
    waits = times[WARM_UP::5]
    first, last = WARM_UP, WARM_UP + 5 * (len(waits) - 1)
    print(json.dumps({
        "tokens_per_second": sum(tokens[first:last]) / (times[last] - times[first]),
        "step_ms": statistics.median(b - a for a, b in itertools.pairwise(waits)) / 5 * 1e3,
        "step_tokens": statistics.median(tokens[WARM_UP:]),
        "peak_gib": torch.cuda.max_memory_allocated() / 2**30,
        "losses": [result.training_loss],
        "varlen_calls": VARLEN_CALLS["count"],
    }))  # fmt: skip


SPLIT_TARGETS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
VARLEN_CALLS = {"count": 0}


def switch_on_varlen() -> None:
    """Let unsloth compute packed attention in one call of torch's FA2.

    It does so from torch 2.12 on, whose function takes `enable_gqa`. The kernel of 2.11 takes grouped heads as well,
    and without this branch each document is a call of its own, which is slower.
    """
    from unsloth.utils import attention_dispatch

    lean = attention_dispatch._LeanFlashVarlen

    def varlen(query: Any, key: Any, value: Any, cu_seqlens: Any, max_seqlen: int, **options: Any) -> Any:
        VARLEN_CALLS["count"] += 1
        left, right = options["window_size"]
        return lean.apply(
            query, key, value, cu_seqlens, max_seqlen, (left, right) == (-1, 0), options["scale"], left, right
        )

    attention_dispatch._TORCH_VARLEN_ATTN = varlen  # asked for its presence only
    attention_dispatch._varlen_attn_call = varlen
