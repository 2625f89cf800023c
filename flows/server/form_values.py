"""The recipe's own values in a deployment's form, so that a person sees what an empty field keeps."""

from __future__ import annotations

import logging
from pathlib import Path

from pydantic import JsonValue

from loraflow.config.load import load_recipe
from loraflow.config.recipe import Recipe
from loraflow.failures import BadConfig
from loraflow.flows.parameters import KEYS, Overrides
from loraflow.flows.server.deployed_parameters import recipe_file
from loraflow.flows.server.deployment_spec import DeploymentSpec

log = logging.getLogger("loraflow")


def with_recipe_values(spec: DeploymentSpec, folder: Path, where: str) -> DeploymentSpec:
    """Return a deployment whose form says the values of the recipe that the deployment names.

    The values are those of the recipe's file when the deployment is created: `loraflow deploy` brings them up to date.

    Args:
        spec: the deployment; it is returned as it is if its flow has no such form, or it names no recipe.
        folder: the folder of `prefect.yaml`.
        where: the deployment's place, for a warning of a recipe that cannot be read.
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
