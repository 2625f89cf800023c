"""Merging from disk to disk: W + (B·A)·s, a block of rows at a time, in fp32, rounded once, in a few hundred megabytes.

The same bits as `peft.merge_and_unload()` for LoRA with fp32 adapters, and its order of operations for DoRA and modules
that were trained as a whole. Embeddings are rounded once, where peft rounds their 16-bit adapter as well. What needs more
goes through peft itself.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import re
import shutil
import threading
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from loraflow.adapters import safetensors_files as tensors
from loraflow.adapters import validation as accept
from loraflow.adapters.fused_projections import SPLIT
from loraflow.adapters.lora_updates import PREFIX
from loraflow.adapters.nf4 import Nf4
from loraflow.adapters.safetensors_files import Entry, Planned
from loraflow.failures import BadModel
from loraflow.job import Progress

# Rows of a block. The product's bits depend on how a matrix is cut: powers of two gave peft's on every shape tried (64 to
# 1024 rows), 2 MiB blocks did not (14 of 400 million elements). 256 rows of fp32 stay in the second-level cache.
ROWS = 256
_MORE = ("lora_bias", "fan_in_fan_out", "trainable_token_indices", "use_qalora", "target_parameters", "arrow_config",
         "alora_invocation_tokens", "layer_replication", "use_bdlora", "megatron_config")  # fmt: skip


@dataclass(frozen=True)
class Lora:
    """One adapted matrix: A [r, in], B [out, r], the scale; of an embedding W is [in, out]. DoRA's magnitude is [out]."""

    down: Entry
    up: Entry
    scale: float
    magnitude: Entry | None = None
    embedding: bool = False


@dataclass(frozen=True)
class Plan:
    """What an adapter does to a base, by the names of its tensors: updates, and tensors that take a place as they are."""

    loras: dict[str, Lora]
    replaced: dict[str, Entry]
    nf4: Nf4 | None = None  # how the tensors of these names were packed in training: they are merged as it saw them
    packed: frozenset[str] = frozenset()


def plan_of(config: dict[str, Any], adapter: Path) -> Plan | None:
    """Return what is to be done, every tensor of the adapter used once, or None if it takes peft.

    Raises:
        BadModel: this is no LoRA adapter, or it is damaged.
    """
    if config.get("peft_type", "LORA") != "LORA":
        raise BadModel(
            "This is no LoRA adapter.", where=str(adapter), expected="LORA", got=str(config.get("peft_type"))
        )
    entries = {entry.name: entry for entry in tensors.read_entries(adapter / "adapter_model.safetensors")}
    if any(config.get(key) for key in _MORE) or accept.changed_base(config):
        return None
    loras: dict[str, Lora] = {}
    used: set[str] = set()
    for first, second, embedding in (
        (".lora_A.weight", ".lora_B.weight", False),
        (".lora_embedding_A", ".lora_embedding_B", True),
    ):
        for stem in sorted(name.removesuffix(first) for name in entries if name.endswith(first)):
            down, up = entries[stem + first], entries.get(stem + second)
            magnitude = entries.get(f"{stem}.lora_magnitude_vector")
            if up is None or len(down.shape) != 2 or len(up.shape) != 2 or (embedding and magnitude is not None):
                return None  # half a pair, a convolution, DoRA's norms over the vocabulary
            if down.shape[0] != up.shape[1]:
                return None
            name, rank = stem.removeprefix(PREFIX), down.shape[0]
            alpha = by_pattern(config.get("alpha_pattern") or {}, name, config.get("lora_alpha", 8))
            check_rank(config, name, rank)
            scale = alpha / (math.sqrt(rank) if config.get("use_rslora") else rank)
            loras[f"{name}.weight"] = Lora(down, up, scale, magnitude, embedding)
            used |= {entry.name for entry in (down, up, magnitude) if entry is not None}
    if bool(config.get("use_dora")) != any(lora.magnitude for lora in loras.values()):
        return None
    rest = [name for name in entries if name not in used]
    replaced = {name.removeprefix(PREFIX).replace(".base_layer.", "."): entries[name] for name in rest}
    if any(".lora_" in name for name in rest) or len(replaced) < len(rest):
        return None
    return Plan(loras, replaced)


def by_pattern(patterns: dict[str, float], name: str, default: float) -> float:
    """Look a module up in peft's alpha_pattern: keys are the ends of names, or regular expressions for them."""
    for pattern, value in patterns.items():
        if re.match(rf"(.*\.)?({pattern})$", name):
            return value
    return default


def check_rank(config: dict[str, Any], name: str, rank: int) -> None:
    """Refuse a configuration whose rank is not the matrices': its alpha is of another adapter too.

    Raises:
        BadModel: it is not.
    """
    told = by_pattern(config.get("rank_pattern") or {}, name, config.get("r", rank))
    if told != rank:
        raise BadModel(
            "The adapter's configuration is not of its weights.",
            where=name,
            expected=f"rank {told}, by adapter_config.json",
            got=f"rank {rank}, in adapter_model.safetensors",
            next_step="bring the two files that were saved together",
        )


def merge_streaming(
    base: Path,
    plan: Plan,
    out: Path,
    dtype: str | None,
    max_bytes: int,
    threads: int | None,
    report: Progress,
) -> None:
    """Write the merged shards and their index to `out`.

    A finished shard is kept in `report.work`, where there is one, with its sha256: an attempt after a kill takes it from
    there if its bytes are still those.

    Raises:
        BadModel: an adapter's tensor has no place in the base, or another shape.
    """
    import torch

    entries = tensors.model_entries(base)
    check_fit(entries, plan)
    files = tensors.plan_files(entries, tensors.DTYPES[dtype] if dtype else None, max_bytes)
    names = ["model.safetensors"] if len(files) == 1 else [
        f"model-{i:05d}-of-{len(files):05d}.safetensors" for i in range(1, len(files) + 1)
    ]  # fmt: skip
    folder = out if report.work is None else report.work / "shards"
    folder.mkdir(exist_ok=True)
    before = torch.get_num_threads()
    torch.set_num_threads(1)  # a thread to a tensor scales; threads inside a small product do not
    used = {entry.file for entry in entries} | {entry.file for entry in _adapters(plan)}
    fds = {file: os.open(file, os.O_RDONLY) for file in used}
    try:
        worker = Worker(fds)
        with ThreadPoolExecutor(threads or os.cpu_count() or 1) as pool:
            for done, (name, planned) in enumerate(zip(names, files, strict=True), 1):
                if folder == out or not _is_whole(folder / name):
                    _write_shard(folder / name, planned, plan, worker, pool, report, seal=folder != out)
                report(shards=done, of=len(files))
    finally:
        torch.set_num_threads(before)
        for fd in fds.values():
            os.close(fd)
    for name in names if folder != out else ():
        shutil.move(folder / name, out / name)  # a rename: both are the store's
    if len(files) > 1:
        index = {
            "metadata": {"total_size": sum(one.size for planned in files for one in planned)},
            "weight_map": {
                one.source.name: name for name, planned in zip(names, files, strict=True) for one in planned
            },
        }
        (out / "model.safetensors.index.json").write_text(json.dumps(index, indent=2, sort_keys=True) + "\n")


def _adapters(plan: Plan) -> list[Entry]:
    loras = [entry for lora in plan.loras.values() for entry in (lora.down, lora.up, lora.magnitude) if entry]
    return [*loras, *plan.replaced.values()]


def _write_shard(
    file: Path, planned: list[Planned], plan: Plan, worker: Worker, pool: Any, report: Progress, seal: bool
) -> None:
    _seal_of(file).unlink(missing_ok=True)
    fd = os.open(file, os.O_RDWR | os.O_CREAT | os.O_TRUNC, 0o644)
    try:
        start = tensors.write_header(fd, planned)
        running = [pool.submit(worker.write, one, plan, fd, start + one.offset) for one in planned]
        for done, future in enumerate(running, 1):
            future.result()
            if done % 64 == 0 or done == len(running):
                report(tensors=done, total=len(running))
        if seal:
            os.fsync(fd)
    finally:
        os.close(fd)
    if seal:
        part = _seal_of(file).with_suffix(".part")
        part.write_text(_sha256(file))
        part.replace(_seal_of(file))


def _seal_of(file: Path) -> Path:
    return file.with_suffix(".sha256")


def _is_whole(file: Path) -> bool:
    return file.exists() and _seal_of(file).exists() and _seal_of(file).read_text() == _sha256(file)


def _sha256(file: Path) -> str:
    with file.open("rb") as handle:
        return hashlib.file_digest(handle, "sha256").hexdigest()


class Worker:
    """Writes one tensor after another, with buffers of its own for each thread."""

    def __init__(self, fds: dict[Path, int]):
        self.fds = fds
        self.local = threading.local()

    def write(self, planned: Planned, plan: Plan, target: int, offset: int) -> None:
        """Write a tensor to its place: merged, replaced, cast or copied."""
        source, lora = plan.replaced.get(planned.source.name, planned.source), plan.loras.get(planned.source.name)
        nf4 = plan.nf4 if planned.source.name in plan.packed else None
        if lora is None and nf4 is None and planned.dtype == source.dtype:
            tensors.copy_range(self.fds[source.file], target, source.size, source.offset, offset)
            return
        import torch

        kinds = {"BF16": torch.bfloat16, "F16": torch.float16, "F32": torch.float32, "F64": torch.float64}
        rows, columns = (source.shape[0], math.prod(source.shape[1:])) if source.shape else (1, 1)
        parts = self._parts(lora, kinds) if lora else None
        size, wide = tensors.SIZES[source.dtype], tensors.SIZES[planned.dtype]
        unpacked = None if nf4 is None else nf4.there_and_back(self._blocks(source, kinds))
        for first in range(0, rows, ROWS):
            count = min(ROWS, rows - first)
            raw = memoryview(self._buffer(count * columns * size))
            block = torch.frombuffer(raw, dtype=kinds[source.dtype]).view(count, columns)
            if unpacked is None:
                tensors.read_all(self.fds[source.file], raw, source.offset + first * columns * size)
            else:
                block.copy_(next(unpacked))
            if planned.source.dtype != source.dtype:  # what was trained as a whole has first the dtype of its base
                block = block.to(kinds[planned.source.dtype])
            if parts is not None:
                self._add(block, parts, slice(first, first + count))
            if (
                planned.dtype == source.dtype
                and block.data_ptr() == torch.frombuffer(raw, dtype=torch.uint8).data_ptr()
            ):
                tensors.write_all(target, raw, offset + first * columns * size)
            else:
                cast: Any = block.to(kinds[planned.dtype]).contiguous().view(torch.uint8).numpy()
                tensors.write_all(target, memoryview(cast).cast("B"), offset + first * columns * wide)

    def _blocks(self, source: Entry, kinds: dict[str, Any]) -> Iterator[Any]:
        import torch

        rows, columns = source.shape
        row = columns * tensors.SIZES[source.dtype]
        for first in range(0, rows, ROWS):
            raw = bytearray(min(ROWS, rows - first) * row)
            tensors.read_all(self.fds[source.file], memoryview(raw), source.offset + first * row)
            yield torch.frombuffer(raw, dtype=kinds[source.dtype]).view(-1, columns)

    def _parts(self, lora: Lora, kinds: dict[str, Any]) -> tuple[Any, Any, float, Any, bool]:
        magnitude = self._read(lora.magnitude, kinds) if lora.magnitude else None
        return self._read(lora.down, kinds), self._read(lora.up, kinds), lora.scale, magnitude, lora.embedding

    def _add(self, block: Any, parts: tuple[Any, Any, float, Any, bool], rows: slice) -> None:
        """Add (up · down)·scale to rows of the weight, as peft does: in fp32, rounded once to the weight's dtype."""
        import torch

        down, up, scale, magnitude, embedding = parts
        if embedding:
            block.copy_(block.float() + torch.mm(up, down[:, rows]).T * scale)
            return
        up = up[rows]
        if magnitude is not None:
            # DoRA: each row gets the learned length. https://arxiv.org/abs/2402.09353, equation 5
            total = block.float() + torch.mm(up, down) * scale
            factor = magnitude[rows] / torch.linalg.norm(total, dim=1)
            block.copy_(factor.view(-1, 1) * total)
            return
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


def check_fit(entries: list[Entry], plan: Plan) -> None:
    """Every adapter tensor is used exactly once, and fits.

    Raises:
        BadModel: it does not.
    """
    shapes = {entry.name: entry for entry in entries}
    wanted = {name: _shape(lora) for name, lora in plan.loras.items()}
    wanted |= {name: entry.shape for name, entry in plan.replaced.items()}
    for name, shape in wanted.items():
        entry = shapes.get(name)
        if entry is None:
            near = [other for other in shapes if other.split(".")[-2:-1] == name.split(".")[-2:-1]][:2]
            other = _other_form(name, shapes)
            raise BadModel(
                "The adapter adapts a matrix that the base does not have.",
                where=name,
                expected=other or ", ".join(near) or f"one of {len(shapes)} tensors such as {next(iter(shapes), None)}",
                next_step="loraflow adapters convert ADAPTER BASE OUT makes it fit this base's projections; merge OUT"
                if other
                else "merge it into the base that it was trained on",
            )
        if shape != entry.shape or entry.dtype not in tensors.SIZES:
            raise BadModel(
                "An adapter's matrix does not fit the base's.",
                where=name,
                expected=f"{list(entry.shape)} {entry.dtype}",
                got=str(list(shape)),
                next_step="merge it into the base that it was trained on",
            )


def _other_form(name: str, shapes: Iterable[str]) -> str | None:
    """Return what holds a projection in a base that fuses it, or splits it, where this one does not have it as named."""
    parent, own, rest = ["", *name.rsplit(".", 2)][-3:]
    wholes = {part: whole for whole, parts in SPLIT.items() for part in parts}
    for form in (*SPLIT.get(own, ())[:1], wholes.get(own)):
        if form and f"{parent}.{form}.{rest}" in shapes:
            return f"{parent}.{form}.{rest}"
    return None


def _shape(lora: Lora) -> tuple[int, ...]:
    out, inner = lora.up.shape[0], lora.down.shape[1]
    return (inner, out) if lora.embedding else (out, inner)
