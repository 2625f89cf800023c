"""Find and remove what interrupted work left in a bucket and on this machine's disk."""

from __future__ import annotations

import shutil
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path, PurePosixPath

from loraflow.store import staging
from loraflow.store.artifact import MANIFEST, QUARANTINE, RESERVED_FOLDERS
from loraflow.store.bucket import Bucket, ObjectInfo
from loraflow.store.chunk_cache import stale_entries
from loraflow.store.files import folder_size, stale_folders
from loraflow.store.uploads import abort_upload, unfinished_uploads

_LOCAL_PATTERNS = ("work/*/*", "pending/*/*", "staging/*", "artifacts/*/*/*")


def stale_items(bucket: Bucket, scratch: Path, before: float, *, remove: bool) -> Iterator[tuple[PurePosixPath, int]]:
    """Yield, and remove if asked, (name, bytes) of what was last changed before a time in seconds since 1970."""
    for upload in unfinished_uploads(bucket):
        if upload["Initiated"].timestamp() < before:
            if remove:
                abort_upload(bucket, upload)
            yield PurePosixPath("uploads", upload["Key"].removeprefix(bucket.prefix)), 0
    for name, objects in _incomplete(bucket):
        if max(item.modified for item in objects) < before:
            if remove:
                bucket.delete([item.key for item in objects])
            yield PurePosixPath(name), sum(item.size for item in objects)
    for unused in staging.abandoned(scratch / "staging"):
        if unused.exists():
            yield PurePosixPath("cache", "staging", unused.name), folder_size(unused)
        if remove:
            staging.discard(unused)
    yield from stale_entries(scratch, before, remove=remove)
    for folder, size in stale_folders(scratch, _LOCAL_PATTERNS, before):
        if remove:
            shutil.rmtree(scratch / folder)
        yield PurePosixPath("cache", folder), size


def _incomplete(bucket: Bucket) -> Iterator[tuple[str, list[ObjectInfo]]]:
    """Yield (name, objects) of quarantined artifacts, leases, unfinished work, and files without a manifest."""
    groups: dict[str, list[ObjectInfo]] = defaultdict(list)
    for item in bucket.listing():
        parts = item.key.split("/")
        if parts[0] in (QUARANTINE, "locks"):
            groups["/".join(parts[:2]).removesuffix(".json")].append(item)
        elif parts[0] == "work" or (parts[0] not in RESERVED_FOLDERS and len(parts) > 3):
            groups["/".join(parts[:3])].append(item)
    for name, objects in groups.items():
        if name.split("/")[0] in RESERVED_FOLDERS or f"{name}/{MANIFEST}" not in {item.key for item in objects}:
            yield name, objects
