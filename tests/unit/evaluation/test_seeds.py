"""`gate.seeds`: models of several training seeds share all stages before the training, and the gate compares their mean."""

import statistics
from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest

from loraflow.config import load_recipe
from loraflow.evaluation.gate import decide
from loraflow.evaluation.guards import slice_guards
from loraflow.evaluation.seeds import mean_scores, seed_scores, with_seeds
from loraflow.evaluation.values import MetricValue
from loraflow.execution.plan import _certain_changes, find_step, steps_of
from loraflow.execution.workspace import Workspace
from loraflow.failures import BadConfig, BadData
from loraflow.identity import payload
from loraflow.reporting.markdown import seed_lines
from loraflow.stages import TRAIN
from loraflow.store import Ref
from loraflow.tasks.gate import _protocol, gate
from tests.job_factory import make_job
from tests.unit.evaluation.test_scores import scores as commit_scores


def table(hits, **columns):
    n = len(hits)
    values = {"exact_match": np.asarray(hits, dtype=float), "answer": [f"a{i}" for i in range(n)], **columns}
    return pd.DataFrame({"id": [f"r{i:03d}" for i in range(n)], **values})


def test_the_mean_is_that_of_each_rows_scores_whatever_their_order():
    rng = np.random.default_rng(0)
    hits, loss = rng.integers(0, 2, (3, 40)), rng.random((3, 40))
    tables = {seed: table(hits[seed], token_loss=loss[seed], finish=["stop", "length"] * 20) for seed in range(3)}
    tables[2] = tables[2].assign(finish="stop").sample(frac=1, random_state=1)
    found = mean_scores(tables)
    np.testing.assert_allclose(found["exact_match"], hits.mean(0))
    np.testing.assert_allclose(found["token_loss"], loss.mean(0))
    assert found["stops"].tolist() == [1.0, 1 / 3] * 20, "the share of the models whose answer ends with a stop token"
    assert found["answer"].tolist() == tables[0]["answer"].tolist() and mean_scores({0: tables[0]}) is tables[0]


@pytest.mark.parametrize("harm", ["missing", "other", "nan"])
def test_seeds_that_were_scored_on_other_rows_or_have_no_number_are_refused(harm):
    other = table([1] * 10)
    if harm == "missing":
        other = other.iloc[1:]
    elif harm == "other":
        other.loc[3, "id"] = "x"
    else:
        other.loc[3, "exact_match"] = np.nan
    with pytest.raises(BadData, match="same examples|finite"):
        mean_scores({42: table([1] * 10), 43: other})


RULES = {"primary": "exact_match", "min_gain": 0.0, "guards": {}}


def decided(seeds, base, guards=None, parts=(), confidence=0.95):
    tables = {42 + number: table(hits) for number, hits in enumerate(seeds)}
    rules = RULES | {"guards": guards or {}, "parts": parts}
    decision = decide(mean_scores(tables), {"base": table(base)}, confidence=confidence, **rules)
    return with_seeds(decision, tables[42], {"base": table(base)}, seeds=[*tables], **rules)


def test_a_lucky_seed_is_not_promoted_and_one_that_is_as_good_as_its_siblings_is():
    base, lucky, bad = np.zeros(100), np.ones(100), np.zeros(100)
    lucky[30:] = 0
    alone = decide(table(lucky), {"base": table(base)}, confidence=0.95, **RULES)
    assert alone.verdict == "promote"
    worse_base = np.tile([1.0, 0, 0, 0, 0], 20)
    assert decided([lucky, bad, bad], worse_base).verdict == "reject"
    good = decided([lucky, lucky, lucky], base)
    assert good.verdict == "promote" and "mean of 3 models (seeds 42, 43, 44)" in good.reasons[-1]
    assert good.reasons[-1].endswith("the scores of `tuned` are those of seed 42 alone")
    assert good.comparisons[0].difference == pytest.approx(0.3)


def test_the_model_that_would_be_registered_must_not_be_worse_itself():
    base = np.tile([1.0, 0.0], 100)
    worse, better = np.tile([1.0, 0, 0, 0], 50), np.ones(200)
    decision = decided([worse, better, better], base)
    assert decision.verdict == "undecided" and decision.comparisons[0].state == "passed"
    assert "-0.2500 for the model of seed 42, which would be registered" in decision.reasons[0]
    assert decided([better, worse, better], base).verdict == "promote"


def test_a_part_of_the_rows_on_which_the_registered_model_is_worse_is_not_promoted():
    fields = {f"r{i:03d}": {"language": "de" if i < 100 else "en"} for i in range(200)}
    base = np.array([0.0] * 100 + [1.0] * 100)
    first, others = np.array([1.0] * 190 + [0.0] * 10), np.ones(200)
    parts = slice_guards(table(base), {"language": {"exact_match": 0.09}}, fields)
    assert decided([others] * 3, base, parts=parts).verdict == "promote"
    decision = decided([first, *[others] * 9], base, parts=parts)
    assert decision.verdict == "undecided" and "on language en" in decision.reasons[0]


def test_deviation_is_that_of_the_reported_values_and_shown_for_each_seed():
    values = {
        seed: {"exact_match": MetricValue(value=v, low=0, high=1, n=9)} for seed, v in ((42, 0.5), (43, 0.7), (44, 0.9))
    }
    [found] = seed_scores(values)
    assert (found.mean, found.deviation) == (pytest.approx(0.7), pytest.approx(statistics.stdev([0.5, 0.7, 0.9])))
    lines = list(seed_lines([found]))
    assert (
        "| exact_match | 0.500 | 0.700 | 0.900 | 0.700 | 0.200 |" in lines
        and "The model of seed 42 is registered" in lines[2]
    )
    assert not list(seed_lines([]))


def test_seeds_share_all_stages_before_the_training_and_existing_fingerprints_stay(recipe):
    plain, several = load_recipe(recipe), load_recipe(recipe, {"gate.seeds": 3})
    first = plain.training_config.seed
    assert several.seeds == (first, first + 1, first + 2) and plain.seeds == (first,)
    tokens, base = (Ref(stage="s", fingerprint=x, digest=x, uri="", facets={"tokenizer": x}) for x in "tb")

    def fingerprint(stage, recipe):
        inputs = {"tokenize": {"rows": Ref(stage="s", fingerprint="r", digest="r", uri="", facets={"train": "r"}), "base": base},
                  "train": {"tokens": tokens, "base": base}}[stage]  # fmt: skip
        return make_job(stage, recipe, inputs).fingerprint

    assert (
        fingerprint("train", plain) == fingerprint("train", several) == fingerprint("train", several.with_seed(first))
    )
    assert len({fingerprint("train", several.with_seed(seed)) for seed in several.seeds}) == 3
    assert fingerprint("tokenize", several.with_seed(first + 1)) == fingerprint("tokenize", plain)


def test_a_plan_has_a_training_for_each_seed(recipe):
    steps = steps_of(load_recipe(recipe, {"gate.seeds": 3, "training_config.seed": 7}))
    assert [step.label for step in steps if step.stage.name == "train"] == ["train", "train seed 8", "train seed 9"]
    assert find_step("train seed 8").seed == 8 and find_step("evaluate seed 8").inputs["model"] == "merge seed 8"
    for count in (0, 21):
        with pytest.raises(BadConfig):
            load_recipe(recipe, {"gate.seeds": count})


def test_a_plan_compares_a_further_seed_with_the_trainings_of_that_seed(recipe):
    workspace = Workspace(load_recipe(recipe, {"gate.seeds": 2, "training_config.seed": 7}))
    own, further = (find_step(label) for label in ("train", "train seed 8"))
    config = TRAIN.config.from_recipe(workspace.recipe, workspace).identity()
    known = payload(TRAIN.name, TRAIN.version, {"tokens": "t", "base": "b"}, config)
    workspace.store.newest_payload = lambda stage, wanted: known
    inputs = {"tokens": None, "base": None}
    assert _certain_changes(workspace, own, inputs) == []
    assert _certain_changes(workspace, further, inputs) == ["training_config.seed 7 → 8"]


def test_the_gate_decides_on_the_mean_and_one_seed_is_the_rule_that_it_was(recipe):
    workspace = Workspace(load_recipe(recipe, {"gate.seeds": 3}))
    refs = [
        commit_scores(workspace, name, value) for name, value in (("base", 2.0), ("a", 1.0), ("b", 3.5), ("c", 3.0))
    ]
    merged = Ref(stage="merge", fingerprint="f" * 64, digest="d" * 64, uri=workspace.store.uri)
    further = tuple(SimpleNamespace(seed=seed, scores=ref) for seed, ref in ((1, refs[2]), (2, refs[3])))
    single = SimpleNamespace(
        merged=merged, base_scores=refs[0], tuned_scores=refs[1], champion_scores=None, further_seeds=(), general={}
    )
    several = SimpleNamespace(**vars(single) | {"further_seeds": further})
    assert _protocol(workspace, single) != _protocol(workspace, several)
    assert gate.fn(Workspace(load_recipe(recipe)), single).verdict == "promote"
    decision = gate.fn(workspace, several)
    assert decision.verdict == "reject" and decision.comparisons[0].difference == pytest.approx(-0.5)
    nameless = commit_scores(workspace, "e", 1.0, id=[None, *(f"r{i}" for i in range(1, 80))])
    with pytest.raises(BadData, match="no valid `id`"):
        gate.fn(
            workspace, SimpleNamespace(**vars(single) | {"further_seeds": (SimpleNamespace(seed=1, scores=nameless),)})
        )
    bad = commit_scores(workspace, "d", 1.0, config={"max_new_tokens": 8})
    with pytest.raises(BadData, match="seed 2"):
        gate.fn(
            workspace,
            SimpleNamespace(**vars(single) | {"further_seeds": (further[0], SimpleNamespace(seed=2, scores=bad))}),
        )
