"""Commit an artifact to a bucket: upload its files, then its manifest, then the pointer.

The manifest is created and not replaced, and the pointer is replaced only if it has not changed. An object is visible
either completely or not at all, so a crash at any moment leaves the old state or the new.
"""

from __future__ import annotations

import json
import shutil
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from loraflow.failures import Network
from loraflow.store.artifact import Manifest, Ref
from loraflow.store.bucket import CONCURRENCY
from loraflow.store.s3_artifacts import S3Artifacts
from loraflow.store.s3_cache import ArtifactCache
from loraflow.store.s3_layout import file_key, is_telemetry, manifest_key, pointer_key
from loraflow.store.uploads import upload_file

ATTEMPTS = 8  # at replacing the pointer while other machines commit


def commit_artifact(
    artifacts: S3Artifacts, cache: ArtifactCache, folder: Path, manifest: Manifest, *, replace: bool
) -> Ref:
    """Upload a folder as an artifact and return its ref, or the ref of the artifact that is current already.

    The first committed digest of a fingerprint stays current while it is intact, unless `replace` is set. The folder is
    moved to the cache or removed.

    Raises:
        Network: the store did not answer, or other workers kept changing the artifact.
    """
    bucket, ref = artifacts.bucket, manifest.ref(artifacts.uri)
    pointer, content = pointer_key(ref.stage, ref.fingerprint), json.dumps({"digest": ref.digest}).encode()
    for _ in range(ATTEMPTS):
        seen = bucket.get(pointer)
        current = artifacts.find(ref.stage, ref.fingerprint)
        if current is not None and (not replace or current.digest == ref.digest):
            shutil.rmtree(folder)
            return current
        _upload_files(artifacts, folder, ref, manifest)
        is_ours = _write_manifest(artifacts, ref, manifest)
        written = bucket.replace(pointer, content, seen.etag) if seen else bucket.create(pointer, content)
        if written is None:
            continue  # another machine committed meanwhile
        if is_ours:
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


def _write_manifest(artifacts: S3Artifacts, ref: Ref, manifest: Manifest) -> bool:
    """Write the manifest, unless another writer's artifact is intact; return whether the stored manifest is ours."""
    bucket, key = artifacts.bucket, manifest_key(ref)
    data = json.dumps(manifest.model_dump(), indent=1, sort_keys=True, ensure_ascii=False).encode()
    if bucket.create(key, data) is not None:
        return True
    seen = bucket.get(key)
    if seen is not None and not artifacts.check(ref):
        return False
    return (bucket.replace(key, data, seen.etag) if seen else bucket.create(key, data)) is not None
