"""The store's values and its interface: what an object store has to offer as well."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager
from pathlib import Path, PurePosixPath
from typing import Any, Literal, Protocol

from pydantic import BaseModel, ConfigDict

from loraflow import identity
from loraflow.failures import CorruptArtifact
from loraflow.identity import short
from loraflow.store.files import files_below, hash_file

MANIFEST = "manifest.json"
TELEMETRY = "telemetry/"  # files below it are kept and hashed, but stay out of the digest
OWN = {"work", "staging", "locks", "set-aside", "runs", "registry"}  # folders of a store that are no stages


class Ref(BaseModel):
    """The small value that stages pass to each other: it names an artifact, wherever it lies."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    stage: str
    fingerprint: str
    digest: str
    uri: str
    # Digests of parts, so that a stage can depend on less than the whole: rows for training, the tokenizer alone.
    facets: dict[str, str] = {}

    def identity(self, facet: str | None = None) -> str:
        """Return the digest that goes into a consumer's fingerprint."""
        return self.digest if facet is None else self.facets[facet]

    def __str__(self) -> str:
        return f"{self.stage}/{short(self.fingerprint)}/{short(self.digest)}"


class Summary(BaseModel):
    """What a stage returns: small figures for people and decisions, and the digests of its parts."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    figures: dict[str, Any] = {}
    # {facet: relative path prefixes of the files that make it up}
    facets: dict[str, list[str]] = {}
    # Bytes that the flow process may want without opening files, such as checks' verdicts.
    report: dict[str, Any] = {}


class Manifest(BaseModel):
    """An artifact's record, written last: without it the folder is no artifact."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    schema_version: int = 1
    stage: str
    version: int
    fingerprint: str
    payload: dict[str, Any]
    digest: str
    facets: dict[str, str]
    files: dict[str, dict[str, Any]]  # {relative path: {"size": bytes, "sha256": hex}}
    inputs: dict[str, dict[str, Any]]  # refs of the inputs, for lineage
    figures: dict[str, Any]
    report: dict[str, Any]
    provenance: dict[str, Any]

    @property
    def size(self) -> int:
        """Return the artifact's size in bytes."""
        return sum(entry["size"] for entry in self.files.values())


def describe(
    staged: Path, payload: dict[str, Any], inputs: dict[str, Ref], summary: Summary, provenance: dict[str, Any]
) -> Manifest:
    """Hash the files of a staging folder and return the manifest that they get."""
    files: dict[str, dict[str, Any]] = {
        name: {"size": path.stat().st_size, "sha256": hash_file(path)}
        for name, path in files_below(staged)
        if name != MANIFEST
    }
    results = _results(files)
    return Manifest(
        stage=payload["stage"],
        version=payload["version"],
        fingerprint=identity.fingerprint(payload),
        payload=payload,
        digest=identity.digest(results),
        facets={facet: _facet(results, prefixes) for facet, prefixes in summary.facets.items()},
        files=files,
        inputs={name: ref.model_dump(exclude={"uri"}) for name, ref in inputs.items()},
        figures=summary.figures,
        report=summary.report,
        provenance=provenance,
    )


def misfits(found: dict[str, int], manifest: Manifest) -> list[str]:
    """Compare names and sizes of an artifact's files with its manifest and return what is wrong, a line each."""
    problems = []
    for name, entry in manifest.files.items():
        if name not in found:
            problems.append(f"{name}: missing")
        elif found[name] != entry["size"]:
            problems.append(f"{name}: {found[name]} bytes, expected {entry['size']}")
    return problems + [f"{name}: not in the manifest" for name in sorted(found.keys() - manifest.files.keys())]


def contradictions(manifest: Manifest, ref: Ref) -> list[str]:
    """Return where a manifest does not agree with itself, or with the ref that led to it, a line each."""
    problems = []
    if identity.digest(_results(manifest.files)) != ref.digest:
        problems.append(f"{MANIFEST}: its digest is not that of its files")
    if identity.fingerprint(manifest.payload) != ref.fingerprint:
        problems.append(f"{MANIFEST}: its payload does not give its fingerprint")
    return problems


def _results(files: dict[str, dict[str, Any]]) -> dict[str, str]:
    return {name: entry["sha256"] for name, entry in files.items() if not name.startswith(TELEMETRY)}


def _facet(results: dict[str, str], prefixes: list[str]) -> str:
    part = {name: sha for name, sha in results.items() if name.startswith(tuple(prefixes))}
    if not part:
        raise ValueError(f"no result file starts with {prefixes}: a facet must not be empty")
    return identity.digest(part)


class Store(Protocol):
    """What stages, flows and the command line need of a store."""

    uri: str
    scratch: Path  # a local folder for what is of this machine alone; staging folders lie on its disk

    # artifacts

    def find(self, stage: str, fingerprint: str) -> Ref | None:
        """Return the current artifact if its manifest, names and sizes are right, else None."""

    def manifest(self, ref: Ref) -> Manifest:
        """Read an artifact's manifest."""

    def location(self, ref: Ref) -> str:
        """Say where an artifact lies, for people; nothing is fetched."""

    def path(self, ref: Ref) -> Path:
        """Return a local folder with the artifact's files. What had to be fetched was hashed on arrival."""

    def read(self, ref: Ref, name: str) -> bytes:
        """Return the content of one file of an artifact."""

    def check(self, ref: Ref) -> list[str]:
        """Compare an artifact's names and sizes with its manifest and return what is wrong, a line each."""

    def verify(self, ref: Ref) -> list[str]:
        """Hash an artifact's contents where they are kept and return what is wrong with them, a line each."""

    def fetch(self, ref: Ref) -> list[str]:
        """Hash the contents that `path` gives, after getting them here if need be; return what is wrong, a line each."""

    def quarantine(self, ref: Ref, problems: list[str]) -> str:
        """Move a corrupt artifact out of the way, with the reasons beside it, and say where it went."""

    def staging(self, stage: str, fingerprint: str) -> Path:
        """Return a new empty local folder for a job to write into."""

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
        """Turn a staging folder into an artifact: after a crash at any instant the old state or the new is there."""

    def resume_commit(self, stage: str, fingerprint: str) -> Ref | None:
        """Finish a commit that was cut off, if all of what it had to write still lies here."""

    def lock(self, stage: str, fingerprint: str) -> AbstractContextManager[None]:
        """Hold a job's lock; wait for whoever has it. A dead holder's lock frees itself."""

    def work_folder(self, stage: str, fingerprint: str, instead_of: Ref | None = None) -> Path:
        """Return the local folder in which an unfinished job keeps what a retry goes on from.

        With `instead_of`, an artifact that is to be computed anew, it holds what an attempt at that left, and nothing older.
        """

    def mirror_checkpoints(self, stage: str, fingerprint: str) -> AbstractContextManager[None]:
        """Keep a job's newest checkpoint where an attempt on another machine finds it, while the job is computed."""

    def remove_work_folder(self, stage: str, fingerprint: str) -> None:
        """Remove what was kept: the job is done."""

    def artifacts(self) -> Iterator[Ref]:
        """Go through all artifacts, current or not. Their facets are not read."""

    def newest(self, stage: str) -> Manifest | None:
        """Return the manifest of the stage's newest artifact."""

    def newest_payload(self, stage: str, like: dict[str, Any]) -> dict[str, Any] | None:
        """Return the payload of the stage's artifact that is nearest to `like`, to explain a miss."""

    def previous_state(self, stage: str, fingerprint: str) -> Literal["damaged", "removed"] | None:
        """Say what is left of an artifact that was there and is not found; None if there was none."""

    # small documents: records of runs, the promotion log. Names are relative, such as `runs/x.json`

    def read_document(self, name: str) -> bytes | None:
        """Return a document, None if there is none."""

    def create_document(self, name: str, data: bytes) -> bool:
        """Write a document that is not there yet; of several writers one succeeds. Return False if it is there."""

    def write_document(self, name: str, data: bytes) -> None:
        """Write or replace a document: a reader, or a crash, sees the old content or the new."""

    def documents(self, prefix: str) -> list[str]:
        """Return the names of all documents below a prefix that ends with a slash, sorted."""

    def read_documents(self, prefix: str, suffix: str = "") -> dict[str, bytes]:
        """Return all documents below such a prefix whose names end so, sorted by name."""

    # keeping the store small

    def reader_lock(self) -> AbstractContextManager[None]:
        """Hold off `gc` while artifacts are in use."""

    def cleanup_lock(self) -> AbstractContextManager[None]:
        """Keep readers out while something is removed. Raises `Held` if there are any."""

    def committed_at(self, ref: Ref) -> float:
        """Return when an artifact was committed, in seconds since 1970."""

    def remove(self, ref: Ref) -> None:
        """Delete an artifact: nobody finds half of it."""

    def leftovers(self, before: float, *, remove: bool) -> Iterator[tuple[PurePosixPath, int]]:
        """Yield, and remove, (name, bytes) of unfinished work and cut-off writes from before a time."""


def require_intact(store: Store, ref: Ref) -> None:
    """Get an artifact here and hash its contents; one that is damaged is set aside.

    Raises:
        CorruptArtifact: it was, so that whoever made it has to make it again.
    """
    problems = store.fetch(ref)
    if problems:
        aside = store.quarantine(ref, problems)
        raise CorruptArtifact(
            f"{ref} is damaged.", where=aside, got="; ".join(problems[:3]), next_step="run again: it is made anew"
        )
