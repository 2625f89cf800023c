"""Decisions against a log that others write to."""

from types import SimpleNamespace

import pytest

from loraflow import identity
from loraflow.config import load_recipe
from loraflow.evaluation.values import Decision
from loraflow.execution.workspace import Workspace
from loraflow.failures import Failure
from loraflow.store import Summary
from loraflow.tasks.register import register


def model(workspace, name):
    payload = identity.payload("merge", 1, {}, {"x": name})
    staged = workspace.store.staging("merge", identity.fingerprint(payload))
    (staged / "model").write_text(name)
    return workspace.store.commit(staged, payload=payload, inputs={}, summary=Summary(), provenance={})


def promote(workspace, ref):
    workspace.log.append(
        workspace.log.head(), action="promote", merged=ref, adapter=None, inputs={}, reasons=[], actor="x"
    )


def test_a_model_is_not_promoted_over_a_champion_it_was_not_compared_with(recipe):
    workspace = Workspace(load_recipe(recipe))
    promote(workspace, model(workspace, "a"))
    assert workspace.champion() is not None  # the walk scores the champion in force
    promote(workspace, model(workspace, "b"))  # and meanwhile another run promotes
    decision = Decision("promote", ["better"])
    challenger = model(workspace, "c")
    registration = register.fn(workspace, SimpleNamespace(merged=challenger, adapter=challenger), decision)
    assert registration.entry is None and decision.verdict == "promote", "the gate's decision itself is not changed"
    assert registration.decision.verdict == "undecided" and "in the meantime" in registration.decision.reasons[0]
    assert workspace.log.head().seq == 2


def test_a_missing_champion_stops_the_run(recipe):
    import shutil

    workspace = Workspace(load_recipe(recipe))
    ref = model(workspace, "a")
    promote(workspace, ref)
    shutil.rmtree(workspace.store.path(ref))
    with pytest.raises(Failure, match="missing or damaged"):
        workspace.champion()
