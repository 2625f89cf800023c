"""This machine's copies of a bucket's artifacts: downloaded as a whole, hashed on arrival, then renamed into place."""

from __future__ import annotations

import hashlib
import os
import shutil
import uuid
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from loraflow import identity
from loraflow.store import staging
from loraflow.store.artifact import MANIFEST, HasHash, Manifest, Ref, check_consistency, check_folder, has_hash
from loraflow.store.bucket import CONCURRENCY, retry_network
from loraflow.store.files import fsync_tree, is_inside, raise_machine_fault, translate_os_errors, write_atomic
from loraflow.store.lock import flock
from loraflow.store.s3_artifacts import ObjectMemo, S3Artifacts, file_key


def cache_folder(uri: str) -> Path:
    """Return this machine's folder for a store: below LORAFLOW_CACHE, by default ~/.cache/loraflow."""
    base = os.environ.get("LORAFLOW_CACHE") or Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache", "loraflow")
    readable = uri.removeprefix("s3://").replace("/", "-")[:40]
    return Path(base).expanduser().absolute() / f"{readable}-{hashlib.sha256(uri.encode()).hexdigest()[:8]}"


class ArtifactCache:
    """Copies of artifacts in this machine's folder of the store. A copy with a manifest is complete."""

    def __init__(self, root: Path, artifacts: S3Artifacts):
        self.root = root
        self.artifacts = artifacts

    def folder(self, ref: Ref) -> Path:
        """Return the folder of an artifact's copy, whether it exists or not."""
        return self.root / "artifacts" / ref.stage / ref.fingerprint / ref.digest

    def object_memo(self) -> ObjectMemo:
        """Return the hashes that this machine remembers of the bucket's objects."""
        return ObjectMemo(self.root / "objects.json")

    def local_folder(self, *parts: str) -> Path:
        """Return a folder of this machine, made if need be."""
        with translate_os_errors(str(self.root)):
            folder = self.root.joinpath(*parts)
            folder.mkdir(parents=True, exist_ok=True)
            return folder

    def has(self, ref: Ref) -> bool:
        """Tell whether there is a complete copy. Its contents are not hashed."""
        return (self.folder(ref) / MANIFEST).exists()

    def is_intact(self, ref: Ref, has_hash: HasHash = has_hash) -> bool:
        """Hash a copy; tell whether it matches its manifest."""
        folder = self.folder(ref)
        try:
            manifest = Manifest.parse((folder / MANIFEST).read_bytes())
            problems = check_folder(folder, manifest, contents=True, has_hash=has_hash)
            return not problems and not check_consistency(manifest, ref)
        except (OSError, ValueError) as error:
            raise_machine_fault(error)
            return False

    def add(self, folder: Path, ref: Ref) -> None:
        """Move a complete artifact, with its manifest, into the cache."""
        target = self.folder(ref)
        target.parent.mkdir(parents=True, exist_ok=True)
        self.drop(ref)
        folder.rename(target)

    def drop(self, ref: Ref) -> None:
        """Remove the copy of an artifact, and forget its manifest."""
        self.artifacts.forget(ref)
        folder = self.folder(ref)
        if folder.exists():
            removed = self.local_folder("staging") / f"gone-{uuid.uuid4().hex[:12]}"
            staging.claim(removed)
            try:
                folder.rename(removed)
                shutil.rmtree(removed)
            finally:
                staging.release(removed)

    def staging(self, stage: str, fingerprint: str) -> Path:
        """Return a new empty folder on the disk of the cache."""
        with translate_os_errors(str(self.root)):
            return staging.create(self.root / "staging", f"{stage}-{identity.short(fingerprint)}")

    def download(self, ref: Ref) -> list[str]:
        """Copy an artifact to the cache if it is intact; return the problems, a line each."""
        lock = self.local_folder("locks") / f"fetch-{identity.short(ref.digest)}.lock"
        with flock(lock), translate_os_errors(str(self.root)):
            if self.has(ref):
                return []  # another process was faster
            problems = self.artifacts.check(ref)
            if problems:
                return problems
            manifest = self.artifacts.read_manifest(ref)
            problems = check_consistency(manifest, ref) + [
                f"{name}: not a valid file name" for name in manifest.files if not is_inside(name)
            ]
            return problems or self._download_files(ref, manifest)

    def _download_files(self, ref: Ref, manifest: Manifest) -> list[str]:
        folder = self.staging(f"fetch-{ref.stage}", ref.fingerprint)

        def download(name: str) -> None:
            target = folder / name
            target.parent.mkdir(parents=True, exist_ok=True)
            with target.open("wb") as file:
                for block in self.artifacts.bucket.blocks(file_key(ref, manifest, name)):
                    file.write(block)

        try:
            with ThreadPoolExecutor(CONCURRENCY) as pool:
                list(pool.map(lambda name: retry_network(lambda: download(name)), manifest.files))
            problems = check_folder(folder, manifest, contents=True)
            if not problems:
                write_atomic(folder / MANIFEST, manifest.document)
                fsync_tree(folder)
                self.add(folder, ref)
            return problems
        finally:
            staging.discard(folder)
