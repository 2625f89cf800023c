"""The store's values and its interface: what an object store has to offer as well."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any, Protocol

from pydantic import BaseModel, ConfigDict

from loraflow.identity import short

MANIFEST = "manifest.json"
TELEMETRY = "telemetry/"  # files below it are kept and hashed, but stay out of the digest


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


class Store(Protocol):
    """What stages, flows and the command line need of a store."""

    uri: str

    def find(self, stage: str, fingerprint: str) -> Ref | None:
        """Return the current artifact if its manifest, names and sizes are right, else None."""

    def manifest(self, ref: Ref) -> Manifest:
        """Read an artifact's manifest."""

    def path(self, ref: Ref) -> Path:
        """Return a local folder with the artifact's files."""

    def check(self, ref: Ref) -> list[str]:
        """Compare an artifact's names and sizes with its manifest and return what is wrong, a line each."""

    def verify(self, ref: Ref) -> list[str]:
        """Hash an artifact's contents and return what is wrong with it, a line each."""

    def set_aside(self, ref: Ref, problems: list[str]) -> Path:
        """Move a corrupt artifact out of the way, with the reasons beside it."""

    def staging(self, stage: str, fingerprint: str) -> Path:
        """Return a new empty folder for a job to write into."""

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

    def lock(self, stage: str, fingerprint: str) -> AbstractContextManager[None]:
        """Hold a job's lock; wait for whoever has it. A dead holder's lock frees itself."""

    def work(self, stage: str, fingerprint: str) -> Path:
        """Return the folder in which an unfinished job keeps what a retry goes on from."""

    def artifacts(self) -> Iterator[Ref]:
        """Go through all artifacts, current or not."""

    def newest_payload(self, stage: str, like: dict[str, Any]) -> dict[str, Any] | None:
        """Return the payload of the stage's artifact that is nearest to `like`, to explain a miss."""
