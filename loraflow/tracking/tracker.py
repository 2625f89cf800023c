"""What the mirror needs of a tracking server. `mlflow_tracker` implements it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple, Protocol


class Point(NamedTuple):
    """A value of a metric at a step."""

    name: str
    value: float
    step: int = 0


@dataclass(frozen=True)
class TrackedRun:
    """A run on the server."""

    id: str  # the server's
    is_complete: bool


@dataclass(frozen=True)
class RunContent:
    """What MLflow gets about a loraflow run."""

    run: str  # loraflow's id
    recipe: str
    started: float  # seconds since 1970
    ended: float
    state: str  # done or failed
    tags: Mapping[str, str]
    params: Mapping[str, str]
    points: Sequence[Point]
    files: Mapping[str, bytes]  # {path among the run's artifacts: content}
    tables: Mapping[str, Mapping[str, Sequence[object]]] = field(default_factory=dict)  # {path: {column: values}}


class Tracker(Protocol):
    """A tracking server with a model registry. Each method raises `Network` if the server does not do it.

    Each method can be repeated after a failure: what was done already stays the same.
    """

    def find_runs(self) -> dict[str, TrackedRun]:
        """Return the runs of the experiment, by loraflow's id."""

    def start_run(self, content: RunContent) -> TrackedRun:
        """Create a run."""

    def write_run(self, run: TrackedRun, content: RunContent) -> None:
        """Write parameters, metrics, tags, files and tables."""

    def finish_run(self, run: TrackedRun, content: RunContent) -> None:
        """Set the run's state and end, and mark it as complete."""

    def find_versions(self) -> dict[str, str]:
        """Return the versions of the model, {digest of the merged model: version}."""

    def create_version(self, digest: str, run: TrackedRun, tags: Mapping[str, str], description: str) -> str:
        """Register a model of a run, and return its version."""

    def champion(self) -> str | None:
        """Return the version that the alias champion names; None if there is no such alias."""

    def set_champion(self, version: str) -> None:
        """Move the alias champion, in one request."""
