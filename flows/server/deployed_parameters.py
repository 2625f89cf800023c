"""Check the parameters in `prefect.yaml` before anything is deployed: otherwise each of their runs fails, at night too."""

from __future__ import annotations

import inspect
import json
import logging
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from jsonschema import ValidationError as JSONSchemaError
from prefect import Flow
from prefect.client.schemas.objects import WorkPool
from prefect.utilities.schema_tools import validate
from prefect.utilities.templating import find_placeholders
from prefect.workers.process import ProcessWorker
from pydantic import JsonValue

from loraflow.config.load import load_recipe
from loraflow.config.project import FILE
from loraflow.config.recipe import Recipe
from loraflow.data.versions.git_branch import MAIN, branches
from loraflow.failures import BadConfig
from loraflow.flows.parameters import KEYS, Overrides
from loraflow.flows.server.deployment_spec import DeploymentSpec, or_known

log = logging.getLogger("loraflow")
RETRAIN = "loraflow.flows.retrain."
SET_KEY = re.compile(r"^--set (?:(\S+): (?=\1\b))?")  # a message that begins with its key needs it once
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
    if error.validator == "additionalProperties" and isinstance(error.schema, dict):
        known = error.schema.get("properties", {})
        unknown = sorted(error.instance.keys() - known.keys())
        return "; ".join(f"{key}: unknown field{or_known(key, known)}" for key in unknown)
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
                    got=error.got
                    or "; ".join(SET_KEY.sub("", line.strip(), 1) for line in error.what.splitlines()[1:]),
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


TEMPLATE = re.compile(r"\{\{\s*([^\s}]*)")


def is_filled_in_later(path: str, text: str) -> bool:
    """Tell whether a template is kept by `prefect deploy` too: the worker or the server fills it in for each run."""
    if path == ".description" or path.startswith(".pull"):
        return True
    # The worker reads blocks and variables, so no secret is in the file.
    if path.startswith(".work_pool.job_variables"):
        return all(name.startswith(("prefect.blocks.", "prefect.variables.")) for name in TEMPLATE.findall(text))
    if re.match(r"\.triggers\[\d+\]\.parameters\b", path):  # of the event
        return not any(name.startswith(("$", "prefect.")) for name in TEMPLATE.findall(text))
    return False


def texts(value: JsonValue, path: str = "") -> Iterator[tuple[str, str]]:
    """Yield every text in a document, with its path."""
    if isinstance(value, str):
        yield path, value
    elif isinstance(value, dict):
        for key, inner in value.items():
            yield from texts(inner, f"{path}.{key}")
    elif isinstance(value, list):
        for number, inner in enumerate(value):
            yield from texts(inner, f"{path}[{number}]")


def with_recipe_values(spec: DeploymentSpec, folder: Path, where: str) -> DeploymentSpec:
    """Return a deployment whose form says the values of the recipe that the deployment names.

    The values are those of the recipe's file when the deployment is created: `loraflow deploy` brings them up to date.

    Args:
        spec: the deployment; it is returned as it is if its flow has no such form, or it names no recipe.
    """
    recipe = spec.parameters.get("recipe")
    file = recipe_file(folder, recipe) if isinstance(recipe, str) else None
    if file is None or _form(spec.parameter_openapi_schema) is None:
        return spec
    try:
        loaded = load_recipe(file)
    except BadConfig as error:
        log.warning("%s: runs of this recipe will fail: %s", where, error)
        return spec
    copied = spec.model_copy(deep=True)
    fields = _form(copied.parameter_openapi_schema)
    for name, field in (fields or {}).items():
        if isinstance(field, dict):
            field["description"] = f"{field['description']} In {recipe}: {_value(loaded, name)}."
    return copied


def _form(schema: dict[str, JsonValue]) -> dict[str, JsonValue] | None:
    """Return the fields of `Overrides` in a flow's schema; None if it has none."""
    found: JsonValue = schema
    for key in ("definitions", Overrides.__name__, "properties"):
        found = found.get(key) if isinstance(found, dict) else None
    return found if isinstance(found, dict) else None


def _value(recipe: Recipe, field: str) -> str:
    """Return the value of a recipe that a field of the form would replace."""
    training = recipe.training_config
    if field == "epochs" and training.max_steps > 0:
        return f"{training.num_train_epochs:g}, not used because max_steps is {training.max_steps}"
    if field == "steps" and training.max_steps < 0:
        return "no limit"
    if field == "batch_size":
        return str(training.global_batch)
    value: object = recipe
    for part in KEYS[field].split("."):
        value = getattr(value, part)
    if value is None:
        return "none"
    return f"{value:g}" if isinstance(value, float) else str(value)


def refuse_ignored_job_variables(spec: DeploymentSpec, pool: WorkPool | None) -> None:
    """Check the job variables of a deployment against the job template of its work pool.

    Args:
        pool: its work pool on the server; None if `loraflow deploy` will create it, of type process.

    Raises:
        BadConfig: the template does not know a variable, such as `image` in a pool of type process.
    """
    known = _known(pool)
    if known is None or not (ignored := sorted(spec.work_pool.job_variables.keys() - known)):
        return
    name, kind = spec.work_pool.name, pool.type if pool else "process"
    create = f"prefect work-pool create {name} --type docker (or kubernetes), then `loraflow deploy`"
    raise BadConfig(
        f"The work pool {name} has no such job variables, so Prefect would ignore them.",
        where=f"prefect.yaml: {spec.full_name}.work_pool.job_variables",
        expected=f"of a pool of type {kind}: {', '.join(sorted(known))}",
        got=", ".join(ignored),
        next_step="remove them from prefect.yaml"
        + ("" if pool else f"; or create a pool of another type first: {create}"),
    )


def _known(pool: WorkPool | None) -> set[str] | None:
    """Return the names of the job variables of a pool; None if the server does not have its template yet."""
    template: Mapping[str, Any] = (pool.base_job_template if pool else None) or {}
    if not template and (pool is None or pool.type == "process"):
        template = ProcessWorker.get_default_base_job_template()
    if not template:  # its first worker sets it
        return None
    return set(template.get("variables", {}).get("properties", {})) | {
        placeholder.name for placeholder in find_placeholders(template.get("job_configuration", {}))
    }
