"""Write safetensors files by their headers and offsets, block by block (`loraflow.base.stored_weights` reads them).

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

from loraflow.base.stored_weights import HeaderEntry, TensorEntry

SIZES = {"BF16": 2, "F16": 2, "F32": 4, "F64": 8}  # bytes of the floating types that a merge touches
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
