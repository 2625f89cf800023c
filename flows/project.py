"""The pull step of deployments that loraflow created when this package was still called `flows`.

Such a deployment names `flows.project.enter`. `loraflow deploy` replaces the name; until then this module forwards to
the step's new module. It is found as `flows.project` only if the repository's folder is on the worker's import path.
"""

from __future__ import annotations

import warnings

from loraflow.flows.server import project


def enter() -> dict[str, str]:
    """Warn, then make the project's folder the working directory."""
    # Prefect copies this category of warning, and no other, from a pull step to the run's log.
    warnings.warn(
        "This deployment was created by an earlier version of loraflow and still names `flows.project.enter`. "
        "Run `loraflow deploy` to update it.",
        DeprecationWarning,
        stacklevel=2,
    )
    return project.enter()
