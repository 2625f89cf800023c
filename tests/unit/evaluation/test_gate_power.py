"""`plan` says what the held-out rows can show, once they are checked; rows have the groups that the dataset names."""

import json
import math
import shutil

import numpy as np
import pandas as pd
import pytest

from loraflow.config import load_recipe
from loraflow.evaluation.evidence import Evidence
from loraflow.evaluation.gate import decide
from loraflow.evaluation.generation import GeneratedAnswer
from loraflow.evaluation.guards import SliceGuard, power_lines
from loraflow.evaluation.intervals import group_labels
from loraflow.evaluation.power import gate_power as power_of
from loraflow.evaluation.power import largest_differences, rows_for_margin
from loraflow.evaluation.score import _Computed, _table, read_rows
from loraflow.evaluation.slices import Part
from loraflow.execution.launcher import run_job
from loraflow.execution.plan import base_config, gate_power, vocabulary_of
from loraflow.execution.workspace import Workspace
from loraflow.registry.looks import row_key
from loraflow.stages import CHECK_DATASET, RESOLVE_BASE, VERSION_DATASET
from loraflow.store import Summary


def checked(workspace):
    """Run the stages that read the dataset."""
    dataset = run_job(workspace.job(VERSION_DATASET, {}), workspace.store)
    return run_job(workspace.job(CHECK_DATASET, {"dataset": dataset}), workspace.store)


def test_the_plan_counts_rows_and_looks_and_warns_of_a_gate_that_cannot_promote(recipe):
    workspace = Workspace(load_recipe(recipe))
    assert gate_power(workspace) is None, "the rows are not known yet"
    rows = checked(workspace)
    found = gate_power(workspace)
    assert (found.rows, found.look, found.level) == (8, "look 1 of 365", 0.025) and found.is_warning()
    assert "at least 20 independent rows are needed" in "\n".join(found.lines())
    lines = workspace.store.read(rows, "heldout.jsonl").decode().splitlines()
    keys = {row_key(json.dumps(json.loads(line)["messages"][:-1])) for line in lines}
    workspace.looks.take("k", challenger="c", rows=keys, error=0.05, horizon=365, promotions=(), actor="me")
    more = gate_power(Workspace(load_recipe(recipe, {"evaluation.max_rows": 20, "gate.guards": {"field_f1": 0.01}})))
    assert (more.rows, more.look) == (20, "look 2 of 365") and more.level == pytest.approx(0.025 / 364)
    assert "a margin of 0.01 needs 299 rows, you have 20" in "\n".join(more.lines())


def test_the_plan_knows_what_a_score_of_the_users_can_show_once_its_range_is_known():
    fixed = {"look": "look 1 of 365", "level": 0.025, "confidence": 0.95, "largest_loss": 10.4, "primary": "brevity"}
    rules = {"min_gain": 20.0, "guards": {"brevity": 3.0}}
    unknown = power_of([1] * 100, **fixed, **rules)
    assert "the range of brevity is not known: set gate.ranges" in unknown.lines()[1] and unknown.is_warning()
    known = power_of([1] * 100, **fixed, **rules, ranges={"brevity": (0.0, 100.0)})
    assert known.gain == pytest.approx(20 + 120 * (0.025 ** (-1 / 100) - 1))
    assert "no gain below" in known.lines()[1] and "unchanged outputs pass" in known.lines()[2]
    table = pd.DataFrame({"id": [f"r{i}" for i in range(100)], "brevity": 50.0})
    for margin, state in ((3.0, "passed"), (2.9, "open")):
        found = decide(
            table, {"base": table}, primary="brevity", min_gain=20, guards={"brevity": margin}, confidence=0.95,
            ranges={"brevity": (0.0, 100.0)},
        )  # fmt: skip
        assert found.comparisons[1].state == state, "as the plan says: 100·(1 − 0.05^(1/100)) = 2.95"
    few = power_of([1] * 20, **fixed, min_gain=90.0, guards={}, ranges={"brevity": (0.0, 100.0)})
    assert "so few rows show no gain over 90" in few.lines()[1] and few.is_warning()
    spent = power_of([1] * 100, **{**fixed, "level": 0.0}, min_gain=0.0, guards={}, ranges={"brevity": (0.0, 100.0)})
    assert "gate.error is used up" in spent.lines()[1] and spent.is_warning()


def test_a_guard_of_the_loss_or_of_an_own_score_on_a_part_is_passed_from_the_rows_that_the_plan_names():
    """Equal outputs, all rows of one length: one row fewer than the plan names leaves the gate undecided."""
    reaches, margins = (
        largest_differences(math.log(400), {"brevity": (0.0, 100.0)}),
        {"token_loss": 0.3, "brevity": 5.0},
    )
    for metric, margin in margins.items():
        needed = rows_for_margin(margin, 0.95, metric, reaches[metric])
        assert not power_lines({"language de": [1] * needed}, {metric: margin}, 0.95, reaches)
        (line,) = power_lines({"language de": [1] * (needed - 1)}, {metric: margin}, 0.95, reaches)
        assert f"a margin of {margin:g} needs {needed} rows" in line and (" of equal length" in line) == (
            metric == "token_loss"
        )
        for rows, state in ((needed, "passed"), (needed - 1, "open")):
            ids = [f"r{i}" for i in range(rows)]
            table = pd.DataFrame(
                {"id": ids, "brevity": 50.0, "token_loss": 1.0, "reference_tokens": 7, "exact_match": 1.0}
            )
            parts = [SliceGuard(Part("language", "de", frozenset(ids)), metric, margin)]
            rules = {"primary": "exact_match", "min_gain": 0, "guards": {}, "confidence": 0.95, "vocabulary": 400}
            found = decide(table, {"base": table}, **rules, parts=parts, ranges={"brevity": (0.0, 100.0)})
            assert found.comparisons[1].state == state, (metric, rows)
        power = power_of(
            [1] * (needed - 1), look="", level=0.025, confidence=0.95, largest_loss=math.log(400), primary="exact_match", min_gain=0.0,
            guards={metric: margin}, ranges={"brevity": (0.0, 100.0)},
        )  # fmt: skip
        assert power.is_warning() and f"needs {needed} rows" in "\n".join(power.lines())


def test_a_damaged_config_of_the_base_in_the_store_is_not_used(recipe, phi3, caplog):
    workspace = Workspace(load_recipe(recipe))
    job, store = workspace.job(RESOLVE_BASE, {}), workspace.store
    staged = store.staging(job.stage, job.fingerprint)
    shutil.copytree(phi3, staged, dirs_exist_ok=True)
    ref = store.commit(staged, payload=job.payload, inputs={}, summary=Summary(), provenance={})
    stored = store.path(ref) / "config.json"
    size = json.loads(stored.read_text())["vocab_size"]
    assert base_config(workspace) == stored and vocabulary_of(workspace) == size
    stored.write_text(stored.read_text().replace(f'"vocab_size": {size}', f'"vocab_size": {size + 1}'))
    assert base_config(workspace) == phi3 / "config.json" and vocabulary_of(workspace) == size
    assert "config.json is damaged" in caplog.text


def test_rows_of_a_group_are_held_out_together_and_have_its_name_in_the_scores(recipe, dataset):
    train, heldout = (dataset / name for name in ("train.jsonl", "heldout.jsonl"))
    rows = [json.loads(line) for line in train.read_text().splitlines()]
    for number, row in enumerate(rows):
        row["document"] = number // 4
    train.write_text("".join(json.dumps(row) + "\n" for row in rows))
    heldout.unlink()
    settings = {"data.group": "document", "data.heldout": [], "data.heldout_fraction": 0.4}
    workspace = Workspace(load_recipe(recipe, settings))
    ref = checked(workspace)
    found, _ = read_rows(workspace.store.path(ref) / "heldout.jsonl", None, 0)
    sizes = pd.Series([row.group for row in found]).value_counts()
    assert len(found) > 8 and set(sizes) == {4}
    answer: GeneratedAnswer = {"text": "red", "tokens": 1, "finish": "stop"}
    table = _table(found, _Computed([answer] * len(found), [(1.0, 1)] * len(found), 0, 0, ["red"] * len(found)))
    assert group_labels(table).max() + 1 == len(sizes)
    plain = _table([row.__class__(row.id, row.set, row.messages) for row in found], _Computed([answer] * len(found), [(1.0, 1)] * len(found), 0, 0, ["red"] * len(found)))  # fmt: skip
    assert "group" not in plain
    power = gate_power(Workspace(load_recipe(recipe, settings | {"evaluation.max_rows": None})))
    assert power.rows == len(sizes) and power.lines()[0].startswith(
        f"gate: {len(found)} held-out rows in {len(sizes)} groups, look 1"
    )
    assert "no model can be promoted: at least 20 independent rows" in power.lines()[1]


@pytest.mark.parametrize("groups", [298, 299])
def test_the_plan_counts_groups_of_rows_as_the_gate_does(groups):
    """Scores of 0 and 1 of rows in groups have Gaffke's bound: unchanged ones pass 0.01 from 299 groups on, not from 268."""
    power = power_of(
        [2] * groups, look="look 1 of 365", level=0.025, confidence=0.95, largest_loss=math.log(400),
        primary="exact_match", min_gain=0.0, guards={"stops": 0.01},
    )  # fmt: skip
    group = [f"g{i // 2}" for i in range(2 * groups)]
    base = pd.DataFrame({"id": [f"r{i}" for i in range(2 * groups)], "group": group, "exact_match": 0.0, "stops": 1.0})
    found = decide(
        base.assign(exact_match=1.0),
        {"base": base},
        primary="exact_match",
        min_gain=0,
        guards={"stops": 0.01},
        confidence=0.95,
    )
    enough = groups == 299
    assert (found.verdict == "promote", power.is_warning()) == (enough, not enough)
    assert f"gate: {2 * groups} held-out rows in {groups} groups, look 1" in power.lines()[0]
    assert ("a margin of 0.01 needs 299 groups of equal size, you have 298" in power.lines()[2]) is not enough
    gain = "exact_match: no gain below 0.012 can be shown, and more is needed if rows differ"
    assert gain in power.lines()[1], "exp(-ln(0.025) / 299) - 1"


UNEQUAL = {
    "one large group": ([50] + [1] * 450, 0.01, True),
    "one group with most rows": ([401] + [1] * 99, 0.05, True),
    "geometric sizes": ([2 ** (i % 7) for i in range(140)], 0.03, True),
    "two sizes": ([1, 2] * 100, 0.05, False),
    "a small margin": ([1, 2] * 100, 0.015, True),
}


@pytest.mark.parametrize("name", UNEQUAL)
def test_the_plan_says_of_groups_of_unequal_size_what_the_gate_does(name):
    """The gate's own bound is the oracle: a few large groups can show less than as many groups of equal size."""
    sizes, margin, is_open = UNEQUAL[name]
    fixed = {"look": "look 1 of 365", "level": 0.025, "confidence": 0.95, "largest_loss": math.log(400)}
    power = power_of(sizes, **fixed, primary="exact_match", min_gain=0.0, guards={"stops": margin})
    group = [f"g{number}" for number, size in enumerate(sizes) for _ in range(size)]
    base = pd.DataFrame({"id": [f"r{i}" for i in range(len(group))], "group": group, "exact_match": 0.0, "stops": 1.0})
    parts = [SliceGuard(Part("language", "de", frozenset(base["id"])), "stops", margin)]
    rules = {"primary": "exact_match", "min_gain": 0, "guards": {"stops": margin}, "confidence": 0.95}
    found = decide(base, {"base": base}, **rules, parts=parts)
    assert {comparison.state for comparison in found.comparisons[1:]} == {"open" if is_open else "passed"}
    weights = np.array(sizes, float)
    bound = Evidence(0 * weights, weights, 1.0, rows=len(group)).lower_bound(0.95)
    assert power.guards["stops"][1] == pytest.approx(-bound) and (-bound >= margin) == is_open
    (line,) = [line for line in power.lines() if line.startswith("  stops")]
    assert ("even unchanged outputs do not pass" in line, power.is_warning()) == (is_open, is_open)
    assert f"{len(sizes)} {'' if is_open else 'groups '}of unequal size" in line
    lines = power_lines({"language de": sizes}, {"stops": margin}, 0.95, {"stops": 1.0})
    assert ["of unequal size, which can rule out" in line for line in lines] == [True] * is_open
    can_promote = Evidence(weights, weights, 1.0, rows=len(group)).p_above(0.0, 0.025) <= 0.025
    assert (power.gain is not None) == can_promote
    for factor in (1.001, 0.999) if can_promote else ():  # each row gains as much as the plan says
        p = Evidence(factor * power.gain * weights, weights, 1.0, rows=len(group)).p_above(0.0, 0.025)
        assert (p <= 0.025) == (factor > 1)


def test_a_held_out_row_without_its_group_is_malformed(recipe, dataset):
    workspace = Workspace(load_recipe(recipe, {"data.group": "document"}))
    report = workspace.store.manifest(checked(workspace)).report
    assert report["counts"]["malformed"] == 20 and "data.group" in report["first_problems"][0]
