"""The pull step of every deployment: enter the project's folder on the worker's machine.

It also refuses a run whose deployment was created by another version of loraflow, if the two do not fit together.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Mapping
from importlib import import_module
from importlib.machinery import PathFinder
from pathlib import Path
from typing import TYPE_CHECKING
from uuid import UUID

from pydantic import JsonValue

import loraflow
from loraflow.config.project import FILE, PROJECT_ID, PROJECT_VARIABLE, project_id, project_name
from loraflow.failures import BadConfig

if TYPE_CHECKING:
    from prefect.client.schemas.responses import DeploymentResponse

DEPLOY_AGAIN = "`loraflow deploy` with the worker's version of loraflow; then start the run again"
# What decides whether a value fits a field of the form. Titles and descriptions do not.
CONSTRAINTS = ("type", "anyOf", "allOf", "enum", "items", "$ref", "minimum", "maximum", "exclusiveMinimum")


def find_project() -> Path:
    """Return the project's folder: LORAFLOW_HOME, else the checkout that loraflow is imported from.

    Raises:
        BadConfig: the folder has no recipes.
    """
    home = os.environ.get("LORAFLOW_HOME")
    folder = Path(home) if home else Path(loraflow.__file__).parent.parent
    if not (folder / "configs").is_dir():
        raise BadConfig(
            "The worker does not know the project's folder.",
            where=str(folder),
            expected="a folder with configs/",
            next_step="start the worker with LORAFLOW_HOME=/path/of/the/project",
        )
    return folder


def enter(project: str | None = None) -> dict[str, str]:
    """Make the project's folder the working directory. `prefect.yaml` names this function as its pull step.

    Args:
        project: the `name` of the deployment's `prefect.yaml`; None, as in older files, is not checked.

    Raises:
        BadConfig: there is no project, the folder's project is not the deployment's or has no name, the run's deployment
            does not fit this version, or a file shadows a module (`refuse_shadowed_modules`).
    """
    run_id = os.environ.get("PREFECT__FLOW_RUN_ID")
    try:
        folder = find_project()
        if project is not None:
            _refuse_another_project(folder, str(project))  # YAML reads a name of digits as a number
        os.chdir(folder)
        refuse_shadowed_modules(folder)  # before the next line imports the run's flow
        if run_id:
            refuse_outdated(UUID(run_id))
    except BadConfig as failure:
        if run_id:
            _fail_run(UUID(run_id), failure)
        raise
    return {"directory": str(folder)}


def import_own_flow(entrypoint: str) -> None:
    """Import the module of one of loraflow's flows. Prefect itself would put the working directory in front meanwhile.

    Raises:
        ImportError: there is no such module.
    """
    if entrypoint.startswith("loraflow.") and ":" not in entrypoint:
        import_module(entrypoint.rpartition(".")[0])


# Libraries that a run may import only later, such as pandas at the gate.
_IMPORTED_LATER = frozenset(
    ["datasets", "evaluate", "huggingface_hub", "mlflow", "numpy", "pandas", "pyarrow", "scipy"]
)


def refuse_shadowed_modules(folder: Path) -> None:
    """Refuse a project with a file that has the name of a module of Python or a library which a run imports.

    Prefect starts each run with the project's folder in PYTHONPATH, in front of Python's own modules.

    Raises:
        BadConfig: there is one: each run would crash, or use it in place of the module.
    """
    python, root = Path(os.__file__).resolve().parent, folder.resolve()
    others = [path for path in sys.path if Path(path).resolve() != root]
    for file in sorted([*folder.glob("*.py"), *folder.glob("*/__init__.py")]):
        name = file.parent.name if file.stem == "__init__" else file.stem
        loaded = getattr(sys.modules.get(name), "__spec__", None)
        # os, sys, … have no location: they are never replaced
        is_imported = name in _IMPORTED_LATER if loaded is None else loaded.has_location
        spec = PathFinder.find_spec(name, others) if is_imported and name not in ("loraflow", "__main__") else None
        if spec is None or spec.origin is None:
            continue
        origin = Path(spec.origin).resolve()
        if origin.is_relative_to(python) or {"site-packages", "dist-packages"} & {*origin.parts}:
            raise BadConfig(
                f"Runs would import this file in place of the module {name}.",
                where=str(file),
                next_step="rename it: Prefect starts runs with the project's folder in PYTHONPATH",
            )


def _refuse_another_project(folder: Path, project: str) -> None:
    """Refuse the run of a project that this worker does not serve, or may not serve: its folder would be the wrong one."""
    configured = os.environ.get(PROJECT_VARIABLE, "").strip() or None
    name = project_name(folder)
    if name is None and configured is None:
        raise BadConfig(
            "The worker's folder does not say which project it is.",
            where=f"worker in {folder}",
            expected=f"the project {project}, as `name` in {FILE}",
            got=f"{FILE} without a name" if (folder / FILE).exists() else f"no {FILE}",
            next_step=f"copy the project's {FILE} into that folder; or start the worker with {PROJECT_VARIABLE}={project}",
        )
    for found, source in ((name, FILE), (configured, PROJECT_VARIABLE)):
        if found is not None and found != project:
            raise BadConfig(
                "The worker serves another project than the run's.",
                where=f"worker in {folder}",
                expected=f"the project {project}",
                got=f"the project {found}, by its {source}",
                next_step="give each project a work pool of its own in prefect.yaml, and start its worker with "
                f"LORAFLOW_HOME=/path/of/{project}",
            )
    expected_id, folder_id = os.environ.get(PROJECT_ID), project_id(folder)
    if expected_id and folder_id and expected_id != folder_id:
        raise BadConfig(
            "The worker serves another project of the same name.",
            where=f"worker in {folder}",
            expected=f"{PROJECT_ID} {expected_id}",
            got=f"{folder_id}, by its {FILE}",
            next_step=f"replace the name {project} everywhere in one of the two {FILE}, and deploy that project again; "
            f"or, if both are the same project, write the id of one ({expected_id}) into the other",
        )


def _fail_run(run_id: UUID, failure: BadConfig) -> None:
    """Set the run's state: of a failed pull step, Prefect itself reports only the exit status."""
    from prefect.client.orchestration import get_client
    from prefect.states import Failed

    with get_client(sync_client=True) as client:
        client.set_flow_run_state(run_id, Failed(message=str(failure)), force=True)


def refuse_outdated(run_id: UUID) -> None:
    """Refuse a run with unknown parameters, or of another version's deployment that does not fit here.

    Raises:
        BadConfig: the flow does not exist any more, its parameters have changed, or the run's have unknown names.
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
    try:
        import_own_flow(deployment.entrypoint)
        flow = import_object(deployment.entrypoint)
    except (ImportError, AttributeError) as error:
        raise BadConfig(
            "The deployment's flow does not exist in this worker's version of loraflow.",
            where=f"deployment {deployment.name}",
            expected=f"a flow at {deployment.entrypoint}",
            got=f"{type(error).__name__}: {error}",
            next_step=DEPLOY_AGAIN,
        ) from error
    try:
        flow.validate_parameters(run.parameters)
    except (ParameterBindError, ParameterTypeError, SignatureMismatchError) as error:
        changes = _changed_parameters(deployment, parameter_schema(flow).model_dump())
        where = f"{flow.name}/{deployment.name}"
        if changes:
            problem = "The deployment was created by another version of loraflow than this worker's."
            raise BadConfig(problem, where=where, expected=changes, got=str(error), next_step=DEPLOY_AGAIN) from error
        if isinstance(error, SignatureMismatchError):  # the server accepts them, and Prefect reports an exit status
            raise BadConfig(
                "The run has parameters that its flow does not have.",
                where=where,
                got=str(error),
                next_step="start it with the names of the form",
            ) from error
        # another value is wrong in both versions, and the flow itself reports it


def _changed_parameters(deployment: DeploymentResponse, schema: Mapping[str, JsonValue]) -> str:
    """Return the parameters that were removed, added or changed since the deployment was created; empty if none."""
    deployed, current = _constraints(deployment.parameter_openapi_schema or {}), _constraints(schema)
    changes = {
        "removed": deployed.keys() - current.keys(),
        "added": current.keys() - deployed.keys(),
        "changed": {name for name in deployed.keys() & current.keys() if deployed[name] != current[name]},
    }
    return "; ".join(f"{change}: {', '.join(sorted(names))}" for change, names in changes.items() if names)


def _constraints(schema: Mapping[str, JsonValue]) -> dict[str, dict[str, JsonValue]]:
    """Return the constraints of every field of a form, by name: `recipe`, `Overrides.rank`, …"""
    fields = dict(_mapping(schema.get("properties")))
    for name, model in _mapping(schema.get("definitions")).items():
        properties = _mapping(_mapping(model).get("properties"))
        fields |= {f"{name}.{field}": value for field, value in properties.items()}
    return {
        name: {key: value for key, value in _mapping(field).items() if key in CONSTRAINTS}
        for name, field in fields.items()
    }


def _mapping(value: JsonValue) -> Mapping[str, JsonValue]:
    return value if isinstance(value, dict) else {}
