"""An artifact's values: the ref that names it, what its stage reports, and the manifest that describes its files."""

import hashlib
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path, PurePosixPath
from typing import Annotated, Literal, NotRequired, Self, TypeAlias

from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, JsonValue, ValidationError
from typing_extensions import TypedDict  # before Python 3.12, pydantic refuses that of typing

from loraflow import identity
from loraflow.failures import CorruptArtifact
from loraflow.frozen import StoredModel
from loraflow.identity import short
from loraflow.store.checksum import MANIFEST as MANIFEST
from loraflow.store.checksum import (
    ChangedDocument,
    add_manifest_checksum,
    check_document,
    check_manifest_checksum,
    with_checksum,
)
from loraflow.store.files import files_below, hash_file, is_inside, json_bytes

POINTER = "current.json"
TELEMETRY = "telemetry/"  # files below it are stored and hashed, but stay out of the digest
# Top-level folders of a store that are not stages.
RESERVED_FOLDERS = {"work", "staging", "locks", "set-aside", "runs", "registry", "anchors", "cache"}
REPLACED = "damaged, and replaced by a new artifact"  # the problem of an artifact that a commit quarantines
QUARANTINE = "set-aside"  # the folder of quarantined artifacts; stores on disk have this name

PreviousState = Literal["damaged", "removed"]


def _one_name(value: str) -> str:
    is_one = PurePosixPath(value).parts == (value,) and is_inside(value)
    if not is_one or value != value.strip() or not value.isprintable():
        raise ValueError("it is not the name of a folder")
    return value


FolderName = Annotated[str, AfterValidator(_one_name)]  # in documents of a store, which may come from anywhere


class Ref(BaseModel):
    """Name an artifact: the small value that stages pass to each other."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    stage: FolderName
    fingerprint: FolderName
    digest: FolderName
    uri: str
    # Digests of parts, so that a stage can depend on a part of the artifact: on the training rows, or on the tokenizer.
    facets: dict[str, str] = {}

    def identity(self, facet: str | None = None) -> str:
        """Return the digest that goes into a consumer's fingerprint."""
        return self.digest if facet is None else self.facets[facet]

    def __str__(self) -> str:
        return f"{self.stage}/{short(self.fingerprint)}/{short(self.digest)}"


class InputRef(TypedDict):
    """Name an input in a manifest: a `Ref` without the store's uri, since stores move."""

    stage: FolderName
    fingerprint: FolderName
    digest: FolderName
    facets: NotRequired[dict[str, str]]


class FileEntry(BaseModel):
    """Describe a file in a manifest: its size in bytes and the hex sha256 of its content."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    size: int
    sha256: str


_Reported: TypeAlias = "Mapping[str | int, _Reported] | Sequence[_Reported] | str | int | float | bool | None"


def _as_json(value: _Reported) -> _Reported:
    """Write tuples as lists and integer keys as strings, as `json.dumps` does, so that stages may report either."""
    if isinstance(value, Mapping):
        return {str(key) if type(key) is int else key: _as_json(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_as_json(item) for item in value]
    return value


JsonMapping = Annotated[Mapping[str, JsonValue], BeforeValidator(_as_json)]


class Summary(BaseModel):
    """Report what a stage computed: small figures for people and decisions, and the names of its parts."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    figures: JsonMapping = {}
    # {facet: prefixes of the relative paths of its files}
    facets: dict[str, list[str]] = {}
    # Small results that the flow reads without opening the files, such as the verdicts of checks.
    report: JsonMapping = {}


class Manifest(BaseModel):
    """Describe an artifact. It is written last: a folder without a manifest is not an artifact."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    schema_version: int = 1
    stage: FolderName
    version: int
    fingerprint: FolderName
    payload: dict[str, JsonValue]
    digest: FolderName
    facets: dict[str, str]
    files: dict[str, FileEntry]  # by relative posix path
    inputs: dict[str, InputRef]  # for lineage
    figures: dict[str, JsonValue]
    report: dict[str, JsonValue]
    provenance: dict[str, JsonValue]

    @classmethod
    def parse(cls, content: bytes) -> Self:
        """Parse the bytes of `manifest.json`. Manifests of earlier versions have no checksum.

        Raises:
            ValueError: it cannot be parsed, or it was changed after it was written (`ChangedManifest`).
        """
        try:
            return cls._without_checksum(check_manifest_checksum(content))
        except ChangedDocument as error:
            raise ChangedManifest(content_problem(MANIFEST)) from error

    @classmethod
    def _without_checksum(cls, content: bytes) -> Self:
        manifest = cls.model_validate_json(content)
        if "checksum" in manifest.provenance:  # the file is no longer as it was written
            raise ChangedManifest(content_problem(MANIFEST))
        return manifest

    @property
    def document(self) -> bytes:
        """The manifest as the bytes of its file, with a checksum, which earlier versions take for a part of `provenance`."""
        return add_manifest_checksum(json_bytes(self.model_dump()))

    @property
    def size(self) -> int:
        """Return the artifact's size in bytes."""
        return sum(entry.size for entry in self.files.values())

    @property
    def seconds(self) -> float | None:
        """Return how long the stage took, if that was recorded."""
        seconds = self.provenance.get("seconds")
        return float(seconds) if isinstance(seconds, int | float) else None

    def ref(self, uri: str) -> Ref:
        """Return the ref of this artifact in the store at `uri`."""
        return Ref(stage=self.stage, fingerprint=self.fingerprint, digest=self.digest, uri=uri, facets=self.facets)

    def input_refs(self, uri: str) -> dict[str, Ref]:
        """Return the refs of the inputs in the store at `uri`, by name."""
        return {name: Ref.model_validate({**stored, "uri": uri}) for name, stored in self.inputs.items()}


class Pointer(StoredModel):
    """The content of `current.json`: the current digest of a fingerprint, and the hash of each digest's manifest.

    An artifact's digest covers its result files. A manifest also has figures, a report and facets, which decide things.
    """

    digest: str
    manifests: dict[str, str] = {}  # digest → sha256 of its manifest.json

    def committed_hash(self, digest: str) -> str | None:
        """Return the hash of a digest's manifest; None if it was committed by an older release, or not made current.

        Raises:
            DamagedPointer: the hash of the current manifest is missing beside others: an edited one would be believed.
        """
        if digest == self.digest and self.manifests and digest not in self.manifests:
            raise DamagedPointer(f"{POINTER}: the hash of the current manifest is missing")
        return self.manifests.get(digest)

    def pointing_to(self, ref: Ref, manifest: bytes) -> bytes:
        """Return the bytes of the pointer after a commit, with a checksum; what it knows of other digests stays."""
        manifests = {**self.manifests, ref.digest: hashlib.sha256(manifest).hexdigest()}
        name = _pointer_name(ref.stage, ref.fingerprint)
        return with_checksum(name, {"digest": ref.digest, "manifests": manifests})


class ChangedManifest(ValueError):
    """A manifest differs from the committed one. The text is a line for each problem, joined by semicolons."""


class DamagedPointer(ChangedManifest):
    """The pointer, which has the hash of the manifest, was changed or cannot be read."""


def parse_pointer(content: bytes, stage: str, fingerprint: str) -> Pointer:
    """Parse the `current.json` of a fingerprint.

    Raises:
        DamagedPointer: it cannot be parsed, was changed, or is the pointer of another fingerprint.
    """
    try:
        return Pointer.model_validate_json(check_document(_pointer_name(stage, fingerprint), content))
    except ChangedDocument as error:
        raise DamagedPointer(f"{POINTER}: hash mismatch") from error
    except ValidationError as error:
        raise DamagedPointer(f"{POINTER}: cannot be read") from error


def _pointer_name(stage: str, fingerprint: str) -> str:
    return f"{stage}/{fingerprint}/{POINTER}"


def parse_manifest(content: bytes, ref: Ref, pointer: Pointer | None) -> Manifest:
    """Parse the manifest of an artifact and compare it with the artifact's address, and with its hash in the pointer.

    Args:
        pointer: the pointer of its fingerprint; None if there is none: then address and checksum are compared.

    Raises:
        ValueError: it cannot be parsed, or it was changed after its commit (`ChangedManifest`), or the pointer was.
    """
    manifest = Manifest.parse(content)
    problems = check_consistency(manifest, ref)
    committed = pointer.committed_hash(ref.digest) if pointer else None
    if not problems and committed not in (None, hashlib.sha256(content).hexdigest()):
        problems = [content_problem(MANIFEST)]
    if problems:
        raise ChangedManifest("; ".join(problems))
    return manifest


class _PayloadHead(BaseModel):
    """The part of a payload that a manifest repeats."""

    stage: str
    version: int


def build_manifest(
    staged: Path,
    payload: Mapping[str, JsonValue],
    inputs: Mapping[str, Ref],
    summary: Summary,
    provenance: Mapping[str, JsonValue],
) -> Manifest:
    """Hash the files of a staging folder and return their manifest."""
    files = {
        name: FileEntry(size=path.stat().st_size, sha256=hash_file(path))
        for name, path in files_below(staged)
        if name != MANIFEST
    }
    hashes = result_hashes(files)
    head = _PayloadHead.model_validate(payload)
    return Manifest(
        stage=head.stage,
        version=head.version,
        fingerprint=identity.fingerprint(payload),
        payload=dict(payload),
        digest=identity.digest(hashes),
        facets={facet: _facet_digest(hashes, prefixes) for facet, prefixes in summary.facets.items()},
        files=files,
        inputs={
            name: InputRef(stage=ref.stage, fingerprint=ref.fingerprint, digest=ref.digest, facets=ref.facets)
            for name, ref in inputs.items()
        },
        figures=dict(summary.figures),
        report=dict(summary.report),
        provenance=dict(provenance),
    )


def compare_sizes(found: Mapping[str, int], manifest: Manifest) -> list[str]:
    """Compare names and sizes of files, but for telemetry, with the manifest; return the problems, a line each."""
    problems = []
    for name, entry in manifest.files.items():
        if name.startswith(TELEMETRY):
            continue
        if name not in found:
            problems.append(f"{name}: missing")
        elif found[name] != entry.size:
            problems.append(f"{name}: {found[name]} bytes, expected {entry.size}")
    return problems + [f"{name}: not in the manifest" for name in sorted(found.keys() - manifest.files.keys())]


HasHash = Callable[[Path, str], bool]  # whether a file's content has a sha256


def has_hash(path: Path, sha256: str) -> bool:
    """Hash a file and compare."""
    return hash_file(path) == sha256


def check_folder(folder: Path, manifest: Manifest, has_hash: HasHash | None = has_hash) -> list[str]:
    """Compare a folder's names, sizes and hashes with a manifest; return the problems. With None, no content is read.

    Raises:
        ValueError: the folder holds something other than folders and regular files.
    """
    found = {name: path.stat().st_size for name, path in files_below(folder) if name != MANIFEST}
    problems = compare_sizes(found, manifest)
    if problems or has_hash is None:
        return problems
    return [
        content_problem(name)
        for name, entry in manifest.files.items()
        if name not in found or not has_hash(folder / name, entry.sha256)
    ]


def result_problems(problems: list[str]) -> list[str]:
    """Return the problems without those of telemetry, on which no result depends. Whoever reads telemetry hashes it."""
    return [problem for problem in problems if not problem.startswith(TELEMETRY)]


def content_problem(name: str) -> str:
    """Return the line that reports a file whose hash differs from the manifest's."""
    return f"{name}: hash mismatch"


def check_content(manifest: Manifest, name: str, content: bytes | None) -> list[str]:
    """Compare the content of one file, None if there is no such file, with the manifest; return the problems."""
    entry = manifest.files.get(name)
    if entry is None:
        return [f"{name}: not in the manifest"]
    if content is None:
        return [f"{name}: missing"]
    return [] if hashlib.sha256(content).hexdigest() == entry.sha256 else [content_problem(name)]


def manifest_problem(error: Exception) -> str:
    """Return the line that reports a manifest that is missing, unreadable or changed."""
    return str(error) if isinstance(error, ChangedManifest) else f"{MANIFEST}: {type(error).__name__}"


def quarantine_record(folder: str, was: str, problems: list[str]) -> tuple[str, bytes]:
    """Return name and bytes of the document that says where a quarantined artifact was, and why it is there."""
    name = f"{QUARANTINE}/{folder}.json"
    return name, with_checksum(name, {"was": was, "problems": [*problems], "time": time.time()})


def check_consistency(manifest: Manifest, ref: Ref) -> list[str]:
    """Check that a manifest names its ref, and gives its digest and fingerprint; return the problems, a line each."""
    problems = []
    if (manifest.stage, manifest.fingerprint, manifest.digest) != (ref.stage, ref.fingerprint, ref.digest):
        problems.append(f"{MANIFEST}: it is the manifest of {manifest.ref('')}")
    if identity.digest(result_hashes(manifest.files)) != ref.digest:
        problems.append(f"{MANIFEST}: digest mismatch: the hashes of its files give another digest")
    if identity.fingerprint(manifest.payload) != ref.fingerprint:
        problems.append(f"{MANIFEST}: fingerprint mismatch: its payload gives another fingerprint")
    return problems


def unreadable_manifest(ref: Ref, where: str, error: Exception) -> CorruptArtifact:
    """Return the failure for a manifest that is missing, cannot be parsed, or was changed."""
    changed = isinstance(error, ChangedManifest)
    what = "was changed after it was written" if changed else "cannot be read"
    return CorruptArtifact(
        f"The manifest of {ref} {'cannot be checked' if isinstance(error, DamagedPointer) else what}.",
        where=where,
        got=str(error) if changed else f"{type(error).__name__}: {error}".splitlines()[0],
        next_step="run again: the stage recomputes it",
        ref=ref.model_dump(),
    )


def damaged_artifact(ref: Ref, where: str, problems: list[str]) -> CorruptArtifact:
    """Return the failure for an artifact whose files are not what its manifest says."""
    return CorruptArtifact(
        f"{ref} is damaged.", where=where, got="; ".join(problems[:3]), next_step="run again: the stage recomputes it"
    )


def result_hashes(files: Mapping[str, FileEntry]) -> dict[str, str]:
    """Return the hashes of a manifest's files, by name, without telemetry."""
    return {name: entry.sha256 for name, entry in files.items() if not name.startswith(TELEMETRY)}


def _facet_digest(hashes: Mapping[str, str], prefixes: list[str]) -> str:
    part = {name: sha256 for name, sha256 in hashes.items() if name.startswith(tuple(prefixes))}
    if not part:
        raise ValueError(f"no result file starts with {prefixes}: a facet must not be empty")
    return identity.digest(part)
