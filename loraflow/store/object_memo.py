"""Remember the hashes of a bucket's objects, so that an artifact there is read once after each change."""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import TypeAlias

from pydantic import TypeAdapter

from loraflow.store.bucket import ObjectInfo
from loraflow.store.files import write_atomic

log = logging.getLogger(__name__)
_Stamp: TypeAlias = tuple[str, int, float]  # ETag, size in bytes, time of the last write in seconds since 1970
_MEMO = TypeAdapter(dict[str, tuple[str, int, float, str]])  # by key: the stamp and the hash


class ObjectMemo:
    """Hashes of objects that this machine read, by key, ETag, size and time of the last write.

    Each write gives an object another ETag, or at least another time. The memo is a file of this machine: another machine
    reads the objects once more.
    """

    def __init__(self, path: Path):
        self.path = path
        self.changed = False
        try:
            self.known = _MEMO.validate_json(path.read_bytes())
        except (OSError, ValueError):
            self.known = {}

    def remembers(self, item: ObjectInfo, sha256: str) -> bool:
        """Tell whether an object had a hash when it was read, and has not changed since."""
        return self.known.get(item.key) == (*_stamp(item), sha256)

    def add(self, item: ObjectInfo, sha256: str) -> None:
        """Remember the hash of an object that was read after it was listed."""
        self.known[item.key] = (*_stamp(item), sha256)
        self.changed = True

    def save(self) -> None:
        """Write the memo to its file. A memo that cannot be written costs time only, so the error is only logged."""
        if self.changed:
            try:
                self.path.parent.mkdir(parents=True, exist_ok=True)
                write_atomic(self.path, json.dumps(self.known).encode())
                self.changed = False
            except OSError as error:
                log.debug("hashes of objects are not remembered: %s", error)


def _stamp(item: ObjectInfo) -> _Stamp:
    return item.etag, item.size, item.modified
