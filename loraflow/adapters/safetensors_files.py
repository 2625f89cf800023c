"""Safetensors files as offsets: read the headers, plan new files, leave the contents on the disk.

Format: 8 bytes little-endian length of the header, the header (JSON), the tensors' bytes one after another.
https://github.com/huggingface/safetensors#format
"""

from __future__ import annotations

import json
import os
import struct
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from loraflow.failures import BadModel

SIZES = {"BF16": 2, "F16": 2, "F32": 4, "F64": 8}  # bytes of the floating types that a merge touches
DTYPES = {"bfloat16": "BF16", "float16": "F16", "float32": "F32"}
_MAX_HEADER = 100_000_000


@dataclass(frozen=True)
class Entry:
    """One tensor in a file: where its bytes are."""

    name: str
    file: Path
    dtype: str
    shape: tuple[int, ...]
    offset: int  # of its first byte, from the start of the file
    size: int  # bytes


def read_entries(file: Path) -> list[Entry]:
    """Return a file's tensors, in the order of their bytes.

    Raises:
        BadModel: the header is no header, or its offsets lie outside of the file.
    """
    total = file.stat().st_size
    try:
        with file.open("rb") as handle:
            (length,) = struct.unpack("<Q", handle.read(8))
            if length > min(total - 8, _MAX_HEADER):
                raise ValueError(f"a header of {length} bytes in a file of {total}")
            header = json.loads(handle.read(length))
        found = []
        for name, entry in header.items():
            if name == "__metadata__":
                continue
            start, end = entry["data_offsets"]
            if not 0 <= start <= end <= total - 8 - length:
                raise ValueError(f"{name} lies outside of the file")
            found.append(Entry(name, file, entry["dtype"], tuple(entry["shape"]), 8 + length + start, end - start))
    except (ValueError, KeyError, TypeError, AttributeError, struct.error) as error:
        raise BadModel("A safetensors file is damaged.", where=str(file.name), got=str(error)[:200]) from error
    return sorted(found, key=lambda entry: entry.offset)


def model_entries(folder: Path) -> list[Entry]:
    """Return all tensors of a model's folder, file by file: of the files that transformers would load.

    Raises:
        BadModel: there are none.
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
                "The index does not say what the files hold.",
                where=str(index),
                got=f"{len(wrong)} tensors, such as {wrong[0]}" if wrong else "a tensor in two files",
                next_step="fetch the base again",
            )
    return entries


def _weight_map(index: Path) -> dict[str, str]:
    """Read which file holds which tensor; a name that leads out of the folder is refused before anything is opened.

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
class Planned:
    """One tensor of a new file."""

    source: Entry
    dtype: str
    offset: int
    size: int


def plan_files(entries: Iterable[Entry], dtype: str | None, max_bytes: int) -> list[list[Planned]]:
    """Lay tensors out in new files of at most `max_bytes`, or one tensor; offsets count from behind the header.

    `dtype` (BF16, F16, F32) casts floating tensors; None keeps each one's own.
    """
    files: list[list[Planned]] = []
    at = 0
    for entry in entries:
        cast = dtype if dtype and entry.dtype in SIZES else entry.dtype
        size = entry.size if cast == entry.dtype else entry.size // SIZES[entry.dtype] * SIZES[cast]
        if not files or (at + size > max_bytes and files[-1]):
            files.append([])
            at = 0
        files[-1].append(Planned(entry, cast, at, size))
        at += size
    return files


def write_header(fd: int, planned: list[Planned]) -> int:
    """Write a new file's header, make the file as long as it will be, and return the offset of its first tensor."""
    header = {
        "__metadata__": {"format": "pt"},
        **{
            one.source.name: {
                "dtype": one.dtype,
                "shape": list(one.source.shape),
                "data_offsets": [one.offset, one.offset + one.size],
            }
            for one in planned
        },
    }
    raw = json.dumps(header, separators=(",", ":")).encode()
    raw += b" " * (-len(raw) % 8)  # tensors begin at a multiple of eight bytes
    start = 8 + len(raw)
    os.truncate(fd, start + sum(one.size for one in planned))
    write_all(fd, struct.pack("<Q", len(raw)) + raw, 0)
    return start


def read_all(fd: int, buffer: memoryview, offset: int) -> None:
    """Fill a buffer from a place in a file."""
    while buffer:
        got = os.preadv(fd, [buffer], offset)
        if got == 0:
            raise EOFError(f"the file ends {len(buffer)} bytes early")
        buffer, offset = buffer[got:], offset + got


def write_all(fd: int, data: bytes | memoryview, offset: int) -> None:
    """Write all of a buffer to a place in a file."""
    view = memoryview(data)
    while view:
        done = os.pwrite(fd, view, offset)
        view, offset = view[done:], offset + done


def copy_range(source: int, target: int, size: int, source_offset: int, target_offset: int) -> None:
    """Copy bytes between files inside the kernel, or through a buffer where it cannot."""
    while size:
        try:
            done = os.copy_file_range(source, target, min(size, 2**30), source_offset, target_offset)
        except (OSError, AttributeError) as error:  # AttributeError: macOS has no such call
            if getattr(error, "errno", None) == 28:  # a full disk is a full disk by either way
                raise
            buffer = memoryview(bytearray(min(size, 8 * 2**20)))
            read_all(source, buffer, source_offset)
            write_all(target, buffer, target_offset)
            done = len(buffer)
        if done == 0:
            raise EOFError("a file of weights ends early")
        size, source_offset, target_offset = size - done, source_offset + done, target_offset + done
