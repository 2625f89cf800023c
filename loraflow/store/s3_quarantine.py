"""Move a damaged artifact of a bucket to the quarantine."""

from __future__ import annotations

import uuid

from loraflow import identity
from loraflow.store.artifact import QUARANTINE, Ref, quarantine_record
from loraflow.store.s3_artifacts import S3Artifacts
from loraflow.store.s3_cache import ArtifactCache
from loraflow.store.s3_layout import artifact_prefix, manifest_key


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
