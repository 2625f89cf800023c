"""What cut-off work leaves in a bucket and on this machine's disk."""

from __future__ import annotations

import shutil
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path, PurePosixPath

from loraflow.store.base import MANIFEST, OWN
from loraflow.store.bucket import Bucket, Listed


def sweep(bucket: Bucket, scratch: Path, before: float, *, remove: bool) -> Iterator[tuple[PurePosixPath, int]]:
    """Yield, and remove, (name, bytes) of what nobody touched since a time, in seconds since 1970."""
    for upload in bucket.uploads():
        if upload["Initiated"].timestamp() < before:
            if remove:
                bucket.abort(upload)
            yield PurePosixPath("uploads", upload["Key"].removeprefix(bucket.prefix)), 0
    for name, group in _leftovers(bucket):
        if max(one.modified for one in group) < before:
            if remove:
                bucket.delete([one.key for one in group])
            yield PurePosixPath(name), sum(one.size for one in group)
    for pattern in ("work/*/*", "pending/*/*", "staging/*", "artifacts/*/*/*"):
        for path in scratch.glob(pattern):
            if path.is_dir() and path.stat().st_mtime < before:
                size = sum(file.stat().st_size for file in path.rglob("*") if file.is_file())
                if remove:
                    shutil.rmtree(path)
                yield PurePosixPath("cache", path.relative_to(scratch).as_posix()), size


def _leftovers(bucket: Bucket) -> Iterator[tuple[str, list[Listed]]]:
    """Yield (name, objects) of what was set aside, of leases, of unfinished work, and of files without a manifest."""
    groups: dict[str, list[Listed]] = defaultdict(list)
    for one in bucket.listing():
        parts = one.key.split("/")
        if parts[0] in ("set-aside", "locks"):
            groups["/".join(parts[:2]).removesuffix(".json")].append(one)
        elif parts[0] == "work" or (parts[0] not in OWN and len(parts) > 3):
            groups["/".join(parts[:3])].append(one)
    for name, group in groups.items():
        if name.split("/")[0] in OWN or f"{name}/{MANIFEST}" not in {one.key for one in group}:
            yield name, group
