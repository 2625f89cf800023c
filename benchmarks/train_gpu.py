"""LoRA training of Phi-3 mini's shape on one GPU: ours through the worker, and the peers' settings, on the same rows.

    python benchmarks/train_gpu.py                     every case
    python benchmarks/train_gpu.py bf16 fp8 trl-best   some of them
    python benchmarks/train_gpu.py --check             LoRA gradients against eager fp32
    python benchmarks/train_gpu.py --profile bf16      device time by class of kernel

Weights are random (3.82 billion), lengths lognormal (median 350, clipped to 2,047, so that the 4k model's window masks
nothing), half of the tokens are learned. Tokens per second count no padding, and everything from the host's batch to
the optimizer's step, after warm-up. The ceiling is the measured rate of an 8192³ bf16 product over the counted FLOPs.
"""

from __future__ import annotations

import argparse
import itertools
import json
import math
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    import torch

    from loraflow.config import Recipe
    from loraflow.training.batches import StepItem
    from loraflow.training.trainer import FastTrainer

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
TINY = os.environ.get("LORAFLOW_BENCH_TINY") == "1"  # a dry run on a CPU: says nothing about speed
LENGTH = 256 if TINY else 2048
SHAPE = (
    {"hidden_size": 96, "intermediate_size": 256, "num_hidden_layers": 2, "num_attention_heads": 4}
    if TINY
    else {"hidden_size": 3072, "intermediate_size": 8192, "num_hidden_layers": 32, "num_attention_heads": 32}
)
VOCABULARY = 507 if TINY else 32064
WARM, TIMED = (5, 11) if TINY else (10, 26)


Setting = str | float | bool | list[str] | None


@dataclass
class Case:
    """One line of the table."""

    name: str
    what: str
    rows: int = 8  # of 2,048 tokens in an optimizer step
    settings: dict[str, Setting] = field(default_factory=dict)
    peer: dict[str, Setting] | None = None  # for trl's own trainer
    timed: int = TIMED


FAST = {
    "training_config.learning_rate": 1e-4,
    "training_config.packing": True,
    "training_config.max_length": LENGTH,
    "training_config.gradient_accumulation_steps": 1,
    "training_config.logging_steps": 5,
    "training_config.save_strategy": "no",
    "peft_config.lora_dropout": 0.0,
    "peft_config.target_modules": ["qkv_proj", "o_proj", "gate_up_proj", "down_proj"],
    "runtime.compile": "on",
    "runtime.device": "cpu" if TINY else "cuda",
}
RECOMPUTED = {"training_config.gradient_checkpointing": True}
CASES = [
    Case("bf16", "ours, bf16, 16k tokens at a time"),
    Case("bf16-8k", "ours, bf16, 8k tokens", rows=4),
    Case("bf16-fa2", "ours, bf16, 16k tokens, torch's own FA2", settings={"runtime.attn_implementation": "varlen"}),
    Case("bf16-dropout", "ours, bf16, 16k, dropout 0.05", settings={"peft_config.lora_dropout": 0.05}),
    Case("bf16-eager", "ours, bf16, 16k, nothing compiled", settings={"runtime.compile": "off"}, timed=16),
    Case("bf16-small", "ours, bf16, 4k tokens, recomputed", rows=8, settings={**RECOMPUTED, "runtime.micro_tokens": 4096}),
    Case("fp8", "ours, fp8 base, 16k tokens", settings={"base.quantization": "fp8"}),
    Case("fp8-dropout", "ours, fp8 base, 16k, dropout 0.05",
         settings={"base.quantization": "fp8", "peft_config.lora_dropout": 0.05}),
    Case("nf4", "ours, QLoRA nf4, 8k tokens", rows=4, settings={"base.quantization": "nf4"}),
    Case("nf4-small", "ours, QLoRA nf4, 4k tokens, recomputed",
         settings={"base.quantization": "nf4", **RECOMPUTED, "runtime.micro_tokens": 4096}),
    Case("stock", "ours with runtime.engine: stock, 8k tokens", rows=4, timed=11,
         settings={"runtime.engine": "stock", "training_config.gradient_checkpointing": False}),
    Case("trl-best", "trl: bfd packing, padding-free, liger, varlen FA2, nothing recomputed", rows=4, timed=16,
         peer={"packing": True, "gradient_checkpointing": False, "use_liger_kernel": True}),
    Case("card", "the model card's recipe: padded batches of 4, recomputed, sdpa, dropout 0.05", timed=20,
         peer={"per_device_train_batch_size": 4, "gradient_checkpointing": True}),
    Case("card-nocudnn", "the same without cuDNN's attention, which makes a plan for each shape", timed=20,
         peer={"per_device_train_batch_size": 4, "gradient_checkpointing": True, "cudnn": False}),
]  # fmt: skip


# -- the same model and rows for all -------------------------------------------------------------------------------


def build_base(folder: Path) -> None:
    import torch
    from transformers import AutoTokenizer, GenerationConfig, Phi3Config, Phi3ForCausalLM

    from tests.conftest import build_tokenizer

    folder.mkdir(parents=True)
    build_tokenizer(folder)
    eos = AutoTokenizer.from_pretrained(folder).eos_token_id
    config = Phi3Config(
        vocab_size=VOCABULARY, num_key_value_heads=SHAPE["num_attention_heads"], max_position_embeddings=4096,
        original_max_position_embeddings=4096, sliding_window=2047, rms_norm_eps=1e-5, bos_token_id=1, eos_token_id=eos,
        pad_token_id=0, tie_word_embeddings=False, **SHAPE,
    )  # fmt: skip
    torch.manual_seed(0)
    with torch.device("cpu" if TINY else "cuda"):
        model = Phi3ForCausalLM._from_config(config, dtype=torch.bfloat16)
    with torch.no_grad():  # as a trained network: small steps in each layer, embeddings of unit size
        for layer in model.model.layers:
            layer.self_attn.o_proj.weight.mul_(64**-0.5)
            layer.mlp.down_proj.weight.mul_(64**-0.5)
        model.model.embed_tokens.weight.mul_(25.0)
    model.generation_config = GenerationConfig(eos_token_id=eos, pad_token_id=0)
    model.save_pretrained(folder)


def documents(count: int, seed: int = 1234) -> list[tuple[np.ndarray, np.ndarray]]:
    draw = np.random.default_rng(seed)
    median = 40 if TINY else 350
    lengths = np.clip(np.exp(draw.normal(math.log(median), 0.8, count)), 16, LENGTH - 1).astype(int)
    out = []
    for length, masked in zip(lengths, draw.uniform(0.3, 0.7, count), strict=True):
        ids = draw.integers(3, VOCABULARY - 64 if not TINY else 500, length).astype(np.int32)
        labels = ids.copy()
        labels[: max(1, int(length * masked))] = -100
        out.append((ids, labels))
    return out


def build_tokens(folder: Path, rows: int) -> None:
    """Write documents as the tokenize stage does."""
    from loraflow.data.packing import best_fit_decreasing
    from loraflow.data.token_files import TokenBatch, open_shard, write_packing

    docs = documents(int(rows * LENGTH / (50 if TINY else 400)))
    lengths = np.array([len(ids) for ids, _ in docs], np.int32)
    folder.mkdir(parents=True, exist_ok=True)
    with open_shard(folder / "train") as append:
        append(
            TokenBatch(
                np.concatenate([ids for ids, _ in docs]), np.concatenate([labels for _, labels in docs]), lengths
            )
        )
    write_packing(folder / "packing.parquet", best_fit_decreasing(lengths, LENGTH))
    (folder / "report.json").write_text(json.dumps({"figures": {"train_tokens": int(lengths.sum())}}))


def flops_per_token(lengths: np.ndarray, learned: float) -> float:
    """Forward and activation gradients of the frozen products, the head where a token is learned, LoRA, attention."""
    hidden, inner, layers = SHAPE["hidden_size"], SHAPE["intermediate_size"], SHAPE["num_hidden_layers"]
    frozen = layers * (hidden * 3 * hidden + hidden * hidden + hidden * 2 * inner + inner * hidden)
    lora = layers * 16 * ((hidden + 3 * hidden) + 2 * hidden + (hidden + 2 * inner) + (inner + hidden))
    context = (lengths * (lengths + 1) / 2).sum() / lengths.sum()
    return 4 * frozen + 4 * VOCABULARY * hidden * learned + 6 * lora + layers * 12 * hidden * context


def ceiling() -> float:
    """Return the FLOP/s of an 8192³ bf16 product."""
    import torch

    if TINY:
        return 1e11
    a, b = (torch.randn(8192, 8192, device="cuda", dtype=torch.bfloat16) for _ in range(2))
    times = []
    for _ in range(20):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        a @ b
        end.record()
        torch.cuda.synchronize()
        times.append(start.elapsed_time(end) / 1e3)
    return 2 * 8192**3 / statistics.median(times[5:])


# -- cases -----------------------------------------------------------------------------------------------------------


def recipe(case: Case, **more: Setting) -> Recipe:
    from loraflow.config import parse_recipe

    steps = WARM + case.timed
    settings = {**FAST, "training_config.max_steps": steps, "training_config.per_device_train_batch_size": case.rows}
    return parse_recipe("name: bench\nbase: {model: x}\n", overrides={**settings, **case.settings, **more})


def ours(case: Case, work: Path) -> dict[str, Any]:
    """Run the train stage by its worker, as the flow does."""
    from loraflow.execution.job_file import JobFile
    from loraflow.store import Ref
    from tests.jobs import make_job

    ref = Ref(stage="s", fingerprint="f", digest="d", uri="")
    job = make_job("train", recipe(case), {"tokens": ref, "base": ref})
    home = work / case.name
    shutil.rmtree(home, ignore_errors=True)  # of an earlier call: its compiled code is kept, beside it
    home.mkdir()
    folders = {"tokens": work / "tokens", "base": work / "base"}
    job_file = JobFile(job, home / "out", folders, home).write()
    env = {**os.environ, "TORCHINDUCTOR_CACHE_DIR": str(work / "compiled")}
    started = time.time()
    with (home / "log.txt").open("w") as log:
        command = [sys.executable, "-m", "loraflow.execution.worker", str(job_file)]
        code = subprocess.run(command, cwd=ROOT, stdout=log, stderr=log, env=env).returncode
    if code:
        raise RuntimeError((home / "log.txt").read_text()[-3000:])
    engine = json.loads((home / "out" / "telemetry" / "engine.json").read_text())
    curve = [json.loads(line) for line in (home / "out" / "telemetry" / "curves.jsonl").read_text().splitlines()]
    marks = [json.loads(line) for line in (home / "progress.jsonl").read_text().splitlines()]
    stamp = {mark["step"]: mark["time"] for mark in marks if "step" in mark}
    # Steps are logged, and so waited for, every fifth: the stamp of the step after is one launch behind.
    first, last = WARM + 1, WARM + 1 + (case.timed - 1) // 5 * 5
    tokens = step_tokens(work, case)[first:last].sum()
    parts = [stamp[k + 5] - stamp[k] for k in range(first, last, 5)]
    shutil.rmtree(home / "out" / "adapter")
    return {
        "tokens_per_second": tokens / (stamp[last] - stamp[first]),
        "step_ms": statistics.median(parts) / 5 * 1e3,
        "peak_gib": engine.get("peak_gib"),
        "first_step_s": stamp[1] - started,
        "losses": [row["loss"] for row in curve if "loss" in row],
        "engine": engine,
    }


def step_tokens(work: Path, case: Case) -> np.ndarray:
    from loraflow.data.token_rows import TokenRows
    from loraflow.training.schedule import row_order

    rows = TokenRows(work / "tokens" / "train", work / "tokens" / "packing.parquet")
    order = row_order(len(rows), (WARM + case.timed) * case.rows, 0)
    return rows.tokens[order].reshape(-1, case.rows).sum(1)


def peer(case: Case, work: Path) -> dict[str, Any]:
    """Run trl's own trainer with a peer's settings, in a process of its own."""
    env = {**os.environ, "LORAFLOW_BENCH_PEER": json.dumps([case.name, str(work)])}
    done = subprocess.run([sys.executable, __file__], capture_output=True, text=True, env=env, cwd=ROOT)
    if done.returncode:
        raise RuntimeError(done.stderr[-3000:])
    return json.loads(done.stdout.strip().splitlines()[-1])


def run_peer(case: Case, work: Path) -> None:
    import torch
    from datasets import Dataset
    from peft import LoraConfig
    from transformers import AutoModelForCausalLM, AutoTokenizer
    from trl import SFTConfig, SFTTrainer

    options = dict(case.peer or {})
    torch.backends.cuda.enable_cudnn_sdp(options.pop("cudnn", True))
    packing = options.get("packing", False)
    attention = "sdpa"
    if packing and not TINY:
        from loraflow.hardware.attention import DOCUMENTS
        from loraflow.training.attention import register

        register()  # torch's varlen FA2, so that no package is needed; trl's collator gives it the borders
        attention = DOCUMENTS
    options.setdefault("per_device_train_batch_size", case.rows)
    steps, warm = WARM + case.timed, WARM
    batch = options["per_device_train_batch_size"]
    docs = documents(int(steps * batch * (LENGTH / 400 * 1.2 if packing else 1)) + 64)
    data = Dataset.from_dict({"input_ids": [a.tolist() for a, _ in docs], "labels": [b.tolist() for _, b in docs]})
    stamps, tokens = [], []

    class Timed(SFTTrainer):
        def training_step(self, model: Any, inputs: Any, *a: Any, **k: Any) -> Any:
            if torch.cuda.is_available():
                torch.cuda.synchronize()  # trl waits in every step for its own metrics
            stamps.append(time.perf_counter())
            tokens.append(int((inputs["input_ids"] != 0).sum()))
            if len(stamps) == warm and torch.cuda.is_available():
                torch.cuda.reset_peak_memory_stats()
            return super().training_step(model, inputs, *a, **k)

    if options.get("use_liger_kernel"):
        options["liger_kernel_config"] = {"rope": True, "rms_norm": True, "swiglu": True, "cross_entropy": False}
    if TINY:
        options.pop("use_liger_kernel", None), options.pop("liger_kernel_config", None)
    trainer = Timed(
        model=AutoModelForCausalLM.from_pretrained(
            work / "base", dtype=torch.bfloat16, attn_implementation=attention, device_map=None if TINY else {"": 0}
        ),
        args=SFTConfig(
            output_dir=str(work / "trl"), max_steps=steps, learning_rate=1e-4, lr_scheduler_type="cosine", bf16=True,
            max_length=LENGTH, save_strategy="no", report_to="none", logging_steps=20, seed=0, disable_tqdm=True,
            use_cpu=TINY, gradient_checkpointing_kwargs={"use_reentrant": False}, **options,
        ),
        train_dataset=data,
        processing_class=AutoTokenizer.from_pretrained(work / "base"),
        peft_config=LoraConfig(r=16, lora_alpha=32, lora_dropout=0.0 if packing else 0.05, target_modules="all-linear",
                               task_type="CAUSAL_LM"),
    )  # fmt: skip
    result = trainer.train()
    print(json.dumps({
        "tokens_per_second": sum(tokens[warm : steps - 1]) / (stamps[steps - 1] - stamps[warm]),
        "step_ms": statistics.median(b - a for a, b in zip(stamps[warm:-1], stamps[warm + 1 :], strict=True)) * 1e3,
        "peak_gib": torch.cuda.max_memory_allocated() / 2**30 if torch.cuda.is_available() else 0.0,
        "losses": [result.training_loss],
    }))  # fmt: skip


def table(results: dict[str, dict[str, Any]], work: Path, rate: float) -> None:

    from loraflow.data.token_rows import TokenRows

    rows = TokenRows(work / "tokens" / "train")
    learned = sum(int((rows.document(i)[1][1:] != -100).sum()) for i in range(len(rows))) / rows.lengths.sum()
    limit = rate / flops_per_token(rows.lengths.astype(float), float(learned))
    print(f"\nceiling {limit:,.0f} tokens/s: {rate / 1e12:.0f} TFLOP/s over "
          f"{flops_per_token(rows.lengths.astype(float), float(learned)) / 1e9:.2f} GFLOP a token")  # fmt: skip
    best, card = (results.get(name, {}).get("tokens_per_second") for name in ("trl-best", "card"))
    print(
        f"{'case':14s} {'tok/s':>8s} {'ms/step':>8s} {'GiB':>6s} {'% ceil':>6s} {'x trl':>6s} {'x card':>6s} {'1st s':>6s}"
    )
    for case in CASES:
        if (one := results.get(case.name)) is None:
            continue
        speed = one["tokens_per_second"]
        print(f"{case.name:14s} {speed:8,.0f} {one['step_ms']:8.1f} {one['peak_gib'] or 0:6.1f} {100 * speed / limit:6.1f} "
              f"{speed / best if best else 0:6.2f} {speed / card if card else 0:6.1f} {one.get('first_step_s', 0):6.1f}  "
              f"{case.what}")  # fmt: skip
        print(f"{'':14s} losses {[round(x, 3) for x in one['losses'][::2]]}")
    print("1st s: from the start of the process to the end of the first step, compiling included")


# -- gradients against eager fp32, and profiles ------------------------------------------------------------------------


def build(work: Path, case: Case, **more: Setting) -> FastTrainer:
    """Return the trainer that the stage builds, in this process."""
    import logging

    from loraflow.job import Inputs, Progress
    from loraflow.store import Ref
    from loraflow.training.engine import build_trainer
    from loraflow.training.setup import prepare_training
    from tests.jobs import make_job

    logging.basicConfig(level=logging.WARNING)

    ref = Ref(stage="s", fingerprint="f", digest="d", uri="")
    job = make_job("train", recipe(case, **more), {"tokens": ref, "base": ref})
    inputs = Inputs({"tokens": work / "tokens", "base": work / "base"})
    setup = prepare_training(job, inputs, Progress(work=Path(tempfile.mkdtemp(dir=work))))
    return build_trainer(setup).trainer


def set_up_projections(model: torch.nn.Module) -> None:
    """Give LoRA's B values, the same in every model: at zero, A would have no gradient."""
    import zlib

    import torch

    for name, parameter in model.named_parameters():
        if "lora_B" in name or "lora_A" in name:
            plain = name.replace(".default", "")
            draw = torch.Generator().manual_seed(zlib.crc32(plain.encode()))
            scale = 0.02 if "lora_B" in name else 1 / math.sqrt(parameter.shape[1])
            parameter.data.copy_(torch.randn(parameter.shape, generator=draw) * scale)


def check(work: Path, names: list[str]) -> None:
    """Compare LoRA's gradients on one micro-batch of 4k tokens with peft's in eager fp32."""
    import gc

    import torch
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    device = "cpu" if TINY else "cuda"
    torch.backends.cuda.matmul.allow_tf32 = False

    def gather(model: torch.nn.Module) -> dict[str, torch.Tensor]:
        return {
            n.replace(".default", ""): p.grad.float().cpu() for n, p in model.named_parameters() if p.grad is not None
        }

    def eager(dtype: torch.dtype, item: StepItem) -> tuple[float, dict[str, torch.Tensor]]:
        model = AutoModelForCausalLM.from_pretrained(work / "base", dtype=torch.bfloat16, attn_implementation="eager")
        # The rotary frequencies stay fp32: .to(bfloat16) would round them.
        model = model.to(dtype).to(device) if dtype == torch.float32 else model.to(device)
        model = get_peft_model(model, LoraConfig(r=16, lora_alpha=32, task_type="CAUSAL_LM",
                               target_modules=FAST["peft_config.target_modules"]), autocast_adapter_dtype=False)  # fmt: skip
        set_up_projections(model)
        model.train()
        model.gradient_checkpointing_enable({"use_reentrant": False})
        model.enable_input_require_grads()
        total = 0.0
        for micro in item["micro_batches"]:
            borders = sorted(set(micro["cu_seq_lens_q"].tolist()))
            target = torch.full((micro["input_ids"].numel(),), -100)
            target[micro["loss_index"]] = micro["targets"]
            for start, end in itertools.pairwise(borders):
                wanted = target[start:end]
                if not (wanted != -100).any():
                    continue
                hidden = model.get_base_model().model(micro["input_ids"][:, start:end].to(device), use_cache=False)
                at = (wanted != -100).nonzero()[:, 0]
                logits = model.get_base_model().lm_head(hidden.last_hidden_state[0, at.to(device)]).float()
                loss = (
                    torch.nn.functional.cross_entropy(logits, wanted[at].to(device), reduction="sum")
                    / item["num_supervised_tokens"]
                )
                loss.backward()
                total += float(loss)
        found = gather(model)
        del model
        gc.collect()
        torch.cuda.empty_cache()
        return total, found

    case = Case("check", "", rows=2)
    from loraflow.data.token_rows import TokenRows
    from loraflow.training.batches import StepDataset, concatenated_layout
    from loraflow.training.schedule import row_order

    rows = TokenRows(work / "tokens" / "train", work / "tokens" / "packing.parquet")
    steps = row_order(len(rows), 2, 0).reshape(1, 2)
    item = StepDataset(rows, steps, concatenated_layout(rows, steps, 2 * LENGTH), 0)[0]
    loss, exact = eager(torch.float32, item)

    def against(name: str, found_loss: float, found: dict[str, torch.Tensor]) -> None:
        a = torch.cat([found[n].flatten() for n in sorted(exact)]).double()
        b = torch.cat([exact[n].flatten() for n in sorted(exact)]).double()
        error, cosine = float((a - b).norm() / b.norm()), float(a @ b / a.norm() / b.norm())
        off = abs(found_loss - loss) / loss
        print(f"{name:16s} gradient error {error:.4f}, cosine {cosine:.5f}, loss error {off:.1e}", flush=True)

    against("eager bf16", *eager(torch.bfloat16, item))
    for one in CASES:
        if one.name not in names or one.peer is not None:
            continue
        case.settings = {**one.settings, "peft_config.lora_dropout": 0.0, "runtime.compile": "off" if TINY else "on"}
        trainer = build(work, case)
        set_up_projections(trainer.model)
        trainer.model.train()
        total = 0.0
        for micro in item["micro_batches"]:
            part = trainer.micro_batch_loss(micro) / item["num_supervised_tokens"]
            part.backward()
            total += float(part)
        against(one.name, total, gather(trainer.model))
        del trainer
        gc.collect()
        torch.cuda.empty_cache()
        torch._dynamo.reset()


CLASSES = (
    ("attention", ("flash", "fmha", "attn")),
    ("frozen and LoRA products", ("gemm", "nvjet", "cutlass", "xmma", "cublas", "splitk", "sm90")),
    ("compiled elementwise", ("triton",)),
    ("optimizer, clipping", ("multi_tensor", "adam", "foreach")),
    ("copies", ("memcpy", "memset")),
)


def profile(work: Path, case: Case) -> None:
    """Print the device time of a step by class of kernel."""
    import torch
    from torch.profiler import ProfilerActivity
    from torch.profiler import profile as profiler

    trainer = build(work, case)
    trainer.model.train()
    trainer.create_optimizer()
    parameters = trainer.trained

    def step(number: int) -> None:
        item = trainer.steps[number]
        for micro in item["micro_batches"]:
            (trainer.micro_batch_loss(micro) / item["num_supervised_tokens"]).backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        trainer.optimizer.step()
        trainer.optimizer.zero_grad()

    for number in range(4):
        step(number)
    torch.cuda.synchronize()
    with profiler(activities=[ProfilerActivity.CUDA]) as seen:
        for number in range(4, 7):
            step(number)
        torch.cuda.synchronize()
    rows = [(e.key, e.self_device_time_total / 3e3, e.count / 3) for e in seen.key_averages()
            if e.self_device_time_total > 0 and "CUDA" in str(e.device_type)]  # fmt: skip
    total = sum(ms for _, ms, _ in rows)
    print(f"\n{case.name}: {total:.1f} ms of kernels a step")
    left = dict.fromkeys([name for name, _ in CLASSES] + ["other"], 0.0)
    for key, ms, _ in rows:
        low = key.lower()
        left[next((name for name, words in CLASSES if any(w in low for w in words)), "other")] += ms
    for name, ms in left.items():
        print(f"  {name:26s} {ms:8.1f} ms {100 * ms / total:5.1f} %")
    for key, ms, count in sorted(rows, key=lambda row: -row[1])[:22]:
        print(f"    {ms:8.2f} ms {count:6.0f} x {key[:130]}")


def main() -> None:
    if "LORAFLOW_BENCH_PEER" in os.environ:
        name, work = json.loads(os.environ["LORAFLOW_BENCH_PEER"])
        run_peer(next(case for case in CASES if case.name == name), Path(work))
        return
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("cases", nargs="*", default=[])
    parser.add_argument("--work", type=Path, help="folder for model and rows, kept for the next call")
    parser.add_argument("--check", action="store_true")
    parser.add_argument("--profile", action="store_true")
    chosen = parser.parse_args()
    work = chosen.work or Path(tempfile.mkdtemp())
    work.mkdir(parents=True, exist_ok=True)
    wanted = chosen.cases or [case.name for case in CASES]
    if not (work / "base").exists():
        build_base(work / "base")
        build_tokens(work / "tokens", rows=(WARM + TIMED) * 8 + 16)
    import torch

    print(torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu", "torch", torch.__version__, flush=True)
    if chosen.check:
        check(work, wanted)
        return
    cases = [case for case in CASES if case.name in wanted]
    if chosen.profile:
        for case in cases:
            profile(work, case)
        return
    rate = ceiling()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
    results = {}
    for case in cases:
        try:
            results[case.name] = peer(case, work) if case.peer is not None else ours(case, work)
            print(case.name, json.dumps({k: v for k, v in results[case.name].items() if k != "losses"}), flush=True)
        except RuntimeError as error:
            print(case.name, "failed:", str(error)[-1500:], flush=True)
    table(results, work, rate)


if __name__ == "__main__":
    main()
