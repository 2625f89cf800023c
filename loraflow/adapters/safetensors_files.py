"""Read and write safetensors files by their headers and offsets; the contents stay on the disk.

Format: 8 bytes little-endian length of the header, the header (JSON), the tensors' bytes one after another.
https://github.com/huggingface/safetensors#format
"""

from __future__ import annotations

import errno
import json
import os
import struct
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import TypedDict

from loraflow.failures import BadModel

SIZES = {"BF16": 2, "F16": 2, "F32": 4, "F64": 8}  # bytes of the floating types that a merge touches
DTYPES = {"bfloat16": "BF16", "float16": "F16", "float32": "F32"}
_MAX_HEADER = 100_000_000  # bytes; the limit of the safetensors library


class _HeaderEntry(TypedDict):
    """A tensor in a file's header, whose keys are the tensors' names."""

    dtype: str
    shape: list[int]
    data_offsets: list[int]  # of the first byte and after the last one, counted from the end of the header


@dataclass(frozen=True)
class TensorEntry:
    """A tensor in a file, by the position of its bytes."""

    name: str
    file: Path
    dtype: str
    shape: tuple[int, ...]
    offset: int  # of the first byte, from the start of the file
    size: int  # bytes


def read_entries(file: Path) -> list[TensorEntry]:
    """Return a file's tensors, in the order of their bytes.

    Raises:
        BadModel: the header cannot be read, or its offsets are outside the file.
    """
    total = file.stat().st_size
    try:
        with file.open("rb") as handle:
            (length,) = struct.unpack("<Q", handle.read(8))
            if length > min(total - 8, _MAX_HEADER):
                raise ValueError(f"a header of {length} bytes in a file of {total}")
            header: dict[str, _HeaderEntry] = json.loads(handle.read(length))
        found = []
        for name, entry in header.items():
            if name == "__metadata__":
                continue
            start, end = entry["data_offsets"]
            if not 0 <= start <= end <= total - 8 - length:
                raise ValueError(f"{name} lies outside of the file")
            found.append(
                TensorEntry(name, file, entry["dtype"], tuple(entry["shape"]), 8 + length + start, end - start)
            )
    except (ValueError, KeyError, TypeError, AttributeError, struct.error) as error:
        raise BadModel("A safetensors file is damaged.", where=str(file.name), got=str(error)[:200]) from error
    return sorted(found, key=lambda entry: entry.offset)


def model_entries(folder: Path) -> list[TensorEntry]:
    """Return the tensors of the files that transformers would load from a model's folder, file by file.

    Raises:
        BadModel: there are no such files, or they do not hold what their index says.
    """
    single, index = folder / "model.safetensors", folder / "model.safetensors.index.json"
    if single.exists():
        files = [single]
    elif index.exists():
        weight_map = _weight_map(index)
        files = [folder / name for name in sorted(set(weight_map.values()))]
    else:
        files = sorted(folder.glob("*.safetensors"))
    if not files:
        raise BadModel("The base has no safetensors.", where=str(folder), expected="model.safetensors")
    entries = [entry for file in files for entry in read_entries(file)]
    if index.exists() and not single.exists():
        held = {entry.name: entry.file.name for entry in entries}
        if held != weight_map or len(held) < len(entries):
            wrong = sorted(name for name in held.keys() | weight_map.keys() if held.get(name) != weight_map.get(name))
            raise BadModel(
                "The index does not match the tensors in the files.",
                where=str(index),
                got=f"{len(wrong)} tensors, such as {wrong[0]}" if wrong else "a tensor in two files",
                next_step="fetch the base again",
            )
    return entries


def _weight_map(index: Path) -> dict[str, str]:
    """Read which file holds which tensor, and refuse paths outside of the folder before any file is opened.

    Raises:
        BadModel: the index is damaged, names a file that is missing, or one elsewhere.
    """
    try:
        weight_map = {str(name): str(file) for name, file in json.loads(index.read_text("utf-8"))["weight_map"].items()}
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise BadModel("The index of the weights is damaged.", where=str(index), got=str(error)[:200]) from error
    for file in sorted(set(weight_map.values())):
        if Path(file).name != file or not file.endswith(".safetensors"):
            raise BadModel(
                "The index of the weights names a file outside of its folder.",
                where=str(index),
                expected="the name of a .safetensors file beside it",
                got=file[:200],
                next_step="do not use this checkpoint",
            )
        if not (index.parent / file).exists():
            raise BadModel("A file of weights is missing.", where=str(index), expected=file, next_step="fetch it again")
    return weight_map


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
        entries: the tensors.
        dtype: BF16, F16 or F32, which floating-point tensors are cast to; None leaves their dtypes unchanged.
        max_bytes: of one file; a larger tensor has a file of its own.
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
    tensors: dict[str, _HeaderEntry] = {
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
