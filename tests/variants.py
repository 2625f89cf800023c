"""Every way to train an adapter, run on a tiny Phi-3: trained, killed and resumed, evaluated, merged, exported.

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
WATCHED = {
    "data__validation_fraction": 0.1,
    "training_config__eval_strategy": "steps",
    "training_config__eval_steps": 6,
}
ALL = ["qkv_proj", "o_proj", "gate_up_proj", "down_proj"]
# name → what the recipe says beside the tiny recipe of tests/unit/test_training.py
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
    """Kill this process at a step, as the system does: nothing can be caught."""

    def __init__(self, step: int, work: Path):
        work.mkdir(parents=True, exist_ok=True)
        super().__init__(work / "progress.jsonl", work)
        self.step = step

    def __call__(self, **figures):
        if figures.get("step") == self.step:
            os.kill(os.getpid(), signal.SIGKILL)


def _killed(base: Path, shards: Path, folder: Path, settings: dict[str, Any]) -> None:
    from tests.unit.test_training import run

    run(base, shards, folder, KillAt(3, folder / "work"), **settings)


def exercise(settings: dict[str, Any], base: Path, shards: Path, folder: Path) -> dict[str, Any]:
    """Return what was seen. Training computes in float32, from a base that is stored in 16 bits and merged in them.

    `first_loss`, `last_loss`; `resumed`: largest difference of the adapter's tensors between a run that was killed by SIGKILL
    at step 3 of 6 and resumed, and one that was not; `exported`: difference between the validation loss that training saw
    last and that of the saved adapter, opened by peft; `route`, `merge_ulps`: largest difference to peft's own merge in units
    in the last place of the weights' dtype; `kl` between the adapter in PEFT and the merged model, `moved` between base and
    adapter, nats per token on four chats; `evaluated`: the merged model's token loss on them, by the evaluate stage.
    """
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    from tests.unit.test_training import run

    settings = {**WATCHED, **settings}
    adapter, losses = run(base, shards, folder / "straight", **settings)
    code = run_in_fork(_killed, base, shards, folder / "killed", settings)
    assert code == -signal.SIGKILL, code
    assert not (folder / "killed" / "out" / "adapter").exists()
    again, found = run(base, shards, folder / "killed", **settings)
    assert adapter.keys() == again.keys() and losses.keys() == found.keys()
    resumed = max(float((adapter[name].float() - again[name].float()).abs().max()) for name in adapter)

    exported = folder / "straight" / "out" / "adapter"
    (folder / "merged").mkdir()
    figures = merge(base, exported, folder / "merged")
    load = lambda path: AutoModelForCausalLM.from_pretrained(path, dtype="auto").eval()  # noqa: E731
    theirs = PeftModel.from_pretrained(load(base), str(exported)).merge_and_unload().state_dict()
    merged = load(folder / "merged")
    # peft keeps an embedding's adapter in the embedding's own 16 bits and rounds it twice. Ours rounds once, as peft
    # does in fp32, so embeddings are compared with peft's merge in fp32.
    exact = PeftModel.from_pretrained(
        AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32), str(exported)
    ).merge_and_unload().state_dict()  # fmt: skip
    theirs = {
        name: exact[name].to(tensor.dtype) if "embed_tokens" in name or "lm_head" in name else tensor
        for name, tensor in theirs.items()
    }
    distance = max(ulps(tensor, theirs[name]) for name, tensor in merged.state_dict().items())

    wide = lambda path: AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32).eval()  # noqa: E731
    before, after, loaded = (
        wide(base),
        wide(folder / "merged"),
        PeftModel.from_pretrained(wide(base), str(exported)).eval(),
    )
    rows = [torch.tensor(row.tolist())[None] for row, _ in _documents(shards / "train", 4)]
    with torch.inference_mode():
        one, two, three = ([model(input_ids=row).logits[0] for row in rows] for model in (before, loaded, after))
    return {
        "first_loss": losses[1], "last_loss": losses[6], "resumed": resumed,
        "exported": abs(_validation_loss(folder / "straight") - _loss(loaded, _documents(shards / "validation", 5))),
        "route": figures["route"], "merge_ulps": distance, "kl": compare_logits(two, three).mean_kl,
        "moved": compare_logits(one, two).mean_kl, "evaluated": _evaluate(folder),
        "adapter": json.loads((exported / "adapter_config.json").read_text()), "folder": exported,
    }  # fmt: skip


def _documents(shards: Path, count: int) -> list[Any]:
    from loraflow.data.token_rows import TokenRows

    rows = TokenRows(shards)
    return [rows.document(number) for number in range(count)]


def _validation_loss(folder: Path) -> float:
    """Return what training measured after its last step."""
    lines = (folder / "out" / "telemetry" / "curves.jsonl").read_text().splitlines()
    return [row["eval_loss"] for line in lines if "eval_loss" in (row := json.loads(line))][-1]


def _loss(model: Any, documents: list[Any]) -> float:
    total = count = 0.0
    for ids, labels in documents:
        with torch.inference_mode():
            logits = model(input_ids=torch.tensor(ids.tolist())[None]).logits[0, :-1]
        wanted = torch.tensor(labels[1:].tolist())
        total += float(torch.nn.functional.cross_entropy(logits, wanted, reduction="sum"))
        count += int((wanted != -100).sum())
    return total / count


def _evaluate(folder: Path) -> float:
    from loraflow.evaluation import score
    from loraflow.job import Inputs
    from tests.job_factory import make_job
    from tests.unit.test_training import REF, recipe

    rows, out = folder / "rows", folder / "scores"
    rows.mkdir()
    out.mkdir()
    lines = [json.dumps({"id": str(i), "set": "heldout", **chat(i)}) + "\n" for i in range(4)]
    (rows / "heldout.jsonl").write_text("".join(lines))
    asked = recipe(evaluation__metrics=["token_loss"], evaluation__max_new_tokens=4, runtime__eval_batch_size=4)
    job = make_job("evaluate", asked, {"model": REF, "rows": REF})
    figures = score.run(job, Inputs({"model": folder / "merged", "rows": rows}), out, Progress()).figures
    return float(figures["heldout.token_loss"])


def ulps(one: torch.Tensor, two: torch.Tensor) -> float:
    """Return the largest difference in units in the last place of the larger one's exponent."""
    assert one.dtype == two.dtype
    if torch.equal(one, two):
        return 0.0
    size = torch.maximum(one.float().abs(), two.float().abs()).clamp(min=torch.finfo(one.dtype).tiny)
    unit = torch.exp2(torch.floor(torch.log2(size))) * torch.finfo(one.dtype).eps
    return float(((one.float() - two.float()).abs() / unit).max())
