"""Commit an artifact to a bucket: upload its files, then its manifest, then the pointer.

The manifest is created and not replaced, and the pointer is replaced only if it has not changed. An object is visible
either completely or not at all, so a crash at any moment leaves the old state or the new.
"""

import shutil
import uuid
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from loraflow import identity
from loraflow.failures import Network
from loraflow.store.artifact import (
    QUARANTINE,
    REPLACED,
    DamagedPointer,
    Manifest,
    Pointer,
    Ref,
    parse_pointer,
    quarantine_record,
)
from loraflow.store.bucket import CONCURRENCY, StoredObject, upload_file
from loraflow.store.s3_artifacts import (
    ArtifactCache,
    S3Artifacts,
    artifact_prefix,
    file_key,
    is_telemetry,
    manifest_key,
    pointer_key,
)

ATTEMPTS = 8  # at replacing the pointer while other machines commit


def commit_artifact(
    artifacts: S3Artifacts, cache: ArtifactCache, folder: Path, manifest: Manifest, *, replace: bool
) -> Ref:
    """Upload a folder as an artifact and return its ref, or the ref of the artifact that is current already.

    The first committed digest of a fingerprint stays current while it is intact, unless `replace` is set: its objects are
    read and hashed. The folder is moved to the cache or removed.

    Raises:
        Network: the store did not answer, or other workers kept changing the artifact.
    """
    bucket, ref = artifacts.bucket, manifest.ref(artifacts.uri)
    key, document = pointer_key(ref.stage, ref.fingerprint), manifest.document
    for _ in range(ATTEMPTS):
        seen = bucket.get(key)
        current = artifacts.find(ref.stage, ref.fingerprint)
        keeps_current = current is not None and (not replace or current.digest == ref.digest)
        if current is not None and keeps_current and not artifacts.hash_objects(current, cache.object_memo()):
            shutil.rmtree(folder)
            return current
        # Objects of the same digest that are damaged are not used, whatever hash their metadata names.
        if bucket.get(manifest_key(ref)) and artifacts.hash_objects(ref, cache.object_memo()):
            move_to_quarantine(artifacts, cache, ref, [REPLACED])
        _upload_files(artifacts, folder, ref, manifest)
        stored = _write_manifest(artifacts, ref, document)
        if stored is None:
            continue  # another machine removed it meanwhile
        content = _pointer(seen, ref).pointing_to(ref, stored)
        written = bucket.replace(key, content, seen.etag) if seen else bucket.create(key, content)
        if written is None:
            continue  # another machine committed meanwhile
        if stored == document:
            cache.add(folder, ref)
        else:
            shutil.rmtree(folder)
        return ref
    raise Network("Other workers keep changing the artifact.", where=artifacts.location(ref), next_step="run again")


def _upload_files(artifacts: S3Artifacts, folder: Path, ref: Ref, manifest: Manifest) -> None:
    names = {file_key(ref, manifest, name): name for name in manifest.files}
    expected = {*names, manifest_key(ref)}
    # Objects that a damaged artifact with the same digest left.
    stray = [key for key in artifacts.keys(ref) if key not in expected and not is_telemetry(ref, key)]
    artifacts.bucket.delete(stray)

    def upload(key: str) -> None:
        name = names[key]
        upload_file(artifacts.bucket, folder / name, key, manifest.files[name].sha256)

    with ThreadPoolExecutor(CONCURRENCY) as pool:
        list(pool.map(upload, names))


def _write_manifest(artifacts: S3Artifacts, ref: Ref, document: bytes) -> bytes | None:
    """Write the manifest, unless another writer's artifact is intact.

    Return the stored manifest: `document`, or the other writer's; None if another writer changed it at the same time.
    """
    bucket, key = artifacts.bucket, manifest_key(ref)
    if bucket.create(key, document) is not None:
        return document
    seen = bucket.get(key)
    if seen is not None and not artifacts.check(ref):
        return seen.data
    written = bucket.replace(key, document, seen.etag) if seen else bucket.create(key, document)
    return document if written is not None else None


def _pointer(seen: StoredObject | None, ref: Ref) -> Pointer:
    """Return the pointer that a commit replaces; an empty one if there is none that can be read."""
    try:
        return parse_pointer(seen.data, ref.stage, ref.fingerprint) if seen else Pointer(digest=ref.digest)
    except DamagedPointer:
        return Pointer(digest=ref.digest)


def move_to_quarantine(artifacts: S3Artifacts, cache: ArtifactCache, ref: Ref, problems: list[str]) -> str:
    """Copy an artifact's objects below `set-aside/`, with its problems, then remove it; return its new uri.

    The caller holds the lock of its job.
    """
    bucket = artifacts.bucket
    target = f"{QUARANTINE}/{ref.stage}-{identity.short(ref.digest)}-{uuid.uuid4().hex[:6]}"
    for key in artifacts.keys(ref):
        bucket.copy(key, target + key.removeprefix(artifact_prefix(ref)))
    bucket.put(*quarantine_record(target.removeprefix(f"{QUARANTINE}/"), artifacts.location(ref), problems))
    remove_artifact(artifacts, cache, ref)
    return f"{artifacts.uri}/{target}"


def remove_artifact(artifacts: S3Artifacts, cache: ArtifactCache, ref: Ref) -> None:
    """Delete an artifact, its manifest first: without it the other files are not an artifact."""
    artifacts.bucket.delete([manifest_key(ref)])
    artifacts.bucket.delete(artifacts.keys(ref))
    cache.drop(ref)
