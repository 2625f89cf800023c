"""`loraflow mlflow sync`: send MLflow what it does not have, after it was away or when it is new."""

from __future__ import annotations

import dataclasses

import click

from loraflow.cli import model_option, quiet_logging, store_option
from loraflow.credentials import hide_in_url
from loraflow.failures import BadConfig
from loraflow.serving.models import only_model
from loraflow.store import open_store
from loraflow.tracking.mirror import open_tracker, summary_line, sync, tracking_of_model


@click.group()
def mlflow() -> None:
    """Show runs and the champion in MLflow. The store stays the truth; MLflow is a view of it."""


@mlflow.command("sync")
@store_option
@model_option
@click.option("--uri", help="MLflow's address; the default is that of the model's newest run, or MLFLOW_TRACKING_URI.")
@click.option("--experiment", help="Name of MLflow's experiment.")
def sync_command(store: str, model: str | None, uri: str | None, experiment: str | None) -> None:
    """Send the runs that are missing, register promoted models, and move the alias champion to the champion."""
    quiet_logging()
    opened = open_store(store)
    name = model or only_model(opened)
    tracking = tracking_of_model(opened, name, uri)
    if tracking is None:
        raise BadConfig(
            "Nothing says where MLflow is.",
            where="runtime.mlflow.uri, MLFLOW_TRACKING_URI or --uri",
            expected="an address such as http://localhost:5000 or sqlite:///mlflow.db",
            next_step="loraflow mlflow sync --uri ADDRESS",
        )
    if experiment:
        tracking = dataclasses.replace(tracking, experiment=experiment)
    with opened.reader_lock():
        done = sync(opened, name, open_tracker(tracking))
    click.echo(summary_line(done, name, hide_in_url(tracking.uri)))
