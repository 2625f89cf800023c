"""Keys of an artifact's objects in a bucket.

Telemetry differs between two computations with equal results, which have the same digest and so the same prefix.
It is therefore stored below `telemetry-<its own digest>/`: no writer overwrites what another writer's manifest describes.
"""

from __future__ import annotations

from collections.abc import Iterable

from loraflow import identity
from loraflow.store.artifact import MANIFEST, POINTER, RESERVED_FOLDERS, TELEMETRY, Manifest, Ref
from loraflow.store.bucket import ObjectInfo
from loraflow.store.files import is_inside


def artifact_prefix(ref: Ref) -> str:
    """Return the prefix of an artifact's keys, without the final slash."""
    return f"{ref.stage}/{ref.fingerprint}/{ref.digest}"


def manifest_key(ref: Ref) -> str:
    """Return the key of an artifact's manifest."""
    return f"{artifact_prefix(ref)}/{MANIFEST}"


def pointer_key(stage: str, fingerprint: str) -> str:
    """Return the key of the pointer to the current digest."""
    return f"{stage}/{fingerprint}/{POINTER}"


def file_key(ref: Ref, manifest: Manifest, name: str) -> str:
    """Return the key of one file of an artifact."""
    if not name.startswith(TELEMETRY):
        return f"{artifact_prefix(ref)}/{name}"
    hashes = {file: entry.sha256 for file, entry in manifest.files.items() if file.startswith(TELEMETRY)}
    digest = identity.short(identity.digest(hashes))
    return f"{artifact_prefix(ref)}/telemetry-{digest}/{name.removeprefix(TELEMETRY)}"


def is_telemetry(ref: Ref, key: str) -> bool:
    """Tell whether a key belongs to the telemetry of any computation of this artifact."""
    return key.startswith(f"{artifact_prefix(ref)}/telemetry-")


def file_sizes(ref: Ref, manifest: Manifest, listed: Iterable[ObjectInfo]) -> dict[str, int]:
    """Return {file name: bytes} of an artifact's objects, without telemetry that other manifests describe."""
    names = {file_key(ref, manifest, name): name for name in manifest.files}
    prefix = f"{artifact_prefix(ref)}/"
    return {
        names.get(item.key, item.key.removeprefix(prefix)): item.size
        for item in listed
        if item.key in names or not (item.key == manifest_key(ref) or is_telemetry(ref, item.key))
    }


def parse_manifest_key(key: str, uri: str) -> Ref | None:
    """Return the ref of the artifact whose manifest has this key, without its facets; None for any other key."""
    parts = key.split("/")
    if len(parts) != 4 or parts[3] != MANIFEST or parts[0] in RESERVED_FOLDERS or not all(map(is_inside, parts)):
        return None
    return Ref(stage=parts[0], fingerprint=parts[1], digest=parts[2], uri=uri)
