"""The validation losses of trained adapters in the store."""

from __future__ import annotations

import logging

from loraflow.config.stage_configs import FingerprintedTraining, TrainConfig
from loraflow.execution.workspace import Workspace
from loraflow.failures import CorruptArtifact
from loraflow.store import Ref, Store
from loraflow.training.validation_loss import Curves

log = logging.getLogger("loraflow")
CURVES = "telemetry/curves.jsonl"  # in an adapter's artifact
NOT_MEASURED = "its adapter is in the store, but its validation loss was not measured"


def read_curves(store: Store, adapter: Ref, name: str = CURVES) -> Curves | None:
    """Return the losses that a training logged; None if the log is damaged, which the adapter's digest does not cover."""
    try:
        return Curves.parse(store.read(adapter, name))
    except CorruptArtifact as failure:
        log.warning("the losses of an adapter cannot be read. %s", failure)
        return None


def training_config(workspace: Workspace) -> FingerprintedTraining:
    """Return the settings of the training that decide its result."""
    return TrainConfig.from_recipe(workspace.recipe, workspace).training_config
