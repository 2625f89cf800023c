"""The interface of an artifact store, which the local store and the bucket store implement."""

from __future__ import annotations

import io
import logging
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING, Protocol

from pydantic import JsonValue

from loraflow.failures import CorruptArtifact, ReadOnlyStore
from loraflow.store.artifact import MANIFEST, Manifest, PreviousState, Ref, Summary, damaged_artifact, result_problems
from loraflow.store.files import HashMemo

if TYPE_CHECKING:
    import pandas as pd

log = logging.getLogger(__name__)

__all__ = ["MANIFEST", "Manifest", "Ref", "Store", "Summary", "read_intact", "require_intact"]


class Store(Protocol):
    """What stages, flows and the command line need of a store.

    A method of a store with `@override` and no docstring does just what is written here.
    """

    uri: str
    scratch: Path  # a local folder for the files of this machine; staging folders are on its disk

    # artifacts

    def find(self, stage: str, fingerprint: str) -> Ref | None:
        """Return the current artifact if its manifest, names and sizes are right, else None."""

    def manifest(self, ref: Ref) -> Manifest:
        """Return an artifact's manifest.

        Raises:
            CorruptArtifact: it is missing, unreadable, or was changed.
        """

    def location(self, ref: Ref) -> str:
        """Return the artifact's folder or uri, for messages; nothing is downloaded."""

    def path(self, ref: Ref) -> Path:
        """Return a local folder with the artifact's files. Files that were downloaded are hashed on arrival."""

    def read(self, ref: Ref, name: str) -> bytes:
        """Return the content of one file of an artifact. Its hash is always compared with the manifest.

        Raises:
            CorruptArtifact: the file or the manifest is missing or was changed.
        """

    def check(self, ref: Ref) -> list[str]:
        """Compare an artifact's names and sizes with its manifest; return the problems, a line each."""

    def verify(self, ref: Ref, memo: HashMemo | None = None) -> list[str]:
        """Hash an artifact's contents in the store; return the problems, a line each.

        All is hashed, whatever the memo knows; the memo only remembers the hashes of files on this machine.
        """

    def fetch(self, ref: Ref, memo: HashMemo | None = None) -> list[str]:
        """Hash the files that `path` returns, downloaded if need be; return the problems, a line each.

        With a memo, files that have not changed since they were hashed are not hashed again.
        """

    def check_changed(self, ref: Ref, memo: HashMemo) -> list[str]:
        """Hash those files that changed since this machine hashed them; return the problems, a line each.

        Objects of a bucket are read once after each change, and not stored here.
        """

    def is_remembered(self, ref: Ref, memo: HashMemo) -> bool:
        """Tell whether all files were hashed on this machine, were intact, and have not changed since. Nothing is read."""

    def quarantine(self, ref: Ref, problems: list[str]) -> str | None:
        """Move a damaged artifact to the quarantine (`set-aside/`), with its problems; return its new location.

        It is hashed again. None if it is intact by now, and stays: another worker recomputed it meanwhile.
        """

    def staging(self, stage: str, fingerprint: str) -> Path:
        """Return a new empty local folder for a job to write into."""

    def commit(
        self,
        staged: Path,
        *,
        payload: Mapping[str, JsonValue],
        inputs: Mapping[str, Ref],
        summary: Summary,
        provenance: Mapping[str, JsonValue],
        replace: bool = False,
    ) -> Ref:
        """Turn a staging folder into an artifact and return its ref.

        The write is atomic: after a crash the old state or the new one is there. The first committed digest of a
        fingerprint stays current while it is intact, so that two workers whose results differ in the last bits agree;
        then its ref is returned. `replace` is for an artifact that is recomputed with `--force`.
        """

    def resume_commit(self, stage: str, fingerprint: str) -> Ref | None:
        """Finish an interrupted commit if all of its files are still on this machine; None if there is none."""

    def lock(self, stage: str, fingerprint: str) -> AbstractContextManager[None]:
        """Hold a job's lock; wait until it is free. The lock of a dead holder becomes free by itself."""

    def work_folder(self, stage: str, fingerprint: str, recompute_of: Ref | None = None) -> Path:
        """Return the local folder in which an unfinished job stores what a retry resumes from.

        With `recompute_of`, the artifact to recompute, it keeps only what earlier attempts to recompute that artifact left.
        """

    def mirror_checkpoints(self, stage: str, fingerprint: str) -> AbstractContextManager[None]:
        """Copy a job's newest checkpoint, while the job runs, to where an attempt on another machine finds it."""

    def remove_work_folder(self, stage: str, fingerprint: str) -> None:
        """Remove a finished job's work folder and mirrored checkpoints."""

    def artifacts(self) -> Iterator[Ref]:
        """Yield all artifacts that have a manifest, current or not, without their facets."""

    def newest(self, stage: str) -> Manifest | None:
        """Return the manifest of the stage's newest artifact."""

    def newest_payload(self, stage: str, like: Mapping[str, JsonValue]) -> dict[str, JsonValue] | None:
        """Return the payload of the stage that differs least from `like`, to explain a miss; of equal ones, the newest."""

    def previous_state(self, stage: str, fingerprint: str) -> PreviousState | None:
        """Return what is left of an artifact that existed and is not found; None if there was none."""

    # documents: small files such as records of runs and the promotion log. Names are relative: `runs/x.json`

    def read_document(self, name: str) -> bytes | None:
        """Return a document, None if it does not exist."""

    def create_document(self, name: str, data: bytes) -> bool:
        """Write a document that does not exist; of several writers one succeeds. Return False if it exists."""

    def write_document(self, name: str, data: bytes) -> None:
        """Write or replace a document atomically."""

    def remove_document(self, name: str) -> None:
        """Delete a document, if it exists."""

    def documents(self, prefix: str) -> list[str]:
        """Return the names of all documents below a prefix that ends with a slash, sorted."""

    def read_documents(self, prefix: str, suffix: str = "") -> dict[str, bytes]:
        """Return all documents below a prefix whose names end with `suffix`, sorted by name."""

    # cleanup

    def reader_lock(self) -> AbstractContextManager[None]:
        """Block cleanups while artifacts are in use."""

    def cleanup_lock(self) -> AbstractContextManager[None]:
        """Block readers while artifacts are removed.

        Raises:
            LockHeld: there are readers.
        """

    def committed_at(self, ref: Ref) -> float:
        """Return when an artifact was committed, in seconds since 1970."""

    def remove(self, ref: Ref) -> None:
        """Delete an artifact atomically."""

    def stale_items(self, before: float, *, remove: bool) -> Iterator[tuple[PurePosixPath, int]]:
        """Yield (name, bytes) of unfinished work, interrupted writes and quarantined artifacts older than a time.

        `before` is in seconds since 1970. With `remove`, delete each item.
        """


def hash_memo(store: Store) -> HashMemo:
    """Return the hashes that are remembered of the files of a store."""
    return HashMemo(store.scratch / "hashes.json")


def require_intact(store: Store, ref: Ref, memo: HashMemo | None = None) -> None:
    """Fetch an artifact to this machine and hash its contents; with a memo, only what changed since it was hashed.

    Raises:
        CorruptArtifact: it is damaged. It was moved to the quarantine, so that its stage recomputes it.
    """
    _require(store, ref, lambda: store.fetch(ref, memo), memo)


def require_intact_in_store(store: Store, ref: Ref, memo: HashMemo | None = None) -> None:
    """Hash all contents of an artifact where the store has them, before a promotion names it.

    Raises:
        CorruptArtifact: it is damaged. It was moved to the quarantine, so that its stage recomputes it.
    """
    _require(store, ref, lambda: store.verify(ref, memo), memo)


def require_unchanged(store: Store, ref: Ref, memo: HashMemo) -> None:
    """Hash those files of an artifact that changed since this machine hashed them, where the store has them.

    Raises:
        CorruptArtifact: it is damaged. It was moved to the quarantine, so that its stage recomputes it.
    """
    _require(store, ref, lambda: store.check_changed(ref, memo), memo)


def _require(store: Store, ref: Ref, check: Callable[[], list[str]], memo: HashMemo | None) -> None:
    """Check an artifact; quarantine it if it is damaged."""
    problems = check()
    where = _quarantine(store, ref, problems) if result_problems(problems) else None
    if result_problems(problems) and where is None:
        problems = check()
    if memo is not None:
        memo.save()
    if result_problems(problems):
        raise damaged_artifact(ref, where or store.location(ref), problems)
    if problems:
        log.warning("%s is used, although its telemetry is damaged: %s", ref, "; ".join(problems[:3]))


def read_intact(store: Store, ref: Ref, name: str) -> bytes:
    """Return the content of one file of an artifact on which a decision depends; it is always hashed.

    Raises:
        CorruptArtifact: it is damaged. The artifact was moved to the quarantine, so that its stage recomputes it.
    """
    try:
        return store.read(ref, name)
    except CorruptArtifact as failure:
        where = _quarantine(store, ref, [failure.got])
        if where is None:
            return store.read(ref, name)
        raise damaged_artifact(ref, where, [failure.got]) from failure


def read_table(store: Store, ref: Ref, name: str = "scores.parquet") -> pd.DataFrame:
    """Return a table of an artifact: the bytes that are parsed are the bytes that were hashed (`read_intact`)."""
    import pandas as pd

    return pd.read_parquet(io.BytesIO(read_intact(store, ref, name)))


def _quarantine(store: Store, ref: Ref, problems: list[str]) -> str | None:
    """Quarantine an artifact and return its place; None if it is intact by now. In a read-only store it stays in place."""
    try:
        return store.quarantine(ref, problems)
    except ReadOnlyStore:
        return store.location(ref)
