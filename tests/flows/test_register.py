"""Decisions against a log that others write to."""

import hashlib
from types import SimpleNamespace

import pytest

from loraflow import identity
from loraflow.config import load_recipe
from loraflow.evaluation.values import Decision
from loraflow.execution.workspace import Workspace
from loraflow.failures import CorruptArtifact, DamagedLog, Failure
from loraflow.flows.finetune import repairs
from loraflow.store import Summary, require_intact
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


@pytest.mark.parametrize("harmed", ["merged", "adapter"])
def test_a_model_with_a_changed_byte_is_not_promoted(recipe, harmed, monkeypatch):
    """Nor if its files were hashed a moment ago: a promotion hashes always."""
    monkeypatch.setattr("loraflow.store.files.SETTLED", -1)
    workspace = Workspace(load_recipe(recipe))
    assert workspace.champion() is None
    result = SimpleNamespace(merged=model(workspace, "weights"), adapter=model(workspace, "adapter"))
    damaged = getattr(result, harmed)
    file = workspace.store.path(damaged) / "model"
    known = file.read_text()
    file.write_text(known.swapcase())
    workspace.memo.hash(file)  # a memo that is wrong about the file
    workspace.memo.known = {key: (*value[:4], hash_of(known)) for key, value in workspace.memo.known.items()}
    require_intact(workspace.store, damaged, workspace.memo)
    with pytest.raises(CorruptArtifact, match=r"set-aside(.|\n)*model: hash mismatch"):
        register.fn(workspace, result, Decision("promote", ["better"]))
    assert workspace.log.head() is None
    assert workspace.store.find("merge", damaged.fingerprint) is None, "so its stage recomputes it"


def hash_of(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()


def test_a_missing_champion_stops_the_run(recipe):
    import shutil

    workspace = Workspace(load_recipe(recipe))
    ref = model(workspace, "a")
    promote(workspace, ref)
    shutil.rmtree(workspace.store.path(ref))
    with pytest.raises(Failure, match="missing or damaged"):
        workspace.champion()


def test_a_damaged_promotion_log_stops_the_run_at_once_with_its_own_message(recipe):
    """A damaged artifact is recomputed, and the pipeline starts again. Nothing recomputes a log."""
    workspace, attempts = Workspace(load_recipe(recipe)), []
    promote(workspace, model(workspace, "a"))
    workspace.store.remove_document(f"registry/{workspace.log.model}/log/000001.json")

    with pytest.raises(DamagedLog) as caught:
        for attempt in repairs(SimpleNamespace(workspace=workspace)):
            with attempt:
                attempts.append(1)
                workspace.champion()
    assert attempts == [] and "entry 1" in caught.value.expected and "registry accept" in caught.value.next_step


def test_a_store_that_is_gone_during_a_run_promotes_nothing_in_the_empty_folder_that_is_left(recipe):
    """The disk of the store is not mounted any more: the next attempt would compute all of it again, as a first run."""
    workspace, attempts = Workspace(load_recipe(recipe)), []
    promote(workspace, model(workspace, "a"))
    workspace.looks.take("k", challenger="b", rows=["r"], error=0.05, horizon=9, promotions=[], actor="me")
    with pytest.raises(DamagedLog, match="entry 1 with hash .* this process read before"):
        for attempt in repairs(SimpleNamespace(workspace=workspace)):
            with attempt:
                attempts.append(1)
                workspace.store.root.rename(workspace.store.root.with_name("away"))
                raise CorruptArtifact("an artifact is missing")
    assert attempts == [1]
    with pytest.raises(DamagedLog):
        workspace.champion()
    with pytest.raises(DamagedLog, match="this process read before"):
        workspace.looks.preview(["r"], error=0.05, horizon=9, promotions=[])


def test_a_damaged_artifact_starts_the_pipeline_again_at_most_five_times(recipe):
    workspace, attempts = Workspace(load_recipe(recipe)), []
    run = SimpleNamespace(workspace=workspace)
    for attempt in repairs(run):
        with attempt:
            attempts.append(1)
            if len(attempts) < 3:
                raise CorruptArtifact("an artifact is damaged")
    assert len(attempts) == 3
    with pytest.raises(Failure, match="damaged 5 times in one run"):
        for attempt in repairs(run):
            with attempt:
                raise CorruptArtifact("an artifact is damaged")
    with pytest.raises(KeyError):
        for attempt in repairs(run):
            with attempt:
                raise KeyError("another error ends the run")
