"""A store in an S3 bucket, with a cache folder on each machine. See the package's docstring for its layout."""

import logging
import os
import shutil
from collections import defaultdict
from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, suppress
from pathlib import Path, PurePosixPath

from pydantic import JsonValue
from typing_extensions import override

from loraflow import identity
from loraflow.failures import Failure
from loraflow.store import lease as leases
from loraflow.store import staging
from loraflow.store.artifact import (
    MANIFEST,
    QUARANTINE,
    RESERVED_FOLDERS,
    TELEMETRY,
    Manifest,
    Ref,
    Summary,
    build_manifest,
    check_consistency,
    check_content,
    check_folder,
    damaged_artifact,
    has_hash,
)
from loraflow.store.base import Store
from loraflow.store.bucket import Bucket, ObjectInfo, abort_upload, unfinished_uploads
from loraflow.store.checkpoint_mirror import CheckpointMirror
from loraflow.store.chunk_cache import stale_entries
from loraflow.store.files import (
    HashMemo,
    folder_size,
    fsync_tree,
    is_there,
    raise_machine_fault,
    read_file,
    remove_tree,
    set_default_modes,
    stale_folders,
    translate_os_errors,
    write_atomic,
)
from loraflow.store.lock import flock
from loraflow.store.s3_artifacts import ArtifactCache, S3Artifacts, cache_folder, file_key, manifest_key
from loraflow.store.s3_commit import commit_artifact, move_to_quarantine, remove_artifact

log = logging.getLogger(__name__)


class S3Store(S3Artifacts, Store):
    """Artifacts in a bucket; what a run reads is copied to this machine's cache."""

    def __init__(self, uri: str, *, lease_seconds: float = leases.SECONDS):
        super().__init__(Bucket(uri))
        self.scratch = cache_folder(self.uri)
        self.lease_seconds = lease_seconds
        self.cache = ArtifactCache(self.scratch, self)

    # reading

    def path(self, ref: Ref) -> Path:
        """Return the folder of the artifact's copy on this machine, downloaded if need be.

        Raises:
            CorruptArtifact: the downloaded files do not have the hashes of the manifest. The artifact was quarantined.
        """
        folder = self.cache.folder(ref)
        if self.cache.has(ref):
            os.utime(folder)  # it is in use: the cleanup removes copies that were not used for two weeks
            return folder
        where: str | None = None
        if problems := self.cache.download(ref):
            where = self.quarantine(ref, problems)
            if where is None:  # intact by now
                problems = self.cache.download(ref)
        if problems:
            raise damaged_artifact(ref, where or self.location(ref), problems)
        return folder

    @override
    def read(self, ref: Ref, name: str) -> bytes:
        manifest, cached = self.manifest(ref), self.cache.folder(ref) / name
        with suppress(OSError):  # there is no copy
            content = read_file(cached)
            if not check_content(manifest, name, content):
                return content
            if not name.startswith(TELEMETRY):  # of which the copy may have another computation's
                self.cache.drop(ref)  # only the copy is damaged
        found = self.bucket.get(file_key(ref, manifest, name))
        problems = check_content(manifest, name, found.data if found else None)
        if problems or found is None:
            raise damaged_artifact(ref, self.location(ref), problems)
        return found.data

    @override
    def verify(self, ref: Ref, memo: HashMemo | None = None) -> list[str]:
        return self.hash_objects(ref, self.cache.object_memo())

    def fetch(self, ref: Ref, memo: HashMemo | None = None) -> list[str]:
        """Download an artifact if need be, and hash the copy; return the problems, a line each.

        A damaged copy is downloaded again: the artifact in the store may still be intact.
        """
        if self.cache.has(ref):
            if self.cache.is_intact(ref, memo.has_hash if memo else has_hash):
                return []
            self.cache.drop(ref)
        return self.cache.download(ref)

    def check_changed(self, ref: Ref, memo: HashMemo) -> list[str]:
        """Read and hash those objects that changed since this machine hashed them; return the problems, a line each.

        The same holds for the files of this machine's copy, if there is one. A damaged copy is removed.
        """
        if self.cache.has(ref) and not self.cache.is_intact(ref, memo.has_hash):
            self.cache.drop(ref)
        return self.hash_objects(ref, self.cache.object_memo(), changed_only=True)

    def is_remembered(self, ref: Ref, memo: HashMemo) -> bool:
        """Tell whether this machine's copy was hashed, was intact, and has not changed since. Nothing is read."""
        return self.cache.has(ref) and self.cache.is_intact(ref, memo.remembers) and not self.check(ref)

    # documents

    @override
    def read_document(self, name: str) -> bytes | None:
        found = self.bucket.get(name)
        return found.data if found else None

    @override
    def create_document(self, name: str, data: bytes) -> bool:
        return self.bucket.create(name, data) is not None

    @override
    def write_document(self, name: str, data: bytes) -> None:
        self.bucket.put(name, data)

    @override
    def remove_document(self, name: str) -> None:
        self.bucket.delete([name])

    @override
    def documents(self, prefix: str) -> list[str]:
        return sorted(item.key for item in self.bucket.listing(prefix))

    @override
    def read_documents(self, prefix: str, suffix: str = "") -> dict[str, bytes]:
        found = (item for item in self.bucket.listing(prefix) if item.key.endswith(suffix))
        return dict(sorted(self.bucket.read(found).items()))

    # writing

    @override
    def staging(self, stage: str, fingerprint: str) -> Path:
        return self.cache.staging(stage, fingerprint)

    def work_folder(self, stage: str, fingerprint: str, recompute_of: Ref | None = None) -> Path:
        """Return a folder of this machine with the newest checkpoint that an attempt on any machine left."""
        folder = self.cache.local_folder("work", stage, fingerprint)
        with translate_os_errors(str(self.scratch)):
            self._checkpoints(stage, fingerprint).fetch(recompute_of.digest if recompute_of else None)
        return folder

    @override
    def mirror_checkpoints(self, stage: str, fingerprint: str) -> AbstractContextManager[None]:
        return self._checkpoints(stage, fingerprint).mirror_checkpoints()

    @override
    def remove_work_folder(self, stage: str, fingerprint: str) -> None:
        shutil.rmtree(self.scratch / "work" / stage / fingerprint, ignore_errors=True)
        try:
            self._checkpoints(stage, fingerprint).remove()
        except Failure as failure:  # the job is done; the cleanup removes its checkpoints in two weeks
            log.warning(
                "the checkpoints of %s %s could not be removed: %s", stage, identity.short(fingerprint), failure
            )

    def _checkpoints(self, stage: str, fingerprint: str) -> CheckpointMirror:
        return CheckpointMirror(self.bucket, f"work/{stage}/{fingerprint}", self.scratch / "work" / stage / fingerprint)

    @contextmanager
    def lock(self, stage: str, fingerprint: str) -> Iterator[None]:
        """Hold a job's lock: among this machine's processes by flock, among machines by a lease."""
        name = f"{stage}-{identity.short(fingerprint)}"
        with (
            flock(self.cache.local_folder("locks") / f"{name}.lock"),
            leases.lease(self.bucket, f"locks/{name}.json", seconds=self.lease_seconds),
        ):
            yield

    def commit(
        self,
        staged: Path,
        *,
        payload: Mapping[str, JsonValue],
        inputs: Mapping[str, Ref],
        summary: Summary,
        provenance: Mapping[str, JsonValue],
        replace: bool = False,
    ) -> Ref:
        """Hash the files, move them to `pending/` so that `resume_commit` can finish, and upload them.

        The first committed digest of a fingerprint stays current while it is intact; `replace` is for an artifact that is
        recomputed with `--force`.
        """
        with translate_os_errors(str(self.scratch)):
            set_default_modes(staged)
            manifest = build_manifest(staged, payload, inputs, summary, provenance)
            fsync_tree(staged)
            write_atomic(staged / MANIFEST, manifest.document)
            pending = self.cache.local_folder("pending", manifest.stage) / manifest.fingerprint
            shutil.rmtree(pending, ignore_errors=True)
            staged.rename(pending)
            staging.release(staged)
            return commit_artifact(self, self.cache, pending, manifest, replace=replace)

    def resume_commit(self, stage: str, fingerprint: str) -> Ref | None:
        """Finish an interrupted commit of this machine, whose files are still here; None if there is none."""
        pending = self.scratch / "pending" / stage / fingerprint
        try:
            manifest = Manifest.parse(read_file(pending / MANIFEST))
            ref = manifest.ref(self.uri).model_copy(update={"fingerprint": fingerprint})
            is_intact = not check_folder(pending, manifest) and not check_consistency(manifest, ref)
        except (OSError, ValueError) as error:
            raise_machine_fault(error)
            return None
        if not is_intact:
            shutil.rmtree(pending, ignore_errors=True)
            return None
        with translate_os_errors(str(self.scratch)):
            return commit_artifact(self, self.cache, pending, manifest, replace=False)

    def quarantine(self, ref: Ref, problems: list[str]) -> str | None:
        """Move a damaged artifact to the quarantine (`set-aside/`), with its problems; return its new location.

        None if it is intact by now: while the caller hashed it, another worker may have moved the damaged one away, and
        committed it again; or only the copy on this machine was damaged.
        """
        with self.lock(ref.stage, ref.fingerprint):
            self.cache.drop(ref)
            if not self.keys(ref):
                return self.location(ref)  # another worker quarantined it
            if not self.hash_objects(ref, self.cache.object_memo()):
                return None
            return move_to_quarantine(self, self.cache, ref, problems)

    # cleanup

    @override
    @contextmanager
    def reader_lock(self) -> Iterator[None]:
        with (
            leases.reader_lease(self.bucket, self.lease_seconds),
            flock(self.cache.local_folder("locks") / "readers", shared=True),
        ):
            yield

    @override
    @contextmanager
    def cleanup_lock(self) -> Iterator[None]:
        with (
            flock(self.cache.local_folder("locks") / "readers", wait=False),
            leases.cleanup_lease(self.bucket, self.lease_seconds),
        ):
            yield

    @override
    def committed_at(self, ref: Ref) -> float:
        return max((item.modified for item in self.bucket.listing(manifest_key(ref))), default=0.0)

    @override
    def remove(self, ref: Ref) -> None:
        remove_artifact(self, self.cache, ref)

    @override
    def stale_items(self, before: float, *, remove: bool) -> Iterator[tuple[PurePosixPath, int]]:
        return stale_items(self.bucket, self.scratch, before, remove=remove)


_LOCAL_PATTERNS = ("work/*/*", "pending/*/*", "staging/*", "artifacts/*/*/*")


def stale_items(bucket: Bucket, scratch: Path, before: float, *, remove: bool) -> Iterator[tuple[PurePosixPath, int]]:
    """Yield (name, bytes) of unfinished work older than a time."""
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
        if is_there(unused):
            yield PurePosixPath("cache", "staging", unused.name), folder_size(unused)
        if remove:
            staging.discard(unused)
    yield from stale_entries(scratch, before, remove=remove)
    for folder, size in stale_folders(scratch, _LOCAL_PATTERNS, before):
        if remove:
            remove_tree(scratch / folder)
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
