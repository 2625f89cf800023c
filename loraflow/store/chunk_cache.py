"""A cache of parts of a stage's result, by the hash of their sources. It is beside the artifacts of a store.

An entry begins with the SHA-256 of its key and content. So an entry that is damaged, or was copied over another one, is
noticed: it is removed and computed again. Cleanup removes entries that nobody read for two weeks.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import re
import secrets
import zlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path, PurePosixPath
from typing import Any, TypeVar

from loraflow.failures import Failure
from loraflow.store.checkpoints import recompute_digest
from loraflow.store.files import read_file

FOLDER = "cache"
_HASH = hashlib.sha256().digest_size
log = logging.getLogger("loraflow")
MEAN_ROWS = 256  # of a segment
MAX_ROWS = 1024
Item = TypeVar("Item")


class ChunkCache:
    """The entries of a stage. An entry that cannot be read or written is named in the log: the result does not need it.

    Args:
        folder: where they are; it is made when the first one is written.
    """

    def __init__(self, folder: Path):
        self.folder = folder
        self._has_failed = False

    @classmethod
    def beside(cls, work: Path | None, stage: str) -> ChunkCache | None:
        """Return the cache of the store that a job's work folder belongs to.

        None if it belongs to no store, and if the job computes an artifact again on purpose (`--force`): it would only copy.
        """
        if work is None or work.parent.name != stage or work.parent.parent.name != "work" or recompute_digest(work):
            return None
        return cls(work.parents[2] / FOLDER / stage)

    def read(self, key: str) -> memoryview | None:
        """Return the content of an entry; None if there is none, or a damaged one, which is removed."""
        file = self._file(key)
        try:
            data = read_file(file)
            content = memoryview(data)[_HASH:]
            if _hash(key, content) != data[:_HASH]:
                log.warning("%s is damaged; it is computed again", file)
                file.unlink(missing_ok=True)
                return None
            os.utime(file)  # cleanup removes what was not used for long
        except FileNotFoundError:
            return None
        except (OSError, Failure) as error:
            self._say("read", error)
            return None
        return content

    def write(self, key: str, content: bytes) -> None:
        """Write an entry, without a flush to the disk: the hash of an incomplete entry is wrong."""
        file = self._file(key)
        draft = file.with_name(f".draft-{secrets.token_hex(4)}")
        try:
            file.parent.mkdir(parents=True, exist_ok=True)
            try:
                draft.write_bytes(_hash(key, content) + content)
                draft.replace(file)
            finally:
                draft.unlink(missing_ok=True)
        except OSError as error:
            self._say("written", error)

    def _say(self, what: str, error: Exception) -> None:
        if not self._has_failed:  # once: a full disk fails for every entry
            log.warning("the cache %s cannot be %s (%s); rows are computed without it", self.folder, what, error)
        self._has_failed = True

    def _file(self, key: str) -> Path:
        return self.folder / key[:2] / key


def _hash(key: str, content: bytes | memoryview) -> bytes:
    found = hashlib.sha256(key.encode() + b"\0")
    found.update(content)
    return found.digest()


def split_head(content: bytes | memoryview) -> tuple[Any, int]:
    """Return the JSON in the first line of a content, and where the next line begins."""
    end = next(re.finditer(b"\n", content)).end()
    return json.loads(bytes(content[:end])), end


def stale_entries(root: Path, before: float, *, remove: bool) -> Iterator[tuple[PurePosixPath, int]]:
    """Yield (name, bytes) of each stage's entries that were last used before a time, together.

    Args:
        root: the folder of the store, or of its local copy.
    """
    for folder in sorted((root / FOLDER).glob("*")):
        size = 0
        for file in folder.glob("*/*"):
            found = file.stat()
            if found.st_mtime < before:
                size += found.st_size
                if remove:
                    file.unlink(missing_ok=True)
        if size:
            yield PurePosixPath(FOLDER, folder.name), size


def segments(
    batches: Iterable[Sequence[Item]], contents: Callable[[Sequence[Item]], Sequence[bytes]], max_bytes: int
) -> Iterator[list[Item]]:
    """Yield items in segments, in order, so that added, removed or changed rows change the segments around them alone.

    A segment ends at a row whose checksum says so, wherever the row is. A cache by the content of segments then computes
    only what is new.

    Args:
        batches: the rows, some thousands at a time. How many does not matter for the segments.
        contents: returns what decides whether rows end a segment: the same bytes for the same row.
        max_bytes: content of a segment, but for its last row.
    """
    import numpy as np

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
