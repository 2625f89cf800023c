"""Train, kill, resume, evaluate, merge and export a tiny Phi-3 with every kind of adapter.

`exercise` is what the tests call for some of them, and `benchmarks/adapters.py` for all, to write docs/adapters.md.
"""

from __future__ import annotations

import json
import os
import signal
from pathlib import Path
from typing import Any

import torch

from loraflow.adapters.logits import compare_logits
from loraflow.adapters.merge_folders import merge
from loraflow.job import Progress
from tests.conftest import chat
from tests.forked_process import run_in_fork

# A validation loss after the last step, to compare the saved adapter with.
VALIDATED = {
    "data__validation_fraction": 0.1,
    "training_config__eval_strategy": "steps",
    "training_config__eval_steps": 6,
}
ALL = ["qkv_proj", "o_proj", "gate_up_proj", "down_proj"]
# name → settings in addition to the tiny recipe of tests/unit/training/test_training.py
VARIANTS: dict[str, dict[str, Any]] = {
    "LoRA": {},
    "rank and alpha patterns": {"peft_config__rank_pattern": {"qkv_proj": 8}, "peft_config__alpha_pattern": {"down_proj": 5.0}},
    "rsLoRA": {"peft_config__use_rslora": True},
    "DoRA": {"peft_config__use_dora": True},
    "gaussian": {"peft_config__init_lora_weights": "gaussian"},
    "orthogonal": {"peft_config__init_lora_weights": "orthogonal"},
    "PiSSA": {"peft_config__init_lora_weights": "pissa"},
    "PiSSA, fast SVD": {"peft_config__init_lora_weights": "pissa_niter_4"},
    "OLoRA": {"peft_config__init_lora_weights": "olora"},
    "EVA": {"peft_config__init_lora_weights": "eva"},
    "LoRA+": {"peft_config__loraplus_lr_ratio": 16.0},
    "modules_to_save": {"peft_config__modules_to_save": ["lm_head"]},
    "trainable tokens": {"peft_config__trainable_token_indices": [502, 505]},
    "layers to transform": {"peft_config__layers_to_transform": [1]},
    "embeddings": {"peft_config__target_modules": [*ALL, "embed_tokens"]},
    "bias": {"peft_config__bias": "all"},
    "loralib, q and v": {"method": "loralib", "peft_config__target_modules": ["qkv_proj"],
                         "loralib_config__enable_lora": {"qkv_proj": ["q", "v"]}},
    "loralib, all": {"method": "loralib", "peft_config__target_modules": [*ALL, "embed_tokens"],
                     "loralib_config__enable_lora": {"qkv_proj": ["q", "k", "v"], "gate_up_proj": ["gate", "up"]}},
}  # fmt: skip


class KillAt(Progress):
    """Kill this process at a step with SIGKILL, which cannot be caught."""

    def __init__(self, step: int, work: Path):
        work.mkdir(parents=True, exist_ok=True)
        super().__init__(work / "progress.jsonl", work)
        self.step = step

    def __call__(self, **figures):
        if figures.get("step") == self.step:
            os.kill(os.getpid(), signal.SIGKILL)


def _killed(base: Path, shards: Path, folder: Path, settings: dict[str, Any]) -> None:
    from tests.unit.training.test_training import run

    run(base, shards, folder, KillAt(3, folder / "work"), **settings)


def exercise(settings: dict[str, Any], base: Path, shards: Path, folder: Path) -> dict[str, Any]:
    """Return the figures of a variant. Training computes in float32; the base is stored and merged in 16 bits.

    `first_loss`, `last_loss`; `resumed`: largest difference of the adapter's tensors between a run that was killed by SIGKILL
    at step 3 of 6 and resumed, and one that was not; `exported`: difference between the validation loss that training saw
    last and that of the saved adapter, opened by peft; `route`, `merge_ulps`: largest difference to peft's own merge in units
    in the last place of the weights' dtype; `kl` between the adapter in PEFT and the merged model, `moved` between base and
    adapter, nats per token on four chats; `evaluated`: the merged model's token loss on them, by the evaluate stage.
    """
    settings = {**VALIDATED, **settings}
    adapter, losses, resumed = train_and_resume(settings, base, shards, folder)
    route, distance = merge_and_compare(base, adapter, folder / "merged")
    return {
        "first_loss": losses[1], "last_loss": losses[6], "resumed": resumed, "route": route, "merge_ulps": distance,
        **compare_models(base, adapter, shards, folder), "evaluated": evaluate(folder),
        "adapter": json.loads((adapter / "adapter_config.json").read_text()), "folder": adapter,
    }  # fmt: skip


def train_and_resume(
    settings: dict[str, Any], base: Path, shards: Path, folder: Path
) -> tuple[Path, dict[int, float], float]:
    """Return the adapter, the losses, and the largest difference to a run that was killed and resumed."""
    from tests.unit.training.test_training import run

    adapter, losses = run(base, shards, folder / "straight", **settings)
    code = run_in_fork(_killed, base, shards, folder / "killed", settings)
    assert code == -signal.SIGKILL, code
    assert not (folder / "killed" / "out" / "adapter").exists()
    again, found = run(base, shards, folder / "killed", **settings)
    assert adapter.keys() == again.keys() and losses.keys() == found.keys()
    difference = max(float((adapter[name].float() - again[name].float()).abs().max()) for name in adapter)
    return folder / "straight" / "out" / "adapter", losses, difference


def merge_and_compare(base: Path, adapter: Path, out: Path) -> tuple[str, float]:
    """Merge an adapter. Return the route, and the largest difference to peft's merge in ulps."""
    out.mkdir()
    figures = merge(base, adapter, out)
    expected = _merge_by_peft(base, adapter, "auto")
    # peft keeps an embedding's adapter in the embedding's own 16 bits and rounds it twice. Ours rounds once, as peft
    # does in fp32, so embeddings are compared with peft's merge in fp32.
    exact = _merge_by_peft(base, adapter, torch.float32)
    expected = {
        name: exact[name].to(tensor.dtype) if "embed_tokens" in name or "lm_head" in name else tensor
        for name, tensor in expected.items()
    }
    merged = _load(out, "auto").state_dict()
    return figures["route"], max(ulps(tensor, expected[name]) for name, tensor in merged.items())


def compare_models(base: Path, adapter: Path, shards: Path, folder: Path) -> dict[str, float]:
    """Return `exported`, `kl` and `moved` of `exercise`, computed in float32."""
    from peft import PeftModel

    before, merged = _load(base, torch.float32), _load(folder / "merged", torch.float32)
    adapted = PeftModel.from_pretrained(_load(base, torch.float32), str(adapter)).eval()
    rows = [torch.tensor(row.tolist())[None] for row, _ in _documents(shards / "train", 4)]
    with torch.inference_mode():
        plain, tuned, after = ([model(input_ids=row).logits[0] for row in rows] for model in (before, adapted, merged))
    loss = _loss(adapted, _documents(shards / "validation", 5))
    return {
        "exported": abs(_validation_loss(folder / "straight") - loss),
        "kl": compare_logits(tuned, after).mean_kl,
        "moved": compare_logits(plain, tuned).mean_kl,
    }


def _load(folder: Path, dtype: Any) -> Any:
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(folder, dtype=dtype).eval()


def _merge_by_peft(base: Path, adapter: Path, dtype: Any) -> dict[str, torch.Tensor]:
    from peft import PeftModel

    return PeftModel.from_pretrained(_load(base, dtype), str(adapter)).merge_and_unload().state_dict()


def _documents(shards: Path, count: int) -> list[Any]:
    from loraflow.data.tokens.token_files import TokenRows

    rows = TokenRows(shards)
    return [rows.document(number) for number in range(count)]


def _validation_loss(folder: Path) -> float:
    """Return the validation loss that training measured after its last step."""
    lines = (folder / "out" / "telemetry" / "curves.jsonl").read_text().splitlines()
    return [row["eval_loss"] for line in lines if "eval_loss" in (row := json.loads(line))][-1]


def _loss(model: Any, documents: list[Any]) -> float:
    total = count = 0.0
    for ids, labels in documents:
        with torch.inference_mode():
            logits = model(input_ids=torch.tensor(ids.tolist())[None]).logits[0, :-1]
        targets = torch.tensor(labels[1:].tolist())
        total += float(torch.nn.functional.cross_entropy(logits, targets, reduction="sum"))
        count += int((targets != -100).sum())
    return total / count


def evaluate(folder: Path) -> float:
    """Return the merged model's token loss by the evaluate stage."""
    from loraflow.evaluation import score
    from loraflow.job import Inputs
    from tests.job_factory import make_job
    from tests.unit.training.test_training import REF, recipe

    rows, out = folder / "rows", folder / "scores"
    rows.mkdir()
    out.mkdir()
    lines = [json.dumps({"id": str(i), "set": "heldout", **chat(i)}) + "\n" for i in range(4)]
    (rows / "heldout.jsonl").write_text("".join(lines))
    settings = recipe(evaluation__metrics=["token_loss"], evaluation__max_new_tokens=4, runtime__eval_batch_size=4)
    job = make_job("evaluate", settings, {"model": REF, "rows": REF})
    figures = score.run(job, Inputs({"model": folder / "merged", "rows": rows}), out, Progress()).figures
    return float(figures["heldout.token_loss"])


def ulps(a: torch.Tensor, b: torch.Tensor) -> float:
    """Return the largest difference in units in the last place of the larger one's exponent."""
    assert a.dtype == b.dtype
    if torch.equal(a, b):
        return 0.0
    size = torch.maximum(a.float().abs(), b.float().abs()).clamp(min=torch.finfo(a.dtype).tiny)
    unit = torch.exp2(torch.floor(torch.log2(size))) * torch.finfo(a.dtype).eps
    return float(((a.float() - b.float()).abs() / unit).max())
