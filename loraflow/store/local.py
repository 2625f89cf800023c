"""A store in a local folder: rename, fsync and flock of the kernel, nothing else."""

from __future__ import annotations

import json
import os
import shutil
import time
import uuid
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from pathlib import Path, PurePosixPath
from typing import Any, Literal

from loraflow import identity
from loraflow.failures import CorruptArtifact, from_os_error
from loraflow.store.base import MANIFEST, OWN, Manifest, Ref, Summary, contradictions, describe, misfits
from loraflow.store.checkpoints import begin_anew, forced_over
from loraflow.store.files import files_below, fsync_path, fsync_tree, hash_file, write_atomic, write_json
from loraflow.store.lock import flock


class LocalStore:
    """Artifacts in a folder. See the package's docstring for its layout."""

    def __init__(self, root: str | Path):
        self.root = Path(root).expanduser().absolute()
        self.uri = str(self.root)
        self.scratch = self.root

    # reading

    def find(self, stage: str, fingerprint: str) -> Ref | None:
        """Return the current artifact if its manifest, names and sizes are right, else None."""
        home = self.root / stage / fingerprint
        try:
            digest = json.loads((home / "current.json").read_bytes())["digest"]
            manifest = self._read_manifest(home / digest)
        except (OSError, ValueError, KeyError, TypeError):
            return None
        if manifest.fingerprint != fingerprint or manifest.digest != digest:
            return None
        return None if _misfits(home / digest, manifest) else self._ref(manifest)

    def manifest(self, ref: Ref) -> Manifest:
        """Read an artifact's manifest.

        Raises:
            CorruptArtifact: it is gone or unreadable.
        """
        folder = self._folder(ref)
        try:
            return self._read_manifest(folder)
        except (OSError, ValueError) as error:
            raise CorruptArtifact(
                f"The manifest of {ref} cannot be read.",
                where=str(folder / MANIFEST),
                got=f"{type(error).__name__}: {error}".splitlines()[0],
                next_step="run again: the stage makes it anew",
                ref=ref.model_dump(),
            ) from error

    def path(self, ref: Ref) -> Path:
        """Return the artifact's folder."""
        return self._folder(ref)

    def location(self, ref: Ref) -> str:
        """Return the artifact's folder."""
        return str(self._folder(ref))

    def read(self, ref: Ref, name: str) -> bytes:
        """Return the content of one file of an artifact."""
        return (self._folder(ref) / name).read_bytes()

    def check(self, ref: Ref) -> list[str]:
        """Compare an artifact's names and sizes with its manifest and return what is wrong, a line each."""
        folder = self._folder(ref)
        try:
            return _misfits(folder, self._read_manifest(folder))
        except (OSError, ValueError) as error:
            return [f"{MANIFEST}: {type(error).__name__}"]

    def verify(self, ref: Ref) -> list[str]:
        """Hash an artifact's contents and return what is wrong with it, a line each."""
        problems = self.check(ref)
        if problems:
            return problems
        folder = self._folder(ref)
        manifest = self._read_manifest(folder)
        for name, entry in manifest.files.items():
            if hash_file(folder / name) != entry["sha256"]:
                problems.append(f"{name}: content is not what was written")
        return problems or contradictions(manifest, ref)

    def fetch(self, ref: Ref) -> list[str]:
        """Hash an artifact's contents: they are here already."""
        return self.verify(ref)

    def artifacts(self) -> Iterator[Ref]:
        """Go through all artifacts that have a manifest, current or not. Their facets are not read."""
        for path in sorted(self.root.glob(f"*/*/*/{MANIFEST}")):
            stage, fingerprint, digest = path.parts[-4:-1]
            if stage not in OWN:
                yield Ref(stage=stage, fingerprint=fingerprint, digest=digest, uri=self.uri)

    def newest_payload(self, stage: str, like: dict[str, Any]) -> dict[str, Any] | None:
        """Return the payload of the stage's artifact that is nearest to `like`, the newer one of two as near."""
        best: tuple[int, float] | None = None
        payload = None
        for path in (self.root / stage).glob(f"*/*/{MANIFEST}"):
            try:
                candidate = self._read_manifest(path.parent).payload
            except (OSError, ValueError):
                continue
            rank = (len(identity.explain(candidate, like)), -path.stat().st_mtime)
            if best is None or rank < best:
                best, payload = rank, candidate
        return payload

    def newest(self, stage: str) -> Manifest | None:
        """Return the manifest of the stage's newest artifact."""
        paths = (self.root / stage).glob(f"*/*/{MANIFEST}")
        path = max(paths, key=lambda path: path.stat().st_mtime, default=None)
        try:
            return self._read_manifest(path.parent) if path else None
        except (OSError, ValueError):
            return None

    def previous_state(self, stage: str, fingerprint: str) -> Literal["damaged", "removed"] | None:
        """Say what is left of an artifact that was there and is not found; None if there was none."""
        home = self.root / stage / fingerprint
        if not (home / "current.json").exists():
            return None
        return "damaged" if any(home.glob("*/")) else "removed"

    # documents

    def read_document(self, name: str) -> bytes | None:
        """Return a document, None if there is none."""
        try:
            return (self.root / name).read_bytes()
        except FileNotFoundError:
            return None

    def create_document(self, name: str, data: bytes) -> bool:
        """Write a document that is not there yet: a hard link, which fails if the name is taken."""
        with self._writing():
            path = self.root / name
            path.parent.mkdir(parents=True, exist_ok=True)
            draft = path.with_name(f".draft-{uuid.uuid4().hex[:8]}")
            write_atomic(draft, data)
            try:
                os.link(draft, path)
            except FileExistsError:
                return False
            finally:
                draft.unlink()
            fsync_path(path.parent)
            return True

    def write_document(self, name: str, data: bytes) -> None:
        """Write or replace a document."""
        with self._writing():
            (self.root / name).parent.mkdir(parents=True, exist_ok=True)
            write_atomic(self.root / name, data)

    def documents(self, prefix: str) -> list[str]:
        """Return the names of all documents below a prefix, sorted."""
        found = (self.root / prefix).rglob("*")
        return sorted(
            path.relative_to(self.root).as_posix() for path in found if path.is_file() and path.name[0] != "."
        )

    def read_documents(self, prefix: str, suffix: str = "") -> dict[str, bytes]:
        """Return all documents below a prefix whose names end so, sorted by name."""
        found = ((name, self.read_document(name)) for name in self.documents(prefix) if name.endswith(suffix))
        return {name: data for name, data in found if data is not None}

    # writing

    def staging(self, stage: str, fingerprint: str) -> Path:
        """Return a new empty folder for a job to write into."""
        with self._writing():
            folder = self.root / "staging" / f"{stage}-{identity.short(fingerprint)}-{uuid.uuid4().hex[:8]}"
            folder.mkdir(parents=True)
            return folder

    def work_folder(self, stage: str, fingerprint: str, instead_of: Ref | None = None) -> Path:
        """Return the folder in which an unfinished job keeps what a retry goes on from."""
        with self._writing():
            folder = self.root / "work" / stage / fingerprint
            folder.mkdir(parents=True, exist_ok=True)
            if instead_of is not None and forced_over(folder) != instead_of.digest:
                begin_anew(folder, instead_of.digest)
            return folder

    def mirror_checkpoints(self, stage: str, fingerprint: str) -> AbstractContextManager[None]:
        """Do nothing: whoever sees the store sees the work folder."""
        return nullcontext()

    def remove_work_folder(self, stage: str, fingerprint: str) -> None:
        """Remove what was kept."""
        shutil.rmtree(self.root / "work" / stage / fingerprint, ignore_errors=True)

    @contextmanager
    def lock(self, stage: str, fingerprint: str) -> Iterator[None]:
        """Hold a job's lock; wait for whoever has it."""
        with self._writing():
            (self.root / "locks").mkdir(parents=True, exist_ok=True)
        with flock(self.root / "locks" / f"{stage}-{identity.short(fingerprint)}.lock"):
            yield

    @contextmanager
    def reader_lock(self) -> Iterator[None]:
        """Hold off `gc` while artifacts are in use. In a read-only store nothing can be collected, so no lock."""
        try:
            (self.root / "locks").mkdir(parents=True, exist_ok=True)
            holder = flock(self.root / "locks" / "readers", shared=True)
            holder.__enter__()
        except OSError as error:
            if from_os_error(error, self.uri) is None:
                raise
            yield
            return
        try:
            yield
        finally:
            holder.__exit__(None, None, None)

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
        """Hash, flush, write the manifest, rename into place, replace the pointer: in this order.

        The first committed digest of a fingerprint stands as long as it is whole, so that two workers that computed
        the same job with other last bits agree afterwards; `replace` is for a computation that was forced.
        """
        with self._writing():
            manifest = describe(staged, payload, inputs, summary, provenance)
            fsync_tree(staged)
            write_json(staged / MANIFEST, manifest.model_dump())
            home = self.root / manifest.stage / manifest.fingerprint
            home.mkdir(parents=True, exist_ok=True)
            fsync_path(home.parent)
            standing = self.find(manifest.stage, manifest.fingerprint)
            if standing is not None and (not replace or standing.digest == manifest.digest):
                shutil.rmtree(staged)
                return standing
            target = home / manifest.digest
            if target.exists():  # it was not found above, so it is broken, or its pointer is gone
                self._move_aside(target, ["found in place of a new artifact"])
            os.rename(staged, target)
            fsync_path(home)
            write_json(home / "current.json", {"digest": manifest.digest})
            return self._ref(manifest)

    def resume_commit(self, stage: str, fingerprint: str) -> Ref | None:
        """Return nothing: a commit here is a rename, of which nothing is left to finish."""
        return None

    def quarantine(self, ref: Ref, problems: list[str]) -> str:
        """Move a corrupt artifact out of the way, with the reasons beside it, and return where it went."""
        with self._writing():
            return str(self._move_aside(self._folder(ref), problems))

    def _move_aside(self, folder: Path, problems: list[str]) -> Path:
        target = self.root / "set-aside" / f"{folder.parts[-3]}-{folder.name[:12]}-{uuid.uuid4().hex[:6]}"
        target.parent.mkdir(parents=True, exist_ok=True)
        try:
            os.rename(folder, target)
        except FileNotFoundError:
            return target  # somebody else was faster, or it was deleted by hand
        write_json(target.with_suffix(".json"), {"was": str(folder), "problems": problems, "time": time.time()})
        return target

    # keeping it small

    @contextmanager
    def cleanup_lock(self) -> Iterator[None]:
        """Keep readers out while something is removed.

        Raises:
            Held: there are some.
        """
        with flock(self.root / "locks" / "readers", wait=False):
            yield

    def committed_at(self, ref: Ref) -> float:
        """Return when an artifact was committed, in seconds since 1970."""
        return self._folder(ref).stat().st_mtime

    def remove(self, ref: Ref) -> None:
        """Delete an artifact: renamed first, so that nobody finds half of it."""
        self._remove(self._folder(ref))

    def leftovers(self, before: float, *, remove: bool) -> Iterator[tuple[PurePosixPath, int]]:
        """Yield, and remove, (name, bytes) of folders of unfinished work that nobody wrote to since a time."""
        for pattern in ("work/*/*", "staging/*", "set-aside/*"):
            for path in self.root.glob(pattern):
                if path.is_dir() and path.stat().st_mtime < before:
                    size = sum(file.stat().st_size for file in path.rglob("*") if file.is_file())
                    if remove:
                        self._remove(path)
                    yield PurePosixPath(path.relative_to(self.root).as_posix()), size

    def _remove(self, folder: Path) -> None:
        gone = self.root / "staging" / f"gone-{folder.name[:12]}-{time.time_ns()}"
        gone.parent.mkdir(exist_ok=True)
        folder.rename(gone)
        shutil.rmtree(gone)

    # inside

    def _folder(self, ref: Ref) -> Path:
        return self.root / ref.stage / ref.fingerprint / ref.digest

    def _ref(self, manifest: Manifest) -> Ref:
        return Ref(
            stage=manifest.stage,
            fingerprint=manifest.fingerprint,
            digest=manifest.digest,
            uri=self.uri,
            facets=manifest.facets,
        )

    @staticmethod
    def _read_manifest(folder: Path) -> Manifest:
        return Manifest.model_validate_json((folder / MANIFEST).read_bytes())

    @contextmanager
    def _writing(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            failure = from_os_error(error, self.uri)
            if failure is None:
                raise
            raise failure from error


def _misfits(folder: Path, manifest: Manifest) -> list[str]:
    """Compare names and sizes with the manifest, without reading contents."""
    try:
        found = {name: path.stat().st_size for name, path in files_below(folder) if name != MANIFEST}
    except (OSError, ValueError) as error:
        return [str(error)]
    return misfits(found, manifest)
