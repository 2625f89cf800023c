"""A store in a local folder, built on rename, fsync and flock."""

import os
import shutil
import uuid
from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext, suppress
from pathlib import Path, PurePosixPath

from pydantic import JsonValue
from typing_extensions import override

from loraflow import identity
from loraflow.failures import Failure, ReadOnlyStore
from loraflow.store import staging
from loraflow.store.artifact import (
    MANIFEST,
    POINTER,
    QUARANTINE,
    REPLACED,
    RESERVED_FOLDERS,
    DamagedPointer,
    HasHash,
    Manifest,
    Pointer,
    PreviousState,
    Ref,
    Summary,
    build_manifest,
    check_consistency,
    check_content,
    check_folder,
    damaged_artifact,
    has_hash,
    manifest_problem,
    parse_manifest,
    parse_pointer,
    quarantine_record,
    result_problems,
    unreadable_manifest,
)
from loraflow.store.base import Store
from loraflow.store.checkpoints import recompute_digest, reset_work_folder
from loraflow.store.chunk_cache import stale_entries
from loraflow.store.files import (
    HashMemo,
    LocalDocuments,
    ask_again,
    file_type,
    files_below,
    folder_size,
    folders_in,
    fsync_path,
    fsync_tree,
    is_there,
    raise_machine_fault,
    read_file,
    set_default_modes,
    stale_drafts,
    stale_folders,
    translate_os_errors,
    write_atomic,
)
from loraflow.store.lock import flock


class LocalStore(LocalDocuments, Store):
    """Artifacts in a folder. See the package's docstring for its layout."""

    def __init__(self, root: str | Path):
        self.root = Path(root).expanduser().absolute()
        self.uri = str(self.root)
        self.scratch = self.root

    @override
    def find(self, stage: str, fingerprint: str) -> Ref | None:
        try:
            pointer = self._pointer(stage, fingerprint)
            if pointer is None:
                return None
            ref = Ref(stage=stage, fingerprint=fingerprint, digest=pointer.digest, uri=self.uri)
            manifest = parse_manifest(read_file(self._manifest_file(ref)), ref, pointer)
            return None if check_folder(self._folder(ref), manifest, None) else manifest.ref(self.uri)
        except (OSError, ValueError) as error:
            raise_machine_fault(error)
            return None

    @override
    def manifest(self, ref: Ref) -> Manifest:
        try:
            return self._read_manifest(ref)
        except (OSError, ValueError) as error:
            raise_machine_fault(error)
            raise unreadable_manifest(ref, str(self._manifest_file(ref)), error) from error

    @override
    def path(self, ref: Ref) -> Path:
        return self._folder(ref)

    @override
    def location(self, ref: Ref) -> str:
        return str(self._folder(ref))

    @override
    def read(self, ref: Ref, name: str) -> bytes:
        manifest = self.manifest(ref)
        try:
            content = read_file(self._folder(ref) / name)
        except OSError as error:  # missing, or not a regular file
            raise_machine_fault(error)
            content = None
        problems = check_content(manifest, name, content)
        if problems or content is None:
            raise damaged_artifact(ref, self.location(ref), problems)
        return content

    @override
    def check(self, ref: Ref) -> list[str]:
        return self._check_contents(ref, None)

    @override
    def verify(self, ref: Ref, memo: HashMemo | None = None) -> list[str]:
        return self._check_contents(ref, (lambda path, sha256: memo.rehash(path) == sha256) if memo else has_hash)

    @override
    def fetch(self, ref: Ref, memo: HashMemo | None = None) -> list[str]:
        return self._check_contents(ref, memo.has_hash if memo else has_hash)

    @override
    def check_changed(self, ref: Ref, memo: HashMemo) -> list[str]:
        return self.fetch(ref, memo)

    @override
    def is_remembered(self, ref: Ref, memo: HashMemo) -> bool:
        return not result_problems(self._check_contents(ref, memo.remembers))

    def _check_contents(self, ref: Ref, has_hash: HasHash | None) -> list[str]:
        manifest = None
        try:
            manifest = self._read_manifest(ref)
            return check_folder(self._folder(ref), manifest, has_hash)
        except (OSError, ValueError) as error:  # the file is missing, or no file
            raise_machine_fault(error)
            return [str(error) if manifest else manifest_problem(error)]

    @override
    def artifacts(self) -> Iterator[Ref]:
        for stage in folders_in(self.root):
            if stage.name in RESERVED_FOLDERS:
                continue
            for folder in _artifact_folders(stage):
                if file_type(folder / MANIFEST):
                    fingerprint = folder.parent.name
                    yield Ref(stage=stage.name, fingerprint=fingerprint, digest=folder.name, uri=self.uri)

    @override
    def newest_payload(self, stage: str, like: Mapping[str, JsonValue]) -> dict[str, JsonValue] | None:
        payloads = [manifest.payload for manifest in self._newest_first(stage)]
        return min(payloads, key=lambda payload: len(identity.explain(payload, like)), default=None)

    @override
    def newest(self, stage: str) -> Manifest | None:
        return next(self._newest_first(stage), None)

    def _newest_first(self, stage: str) -> Iterator[Manifest]:
        """Yield the manifests of a stage that can be read. They decide nothing."""
        found = []
        with suppress(OSError, Failure):
            for folder in _artifact_folders(self.root / stage):
                with suppress(OSError):  # a cleanup removed it meanwhile
                    found.append(((folder / MANIFEST).stat().st_mtime, folder / MANIFEST))
        for _, file in sorted(found, reverse=True):
            with suppress(OSError, ValueError, Failure):
                yield Manifest.parse(read_file(file))

    @override
    def previous_state(self, stage: str, fingerprint: str) -> PreviousState | None:
        home = self.root / stage / fingerprint
        if not file_type(home / POINTER):
            return None
        return "damaged" if folders_in(home) else "removed"

    @override
    def staging(self, stage: str, fingerprint: str) -> Path:
        root, name = self.root / "staging", f"{stage}-{identity.short(fingerprint)}"
        with translate_os_errors(str(root / name)):  # an error of a write has no file name
            return staging.create(root, name)

    @override
    def work_folder(self, stage: str, fingerprint: str, recompute_of: Ref | None = None) -> Path:
        folder = self.root / "work" / stage / fingerprint
        with translate_os_errors(str(folder)):
            folder.mkdir(parents=True, exist_ok=True)
            if recompute_of is not None and recompute_digest(folder) != recompute_of.digest:
                reset_work_folder(folder, recompute_of.digest)
            return folder

    def mirror_checkpoints(self, stage: str, fingerprint: str) -> AbstractContextManager[None]:
        """Do nothing: every machine that has the store has the work folder."""
        return nullcontext()

    @override
    def remove_work_folder(self, stage: str, fingerprint: str) -> None:
        shutil.rmtree(self.root / "work" / stage / fingerprint, ignore_errors=True)

    @override
    @contextmanager
    def lock(self, stage: str, fingerprint: str) -> Iterator[None]:
        path = self.root / "locks" / f"{stage}-{identity.short(fingerprint)}.lock"
        with ExitStack() as locks:
            with translate_os_errors(str(path)):
                locks.enter_context(flock(path))
            yield

    @contextmanager
    def reader_lock(self) -> Iterator[None]:
        """Block cleanups while artifacts are in use.

        In a read-only store there is no cleanup, and so no lock.
        """
        with ExitStack() as locks:
            try:
                with translate_os_errors(self.uri):
                    locks.enter_context(flock(self.root / "locks" / "readers", shared=True))
            except ReadOnlyStore:
                pass
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
        """Hash and flush the files, write the manifest, rename the folder into place, replace the pointer."""
        with translate_os_errors(self.uri):
            set_default_modes(staged)
            manifest = build_manifest(staged, payload, inputs, summary, provenance)
            fsync_tree(staged)
            write_atomic(staged / MANIFEST, manifest.document)
            home = self.root / manifest.stage / manifest.fingerprint
            home.mkdir(parents=True, exist_ok=True)
            fsync_path(home.parent)
            current = self.find(manifest.stage, manifest.fingerprint)
            keeps_current = current is not None and (not replace or current.digest == manifest.digest)
            if current is not None and keeps_current and not self.verify(current):
                staging.discard(staged)
                return current
            ref, target = manifest.ref(self.uri), home / manifest.digest
            is_same = not self.verify(ref) and self._is_committed(ref, manifest)
            if is_same:  # it stays in place: it may be a champion's model
                staging.discard(staged)
                ref = self.manifest(ref).ref(self.uri)
            else:
                if is_there(target):  # or a link to a disk that is not mounted
                    self._quarantine(target, [REPLACED])
                os.rename(staged, target)
                staging.release(staged)
                fsync_path(home)
            self.make_current(ref)
            return ref

    def _is_committed(self, ref: Ref, manifest: Manifest) -> bool:
        """Tell whether the pointer knows the manifest of an artifact, or the manifest says the same as a new one.

        Without its pointer, figures, report and facets of a manifest could have been changed.
        """
        pointer, found = self._pointer(ref.stage, ref.fingerprint), self.manifest(ref)
        is_known = pointer is not None and ref.digest in pointer.manifests
        return is_known or (found.facets, found.figures, found.report, found.inputs) == (
            manifest.facets, manifest.figures, manifest.report, manifest.inputs
        )  # fmt: skip

    def adopt(self, folder: Path, manifest: Manifest) -> list[str]:
        """Copy an artifact of another store into this one, without making it current; return the copy's problems.

        A copy with problems is removed.
        """
        with translate_os_errors(self.uri):
            try:
                files = list(files_below(folder))
            except ValueError as error:  # a link, for example
                return [str(error)]
            staged = self.staging(manifest.stage, manifest.fingerprint)
            for name, path in files:  # copytree collects the errors of the system as text
                (staged / name).parent.mkdir(parents=True, exist_ok=True)
                shutil.copy2(path, staged / name)
            shutil.copystat(folder, staged)  # cleanup compares the times of artifacts
            set_default_modes(staged)
            if not is_there(staged / MANIFEST):  # the copy from a bucket may lack it
                write_atomic(staged / MANIFEST, manifest.document)
            ref = manifest.ref(self.uri)
            problems = result_problems(check_folder(staged, manifest)) or check_consistency(manifest, ref)
            if problems:
                staging.discard(staged)
                return problems
            fsync_tree(staged)
            target = self._folder(ref)
            target.parent.mkdir(parents=True, exist_ok=True)
            if is_there(target):
                self._quarantine(target, ["replaced by an intact copy"])
            os.rename(staged, target)
            staging.release(staged)
            fsync_path(target.parent)
            return []

    def make_current(self, ref: Ref) -> None:
        """Let the pointer of a fingerprint name an artifact, with the hash of its manifest."""
        with translate_os_errors(self.uri):
            try:
                pointer = self._pointer(ref.stage, ref.fingerprint) or Pointer(digest=ref.digest)
            except DamagedPointer:
                pointer = Pointer(digest=ref.digest)
            content = read_file(self._manifest_file(ref))
            write_atomic(self.root / ref.stage / ref.fingerprint / POINTER, pointer.pointing_to(ref, content))

    def resume_commit(self, stage: str, fingerprint: str) -> Ref | None:
        """Return None: a commit in a folder is a rename, which leaves nothing to finish."""
        return None

    @override
    def quarantine(self, ref: Ref, problems: list[str]) -> str | None:
        with translate_os_errors(self.uri):
            if not self.verify(ref):
                return None
            return str(self._quarantine(self._folder(ref), problems))

    def _quarantine(self, folder: Path, problems: list[str]) -> Path:
        target = self.root / QUARANTINE / f"{folder.parts[-3]}-{folder.name[:12]}-{uuid.uuid4().hex[:6]}"
        target.parent.mkdir(parents=True, exist_ok=True)
        try:
            os.rename(folder, target)
        except FileNotFoundError:
            return target  # another process was faster, or it was deleted by hand
        name, document = quarantine_record(target.name, str(folder), problems)
        write_atomic(self.root / name, document)
        return target

    @override
    @contextmanager
    def cleanup_lock(self) -> Iterator[None]:
        with ExitStack() as locks:
            with translate_os_errors(self.uri):
                locks.enter_context(flock(self.root / "locks" / "readers", wait=False))
            yield

    @override
    def committed_at(self, ref: Ref) -> float:
        folder = self._folder(ref)
        return ask_again(folder.stat, folder).st_mtime

    @override
    def remove(self, ref: Ref) -> None:
        staging.remove(self.root / "staging", self._folder(ref))

    def stale_items(self, before: float, *, remove: bool) -> Iterator[tuple[PurePosixPath, int]]:
        """Yield (name, bytes) of unfinished work and quarantined artifacts that were last changed before a time.

        Staging folders of processes that have ended are yielded whatever their age.
        """
        for folder in staging.abandoned(self.root / "staging"):
            if is_there(folder):
                yield PurePosixPath("staging", folder.name), folder_size(folder)
            if remove:
                staging.discard(folder)
        for name, size in stale_folders(self.root, ("work/*/*", "staging/*", f"{QUARANTINE}/*"), before):
            if remove:
                staging.remove(self.root / "staging", self.root / name)
            yield name, size
        yield from stale_entries(self.root, before, remove=remove)
        drafts = ("*/*/.*", "runs/.*", f"{QUARANTINE}/.*", "registry/*/*/.*")
        for name, size in stale_drafts(self.root, drafts, before):
            if remove:
                (self.root / name).unlink(missing_ok=True)
            yield name, size

    def _folder(self, ref: Ref) -> Path:
        return self.root / ref.stage / ref.fingerprint / ref.digest

    def _manifest_file(self, ref: Ref) -> Path:
        return self._folder(ref) / MANIFEST

    def _read_manifest(self, ref: Ref) -> Manifest:
        """Read and check a manifest."""
        return parse_manifest(read_file(self._manifest_file(ref)), ref, self._pointer(ref.stage, ref.fingerprint))

    def _pointer(self, stage: str, fingerprint: str) -> Pointer | None:
        """Return the pointer of a fingerprint; None if there is none."""
        try:
            return parse_pointer(read_file(self.root / stage / fingerprint / POINTER), stage, fingerprint)
        except FileNotFoundError:
            return None
        except OSError as error:
            raise_machine_fault(error)
            raise DamagedPointer(f"{POINTER}: {error.strerror}") from error


def _artifact_folders(stage: Path) -> Iterator[Path]:
    return (folder for home in folders_in(stage) for folder in folders_in(home))
