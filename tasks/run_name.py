"""What a run is called in Prefect's UI: recipe, dataset and fingerprint, so that equal runs have equal names."""

from __future__ import annotations

import logging
from pathlib import Path

import httpx
from prefect.client.orchestration import get_client
from prefect.exceptions import PrefectHTTPStatusError
from prefect.runtime import flow_run

from loraflow import identity
from loraflow.execution.plan import Jobs
from loraflow.stages import STAGES

log = logging.getLogger("loraflow")
SHOWN = 8  # characters of the dataset's md5 and of the fingerprint


def run_name() -> str:
    """Return what a run is called before its recipe is read: the recipe's file name."""
    return Path(flow_run.parameters["recipe"]).stem


def full_name(jobs: Jobs) -> str:
    """Return recipe, md5 of the dataset, and a fingerprint over what every stage takes from the recipe."""
    known = {**jobs.dataset, **jobs.base, "metric_modules": jobs.metric_modules}
    slices = {name: stage.slice(jobs.recipe, known) for name, stage in STAGES.items()}
    whole = identity.fingerprint({"dataset": jobs.dataset["md5"], "stages": slices})
    return f"{jobs.recipe.name} {jobs.dataset['md5'][:SHOWN]} {whole[:SHOWN]}"


def show_name(jobs: Jobs) -> None:
    """Give the run its full name. A server that does not take it stops nothing."""
    name = full_name(jobs)
    if not flow_run.id:
        return
    try:
        with get_client(sync_client=True) as client:
            client.update_flow_run(flow_run.id, name=name)  # type: ignore[arg-type]
    except (httpx.HTTPError, PrefectHTTPStatusError) as error:
        log.warning("the run keeps its name: %s", error)
