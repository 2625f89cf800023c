"""Cut rows into segments by their content, so that added, removed or changed rows change the segments around them alone.

A segment ends at a row whose checksum says so, wherever the row is. A cache by the content of segments then computes only
what is new.
"""

from __future__ import annotations

import zlib
from collections.abc import Callable, Iterable, Iterator
from typing import TypeVar

MEAN_ROWS = 256  # of a segment
MAX_ROWS = 1024
Item = TypeVar("Item")


def segments(items: Iterable[Item], content: Callable[[Item], bytes], max_bytes: int) -> Iterator[list[Item]]:
    """Yield items in segments, in order.

    Args:
        items: the rows.
        content: returns what decides whether a row ends a segment: the same bytes for the same row.
        max_bytes: content of a segment, but for its last row.
    """
    found: list[Item] = []
    size = 0
    for item in items:
        found.append(item)
        data = content(item)
        size += len(data)
        if len(found) == MAX_ROWS or size >= max_bytes or zlib.crc32(data) % MEAN_ROWS == 0:
            yield found
            found, size = [], 0
    if found:
        yield found
