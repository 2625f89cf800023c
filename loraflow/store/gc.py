"""Remove what no run needs. Champion and rollback target stay whatever their age; a running flow holds `gc` off."""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Iterator
from pathlib import PurePosixPath

from loraflow.failures import Failure
from loraflow.store.base import Ref, Store
from loraflow.store.lock import Held

OLD_WORK = 14 * 86400  # seconds after which unfinished work and leftovers are given up


def collect(store: Store, *, keep: int, dry_run: bool = False) -> Iterator[tuple[PurePosixPath, int, str]]:
    """Remove, and yield (name in the store, bytes, why) of each thing removed.

    Raises:
        Failure: a run is going on.
    """
    try:
        with store.cleanup_lock():
            for ref, why in _superfluous(store, keep):
                size = _size(store, ref)
                if not dry_run:
                    store.remove(ref)
                yield PurePosixPath(ref.stage, ref.fingerprint, ref.digest), size, why
            for name, size in store.leftovers(time.time() - OLD_WORK, remove=not dry_run):
                yield name, size, "left behind for two weeks"
    except Held:
        raise Failure(
            "A run is going on; its artifacts must stay.",
            where=store.uri,
            next_step="run `loraflow gc` when it has ended",
        ) from None


def _size(store: Store, ref: Ref) -> int:
    try:
        return store.manifest(ref).size
    except Failure:  # its manifest is unreadable; it goes all the same
        return 0


def _superfluous(store: Store, keep: int) -> Iterator[tuple[Ref, str]]:
    from loraflow.registry import PromotionLog
    from loraflow.registry.log import models

    held: set[str] = set()
    for model in models(store):
        # the champion, and the model that a rollback goes back to
        for entry in PromotionLog(store, model).in_force()[-2:]:
            held |= {ref.digest for ref in (entry.merged, entry.adapter) if ref is not None}
    computed: dict[tuple[str, str], list[Ref]] = defaultdict(list)
    for ref in store.artifacts():
        computed[ref.stage, ref.fingerprint].append(ref)
    merged = []
    for (stage, fingerprint), refs in computed.items():
        current = store.find(stage, fingerprint) if len(refs) > 1 else None
        for ref in refs:
            if current is not None and current.digest != ref.digest and ref.digest not in held:
                yield ref, "superseded"
            elif stage == "merge" and ref.digest not in held:
                merged.append(ref)
    merged.sort(key=store.committed_at, reverse=True)
    for ref in merged[keep:]:
        yield ref, f"older than the newest {keep} merged models"
