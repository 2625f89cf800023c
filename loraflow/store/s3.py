"""A store in an S3 bucket, with a cache folder on each machine. See the package's docstring for its layout.

- Commit: files first, then the manifest (created, not replaced), then the pointer (replaced only as it was seen). An
  object appears whole or not at all, so that a crash at any instant leaves the old state or the new.
- Reading: an artifact is downloaded as a whole into the cache, each file hashed on arrival, then renamed into place.
- Telemetry differs between two computations with equal results, which share their digest's prefix. It lies under
  `telemetry-<its own digest>/` there, so that neither writer overwrites what the other's manifest says.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import shutil
import time
import uuid
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager, contextmanager, suppress
from pathlib import Path, PurePosixPath
from typing import Any, Literal

from loraflow import identity
from loraflow.failures import CorruptArtifact, Failure, Network, ReadOnlyStore, from_os_error
from loraflow.store import lease as leases
from loraflow.store.base import MANIFEST, OWN, TELEMETRY, Manifest, Ref, Summary, contradictions, describe, misfits
from loraflow.store.bucket import AT_ONCE, Bucket, Listed, patiently
from loraflow.store.bucket_cleanup import sweep
from loraflow.store.checkpoint_mirror import Kept
from loraflow.store.files import files_below, fsync_tree, hash_file, is_inside, write_json
from loraflow.store.lock import Held, flock

log = logging.getLogger(__name__)

_GC = "locks/gc.json"


def cache_folder(uri: str) -> Path:
    """Return this machine's folder for a store: below LORAFLOW_CACHE, by default ~/.cache/loraflow."""
    base = os.environ.get("LORAFLOW_CACHE") or Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache", "loraflow")
    readable = uri.removeprefix("s3://").replace("/", "-")[:40]
    return Path(base).expanduser().absolute() / f"{readable}-{hashlib.sha256(uri.encode()).hexdigest()[:8]}"


class S3Store:
    """Artifacts in a bucket."""

    def __init__(self, uri: str, *, lease_seconds: float = leases.SECONDS):
        self.bucket = Bucket(uri)
        self.uri = self.bucket.uri
        self.scratch = cache_folder(self.uri)
        self.lease_seconds = lease_seconds
        self._seen: dict[str, Manifest] = {}  # of artifacts that were found here; none changes but for telemetry

    # reading

    def find(self, stage: str, fingerprint: str) -> Ref | None:
        """Return the current artifact if its manifest, names and sizes are right, else None."""
        try:
            pointer = self.bucket.get(f"{stage}/{fingerprint}/current.json")
            if pointer is None:
                return None
            ref = Ref(stage=stage, fingerprint=fingerprint, digest=json.loads(pointer.data)["digest"], uri=self.uri)
            listed = list(self.bucket.listing(f"{_home(ref)}/"))
            manifest = self._listed_manifest(ref, listed)
        except (FileNotFoundError, ValueError, KeyError, TypeError):
            return None
        if manifest.fingerprint != fingerprint or manifest.digest != ref.digest:
            return None
        return None if misfits(_sizes(ref, manifest, listed), manifest) else self._ref(manifest)

    def manifest(self, ref: Ref) -> Manifest:
        """Read an artifact's manifest.

        Raises:
            CorruptArtifact: it is gone or unreadable.
        """
        known = self._seen.get(_home(ref))
        if known is not None:
            return known
        try:
            return self._read_manifest(ref)
        except (FileNotFoundError, ValueError) as error:
            raise CorruptArtifact(
                f"The manifest of {ref} cannot be read.",
                where=f"{self.location(ref)}/{MANIFEST}",
                got=f"{type(error).__name__}: {error}".splitlines()[0],
                next_step="run again: the stage makes it anew",
                ref=ref.model_dump(),
            ) from error

    def location(self, ref: Ref) -> str:
        """Return the artifact's uri."""
        return f"{self.uri}/{_home(ref)}"

    def path(self, ref: Ref) -> Path:
        """Return the artifact's folder in this machine's cache, after downloading it if need be.

        Raises:
            CorruptArtifact: what arrived is not what was written; the artifact is set aside by now.
        """
        folder = self._cached(ref)
        if (folder / MANIFEST).exists():
            os.utime(folder)  # it is in use: `gc` takes what nobody asked for in two weeks
            return folder
        problems = self._download(ref)
        if problems:
            aside = self.quarantine(ref, problems)
            raise CorruptArtifact(
                f"{ref} is damaged.", where=aside, got="; ".join(problems[:3]), next_step="run again: it is made anew"
            )
        return folder

    def read(self, ref: Ref, name: str) -> bytes:
        """Return the content of one file of an artifact.

        Raises:
            CorruptArtifact: it is not what was written.
        """
        cached = self._cached(ref) / name
        if cached.exists():
            return cached.read_bytes()
        manifest = self.manifest(ref)
        data = b"".join(self.bucket.blocks(_key(ref, manifest, name)))
        if hashlib.sha256(data).hexdigest() != manifest.files[name]["sha256"]:
            raise CorruptArtifact(f"{ref} is damaged.", where=self.location(ref), got=name, next_step="loraflow verify")
        return data

    def check(self, ref: Ref) -> list[str]:
        """Compare an artifact's names and sizes with its manifest and return what is wrong, a line each."""
        listed = list(self.bucket.listing(f"{_home(ref)}/"))
        try:
            manifest = self._listed_manifest(ref, listed)
        except (FileNotFoundError, ValueError) as error:
            return [f"{MANIFEST}: {type(error).__name__}"]
        return misfits(_sizes(ref, manifest, listed), manifest)

    def verify(self, ref: Ref) -> list[str]:
        """Read all of an artifact from the bucket and return what is wrong with it, a line each."""
        problems = self.check(ref)
        if problems:
            return problems
        manifest = self._read_manifest(ref)

        def differs(name: str) -> bool:
            total = hashlib.sha256()
            for block in self.bucket.blocks(_key(ref, manifest, name)):
                total.update(block)
            return total.hexdigest() != manifest.files[name]["sha256"]

        with ThreadPoolExecutor(AT_ONCE) as pool:
            wrong = pool.map(lambda name: patiently(lambda: differs(name)), manifest.files)
            problems = [
                f"{name}: content is not what was written"
                for name, bad in zip(manifest.files, wrong, strict=True)
                if bad
            ]
        return problems or contradictions(manifest, ref)

    def fetch(self, ref: Ref) -> list[str]:
        """Get an artifact here and hash it; a damaged copy in the cache is replaced, and no fault of the store's."""
        folder = self._cached(ref)
        if (folder / MANIFEST).exists():
            try:
                manifest = Manifest.model_validate_json((folder / MANIFEST).read_bytes())
                whole = not _differing(folder, manifest) and not contradictions(manifest, ref)
            except (OSError, ValueError):
                whole = False
            if whole:
                return []
            self._forget(ref)
        return self._download(ref)

    def artifacts(self) -> Iterator[Ref]:
        """Go through all artifacts that have a manifest, current or not. Their facets are not read."""
        for one in self.bucket.listing():
            if (ref := self._named(one.key)) is not None:
                yield ref

    def newest(self, stage: str) -> Manifest | None:
        """Return the manifest of the stage's newest artifact."""
        found = max(self._manifests(stage), key=lambda one: one.modified, default=None)
        return next(iter(self._parse([found]).values()), None) if found else None

    def newest_payload(self, stage: str, like: dict[str, Any]) -> dict[str, Any] | None:
        """Return the payload of the stage's artifact that is nearest to `like`, the newer one of two as near."""
        found = self._manifests(stage)
        made = {one.key: one.modified for one in found}
        ranked = [
            (len(identity.explain(manifest.payload, like)), -made[key], manifest.payload)
            for key, manifest in self._parse(found).items()
        ]
        return min(ranked, key=lambda one: one[:2])[2] if ranked else None

    def previous_state(self, stage: str, fingerprint: str) -> Literal["damaged", "removed"] | None:
        """Say what is left of an artifact that was there and is not found; None if there was none."""
        keys = [one.key for one in self.bucket.listing(f"{stage}/{fingerprint}/")]
        if f"{stage}/{fingerprint}/current.json" not in keys:
            return None
        return "damaged" if len(keys) > 1 else "removed"

    # documents

    def read_document(self, name: str) -> bytes | None:
        """Return a document, None if there is none."""
        found = self.bucket.get(name)
        return found.data if found else None

    def create_document(self, name: str, data: bytes) -> bool:
        """Write a document that is not there yet; of several writers one succeeds."""
        return self.bucket.create(name, data) is not None

    def write_document(self, name: str, data: bytes) -> None:
        """Write or replace a document."""
        self.bucket.put(name, data)

    def documents(self, prefix: str) -> list[str]:
        """Return the names of all documents below a prefix, sorted."""
        return sorted(one.key for one in self.bucket.listing(prefix))

    def read_documents(self, prefix: str, suffix: str = "") -> dict[str, bytes]:
        """Return all documents below a prefix whose names end so, sorted by name."""
        found = (one for one in self.bucket.listing(prefix) if one.key.endswith(suffix))
        return dict(sorted(self.bucket.read(found).items()))

    # writing

    def staging(self, stage: str, fingerprint: str) -> Path:
        """Return a new empty folder of this machine for a job to write into."""
        name = f"{stage}-{identity.short(fingerprint)}-{uuid.uuid4().hex[:8]}"
        return self._local_folder("staging", name)

    def work_folder(self, stage: str, fingerprint: str, instead_of: Ref | None = None) -> Path:
        """Return a folder of this machine, with the newest checkpoint that an attempt on any machine left."""
        folder = self._local_folder("work", stage, fingerprint)
        with self._writing():
            self._kept(stage, fingerprint).fetch(instead_of.digest if instead_of else None)
        return folder

    def mirror_checkpoints(self, stage: str, fingerprint: str) -> AbstractContextManager[None]:
        """Keep a job's newest checkpoint in the bucket, while the job is computed."""
        return self._kept(stage, fingerprint).mirror_checkpoints()

    def remove_work_folder(self, stage: str, fingerprint: str) -> None:
        """Remove what was kept, here and in the bucket."""
        shutil.rmtree(self.scratch / "work" / stage / fingerprint, ignore_errors=True)
        try:
            self._kept(stage, fingerprint).forget()
        except Failure as failure:  # the job is done all the same; `gc` takes it in two weeks
            log.warning("what was kept of %s %s stays: %s", stage, identity.short(fingerprint), failure)

    def _kept(self, stage: str, fingerprint: str) -> Kept:
        return Kept(self.bucket, f"work/{stage}/{fingerprint}", self.scratch / "work" / stage / fingerprint)

    @contextmanager
    def lock(self, stage: str, fingerprint: str) -> Iterator[None]:
        """Hold a job's lock: among this machine's processes by flock, among machines by a lease."""
        name = f"{stage}-{identity.short(fingerprint)}"
        with (
            flock(self._local_folder("locks") / f"{name}.lock"),
            leases.lease(self.bucket, f"locks/{name}.json", seconds=self.lease_seconds),
        ):
            yield

    def commit(
        self,
        staged: Path,
        *,
        payload: dict[str, Any],
        inputs: dict[str, Ref],
        summary: Summary,
        provenance: dict[str, Any],
        replace: bool = False,
    ) -> Ref:
        """Hash, keep the result in `pending` for `finish`, upload, write the manifest, replace the pointer.

        The first committed digest of a fingerprint stands as long as it is whole; `replace` is for a computation that
        was forced.
        """
        with self._writing():
            manifest = describe(staged, payload, inputs, summary, provenance)
            fsync_tree(staged)
            write_json(staged / MANIFEST, manifest.model_dump())
            pending = self._local_folder("pending", manifest.stage) / manifest.fingerprint
            shutil.rmtree(pending, ignore_errors=True)
            staged.rename(pending)
            return self._publish(pending, manifest, replace)

    def resume_commit(self, stage: str, fingerprint: str) -> Ref | None:
        """Finish a commit of this machine that was cut off: its files are here, and some of them in the bucket."""
        pending = self.scratch / "pending" / stage / fingerprint
        try:
            manifest = Manifest.model_validate_json((pending / MANIFEST).read_bytes())
            whole = not _differing(pending, manifest) and manifest.fingerprint == fingerprint
        except (OSError, ValueError):
            return None
        if not whole:
            shutil.rmtree(pending, ignore_errors=True)
            return None
        with self._writing():
            return self._publish(pending, manifest, replace=False)

    def _publish(self, folder: Path, manifest: Manifest, replace: bool) -> Ref:
        ref = self._ref(manifest)
        for _ in range(8):
            pointer = self.bucket.get(f"{ref.stage}/{ref.fingerprint}/current.json")
            standing = self.find(ref.stage, ref.fingerprint)
            if standing is not None and (not replace or standing.digest == ref.digest):
                shutil.rmtree(folder)
                return standing
            self._upload(folder, ref, manifest)
            ours = self._place_manifest(ref, manifest)
            data = json.dumps({"digest": ref.digest}).encode()
            key = f"{ref.stage}/{ref.fingerprint}/current.json"
            if (self.bucket.replace(key, data, pointer.etag) if pointer else self.bucket.create(key, data)) is None:
                continue  # another machine committed meanwhile: look what stands now
            self._keep(folder, ref) if ours else shutil.rmtree(folder)
            return ref
        raise Network("Other workers keep on changing the artifact.", where=self.location(ref), next_step="run again")

    def _upload(self, folder: Path, ref: Ref, manifest: Manifest) -> None:
        keys = {_key(ref, manifest, name): name for name in manifest.files}
        known = {*keys, f"{_home(ref)}/{MANIFEST}"}
        there = [one.key for one in self.bucket.listing(f"{_home(ref)}/")]
        foreign = [key for key in there if key not in known and not _is_telemetry(ref, key)]
        self.bucket.delete(foreign)  # of a damaged artifact in whose place this one comes

        def one(key: str) -> None:
            self.bucket.upload(folder / keys[key], key, manifest.files[keys[key]]["sha256"])

        with ThreadPoolExecutor(AT_ONCE) as pool:
            list(pool.map(one, keys))

    def _place_manifest(self, ref: Ref, manifest: Manifest) -> bool:
        """Write the manifest, unless another writer's stands and its files are whole. Return whether ours stands."""
        key = f"{_home(ref)}/{MANIFEST}"
        data = json.dumps(manifest.model_dump(), indent=1, sort_keys=True, ensure_ascii=False).encode()
        if self.bucket.create(key, data) is not None:
            return True
        seen = self.bucket.get(key)
        if seen is not None and not self.check(ref):
            return False
        return (self.bucket.replace(key, data, seen.etag) if seen else self.bucket.create(key, data)) is not None

    def quarantine(self, ref: Ref, problems: list[str]) -> str:
        """Move a corrupt artifact out of the way, with the reasons beside it, and return where it went."""
        key = f"{_home(ref)}/{MANIFEST}"
        target = f"set-aside/{ref.stage}-{identity.short(ref.digest)}-{uuid.uuid4().hex[:6]}"
        seen = self.bucket.get(key)
        with self.lock(ref.stage, ref.fingerprint):
            now = self.bucket.get(key)
            if seen is not None and (now is None or now.etag != seen.etag):
                self._forget(ref)
                return self.location(ref)  # another worker set it aside, and may have made it anew
            keys = [one.key for one in self.bucket.listing(f"{_home(ref)}/")]
            for one in keys:
                self.bucket.copy(one, target + one.removeprefix(_home(ref)))
            record = {"was": self.location(ref), "problems": problems, "time": time.time()}
            self.bucket.put(f"{target}.json", json.dumps(record, indent=1).encode())
            self.remove(ref)
        return f"{self.uri}/{target}"

    # keeping it small

    @contextmanager
    def reader_lock(self) -> Iterator[None]:
        """Hold off `gc`, here and on other machines, while artifacts are in use."""
        key = f"locks/readers/{uuid.uuid4().hex}.json"
        try:
            etag = self.bucket.create(key, b"{}")
        except ReadOnlyStore:  # who may not write can hold nothing off
            etag = None
        held = leases.Lease(self.bucket, key, b"{}", etag, self.lease_seconds) if etag else None
        try:
            while leases.is_held(self.bucket.get(_GC), self.lease_seconds):
                time.sleep(0.5)
            with flock(self._local_folder("locks") / "readers", shared=True):
                yield
        finally:
            if held is not None:
                held.release()
                self.bucket.delete([key])

    @contextmanager
    def cleanup_lock(self) -> Iterator[None]:
        """Keep readers out while something is removed.

        Raises:
            Held: there are some.
        """
        with (
            flock(self._local_folder("locks") / "readers", wait=False),
            leases.lease(self.bucket, _GC, seconds=self.lease_seconds, wait=False),
        ):
            for one in self.bucket.listing("locks/readers/"):
                if leases.is_held(self.bucket.get(one.key), self.lease_seconds):
                    raise Held(one.key)
            yield

    def committed_at(self, ref: Ref) -> float:
        """Return when an artifact was committed, in seconds since 1970, by the server's clock."""
        return max((one.modified for one in self.bucket.listing(f"{_home(ref)}/{MANIFEST}")), default=0.0)

    def remove(self, ref: Ref) -> None:
        """Delete an artifact, its manifest first: without it the rest is no artifact."""
        self.bucket.delete([f"{_home(ref)}/{MANIFEST}"])
        self.bucket.delete([one.key for one in self.bucket.listing(f"{_home(ref)}/")])
        self._forget(ref)

    def leftovers(self, before: float, *, remove: bool) -> Iterator[tuple[PurePosixPath, int]]:
        """Yield, and remove, (name, bytes) of cut-off uploads, what was set aside, and old copies on this machine."""
        return sweep(self.bucket, self.scratch, before, remove=remove)

    # inside

    def _download(self, ref: Ref) -> list[str]:
        """Get an artifact into the cache if all of it is right; return what is wrong."""
        with flock(self._local_folder("locks") / f"fetch-{identity.short(ref.digest)}.lock"), self._writing():
            if (self._cached(ref) / MANIFEST).exists():
                return []  # another process was faster
            problems = self.check(ref)
            if problems:
                return problems
            manifest = self._read_manifest(ref)
            problems = contradictions(manifest, ref) + [
                f"{name}: no name for a file" for name in manifest.files if not is_inside(name)
            ]
            if problems:
                return problems
            folder = self.staging(f"fetch-{ref.stage}", ref.fingerprint)
            try:
                with ThreadPoolExecutor(AT_ONCE) as pool:
                    list(
                        pool.map(lambda name: patiently(lambda: self._get(ref, manifest, name, folder)), manifest.files)
                    )
                problems = _differing(folder, manifest)
                if not problems:
                    write_json(folder / MANIFEST, manifest.model_dump())
                    fsync_tree(folder)
                    self._keep(folder, ref)
                return problems
            finally:
                shutil.rmtree(folder, ignore_errors=True)

    def _get(self, ref: Ref, manifest: Manifest, name: str, folder: Path) -> None:
        place = folder / name
        place.parent.mkdir(parents=True, exist_ok=True)
        with place.open("wb") as file:
            for block in self.bucket.blocks(_key(ref, manifest, name)):
                file.write(block)

    def _keep(self, folder: Path, ref: Ref) -> None:
        """Move a whole artifact into the cache; its manifest is in it."""
        place = self._cached(ref)
        place.parent.mkdir(parents=True, exist_ok=True)
        self._forget(ref)
        folder.rename(place)

    def _forget(self, ref: Ref) -> None:
        """Drop the copy in the cache, and what is known of it."""
        self._seen.pop(_home(ref), None)
        place = self._cached(ref)
        if place.exists():
            gone = self._local_folder("staging") / f"gone-{uuid.uuid4().hex[:12]}"
            place.rename(gone)
            shutil.rmtree(gone)

    def _cached(self, ref: Ref) -> Path:
        return self.scratch / "artifacts" / ref.stage / ref.fingerprint / ref.digest

    def _local_folder(self, *parts: str) -> Path:
        with self._writing():
            folder = self.scratch.joinpath(*parts)
            folder.mkdir(parents=True, exist_ok=True)
            return folder

    def _manifests(self, stage: str) -> list[Listed]:
        return [one for one in self.bucket.listing(f"{stage}/") if self._named(one.key) is not None]

    def _named(self, key: str) -> Ref | None:
        """Return the artifact whose manifest a key is."""
        parts = key.split("/")
        if len(parts) != 4 or parts[3] != MANIFEST or parts[0] in OWN:
            return None
        return Ref(stage=parts[0], fingerprint=parts[1], digest=parts[2], uri=self.uri)

    def _parse(self, listed: list[Listed]) -> dict[str, Manifest]:
        """Read manifests; those that are gone or unreadable are left out."""
        found = {}
        for key, data in self.bucket.read(listed).items():
            with suppress(ValueError):
                found[key] = Manifest.model_validate_json(data)
        return found

    def _listed_manifest(self, ref: Ref, listed: list[Listed]) -> Manifest:
        """Return the manifest that is among an artifact's objects."""
        key = f"{_home(ref)}/{MANIFEST}"
        content = self.bucket.read(one for one in listed if one.key == key)
        if key not in content:
            raise FileNotFoundError(f"{self.location(ref)}/{MANIFEST}")
        manifest = self._seen[_home(ref)] = Manifest.model_validate_json(content[key])
        return manifest

    def _read_manifest(self, ref: Ref) -> Manifest:
        found = self.bucket.get(f"{_home(ref)}/{MANIFEST}")
        if found is None:
            raise FileNotFoundError(f"{self.location(ref)}/{MANIFEST}")
        return Manifest.model_validate_json(found.data)

    def _ref(self, manifest: Manifest) -> Ref:
        return Ref(
            stage=manifest.stage,
            fingerprint=manifest.fingerprint,
            digest=manifest.digest,
            uri=self.uri,
            facets=manifest.facets,
        )

    @contextmanager
    def _writing(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            raise from_os_error(error, str(self.scratch)) or error from error


def _home(ref: Ref) -> str:
    return f"{ref.stage}/{ref.fingerprint}/{ref.digest}"


def _key(ref: Ref, manifest: Manifest, name: str) -> str:
    """Return where a file of an artifact lies in the bucket."""
    if not name.startswith(TELEMETRY):
        return f"{_home(ref)}/{name}"
    telemetry = {one: entry["sha256"] for one, entry in manifest.files.items() if one.startswith(TELEMETRY)}
    return f"{_home(ref)}/telemetry-{identity.short(identity.digest(telemetry))}/{name.removeprefix(TELEMETRY)}"


def _sizes(ref: Ref, manifest: Manifest, listed: list[Listed]) -> dict[str, int]:
    """Return {name: bytes} of an artifact's objects, without telemetry of which another manifest would speak."""
    names = {_key(ref, manifest, name): name for name in manifest.files}
    return {
        names.get(one.key, one.key.removeprefix(f"{_home(ref)}/")): one.size
        for one in listed
        if one.key in names or not (one.key == f"{_home(ref)}/{MANIFEST}" or _is_telemetry(ref, one.key))
    }


def _is_telemetry(ref: Ref, key: str) -> bool:
    return key.startswith(f"{_home(ref)}/telemetry-")


def _differing(folder: Path, manifest: Manifest) -> list[str]:
    """Hash a folder's files and return what is not as the manifest says, a line each."""
    found = {name: path.stat().st_size for name, path in files_below(folder) if name != MANIFEST}
    problems = misfits(found, manifest)
    return problems or [
        f"{name}: content is not what was written"
        for name, entry in manifest.files.items()
        if hash_file(folder / name) != entry["sha256"]
    ]
