"""Artifacts that are about to be used as models: they are hashed once per change, and refused if they are damaged."""

from __future__ import annotations

import re
from pathlib import Path

from loraflow.failures import CorruptArtifact
from loraflow.registry.rebuild import how_to_rebuild
from loraflow.store import LocalStore, Ref, Store, hash_memo, require_intact
from loraflow.store.files import HashMemo

_SHA256 = re.compile(r"[0-9a-f]{64}")
_LEVELS = 2  # an adapter's file is two folders below its artifact


def intact_folder(store: Store, ref: Ref, memo: HashMemo | None = None) -> Path:
    """Return the folder of an artifact that is used as a model. Files that changed since they were hashed are hashed.

    Raises:
        CorruptArtifact: it is gone, incomplete or damaged; the next step rebuilds it.
    """
    problems = store.check(ref)
    if problems:
        raise CorruptArtifact(
            "The model's artifact is gone or incomplete.",
            where=store.location(ref),
            got="; ".join(problems[:3]),
            next_step=how_to_rebuild(store, ref),
        )
    try:
        require_intact(store, ref, memo or hash_memo(store))
        return store.path(ref)
    except CorruptArtifact as failure:
        raise CorruptArtifact(
            "The model's artifact is damaged, so it is not used.",
            where=failure.where,
            got=failure.got,
            next_step=how_to_rebuild(store, ref),
        ) from failure


def artifact_at(folder: Path) -> tuple[LocalStore, Ref] | None:
    """Return the store and ref of a folder that is an artifact, or a link to one; None if it is not.

    Raises:
        CorruptArtifact: its manifest is missing, unreadable, or was changed.
    """
    folder = folder.resolve()
    if len(folder.parts) < 4 or not all(_SHA256.fullmatch(part) for part in folder.parts[-2:]):
        return None
    stage, fingerprint, digest = folder.parts[-3:]
    store = LocalStore(folder.parents[2])
    manifest = store.manifest(Ref(stage=stage, fingerprint=fingerprint, digest=digest, uri=store.uri))
    return store, manifest.ref(store.uri)


def require_intact_files(*paths: Path) -> None:
    """Refuse files and folders of damaged artifacts. Others are not checked: nothing says what they should be."""
    for path in paths:
        resolved = path.resolve()
        for folder in (resolved, *resolved.parents[:_LEVELS]):
            found = artifact_at(folder)
            if found is not None:
                intact_folder(*found)
                break
