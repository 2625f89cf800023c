"""Cut rows into segments by their content, so that added, removed or changed rows change the segments around them alone.

A segment ends at a row whose checksum says so, wherever the row is. A cache by the content of segments then computes only
what is new.
"""

from __future__ import annotations

import zlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import TypeVar

import numpy as np

MEAN_ROWS = 256  # of a segment
MAX_ROWS = 1024
Item = TypeVar("Item")


def segments(
    batches: Iterable[Sequence[Item]], contents: Callable[[Sequence[Item]], Sequence[bytes]], max_bytes: int
) -> Iterator[list[Item]]:
    """Yield items in segments, in order.

    Args:
        batches: the rows, some thousands at a time. How many does not matter for the segments.
        contents: returns what decides whether rows end a segment: the same bytes for the same row.
        max_bytes: content of a segment, but for its last row.
    """
    found: list[Item] = []
    size = 0
    for items in batches:
        data = contents(items)
        totals = np.cumsum(np.fromiter(map(len, data), np.int64, len(data)))
        ends = np.flatnonzero(np.fromiter(map(zlib.crc32, data), np.uint32, len(data)) % MEAN_ROWS == 0)
        begin = 0
        while begin < len(items):
            before = int(totals[begin - 1]) if begin else 0
            by_content = ends[np.searchsorted(ends, begin) :][:1]
            by_size = int(np.searchsorted(totals, max_bytes - size + before))
            end = 1 + min(*by_content.tolist(), by_size, begin + MAX_ROWS - len(found) - 1)
            found += items[begin:end]
            if end > len(items):
                size += int(totals[-1]) - before
                break
            yield found
            found, size, begin = [], 0, end
    if found:
        yield found
