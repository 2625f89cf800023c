"""What a plan says of a stage whose inputs are not computed yet."""

from dataclasses import replace
from types import SimpleNamespace

import pytest

from loraflow import identity
from loraflow.config import load_recipe
from loraflow.execution.plan import STEPS, _plan_step
from loraflow.store import LocalStore, Ref, Summary
from tests.golden.payloads import REPOSITORY
from tests.job_factory import Outside, make_job

STEP = next(step for step in STEPS if step.label == "verify")


def ref(stage: str, letter: str) -> Ref:
    facets = {given.part: letter * 64 for given in STEP.stage.inputs.values() if given.part}
    return Ref(stage=stage, fingerprint=letter * 64, digest=letter * 64, uri="folder", facets=facets)


BASE = ref("resolve_base", "a")


@pytest.fixture
def planned(tmp_path):
    """Plan verify, in a store that has a verify of the base `a` and of another adapter."""
    recipe = load_recipe(str(REPOSITORY / "configs" / "quickstart.yaml"), {})
    inputs = {name: ref(source.replace(" ", "_"), "a") for name, source in STEP.inputs.items()}
    job = make_job("verify", recipe, inputs)
    store = LocalStore(tmp_path)
    staged = store.staging("verify", job.fingerprint)
    (staged / "a.txt").write_text("a")
    store.commit(staged, payload=job.payload, inputs={}, summary=Summary(), provenance={"seconds": 1})

    def plan(version: int = job.version, base: Ref | None = BASE, **settings):
        changed = load_recipe(str(REPOSITORY / "configs" / "quickstart.yaml"), settings)
        outside = Outside()
        workspace = SimpleNamespace(store=store, recipe=changed, **vars(outside))
        step = replace(STEP, stage=replace(STEP.stage, version=version))
        refs = {"base": base, "adapter": None, "merged": None, "rows": None}
        found, _ = _plan_step(workspace, step, STEP.inputs, refs, forced=False)
        return found.status, found.why

    return plan


def test_a_stage_may_be_reused_if_only_its_inputs_can_change(planned):
    status, [why] = planned()
    assert status == "depends" and why.startswith("depends on train, merge and check_dataset"), why
    assert planned(base=None)[0] == "depends"


@pytest.mark.parametrize(
    ("change", "why"),
    [
        ({"version": 99}, f"version {STEP.stage.version} → 99"),
        ({"merge.verify_prompts": 31}, "→ 31"),
        ({"base": ref("resolve_base", "b")}, f"inputs.base {identity.short('a' * 64)} → {identity.short('b' * 64)}"),
    ],
)
def test_a_stage_with_another_version_setting_or_known_input_runs_whatever_its_other_inputs_are(planned, change, why):
    status, [found] = planned(**change)
    assert status == "runs" and why in found, found
