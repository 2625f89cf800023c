"""Which held-out rows a model's challengers were ever scored on: what looks refer to, kept so that a loss forgets nothing.

registry/<model>/rows/<digest>.json  the keys of the rows of looks
anchors/<model>/rows/<digest>.json   a copy: whatever is left of the two counts, whether or not a look names it
"""

from __future__ import annotations

import hashlib
from collections.abc import Collection
from typing import NamedTuple

from pydantic import TypeAdapter, ValidationError

from loraflow.data.row_key import row_key as row_key
from loraflow.identity import canonical
from loraflow.registry.anchor import FOLDER as ANCHORS
from loraflow.store import Store
from loraflow.store.files import json_bytes

_ROWS = TypeAdapter(list[str])


class Sets(NamedTuple):
    """The sets of rows that a store has."""

    intact: dict[str, set[str]]  # {digest: keys}; the copy's, if only that is intact
    damaged: set[str]  # digests of documents with other keys than their name says, whether or not the copy is intact
    documents: set[str]  # names of all documents


class ScoredRows:
    """The sets of rows that the looks of one model used."""

    def __init__(self, store: Store, model: str):
        self._store = store
        self._folders = (f"registry/{model}/rows/", f"{ANCHORS}/{model}/rows/")

    def add(self, rows: Collection[str]) -> tuple[str, bool]:
        """Store the keys of rows in both places. Return their digest, and whether neither place had them."""
        keys = sorted(set(rows))
        digest = _digest(keys)
        created = [self._store.create_document(f"{folder}{digest}.json", json_bytes(keys)) for folder in self._folders]
        return digest, all(created)

    def read(self) -> Sets:
        """Return all sets, of both places."""
        found = Sets({}, set(), set())
        for folder in self._folders:
            for name, data in self._store.read_documents(folder, ".json").items():
                found.documents.add(name)
                digest = name.removeprefix(folder).removesuffix(".json")
                keys = _keys(digest, data)
                if keys is None:
                    found.damaged.add(digest)
                else:
                    found.intact[digest] = keys
        return found

    def write_copies(self, stored: Sets) -> None:
        """Write the documents that are missing in one of the two places. Damaged ones stay as they are."""
        for digest, keys in stored.intact.items():
            for folder in self._folders:
                name = f"{folder}{digest}.json"
                if name not in stored.documents:
                    self._store.create_document(name, json_bytes(sorted(keys)))

    def find(self, digest: str) -> set[str] | None:
        """Return the keys of a set; None if it is in neither place. A listing can miss a new file, this does not."""
        for folder in self._folders:
            keys = _keys(digest, self._store.read_document(f"{folder}{digest}.json"))
            if keys is not None:
                return keys
        return None

    def name(self, digest: str) -> str:
        """Return the name of a set's document in the store."""
        return f"{self._folders[0]}{digest}.json"

    def restore(self, digests: Collection[str]) -> None:
        """Replace damaged documents by the other copy, or remove them if that is lost, too; write missing copies."""
        for digest in digests:
            keys = self.find(digest)
            for folder in self._folders:
                name = f"{folder}{digest}.json"
                if _keys(digest, self._store.read_document(name)) is None:
                    self._store.remove_document(name)
                    if keys is not None:
                        self._store.create_document(name, json_bytes(sorted(keys)))


def _keys(digest: str, data: bytes | None) -> set[str] | None:
    try:
        keys = _ROWS.validate_json(data or b"")
    except ValidationError:
        return None
    return set(keys) if _digest(keys) == digest else None


def _digest(keys: list[str]) -> str:
    return hashlib.sha256(canonical(keys)).hexdigest()
