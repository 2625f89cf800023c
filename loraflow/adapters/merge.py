"""Stage merge: base and adapter to a merged checkpoint, streamed from disk to disk.

Plain LoRA is merged block by block of rows, W + (B·A)·s in fp32, rounded once: bit for bit what
`peft.merge_and_unload()` gives for fp32 adapters, in a few hundred megabytes. What needs more than that sum (DoRA,
biases, embeddings, modules_to_save) goes through peft itself.
"""

from __future__ import annotations

import json
import math
import os
import re
import shutil
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from loraflow.adapters import tensors
from loraflow.adapters.tensors import Entry, Planned
from loraflow.failures import BadModel
from loraflow.job import Inputs, Job, Progress
from loraflow.store import Summary

# Rows of a block. The product's bits depend on how a matrix is cut: powers of two gave peft's on every shape tried (64 to
# 1024 rows), 2 MiB blocks did not (14 of 400 million elements). 256 rows of fp32 stay in the second-level cache.
ROWS = 256
_PREFIX = "base_model.model."


def run(job: Job, inputs: Inputs, out: Path, report: Progress) -> Summary:
    """Write the merged model to `out/`, ready for `from_pretrained`.

    Raises:
        BadModel: an adapter tensor fits nothing in the base, or its shape is wrong.
    """
    figures = merge(
        inputs["base"],
        inputs["adapter"] / "adapter",
        out,
        dtype=job.config["dtype"],
        max_shard_bytes=int(job.config["max_shard_size_gb"] * 1e9),
        threads=job.runtime.get("threads"),
        report=report,
    )
    seconds = figures.pop("seconds")
    (out / "telemetry").mkdir()
    (out / "telemetry" / "timing.json").write_text(json.dumps({"merge_seconds": seconds}))
    return Summary(figures=figures)


def merge(
    base: Path,
    adapter: Path,
    out: Path,
    *,
    dtype: str | None = None,
    max_shard_bytes: int = 5 * 10**9,
    threads: int | None = None,
    report: Progress | None = None,
) -> dict[str, Any]:
    """Merge an adapter's folder into a base's folder; `out` must be empty. See `run`.

    Returns:
        Figures: `adapted` matrices, `route` (streamed or peft), `seconds` of the merge alone.
    """
    refuse_pickles(adapter)
    refuse_pickles(base)
    config = read_config(adapter)
    started = time.perf_counter()
    loras = _plain_loras(config, adapter)
    if loras is None:
        adapted = _merge_through_peft(base, adapter, out, dtype, max_shard_bytes)
        route = "peft"
    else:
        adapted = _merge_streaming(base, loras, out, dtype, max_shard_bytes, threads, report or Progress())
        route = "streamed"
    seconds = time.perf_counter() - started
    _copy_the_rest(base, out, dtype)
    return {"adapted": adapted, "route": route, "seconds": round(seconds, 2)}


def refuse_pickles(folder: Path) -> None:
    """Refuse an adapter or model that comes as a pickle.

    Raises:
        BadModel: there are weights, but no safetensors; nothing was opened.
    """
    names = [path.name for path in folder.iterdir()] if folder.is_dir() else []
    if not any(name.endswith(".safetensors") for name in names):
        pickles = [name for name in names if name.endswith((".bin", ".pt", ".pth", ".pkl", ".ckpt"))]
        raise BadModel(
            "The folder has no safetensors."
            + (" A pickle can run code when it is opened, so it is refused." if pickles else ""),
            where=str(folder),
            expected="*.safetensors",
            got=", ".join(pickles or names[:5]) or "nothing",
        )


def read_config(adapter: Path) -> dict[str, Any]:
    """Return an adapter's adapter_config.json.

    Raises:
        BadModel: it is missing, or no JSON.
    """
    try:
        return dict(json.loads((adapter / "adapter_config.json").read_text(encoding="utf-8")))
    except (OSError, ValueError, TypeError) as error:
        raise BadModel(
            "The adapter's configuration cannot be read.",
            where=str(adapter / "adapter_config.json"),
            expected="the JSON that peft writes beside adapter_model.safetensors",
            got=f"{type(error).__name__}: {error}".splitlines()[0][:200],
        ) from error


class Lora:
    """One adapted matrix: A [r, in], B [out, r], fp32, and the scale."""

    def __init__(self, down: Entry, up: Entry, scale: float):
        self.down, self.up, self.scale = down, up, scale


def _plain_loras(config: dict[str, Any], adapter: Path) -> dict[str, Lora] | None:
    """Return {name of the weight: its LoRA}, or None if the adapter is more than sums of products."""
    if config.get("peft_type", "LORA") != "LORA":
        raise BadModel(
            "This is no LoRA adapter.", where=str(adapter), expected="LORA", got=str(config.get("peft_type"))
        )
    file = adapter / "adapter_model.safetensors"
    if not file.exists():
        raise BadModel("The adapter's weights are missing.", where=str(adapter), expected=file.name)
    entries = {entry.name: entry for entry in tensors.read_entries(file)}
    pairs = {name.removesuffix(".lora_A.weight") for name in entries if name.endswith(".lora_A.weight")}
    expected = {f"{stem}.lora_{side}.weight" for stem in pairs for side in "AB"}
    special = ("use_dora", "modules_to_save", "lora_bias", "fan_in_fan_out", "trainable_token_indices", "use_qalora",
               "target_parameters", "arrow_config", "alora_invocation_tokens")  # fmt: skip
    if any(config.get(key) for key in special) or config.get("bias", "none") != "none" or expected != entries.keys():
        return None
    loras = {}
    for stem in sorted(pairs):
        down, up = entries[f"{stem}.lora_A.weight"], entries[f"{stem}.lora_B.weight"]
        name = stem.removeprefix(_PREFIX)
        rank = down.shape[0]
        if len(down.shape) != 2 or len(up.shape) != 2 or up.shape[1] != rank:
            return None  # a convolution
        alpha = by_pattern(config.get("alpha_pattern") or {}, name, config.get("lora_alpha", 8))
        loras[f"{name}.weight"] = Lora(down, up, alpha / (math.sqrt(rank) if config.get("use_rslora") else rank))
    return loras


def by_pattern(patterns: dict[str, float], name: str, default: float) -> float:
    """Look a module up in peft's alpha_pattern: keys are the ends of names, or regular expressions for them."""
    for pattern, value in patterns.items():
        if re.match(rf"(.*\.)?({pattern})$", name):
            return value
    return default


def _merge_streaming(
    base: Path,
    loras: dict[str, Lora],
    out: Path,
    dtype: str | None,
    max_bytes: int,
    threads: int | None,
    report: Progress,
) -> int:
    import torch

    entries = tensors.model_entries(base)
    _check_fit(entries, loras)
    files = tensors.plan_files(entries, tensors.DTYPES[dtype] if dtype else None, max_bytes)
    names = ["model.safetensors"] if len(files) == 1 else [
        f"model-{i:05d}-of-{len(files):05d}.safetensors" for i in range(1, len(files) + 1)
    ]  # fmt: skip
    before = torch.get_num_threads()
    torch.set_num_threads(1)  # a thread to a tensor scales; threads inside a small product do not
    sources = {entry.file: os.open(entry.file, os.O_RDONLY) for entry in entries}
    adapters = {lora.down.file: os.open(lora.down.file, os.O_RDONLY) for lora in loras.values()}
    targets = [os.open(out / name, os.O_RDWR | os.O_CREAT | os.O_EXCL, 0o644) for name in names]
    try:
        starts = [tensors.write_header(fd, planned) for fd, planned in zip(targets, files, strict=True)]
        worker = _Worker(sources | adapters)
        with ThreadPoolExecutor(threads or os.cpu_count() or 1) as pool:
            running = [
                pool.submit(worker.write, one, loras.get(one.source.name), fd, start + one.offset)
                for fd, start, planned in zip(targets, starts, files, strict=True)
                for one in planned
            ]
            for done, future in enumerate(running, 1):
                future.result()
                if done % 64 == 0 or done == len(running):
                    report(tensors=done, total=len(running))
    finally:
        torch.set_num_threads(before)
        for fd in (*sources.values(), *adapters.values(), *targets):
            os.close(fd)
    if len(files) > 1:
        index = {
            "metadata": {"total_size": sum(one.size for planned in files for one in planned)},
            "weight_map": {
                one.source.name: name for name, planned in zip(names, files, strict=True) for one in planned
            },
        }
        (out / "model.safetensors.index.json").write_text(json.dumps(index, indent=2, sort_keys=True) + "\n")
    return len(loras)


class _Worker:
    """Writes one tensor after another, with buffers of its own for each thread."""

    def __init__(self, fds: dict[Path, int]):
        self.fds = fds
        self.local = threading.local()

    def write(self, planned: Planned, lora: Lora | None, target: int, offset: int) -> None:
        """Write a tensor to its place: merged, cast or copied."""
        source = planned.source
        if lora is None and planned.dtype == source.dtype:
            tensors.copy_range(self.fds[source.file], target, source.size, source.offset, offset)
            return
        import torch

        kinds = {"BF16": torch.bfloat16, "F16": torch.float16, "F32": torch.float32, "F64": torch.float64}
        rows, columns = (source.shape[0], math.prod(source.shape[1:])) if source.shape else (1, 1)
        down, up = (self._read(lora.down, kinds), self._read(lora.up, kinds)) if lora else (None, None)
        for first in range(0, rows, ROWS):
            count = min(ROWS, rows - first)
            raw = memoryview(self._buffer(count * columns * tensors.SIZES[source.dtype]))
            tensors.read_all(self.fds[source.file], raw, source.offset + first * columns * tensors.SIZES[source.dtype])
            block = torch.frombuffer(raw, dtype=kinds[source.dtype]).view(count, columns)
            if lora is not None and down is not None and up is not None:
                self._add(block, up[first : first + count], down, lora.scale)
            if planned.dtype == source.dtype:
                tensors.write_all(target, raw, offset + first * columns * tensors.SIZES[source.dtype])
            else:
                cast: Any = block.to(kinds[planned.dtype]).contiguous().view(torch.uint8).numpy()
                tensors.write_all(
                    target, memoryview(cast).cast("B"), offset + first * columns * tensors.SIZES[planned.dtype]
                )

    def _add(self, block: Any, up: Any, down: Any, scale: float) -> None:
        """Add (up · down)·scale to a block of the weight, as peft does: in fp32, rounded once to the weight's dtype."""
        import torch

        if block.dtype == torch.float64:
            block += torch.mm(up, down) * scale
            return
        count, columns = block.shape
        if getattr(self.local, "sum", torch.empty(0)).numel() < count * columns:
            self.local.sum = torch.empty(count * columns)
        total = self.local.sum[: count * columns].view(count, columns)
        if math.frexp(scale)[0] == 0.5:  # a power of two: scaling a factor is scaling the product, to the bit
            total.copy_(block)
            total.addmm_(up * scale, down)
        else:
            torch.mm(up, down, out=total)
            total.mul_(scale).add_(block)
        block.copy_(total)

    def _buffer(self, size: int) -> memoryview:
        if len(getattr(self.local, "buffer", b"")) < size:
            self.local.buffer = bytearray(size)
        return memoryview(self.local.buffer)[:size]

    def _read(self, entry: Entry, kinds: dict[str, Any]) -> Any:
        import torch

        raw = bytearray(entry.size)
        tensors.read_all(self.fds[entry.file], memoryview(raw), entry.offset)
        return torch.frombuffer(raw, dtype=kinds[entry.dtype]).view(entry.shape).float()


def _check_fit(entries: list[Entry], loras: dict[str, Lora]) -> None:
    """Every adapter tensor is used exactly once, and fits.

    Raises:
        BadModel: it does not.
    """
    shapes = {entry.name: entry for entry in entries}
    for name, lora in loras.items():
        entry = shapes.get(name)
        if entry is None:
            near = [other for other in shapes if other.split(".")[-2:-1] == name.split(".")[-2:-1]][:2]
            raise BadModel(
                "The adapter adapts a matrix that the base does not have.",
                where=name,
                expected=", ".join(near) or f"one of {len(shapes)} tensors such as {next(iter(shapes), None)}",
                next_step="merge it into the base that it was trained on",
            )
        if (lora.up.shape[0], lora.down.shape[1]) != entry.shape or entry.dtype not in tensors.SIZES:
            raise BadModel(
                "An adapter's matrix does not fit the base's.",
                where=name,
                expected=f"{list(entry.shape)} {entry.dtype}",
                got=f"[{lora.up.shape[0]}, {lora.down.shape[1]}]",
                next_step="merge it into the base that it was trained on",
            )


def _merge_through_peft(base: Path, adapter: Path, out: Path, dtype: str | None, max_bytes: int) -> int:
    import torch
    from peft import PeftModel
    from peft.tuners.tuners_utils import BaseTunerLayer
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(base, dtype="auto", use_safetensors=True)
    wrapped = PeftModel.from_pretrained(model, str(adapter))
    _check_used(wrapped, adapter)
    adapted = sum(isinstance(module, BaseTunerLayer) for module in wrapped.modules())
    if adapted == 0:
        raise BadModel("The adapter adapts nothing in this base.", where=str(adapter))
    merged = wrapped.merge_and_unload(safe_merge=False)
    if dtype is not None:
        merged = merged.to(getattr(torch, dtype))
    merged.save_pretrained(out, max_shard_size=max_bytes)
    return adapted


def _check_used(wrapped: Any, adapter: Path) -> None:
    """Every tensor of the adapter must have found its place: peft leaves those that do not at their initial values.

    Raises:
        BadModel: one did not.
    """
    from peft import get_peft_model_state_dict, load_peft_weights

    theirs = {name.replace(".default.", ".") for name in load_peft_weights(str(adapter), device="cpu")}
    ours = {name.replace(".default.", ".") for name in get_peft_model_state_dict(wrapped)}
    lost = sorted(name for name in theirs - ours if "lora_" in name) + sorted(n for n in ours - theirs if "lora_" in n)
    if lost:
        raise BadModel(
            "The adapter's tensors do not fit the base.",
            where=str(adapter),
            got=f"{len(lost)} without a partner, such as {lost[0]}",
            next_step="merge it into the base that it was trained on",
        )


def _copy_the_rest(base: Path, out: Path, dtype: str | None) -> None:
    """Carry over configuration, tokenizer, template and generation config: without the last a model may never stop."""
    for path in sorted(base.iterdir()):
        if path.is_dir() or path.name == "manifest.json" or ".safetensors" in path.name:
            continue
        shutil.copyfile(path, out / path.name)
    if dtype is not None:
        file = out / "config.json"
        values = json.loads(file.read_text(encoding="utf-8"))
        values.pop("torch_dtype", None)
        file.write_text(json.dumps({**values, "dtype": dtype}, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
