"""The first step of every deployed run: go into the project's folder on whatever machine the worker runs.

There a deployment that was made from other code than the worker's is told apart from a wrong value.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any
from uuid import UUID

import loraflow
from loraflow.failures import BadConfig


def folder() -> Path:
    """Return the project's folder: LORAFLOW_HOME, else the checkout that loraflow is imported from.

    Raises:
        BadConfig: there are no recipes.
    """
    named = os.environ.get("LORAFLOW_HOME")
    place = Path(named) if named else Path(loraflow.__file__).parent.parent
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
    run = os.environ.get("PREFECT__FLOW_RUN_ID")
    try:
        place = folder()
        os.chdir(place)
        if run:
            refuse_outdated(UUID(run))
    except BadConfig as failure:
        if run:
            _tell(UUID(run), failure)
        raise
    return {"directory": str(place)}


def _tell(run_id: UUID, failure: BadConfig) -> None:
    """Say it in the run's state: of what a pull step raises, the server is told an exit status alone."""
    from prefect.client.orchestration import get_client
    from prefect.states import Failed

    with get_client(sync_client=True) as client:
        client.set_flow_run_state(run_id, Failed(message=str(failure)), force=True)


def refuse_outdated(run_id: UUID) -> None:
    """Refuse a run whose parameters do not fit the flow here because its deployment was made from another version of it.

    Raises:
        BadConfig: what has changed between the two.
    """
    from prefect.client.orchestration import get_client
    from prefect.exceptions import ParameterBindError, ParameterTypeError, SignatureMismatchError
    from prefect.utilities.callables import parameter_schema
    from prefect.utilities.importtools import import_object

    with get_client(sync_client=True) as client:
        run = client.read_flow_run(run_id)
        deployment = client.read_deployment(run.deployment_id) if run.deployment_id else None
    if deployment is None or not deployment.entrypoint:
        return
    flow = import_object(deployment.entrypoint)
    try:
        flow.validate_parameters(run.parameters)
    except (ParameterBindError, ParameterTypeError, SignatureMismatchError) as error:
        deployed, here = _fields(deployment.parameter_openapi_schema), _fields(parameter_schema(flow).model_dump())
        changed = {
            "gone": deployed.keys() - here.keys(),
            "new": here.keys() - deployed.keys(),
            "changed": {name for name in deployed.keys() & here.keys() if deployed[name] != here[name]},
        }
        if not any(changed.values()):  # a wrong value, as the flow itself will say
            return
        raise BadConfig(
            "The deployment was made from another version of loraflow than this worker's.",
            where=f"{flow.name}/{deployment.name}",
            expected="; ".join(f"{what}: {', '.join(sorted(names))}" for what, names in changed.items() if names),
            got=str(error),
            next_step="loraflow deploy, from the version that the worker has; then start the run again",
        ) from error


def _fields(schema: dict[str, Any] | None) -> dict[str, Any]:
    """Return what a form can set, by name, with its bounds: `recipe`, `Overrides.rank`, …"""
    schema = schema or {}
    found = dict(schema.get("properties") or {})
    for name, part in (schema.get("definitions") or {}).items():
        found |= {f"{name}.{field}": value for field, value in (part.get("properties") or {}).items()}
    said = ("type", "anyOf", "allOf", "enum", "items", "$ref", "minimum", "maximum", "exclusiveMinimum")
    return {name: {key: value[key] for key in said if key in value} for name, value in found.items()}
