"""What is known about a record of looks outside of it: losses that a person accepted, and the rows that were scored.

anchors/<model>/looks-accepted-000001.json  an accepted loss; the anchor has their number, so that none is forgotten
registry/<model>/rows/<digest>.json         the keys of the rows that looks refer to
anchors/<model>/rows/<digest>.json          a copy. A set counts if one of the two is left, even if no look names it
"""

import hashlib
import json
from collections.abc import Collection
from typing import NamedTuple

from pydantic import TypeAdapter, ValidationError

from loraflow.data.checks.split import row_key as row_key
from loraflow.frozen import StoredModel
from loraflow.registry.anchor import FOLDER as ANCHORS
from loraflow.registry.runs import LogHead
from loraflow.store import Store
from loraflow.store.checksum import check_document
from loraflow.store.files import json_bytes


class LostLooks(StoredModel):
    """A person's decision to continue without looks that were lost or changed. They are counted nevertheless."""

    reason: str
    actor: str
    time: str
    kept: LogHead = LogHead()  # the last look that was left
    lost: int = 0
    lost_heads: list[LogHead] | None = None  # the lost looks that run records name; None in earlier versions
    set_aside: dict[str, str] = {}
    lost_rows: list[str] = []  # digests of sets of rows of which no intact copy was left
    restored_rows: list[str] = []  # digests of sets of rows that were damaged, and replaced by their copy
    unknown_rows: bool = False  # whether it is unknown which rows were scored: then no row is fresh any more

    def explains(self, head: LogHead) -> bool:
        """Tell whether a look that a run record names was lost."""
        if self.lost_heads is not None:
            return head in self.lost_heads
        return self.kept.seq < head.seq <= self.kept.seq + self.lost


class AcceptedLosses(NamedTuple):
    """The accepted losses of a model, oldest first, and the documents that cannot be read."""

    intact: list[LostLooks]
    damaged: dict[str, bytes]


def read_losses(store: Store, model: str) -> AcceptedLosses:
    """Read the accepted losses of a model."""
    found = AcceptedLosses([], {})
    for name, data in store.read_documents(f"{ANCHORS}/{model}/", ".json").items():
        if name.startswith(f"{ANCHORS}/{model}/looks-accepted-"):
            try:
                found.intact.append(LostLooks.model_validate_json(check_document(name, data)))
            except ValueError:  # ValidationError is a subclass
                found.damaged[name] = data
    return found


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
        digest = digest_of(keys)
        created = [self._store.create_document(f"{folder}{digest}.json", json_bytes(keys)) for folder in self._folders]
        return digest, all(created)

    def read(self) -> Sets:
        """Return all sets, of both places."""
        found = Sets({}, set(), set())
        read: dict[str, bytes] = {}
        for folder in self._folders:
            for name, data in self._store.read_documents(folder, ".json").items():
                found.documents.add(name)
                digest = name.removeprefix(folder).removesuffix(".json")
                if read.get(digest) == data:
                    continue  # hashes are most of a look's time
                read[digest] = data
                keys = keys_of(digest, data)
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
            keys = keys_of(digest, self._store.read_document(f"{folder}{digest}.json"))
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
                if keys_of(digest, self._store.read_document(name)) is None:
                    self._store.remove_document(name)
                    if keys is not None:
                        self._store.create_document(name, json_bytes(sorted(keys)))


def keys_of(digest: str, data: bytes | None) -> set[str] | None:
    """Return the keys of rows in a document; None if they do not have the digest."""
    try:
        keys = _ROWS.validate_json(data or b"")
    except ValidationError:
        return None
    return set(keys) if digest_of(keys) == digest else None


def digest_of(keys: list[str]) -> str:
    """Return the digest of sorted keys of rows, or of other texts."""
    return hashlib.sha256(json.dumps(keys, separators=(",", ":")).encode()).hexdigest()
