"""The first step of every deployed run: go into the project's folder on whatever machine the worker runs."""

from __future__ import annotations

import os
from pathlib import Path

from loraflow.failures import BadConfig


def folder() -> Path:
    """Return the project's folder: LORAFLOW_HOME, else the checkout that loraflow is imported from.

    Raises:
        BadConfig: there are no recipes.
    """
    named = os.environ.get("LORAFLOW_HOME")
    place = Path(named) if named else Path(__file__).parent.parent
    if not (place / "configs").is_dir():
        raise BadConfig(
            "The worker does not know the project's folder.",
            where=str(place),
            expected="a folder with configs/",
            next_step="start the worker with LORAFLOW_HOME=/path/of/the/project",
        )
    return place


def enter() -> dict[str, str]:
    """Make the project's folder the working directory. A pull step of `prefect.yaml`."""
    place = folder()
    os.chdir(place)
    return {"directory": str(place)}
