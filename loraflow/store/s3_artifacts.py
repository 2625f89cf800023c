"""Read and check the artifacts of a bucket: the keys of their objects, and the hashes that this machine read."""

import hashlib
import os
from collections.abc import Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from typing import TypeAlias

from pydantic import JsonValue, TypeAdapter

from loraflow import identity
from loraflow.store import staging
from loraflow.store.artifact import (
    MANIFEST,
    POINTER,
    RESERVED_FOLDERS,
    TELEMETRY,
    HasHash,
    Manifest,
    Pointer,
    PreviousState,
    Ref,
    check_consistency,
    check_folder,
    compare_sizes,
    content_problem,
    has_hash,
    manifest_problem,
    parse_manifest,
    parse_pointer,
    result_problems,
    unreadable_manifest,
)
from loraflow.store.bucket import CONCURRENCY, Bucket, ObjectInfo, retry_network
from loraflow.store.files import (
    Memo,
    file_type,
    fsync_tree,
    is_inside,
    is_there,
    raise_machine_fault,
    read_file,
    translate_os_errors,
    write_atomic,
)
from loraflow.store.lock import flock

_Stamp: TypeAlias = tuple[str, int, float]  # ETag, size in bytes, time of the last write in seconds since 1970
_MEMO = TypeAdapter(dict[str, tuple[str, int, float, str]])  # by key: the stamp and the hash


class ObjectMemo(Memo[tuple[str, int, float, str]]):
    """Hashes of objects that this machine read, by key, ETag, size and time of the last write.

    Each write gives an object another ETag, or at least another time. The memo is a file of this machine: another machine
    reads the objects once more.
    """

    def __init__(self, path: Path):
        super().__init__(path, _MEMO)

    def remembers(self, item: ObjectInfo, sha256: str) -> bool:
        """Tell whether an object had a hash when it was read, and has not changed since."""
        return self.known.get(item.key) == (*_stamp(item), sha256)

    def add(self, item: ObjectInfo, sha256: str) -> None:
        """Remember the hash of an object that was read after it was listed."""
        self.known[item.key] = (*_stamp(item), sha256)
        self.changed = True


def _stamp(item: ObjectInfo) -> _Stamp:
    return item.etag, item.size, item.modified


class S3Artifacts:
    """The artifacts of a bucket. Manifests that were found are remembered: artifacts do not change."""

    def __init__(self, bucket: Bucket):
        self.bucket = bucket
        self.uri = bucket.uri
        self._manifests: dict[str, Manifest] = {}

    def find(self, stage: str, fingerprint: str) -> Ref | None:
        """Return the current artifact if it is complete, else None."""
        try:
            pointer = self.pointer(stage, fingerprint)
            if pointer is None:
                return None
            ref = Ref(stage=stage, fingerprint=fingerprint, digest=pointer.digest, uri=self.uri)
            listed = self._objects(ref)
            manifest = self._listed_manifest(ref, listed, pointer)
        except (FileNotFoundError, ValueError):
            return None
        return None if compare_sizes(file_sizes(ref, manifest, listed), manifest) else manifest.ref(self.uri)

    def manifest(self, ref: Ref) -> Manifest:
        """Return an artifact's manifest, from memory if it was found before.

        Raises:
            CorruptArtifact: it is missing, unreadable, or was changed.
        """
        known = self._manifests.get(artifact_prefix(ref))
        if known is not None:
            return known
        try:
            return self.read_manifest(ref)
        except (FileNotFoundError, ValueError) as error:
            raise unreadable_manifest(ref, f"{self.location(ref)}/{MANIFEST}", error) from error

    def read_manifest(self, ref: Ref) -> Manifest:
        """Read an artifact's manifest from the bucket.

        Raises:
            FileNotFoundError: it is missing.
            ValueError: it is unreadable, or was changed.
        """
        found = self.bucket.get(manifest_key(ref))
        if found is None:
            raise FileNotFoundError(f"{self.location(ref)}/{MANIFEST}")
        return parse_manifest(found.data, ref, self.pointer(ref.stage, ref.fingerprint))

    def pointer(self, stage: str, fingerprint: str) -> Pointer | None:
        """Return the pointer of a fingerprint; None if there is none.

        Raises:
            DamagedPointer: it cannot be read.
        """
        found = self.bucket.get(pointer_key(stage, fingerprint))
        return parse_pointer(found.data, stage, fingerprint) if found else None

    def forget(self, ref: Ref) -> None:
        """Forget an artifact's manifest, because it is removed or written again."""
        self._manifests.pop(artifact_prefix(ref), None)

    def location(self, ref: Ref) -> str:
        """Return the artifact's uri."""
        return f"{self.uri}/{artifact_prefix(ref)}"

    def check(self, ref: Ref) -> list[str]:
        """Compare an artifact's names and sizes with its manifest; return the problems."""
        self.forget(ref)
        listed = self._objects(ref)
        try:
            manifest = self._listed_manifest(ref, listed, self.pointer(ref.stage, ref.fingerprint))
        except (FileNotFoundError, ValueError) as error:
            return [manifest_problem(error)]
        return compare_sizes(file_sizes(ref, manifest, listed), manifest)

    def hash_objects(self, ref: Ref, memo: ObjectMemo, *, changed_only: bool = False) -> list[str]:
        """Read and hash all of an artifact's objects; return the problems, a line each.

        The hashes are remembered. With `changed_only`, objects that have not changed since they were hashed are not read.
        """
        self.forget(ref)
        listed = self._objects(ref)
        try:
            manifest = self._listed_manifest(ref, listed, self.pointer(ref.stage, ref.fingerprint))
        except (FileNotFoundError, ValueError) as error:
            return [manifest_problem(error)]
        problems = compare_sizes(file_sizes(ref, manifest, listed), manifest)
        if problems:
            return problems
        objects = {item.key: item for item in listed}

        def is_damaged(name: str) -> bool:
            item, expected = objects.get(file_key(ref, manifest, name)), manifest.files[name].sha256
            if item is None:  # telemetry
                return True
            if changed_only and memo.remembers(item, expected):
                return False
            total = hashlib.sha256()
            for block in self.bucket.blocks(item.key):
                total.update(block)
            memo.add(item, total.hexdigest())
            return total.hexdigest() != expected

        with ThreadPoolExecutor(CONCURRENCY) as pool:
            damaged = pool.map(lambda name: retry_network(lambda: is_damaged(name)), manifest.files)
            found = [content_problem(name) for name, bad in zip(manifest.files, damaged, strict=True) if bad]
        memo.save()
        return found

    def artifacts(self) -> Iterator[Ref]:
        """Yield all artifacts that have a manifest."""
        for item in self.bucket.listing():
            if (ref := parse_manifest_key(item.key, self.uri)) is not None:
                yield ref

    def newest(self, stage: str) -> Manifest | None:
        """Return the manifest of the stage's newest artifact."""
        found = max(self._stage_manifests(stage), key=lambda item: item.modified, default=None)
        return next(iter(self._parse([found]).values()), None) if found else None

    def newest_payload(self, stage: str, like: Mapping[str, JsonValue]) -> dict[str, JsonValue] | None:
        """Return the payload of the stage that differs least from `like`."""
        newest_first = sorted(self._stage_manifests(stage), key=lambda item: item.modified, reverse=True)
        payloads = [manifest.payload for manifest in self._parse(newest_first).values()]
        return min(payloads, key=lambda payload: len(identity.explain(payload, like)), default=None)

    def previous_state(self, stage: str, fingerprint: str) -> PreviousState | None:
        """Return what is left of an artifact that is not found."""
        keys = [item.key for item in self.bucket.listing(f"{stage}/{fingerprint}/")]
        if pointer_key(stage, fingerprint) not in keys:
            return None
        return "damaged" if len(keys) > 1 else "removed"

    def keys(self, ref: Ref) -> list[str]:
        """Return the keys of all objects of an artifact."""
        return [item.key for item in self._objects(ref)]

    def _objects(self, ref: Ref) -> list[ObjectInfo]:
        return list(self.bucket.listing(f"{artifact_prefix(ref)}/"))

    def _stage_manifests(self, stage: str) -> list[ObjectInfo]:
        return [item for item in self.bucket.listing(f"{stage}/") if parse_manifest_key(item.key, self.uri) is not None]

    def _parse(self, listed: list[ObjectInfo]) -> dict[str, Manifest]:
        """Read manifests; those that are gone or unreadable are left out."""
        found = {}
        for key, data in self.bucket.read(listed).items():
            with suppress(ValueError):
                found[key] = Manifest.parse(data)
        return found

    def _listed_manifest(self, ref: Ref, listed: list[ObjectInfo], pointer: Pointer | None) -> Manifest:
        """Read the manifest that is among an artifact's objects, and remember it."""
        self.forget(ref)
        key = manifest_key(ref)
        content = self.bucket.read(item for item in listed if item.key == key)
        if key not in content:
            raise FileNotFoundError(f"{self.location(ref)}/{MANIFEST}")
        manifest = self._manifests[artifact_prefix(ref)] = parse_manifest(content[key], ref, pointer)
        return manifest


# Keys of an artifact's objects in a bucket.
#
# Telemetry differs between two computations with equal results, which have the same digest and so the same prefix.
# It is therefore stored below `telemetry-<its own digest>/`: no writer overwrites what another writer's manifest describes.


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
        return bool(file_type(self.folder(ref) / MANIFEST))

    def is_intact(self, ref: Ref, has_hash: HasHash = has_hash) -> bool:
        """Hash a copy; tell whether it matches its manifest."""
        folder = self.folder(ref)
        try:
            manifest = Manifest.parse(read_file(folder / MANIFEST))
            problems = result_problems(check_folder(folder, manifest, has_hash))
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
        if is_there(folder):
            staging.remove(self.local_folder("staging"), folder)

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
            missing = [FileNotFoundError] if name.startswith(TELEMETRY) else []
            with target.open("wb") as file, suppress(*missing):
                for block in self.artifacts.bucket.blocks(file_key(ref, manifest, name)):
                    file.write(block)

        try:
            with ThreadPoolExecutor(CONCURRENCY) as pool:
                list(pool.map(lambda name: retry_network(lambda: download(name)), manifest.files))
            problems = result_problems(check_folder(folder, manifest))
            if not problems:
                write_atomic(folder / MANIFEST, manifest.document)
                fsync_tree(folder)
                self.add(folder, ref)
            return problems
        finally:
            staging.discard(folder)
