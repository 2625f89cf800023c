"""Remove what no run needs. Champion and rollback target stay whatever their age; a running flow holds `gc` off."""

from __future__ import annotations

import shutil
import time
from collections.abc import Iterator
from pathlib import Path

from loraflow.failures import Failure
from loraflow.store.local import LocalStore
from loraflow.store.lock import Held, flock

OLD_WORK = 14 * 86400  # seconds after which unfinished work and leftovers are given up


def collect(store: LocalStore, *, keep: int, dry_run: bool = False) -> Iterator[tuple[Path, int, str]]:
    """Remove, and yield (path, bytes, why) of each thing removed.

    Raises:
        Failure: a run is going on.
    """
    try:
        with flock(store.root / "locks" / "readers", wait=False):
            for path, why in _superfluous(store, keep):
                size = sum(file.stat().st_size for file in path.rglob("*") if file.is_file())
                if not dry_run:
                    # Renamed first, so that nobody finds half of it.
                    gone = store.root / "staging" / f"gone-{path.name[:12]}-{time.time_ns()}"
                    gone.parent.mkdir(exist_ok=True)
                    path.rename(gone)
                    shutil.rmtree(gone)
                yield path, size, why
    except Held:
        raise Failure(
            "A run is going on; its artifacts must stay.",
            where=store.uri,
            next_step="run `loraflow gc` when it has ended",
        ) from None


def _superfluous(store: LocalStore, keep: int) -> Iterator[tuple[Path, str]]:
    from loraflow.registry import PromotionLog

    held: set[str] = set()
    for folder in (store.root / "registry").glob("*"):
        # the champion, and the model that a rollback goes back to
        for entry in PromotionLog(store.root, folder.name).in_force()[-2:]:
            held |= {ref.digest for ref in (entry.merged, entry.adapter) if ref is not None}
    merged = []
    for ref in store.artifacts():
        path = store.path(ref)
        current = store.find(ref.stage, ref.fingerprint)
        if current is not None and current.digest != ref.digest and ref.digest not in held:
            yield path, "superseded"
        elif ref.stage == "merge" and ref.digest not in held:
            merged.append(path)
    merged.sort(key=lambda path: path.stat().st_mtime, reverse=True)
    for path in merged[keep:]:
        yield path, f"older than the newest {keep} merged models"
    old = time.time() - OLD_WORK
    for path in [*store.root.glob("work/*/*"), *store.root.glob("staging/*"), *store.root.glob("set-aside/*")]:
        if path.is_dir() and path.stat().st_mtime < old:
            yield path, "left behind for two weeks"
