"""Documents in a folder: run records, reports, the promotion log and other small files with names."""

from __future__ import annotations

import os
import uuid
from pathlib import Path

from loraflow.store.files import fsync_path, translate_os_errors, walk, write_atomic


class LocalDocuments:
    """Documents below `root`. `uri` names the store in messages."""

    root: Path
    uri: str

    def read_document(self, name: str) -> bytes | None:
        """Return a document, None if it does not exist."""
        try:
            return (self.root / name).read_bytes()
        except FileNotFoundError:
            return None

    def create_document(self, name: str, data: bytes) -> bool:
        """Write a document that does not exist, by a hard link, which fails if it exists. Return False then."""
        with translate_os_errors(self.uri):
            path = self.root / name
            path.parent.mkdir(parents=True, exist_ok=True)
            draft = path.with_name(f".draft-{uuid.uuid4().hex[:8]}")
            write_atomic(draft, data)
            try:
                os.link(draft, path)
            except FileExistsError:
                return False
            finally:
                draft.unlink()
            fsync_path(path.parent)
            return True

    def write_document(self, name: str, data: bytes) -> None:
        """Write or replace a document atomically."""
        with translate_os_errors(self.uri):
            (self.root / name).parent.mkdir(parents=True, exist_ok=True)
            write_atomic(self.root / name, data)

    def remove_document(self, name: str) -> None:
        """Delete a document, if it exists."""
        with translate_os_errors(self.uri):
            (self.root / name).unlink(missing_ok=True)

    def documents(self, prefix: str) -> list[str]:
        """Return the names of all documents below a prefix, sorted."""
        found = (root / name for root, _, names in walk(self.root / prefix) for name in names if name[0] != ".")
        return sorted(path.relative_to(self.root).as_posix() for path in found if path.is_file())

    def read_documents(self, prefix: str, suffix: str = "") -> dict[str, bytes]:
        """Return all documents below a prefix whose names end with `suffix`, sorted by name."""
        found = ((name, self.read_document(name)) for name in self.documents(prefix) if name.endswith(suffix))
        return {name: data for name, data in found if data is not None}
