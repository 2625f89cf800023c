"""Merge from disk to disk: W + (B·A)·s in blocks of rows, in fp32, rounded once, in a few hundred megabytes of memory.

For LoRA with fp32 adapters the result has the same bits as `peft.merge_and_unload()`. DoRA and fully trained modules
(modules_to_save) follow peft's order of operations. Embeddings are rounded once; peft rounds their 16-bit adapter as well.
"""

from __future__ import annotations

import errno
import hashlib
import json
import math
import os
import shutil
import struct
import threading
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from loraflow.adapters.merge_plan import SIZES, MatrixUpdate, MergePlan, check_types
from loraflow.base.stored_weights import HeaderEntry, TensorEntry, model_entries
from loraflow.base.weight_checks import is_finite, unused_weights
from loraflow.failures import BadModel
from loraflow.job import Progress

if TYPE_CHECKING:
    import torch

# Rows of a block. The product's bits depend on how a matrix is cut: powers of two gave peft's on every shape tried (64 to
# 1024 rows), 2 MiB blocks did not (14 of 400 million elements). 256 rows of fp32 stay in the second-level cache.
ROWS = 256
FEW_ROWS = 16  # no block is so short: kernels for few rows add products in another order (1 to 3 were seen)
CHECKED_BYTES = 8 * 2**20  # bytes of a copied tensor that are checked at a time
# Within these, from rank 2, adding to the weight while multiplying has the bits of a product that is added afterwards.
FUSED_RANK, FUSED_COLUMNS = 128, 16


def merge_streaming(
    base: Path,
    plan: MergePlan,
    out: Path,
    dtype: str | None,
    max_bytes: int,
    threads: int | None,
    progress: Progress,
) -> None:
    """Write the merged shards and their index to `out`.

    With a `progress.work` folder, finished shards are written there first, each with a checksum. An attempt of the same job
    after a kill uses those whose bytes still have that checksum.

    Raises:
        BadModel: a weight of the base is not finite, or one that the plan changes has no floating-point type.
    """
    import torch

    entries = model_entries(base)
    check_types(entries, plan)
    shards = _name_shards(plan_files(entries, DTYPES[dtype] if dtype else None, max_bytes))
    folder = out if progress.work is None else progress.work / "shards"
    folder.mkdir(exist_ok=True)
    threads_before = torch.get_num_threads()
    torch.set_num_threads(1)  # one thread for each tensor scales; threads inside a small product do not
    sources = {entry.file for entry in (*entries, *plan.adapter_entries)}
    fds = {file: os.open(file, os.O_RDONLY) for file in sources}
    try:
        writer = TensorWriter(base, plan, fds)
        with ThreadPoolExecutor(threads or os.cpu_count() or 1) as pool:
            for done, (name, planned) in enumerate(shards.items(), 1):
                if folder == out:
                    _write_shard(folder / name, planned, writer, pool, progress)
                elif not _is_complete(folder / name):
                    _checksum_file(folder / name).unlink(missing_ok=True)
                    _write_shard(folder / name, planned, writer, pool, progress, sync=True)
                    _write_checksum(folder / name)
                progress(shards=done, of=len(shards))
    finally:
        torch.set_num_threads(threads_before)
        for fd in fds.values():
            os.close(fd)
    for name in shards if folder != out else ():
        shutil.move(folder / name, out / name)  # a rename: both folders belong to the store
    if len(shards) > 1:
        _write_index(out / "model.safetensors.index.json", shards)


def _name_shards(shards: list[list[PlannedTensor]]) -> dict[str, list[PlannedTensor]]:
    if len(shards) == 1:
        return {"model.safetensors": shards[0]}
    return {f"model-{i:05d}-of-{len(shards):05d}.safetensors": shard for i, shard in enumerate(shards, 1)}


def _write_index(file: Path, shards: dict[str, list[PlannedTensor]]) -> None:
    index = {
        "metadata": {"total_size": sum(tensor.size for shard in shards.values() for tensor in shard)},
        "weight_map": {tensor.source.name: name for name, shard in shards.items() for tensor in shard},
    }
    file.write_text(json.dumps(index, indent=2, sort_keys=True) + "\n")


def _write_shard(
    file: Path,
    planned: list[PlannedTensor],
    writer: TensorWriter,
    pool: ThreadPoolExecutor,
    progress: Progress,
    *,
    sync: bool = False,
) -> None:
    fd = os.open(file, os.O_RDWR | os.O_CREAT | os.O_TRUNC, 0o644)
    try:
        start = write_header(fd, planned)
        running = [pool.submit(writer.write, tensor, fd, start + tensor.offset) for tensor in planned]
        for done, future in enumerate(running, 1):
            future.result()
            if done % 64 == 0 or done == len(running):
                progress(tensors=done, total=len(running))
        if sync:
            os.fsync(fd)
    finally:
        os.close(fd)


def _checksum_file(shard: Path) -> Path:
    return shard.with_suffix(".sha256")


def _write_checksum(shard: Path) -> None:
    part = _checksum_file(shard).with_suffix(".part")
    part.write_text(_checksum(shard))
    part.replace(_checksum_file(shard))


def _is_complete(shard: Path) -> bool:
    checksum = _checksum_file(shard)
    return shard.is_file() and checksum.is_file() and checksum.read_bytes() == _checksum(shard).encode()


def _checksum(shard: Path) -> str:
    """Return a checksum of the file's bytes and of its place, in which the work folder is named by the job's fingerprint."""
    with shard.open("rb") as handle:
        sha256 = hashlib.file_digest(handle, "sha256").hexdigest()
    return hashlib.sha256(f"{'/'.join(shard.parts[-5:])} {sha256}".encode()).hexdigest()


@dataclass(frozen=True)
class _Factors:
    """The tensors of a `MatrixUpdate`, in fp32."""

    down: torch.Tensor
    up: torch.Tensor
    scale: float
    magnitude: torch.Tensor | None
    embedding: bool


class _Scratch(threading.local):
    """Memory of one thread, used again for each block."""

    raw = bytearray()
    total: torch.Tensor | None = None

    def bytes(self, size: int) -> memoryview:
        if len(self.raw) < size:
            self.raw = bytearray(size)
        return memoryview(self.raw)[:size]

    def floats(self, rows: int, columns: int) -> torch.Tensor:
        import torch

        if self.total is None or self.total.numel() < rows * columns:
            self.total = torch.empty(rows * columns, dtype=torch.float32)
        return self.total[: rows * columns].view(rows, columns)


class TensorWriter:
    """Writes single tensors of the merged model. Several threads may share it.

    Args:
        fds: open file descriptors of all files of the base and the adapter.
    """

    def __init__(self, base: Path, plan: MergePlan, fds: dict[Path, int]):
        import torch

        self._plan, self._fds = plan, fds
        self._dtypes = {"BF16": torch.bfloat16, "F16": torch.float16, "F32": torch.float32, "F64": torch.float64}
        self._scratch = _Scratch()
        self._base, self._unused, self._asks = base, frozenset[str](), threading.Lock()
        self._has_asked = False

    def write(self, planned: PlannedTensor, target: int, offset: int) -> None:
        """Write a tensor at an offset of the file descriptor `target`: merged, replaced, cast or copied."""
        name = planned.source.name
        source, update = self._plan.replaced.get(name, planned.source), self._plan.updates.get(name)
        nf4 = self._plan.nf4 if name in self._plan.quantized else None
        if update is None and nf4 is None and planned.dtype == source.dtype:
            self._refuse_non_finite(source)
            copy_range(self._fds[source.file], target, source.size, source.offset, offset)
            return
        factors = None if update is None else self._factors(update)
        if nf4 is None:
            blocks = self._blocks(source)
        else:
            blocks = nf4.quantize_and_dequantize(self._blocks(source, in_scratch=False))
        row = 0
        for block in blocks:
            # A fully trained tensor (modules_to_save) is first rounded to the dtype of the base's tensor.
            merged = block.to(self._dtypes[planned.source.dtype])
            if factors is not None:
                _add_update(merged, factors, slice(row, row + len(merged)), self._scratch)
            merged = merged.to(self._dtypes[planned.dtype])
            if not is_finite(merged) and not self._is_unused(name):
                raise _not_finite(name, merged)
            write_all(target, _bytes_of(merged), offset)
            offset += merged.numel() * SIZES[planned.dtype]
            row += len(merged)

    def _blocks(self, source: TensorEntry, *, in_scratch: bool = True) -> Iterator[torch.Tensor]:
        """Yield a tensor in blocks of ROWS rows; with `in_scratch`, each is valid until the next one is asked for."""
        import torch

        rows, columns = (source.shape[0], math.prod(source.shape[1:])) if source.shape else (1, 1)
        row_size = columns * SIZES[source.dtype]
        for first, count in _cut(rows):
            size = count * row_size
            raw = self._scratch.bytes(size) if in_scratch else memoryview(bytearray(size))
            read_all(self._fds[source.file], raw, source.offset + first * row_size)
            yield torch.frombuffer(raw, dtype=self._dtypes[source.dtype]).view(count, columns)

    def _refuse_non_finite(self, source: TensorEntry) -> None:
        """Refuse a tensor that is copied, holds NaN or infinity, and is used. Integers and unknown types are not read."""
        import torch

        dtype = self._dtypes.get(source.dtype)
        if dtype is None:
            return
        for start in range(0, source.size, CHECKED_BYTES):  # a mixture's experts can be one tensor of many gigabytes
            raw = self._scratch.bytes(min(CHECKED_BYTES, source.size - start))
            read_all(self._fds[source.file], raw, source.offset + start)
            if not is_finite(torch.frombuffer(raw, dtype=dtype)) and not self._is_unused(source.name):
                raise BadModel(
                    "A weight of the base is not finite, and the adapter does not change it.",
                    where=f"{source.file}: {source.name}",
                    expected="finite values",
                    got="NaN or infinity",
                    next_step="fetch the base again, or choose another one",
                )

    def _is_unused(self, name: str) -> bool:
        """Tell whether the base's model does not load a tensor. It is opened to know that, once."""
        with self._asks:
            if not self._has_asked:
                self._unused, self._has_asked = unused_weights(self._base), True
        return name in self._unused

    def _factors(self, update: MatrixUpdate) -> _Factors:
        magnitude = None if update.magnitude is None else self._read(update.magnitude)
        return _Factors(self._read(update.down), self._read(update.up), update.scale, magnitude, update.embedding)

    def _read(self, entry: TensorEntry) -> torch.Tensor:
        import torch

        raw = bytearray(entry.size)
        read_all(self._fds[entry.file], memoryview(raw), entry.offset)
        return torch.frombuffer(raw, dtype=self._dtypes[entry.dtype]).view(entry.shape).float()


def _cut(rows: int) -> Iterator[tuple[int, int]]:
    """Yield the first row and the number of rows of each block of a matrix."""
    first = 0
    while first < rows:
        count = ROWS if rows - first >= ROWS + FEW_ROWS else rows - first
        yield first, count
        first += count


def _bytes_of(block: torch.Tensor) -> memoryview:
    import torch

    return block.contiguous().view(torch.uint8).numpy().data.cast("B")


def require_finite(name: str, merged: torch.Tensor) -> None:
    """Refuse merged values that are not finite: a model with such a value answers nothing.

    Raises:
        BadModel: a value is NaN or infinite.
    """
    if not is_finite(merged):
        raise _not_finite(name, merged)


def _not_finite(name: str, merged: torch.Tensor) -> BadModel:
    return BadModel(
        "A merged weight is not finite: NaN, or too large for its type.",
        where=name,
        expected=f"finite values of {str(merged.dtype).removeprefix('torch.')}",
        next_step="check base and adapter for values that are not finite; if the type is float16, merge in bfloat16",
    )


def _add_update(block: torch.Tensor, factors: _Factors, rows: slice, scratch: _Scratch) -> None:
    """Add (B·A)·scale to rows of a weight in place, as peft does: in fp32, rounded once to the weight's dtype."""
    import torch

    down, up, scale = factors.down, factors.up, factors.scale
    if factors.embedding:
        block.copy_(block.float() + torch.mm(up, down[:, rows]).T * scale)
        return
    up = up[rows]
    if factors.magnitude is not None:
        # DoRA: each row gets the learned length. https://arxiv.org/abs/2402.09353, equation 5
        total = block.float() + torch.mm(up, down) * scale
        factor = factors.magnitude[rows] / torch.linalg.norm(total, dim=1)
        block.copy_(factor.view(-1, 1) * total)
        return
    if block.dtype == torch.float64:
        block += torch.mm(up, down) * scale
        return
    total = scratch.floats(*block.shape)
    fuses = 1 < down.shape[0] <= FUSED_RANK and len(block) >= FEW_ROWS and block.shape[1] >= FUSED_COLUMNS
    if fuses and math.frexp(scale)[0] == 0.5:  # for a power of two, scaling B gives the bits of a scaled product
        total.copy_(block)
        total.addmm_(up * scale, down)
    else:
        torch.mm(up, down, out=total)
        total.mul_(scale).add_(block)
    block.copy_(total)


# The format of safetensors files: 8 bytes little-endian length of the header, the header (JSON), the tensors' bytes.
# https://github.com/huggingface/safetensors#format

DTYPES = {"bfloat16": "BF16", "float16": "F16", "float32": "F32"}


@dataclass(frozen=True)
class PlannedTensor:
    """A tensor of a new file; `offset` counts bytes from the end of the header."""

    source: TensorEntry
    dtype: str
    offset: int
    size: int


def plan_files(entries: Iterable[TensorEntry], dtype: str | None, max_bytes: int) -> list[list[PlannedTensor]]:
    """Distribute tensors over new files, in their order.

    Args:
        dtype: BF16, F16 or F32, which floating-point tensors are cast to; None leaves their dtypes unchanged.
        max_bytes: the largest size of a file; a larger tensor has a file of its own.
    """
    files: list[list[PlannedTensor]] = []
    offset = 0
    for entry in entries:
        cast = dtype if dtype and entry.dtype in SIZES else entry.dtype
        size = entry.size if cast == entry.dtype else entry.size // SIZES[entry.dtype] * SIZES[cast]
        if not files or (offset + size > max_bytes and files[-1]):
            files.append([])
            offset = 0
        files[-1].append(PlannedTensor(entry, cast, offset, size))
        offset += size
    return files


def write_header(fd: int, planned: list[PlannedTensor]) -> int:
    """Write a new file's header, extend the file to its final length, and return the offset of its first tensor."""
    tensors: dict[str, HeaderEntry] = {
        tensor.source.name: {
            "dtype": tensor.dtype,
            "shape": list(tensor.source.shape),
            "data_offsets": [tensor.offset, tensor.offset + tensor.size],
        }
        for tensor in planned
    }
    raw = json.dumps({"__metadata__": {"format": "pt"}, **tensors}, separators=(",", ":")).encode()
    raw += b" " * (-len(raw) % 8)  # tensors begin at a multiple of eight bytes
    start = 8 + len(raw)
    os.truncate(fd, start + sum(tensor.size for tensor in planned))
    write_all(fd, struct.pack("<Q", len(raw)) + raw, 0)
    return start


def read_all(fd: int, buffer: memoryview, offset: int) -> None:
    """Fill a buffer with a file's bytes from an offset on."""
    while buffer:
        got = os.preadv(fd, [buffer], offset)
        if got == 0:
            raise EOFError(f"the file ends {len(buffer)} bytes early")
        buffer, offset = buffer[got:], offset + got


def write_all(fd: int, data: bytes | memoryview, offset: int) -> None:
    """Write all of a buffer to a file at an offset."""
    view = memoryview(data)
    while view:
        done = os.pwrite(fd, view, offset)
        view, offset = view[done:], offset + done


def copy_range(source: int, target: int, size: int, source_offset: int, target_offset: int) -> None:
    """Copy bytes between files inside the kernel, or through a buffer if the kernel cannot."""
    while size:
        try:
            done = os.copy_file_range(source, target, min(size, 2**30), source_offset, target_offset)
        except (OSError, AttributeError) as error:  # AttributeError: macOS has no such call
            if getattr(error, "errno", None) == errno.ENOSPC:  # copying through a buffer would not help
                raise
            buffer = memoryview(bytearray(min(size, 8 * 2**20)))
            read_all(source, buffer, source_offset)
            write_all(target, buffer, target_offset)
            done = len(buffer)
        if done == 0:
            raise EOFError("a file of weights ends early")
        size, source_offset, target_offset = size - done, source_offset + done, target_offset + done
