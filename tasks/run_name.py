"""The name and parameters of a run on Prefect's server. Equal runs have equal names: recipe, dataset and fingerprint."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from pathlib import Path

import httpx
from prefect.client.orchestration import get_client
from prefect.exceptions import PrefectHTTPStatusError
from prefect.runtime import flow_run
from pydantic import JsonValue

from loraflow import identity
from loraflow.credentials import mask_json
from loraflow.execution.workspace import Workspace
from loraflow.stages import STAGES

log = logging.getLogger("loraflow")
SHOWN = 8  # characters of the dataset's md5 and of the fingerprint


def run_name() -> str:
    """Return the name of a run before its recipe is read: the recipe's file name."""
    return Path(flow_run.parameters["recipe"]).stem


def mask_parameters(given: Mapping[str, JsonValue]) -> None:
    """Mask credentials in the run's parameters on the server, such as a URL with a password that was typed into the form.

    This process still has them. A retry, or the same run after an approval, is a new process and has not.
    """
    if not flow_run.id or all(mask_json(value) == value for value in given.values()):
        return
    try:
        with get_client(sync_client=True) as client:
            run = client.read_flow_run(flow_run.id)  # type: ignore[arg-type]
            masked = {name: mask_json(value) for name, value in run.parameters.items()}
            client.update_flow_run(run.id, parameters=masked).raise_for_status()
        log.warning(
            "credentials in the run's parameters are masked on Prefect's server; a retry of this run will not have them. "
            "Set up a git credential helper on the worker instead."
        )
    except (httpx.HTTPError, PrefectHTTPStatusError) as error:
        log.warning("credentials in the run's parameters could not be masked on Prefect's server: %s", error)


def full_name(workspace: Workspace) -> str:
    """Return recipe, md5 of the dataset, and a fingerprint over what every stage takes from the recipe."""
    configs = {name: stage.config.from_recipe(workspace.recipe, workspace) for name, stage in STAGES.items()}
    slices = {name: config.identity() for name, config in configs.items() if config.identity()}
    md5 = workspace.dataset.md5
    whole = identity.fingerprint({"dataset": md5, "stages": slices})
    return f"{workspace.recipe.name} {md5[:SHOWN]} {whole[:SHOWN]}"


def show_name(workspace: Workspace) -> None:
    """Give the run its full name. If the server refuses it, the run keeps its name and continues."""
    name = full_name(workspace)
    if not flow_run.id:
        return
    try:
        with get_client(sync_client=True) as client:
            client.update_flow_run(flow_run.id, name=name)  # type: ignore[arg-type]
    except (httpx.HTTPError, PrefectHTTPStatusError) as error:
        log.warning("the run could not be renamed: %s", error)
