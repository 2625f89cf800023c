"""What the mirror needs of a tracking server. `mlflow_tracker` implements it."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from importlib.util import find_spec
from typing import NamedTuple, Protocol

from pydantic import JsonValue

from loraflow.credentials import hide_in_url
from loraflow.failures import MissingExtra


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


VARIABLE = "MLFLOW_TRACKING_URI"
EXPERIMENT = "loraflow"


@dataclass(frozen=True)
class Tracking:
    """An MLflow server or database. `uri` has no credentials; `loraflow.credentials.reveal` gives the one to connect to."""

    uri: str
    experiment: str
    model: str  # name in MLflow's registry
    is_asked_for: bool = True  # by the recipe or a command, and not only by the environment


def find_tracking(section: JsonValue, model: str, environment: Mapping[str, str] = os.environ) -> Tracking | None:
    """Return where to mirror to; None if nothing asks for it. This imports no part of MLflow.

    Args:
        section: `runtime.mlflow`, as in a recipe or a run's record.
        model: the name in loraflow's registry.
        environment: variables of the process.
    """
    given = section if isinstance(section, dict) else {}
    uri = given.get("uri") or environment.get(VARIABLE)
    if not isinstance(uri, str) or not uri:
        return None
    return Tracking(
        hide_in_url(uri),
        str(given.get("experiment") or environment.get("MLFLOW_EXPERIMENT_NAME") or EXPERIMENT),
        str(given.get("model") or model),
        is_asked_for=isinstance(section, dict),
    )


def is_installed() -> bool:
    """Tell whether the extra `mlflow` is installed."""
    return find_spec("mlflow") is not None


def missing_extra(got: str = "") -> MissingExtra:
    """Return the failure that the extra `mlflow` is not installed, or that `got` prevents its import."""
    what = "A part of the extra mlflow cannot be imported." if got else "The extra mlflow is not installed."
    return MissingExtra(what, got=got, next_step="pip install 'loraflow[mlflow]'")
