"""Check the parameters in `prefect.yaml` before anything is deployed: otherwise each of their runs fails, at night too."""

from __future__ import annotations

import inspect
import json
import logging
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from jsonschema import ValidationError as JSONSchemaError
from prefect import Flow
from prefect.utilities.schema_tools import validate
from pydantic import JsonValue

from loraflow.config.load import load_recipe
from loraflow.config.project import FILE
from loraflow.data.git_branch import MAIN, branches
from loraflow.failures import BadConfig
from loraflow.flows.server.deployment_spec import DeploymentSpec

log = logging.getLogger("loraflow")
RETRAIN = "loraflow.flows.retrain."
HYDRATED = "__prefect_kind"  # marks a value that the server computes when a run is created


def check_parameters(spec: DeploymentSpec, flow: Flow[..., Any], where: str) -> None:
    """Check that every set of parameters fits the flow, as the server checks a run.

    Without schema enforcement, only the names are checked.

    Raises:
        BadConfig: a parameter is unknown, or its value does not fit.
    """
    accepted = inspect.signature(flow.fn).parameters.values()
    any_name = any(parameter.kind is parameter.VAR_KEYWORD for parameter in accepted)
    names = [parameter.name for parameter in accepted]
    for part, parameters in parameter_sets(spec):
        if not any_name and (unknown := sorted(parameters.keys() - set(names))):
            raise BadConfig(
                "A deployment has a parameter that its flow does not have.",
                where=f"{where}.{part}",
                expected=", ".join(names) or "no parameters",
                got=", ".join(unknown),
                next_step=f"correct {FILE}",
            )
        if not spec.enforce_parameter_schema:
            continue
        known = {name: value for name, value in parameters.items() if not _is_computed(value)}
        for error in validate(known, spec.parameter_openapi_schema, ignore_required=True):
            raise BadConfig(
                "A parameter of a deployment does not fit its flow.",
                where=f"{where}.{part}{error.json_path.removeprefix('$')}",
                got=_message(error),
                next_step=f"correct {FILE}",
            )


def _message(error: JSONSchemaError) -> str:
    """Say what a value should be. An optional field has two schemas, and jsonschema says only that neither fits."""
    parts = error.context if error.context else [error]
    wrong_type = next((part for part in parts if part.validator == "type" and part.validator_value != "null"), None)
    if wrong_type is None:
        return str(error.message)
    value = json.dumps(error.instance, ensure_ascii=False)
    if wrong_type.validator_value == "string" and isinstance(error.instance, int | float):
        return f"{value} must be a text in quotes: {json.dumps(value)}"  # true and false too
    return str(wrong_type.message)


def check_settings(spec: DeploymentSpec, folder: Path, where: str) -> None:
    """Check the `settings` of loraflow's flows against the recipe of the same parameters.

    Raises:
        BadConfig: the recipe has no such key, or its value is wrong.
    """
    if not spec.entrypoint.startswith("loraflow.flows."):
        return
    for part, parameters in parameter_sets(spec):
        settings, recipe = parameters.get("settings"), parameters.get("recipe")
        if not isinstance(settings, dict) or not settings or not isinstance(recipe, str) or _is_computed(settings):
            continue
        if file := recipe_file(folder, recipe):
            load_recipe(file)  # a problem of the recipe itself is reported as such
            try:
                load_recipe(file, settings)
            except BadConfig as error:
                raise BadConfig(
                    "The settings of a deployment do not fit its recipe.",
                    where=f"{where}.{part}.settings",
                    got=error.got or str(error),
                    next_step=f"correct {FILE}",
                ) from None


def warn_of_missing_branches(spec: DeploymentSpec, folder: Path, where: str) -> None:
    """Warn of a retraining from a branch that the project's repository does not have: each of its runs would fail."""
    if not spec.entrypoint.startswith(RETRAIN) or not (known := branches(folder)):
        return
    for part, parameters in parameter_sets(spec):
        branch, recipe = parameters.get("branch", MAIN), parameters.get("recipe")
        if not isinstance(branch, str) or _is_computed(branch) or branch in known or parameters.get("settings"):
            continue
        file = recipe_file(folder, recipe) if isinstance(recipe, str) else None
        if file and load_recipe(file).data.repo == ".":
            log.warning(
                "%s.%s: the repository has no branch %s, so this retraining will fail; it has: %s "
                "(next: `branch: %s` there)",
                where,
                part,
                branch,
                ", ".join(known),
                known[0],
            )


def recipe_file(folder: Path, recipe: str) -> Path | None:
    """Return the file of a recipe: a path, or a name in `configs/`; None if there is none."""
    paths = (folder / name for name in (recipe, f"configs/{recipe}.yaml", f"configs/{recipe}.yml"))
    return next((path for path in paths if path.is_file()), None)


def parameter_sets(spec: DeploymentSpec) -> Iterator[tuple[str, Mapping[str, JsonValue]]]:
    """Yield the parameters of each kind of run: started by a person, by a schedule, by a trigger; with their field."""
    yield "parameters", spec.parameters
    for kind, items in (("schedules", spec.schedules), ("triggers", spec.triggers)):
        for number, item in enumerate(items):
            if item.parameters:
                yield f"{kind}[{number}].parameters", {**spec.parameters, **item.parameters}


def _is_computed(value: JsonValue) -> bool:
    """Tell whether the server fills in a value, or a part of it, when it creates the run."""
    if isinstance(value, dict):
        return HYDRATED in value or any(map(_is_computed, value.values()))
    if isinstance(value, list):
        return any(map(_is_computed, value))
    return isinstance(value, str) and "{{" in value
