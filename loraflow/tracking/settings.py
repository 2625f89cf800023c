"""Where runs are mirrored to: `runtime.mlflow` of the recipe, else the variable MLFLOW_TRACKING_URI."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass
from importlib.util import find_spec

from pydantic import JsonValue

from loraflow.credentials import hide_in_url
from loraflow.failures import MissingExtra

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
