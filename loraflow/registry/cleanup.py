"""Remove superseded artifacts, older merged models and stale work.

Champions stay, up to a bound, with all that they were made from: `loraflow rollback` can return to them, and
`loraflow show champion` describes them.
"""

import time
from collections import defaultdict
from collections.abc import Iterator
from pathlib import PurePosixPath
from typing import NamedTuple

from loraflow.failures import Failure
from loraflow.registry.champions import KEEP_CHAMPIONS, kept_champions, lineage
from loraflow.registry.log import PromotionLog, models
from loraflow.registry.runs import read_runs
from loraflow.stages import MERGE
from loraflow.store import Ref, Store
from loraflow.store.lock import LockHeld

_MERGE_OF_SEED = f"{MERGE.name} seed "  # labels of train_seed in flows/pipeline.py begin with it
STALE_SECONDS = 14 * 86400  # after which unfinished work and interrupted writes are removed


class Removed(NamedTuple):
    """An item that the cleanup removed: its name in the store, its size in bytes, and why."""

    name: PurePosixPath
    size: int
    reason: str


def remove_unused(
    store: Store, *, keep: int, keep_champions: int = KEEP_CHAMPIONS, dry_run: bool = False
) -> Iterator[Removed]:
    """Remove superseded artifacts, older merged models, and stale work; yield each item.

    The newest `keep` merged models stay, and of each registered model the newest `keep_champions` champions. With
    `dry_run`, yield what would be removed.

    Raises:
        Failure: a run is using the store.
        CorruptArtifact: a promotion log is damaged, so that it is not known which models it needs. Nothing is removed.
    """
    try:
        with store.cleanup_lock():
            for ref, reason in _unused(store, keep, keep_champions):
                size = _size(store, ref)
                if not dry_run:
                    store.remove(ref)
                yield Removed(PurePosixPath(ref.stage, ref.fingerprint, ref.digest), size, reason)
            for name, size in store.stale_items(time.time() - STALE_SECONDS, remove=not dry_run):
                yield Removed(name, size, "unused for two weeks")
    except LockHeld:
        raise Failure(
            "Cannot clean up while a run is using the store.",
            where=store.uri,
            next_step="run `loraflow gc` again when the run has ended",
        ) from None


def _size(store: Store, ref: Ref) -> int:
    try:
        return store.manifest(ref).size
    except Failure:  # an unreadable manifest; the artifact is removed anyway
        return 0


def _registered_digests(store: Store, keep_champions: int) -> set[str]:
    """Return the digests of every model's champions, and of all that they were made from."""
    return {
        ref.digest
        for model in models(store, of_runs=True)
        for entry in kept_champions(PromotionLog(store, model), keep_champions)
        for ref in lineage(store, entry)
    }


def _merges_of_seeds(store: Store) -> set[str]:
    """Return the digests of the merges of further seeds (gate.seeds) in the newest finished run of each model.

    A repeated run finds them in the store. Those of earlier runs count among the newest merged models, as others do.
    """
    newest = {record.model: record for record in read_runs(store) if record.summary is not None}
    return {
        stage.digest for record in newest.values() for stage in record.stages if stage.stage.startswith(_MERGE_OF_SEED)
    }


def _unused(store: Store, keep: int, keep_champions: int) -> Iterator[tuple[Ref, str]]:
    registered = _registered_digests(store, keep_champions) | _merges_of_seeds(store)
    by_fingerprint: dict[tuple[str, str], list[Ref]] = defaultdict(list)
    for ref in store.artifacts():
        by_fingerprint[ref.stage, ref.fingerprint].append(ref)
    merged: list[tuple[bool, float, Ref]] = []
    for (stage, fingerprint), refs in by_fingerprint.items():
        current = store.find(stage, fingerprint) if len(refs) > 1 or stage == "merge" else None
        for ref in refs:
            if ref.digest in registered:
                continue
            if current is not None and current.digest != ref.digest:
                yield ref, "superseded"
            elif stage == "merge":  # those that a lookup finds are kept first
                merged.append((current is not None, store.committed_at(ref), ref))
    merged.sort(key=lambda item: item[:2], reverse=True)
    for _, _, ref in merged[keep:]:
        yield ref, f"older than the newest {keep} merged models"
