"""Decisions against a log that others write to."""

from types import SimpleNamespace

import pytest

from loraflow import identity
from loraflow.config import load_recipe
from loraflow.execution.plan import Jobs
from loraflow.failures import Failure
from loraflow.store import Summary
from loraflow.tasks.decisions import register


def model(jobs, name):
    payload = identity.payload("merge", 1, {}, {"x": name})
    staged = jobs.store.staging("merge", identity.fingerprint(payload))
    (staged / "model").write_text(name)
    return jobs.store.commit(staged, payload=payload, inputs={}, summary=Summary(), provenance={})


def promote(jobs, ref):
    jobs.log.append(jobs.log.head(), action="promote", merged=ref, adapter=None, inputs={}, reasons=[], actor="x")


def test_a_model_is_not_promoted_over_one_that_it_was_not_compared_with(recipe):
    jobs = Jobs(load_recipe(recipe))
    promote(jobs, model(jobs, "a"))
    assert jobs.champion() is not None  # the walk scores the champion in force
    promote(jobs, model(jobs, "b"))  # and meanwhile another run promotes
    decision = {"verdict": "promote", "reasons": ["better"], "seen": jobs.seen.hash}
    challenger = model(jobs, "c")
    assert register.fn(jobs, SimpleNamespace(merged=challenger, adapter=challenger), decision) is None
    assert decision["verdict"] == "undecided" and "meanwhile" in decision["reasons"][0]
    assert jobs.log.head().seq == 2


def test_a_champion_that_is_gone_stops_the_run(recipe):
    import shutil

    jobs = Jobs(load_recipe(recipe))
    ref = model(jobs, "a")
    promote(jobs, ref)
    shutil.rmtree(jobs.store.path(ref))
    with pytest.raises(Failure, match="gone or damaged"):
        jobs.champion()
