"""Parts of the held-out rows by a field of theirs: their values, their scores, and guards on them."""

import json

import numpy as np
import pandas as pd
import pytest

from loraflow.cli.show import _score_lines
from loraflow.config import load_recipe
from loraflow.config.data import Data
from loraflow.config.stage_configs import CheckDatasetConfig
from loraflow.data.checks import check
from loraflow.data.checks.heldout_fields import FILE, MAX_VALUES, NO_VALUE, parse_field_values, write_field_values
from loraflow.evaluation.gate import decide
from loraflow.evaluation.guards import partition_of, power_lines, slice_guards, unscored_parts
from loraflow.evaluation.power import HeldoutRows, advice
from loraflow.evaluation.slices import divide, slice_scores
from loraflow.evaluation.values import Decision, MetricValue, SeedScores, Slice
from loraflow.execution.launcher import run_job
from loraflow.execution.plan_notes import slice_power_lines
from loraflow.execution.workspace import Workspace
from loraflow.failures import BadConfig, BadData
from loraflow.job import Inputs, Job, Progress
from loraflow.serving.champion import RunScores
from loraflow.stages import CHECK_DATASET, VERSION_DATASET


def write(folder, values, name="heldout.jsonl", field="language"):
    """Write rows with a field; return (id, place) of each."""
    rows = [{"prompt": f"q{i}", "completion": "a"} | ({} if v is ... else {field: v}) for i, v in enumerate(values)]
    (folder / name).write_text("".join(json.dumps(row) + "\n" for row in rows))
    return [(f"r{i}", f"{name}:{i + 1}") for i in range(len(rows))]


def values_of(folder, values, fields=("language",), **kwargs):
    write_field_values(folder, write(folder, values, **kwargs), fields, folder)
    found = parse_field_values((folder / FILE).read_bytes())
    return [found[f"r{i}"][fields[0]] for i in range(len(values))]


def test_texts_numbers_and_booleans_are_values_and_empty_ones_are_no_value(tmp_path):
    assert values_of(tmp_path, [" de ", "en", 7, 7.0, True, None, "", ..., 0.5]) == [
        "de", "en", "7", "7", "true", NO_VALUE, NO_VALUE, NO_VALUE, "0.5",
    ]  # fmt: skip


def test_a_cell_of_a_table_and_of_parquet_is_the_same_value_as_one_of_json(tmp_path):
    table = pd.DataFrame({"prompt": ["a", "b"], "completion": ["c", "d"], "level": ["1", ""]})
    table.to_csv(tmp_path / "x.csv", index=False)
    table.assign(level=[1.0, np.nan]).to_parquet(tmp_path / "x.parquet")
    for name in ("x.csv", "x.parquet"):
        records = [(f"r{i}", f"{name}:row {i}") for i in (1, 2)]
        write_field_values(tmp_path, records, ["level"], tmp_path)
        found = parse_field_values((tmp_path / FILE).read_bytes())
        assert [found["r1"]["level"], found["r2"]["level"]] == ["1", NO_VALUE], name


def test_rows_of_other_sets_are_not_read(tmp_path):
    write_field_values(tmp_path, write(tmp_path, ["de", "en"])[:1], ["language"], tmp_path)
    assert parse_field_values((tmp_path / FILE).read_bytes()).keys() == {"r0"}


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ([..., None], "No held-out row has a value"),
        (list(range(MAX_VALUES + 1)), "too many different values"),
        ([i / 7 for i in range(100)], "too many different values"),
        ([["de"], "en"], "lists or objects"),
        ([{"a": 1}], "lists or objects"),
    ],
)
def test_a_field_that_divides_nothing_or_into_too_many_parts_is_refused(tmp_path, values, message):
    with pytest.raises(BadData, match=message) as failure:
        values_of(tmp_path, values)
    assert "language" in failure.value.where


def test_the_message_about_a_missing_field_lists_the_fields_of_the_rows(tmp_path):
    with pytest.raises(BadData) as failure:
        values_of(tmp_path, ["de", "en"], fields=("langauge",))
    assert "language" in failure.value.expected and "length, script" in failure.value.expected


def table(hits, metric="exact_match"):
    prompts = [json.dumps([{"role": "user", "content": f"question {i}"}]) for i in range(len(hits))]
    return pd.DataFrame(
        {
            "id": [f"r{i:04d}" for i in range(len(hits))],
            "prompt": prompts,
            "reference": "x",
            "finish": "stop",
            "reference_tokens": 0,
            metric: np.asarray(hits, dtype=float),
        }
    )


def languages(*sizes):
    names = [name for name, size in zip(("de", "en", "fr"), sizes, strict=False) for _ in range(size)]
    return {f"r{i:04d}": {"language": name} for i, name in enumerate(names)}


def test_scores_of_each_value_are_those_of_its_rows_and_the_rest_is_a_part_of_its_own():
    hits = [1] * 30 + [0] * 20 + [1, 0] * 5
    found = slice_scores(
        {"base": table(np.zeros(60)), "tuned": table(hits)}, ["language"], ["exact_match"],
        confidence=0.95, fields=languages(30, 20),
    )  # fmt: skip
    shown = [(item.name, item.rows, item.values["tuned"]["exact_match"].value) for item in found]
    assert shown == [("de", 30, 1.0), ("en", 20, 0.0), (NO_VALUE, 10, 0.5)]


def decided(tuned, base, sizes, margin=0.05, metric="exact_match", **rules):
    fields = languages(*sizes)
    guards = slice_guards(table(tuned), {"language": {metric: margin}}, fields)
    rules = {"primary": "exact_match", "min_gain": 0.0, "guards": {}, "confidence": 0.95} | rules
    return decide(table(tuned), {"base": table(base)}, parts=guards, **rules)


def test_a_part_that_gets_worse_rejects_a_challenger_that_is_better_as_a_whole():
    base = np.array([0.0] * 400 + [1.0] * 100)
    tuned = np.array([1.0] * 400 + [1.0] * 70 + [0.0] * 30)
    assert decided(tuned, base, (400, 100), margin=0.99).verdict == "promote"
    decision = decided(tuned, base, (400, 100))
    assert decision.verdict == "reject"
    assert "exact_match on language en against base: -0.3000" in decision.reasons[0]
    assert [item.part for item in decision.comparisons] == [None, "language de", "language en"]
    assert Decision.from_dict(decision.to_dict()) == decision


def test_a_part_counts_as_the_same_guard_on_a_table_of_its_rows_alone():
    rng = np.random.default_rng(3)
    tuned, base = rng.integers(0, 2, 300), rng.integers(0, 2, 300)
    inside = decided(tuned, base, (200, 100)).comparisons[2]
    rules = {"primary": "exact_match", "min_gain": 0.0, "confidence": 0.95}
    alone = decide(table(tuned[200:]), {"base": table(base[200:])}, guards={"exact_match": 0.05}, **rules).comparisons[
        1
    ]
    assert (inside.difference, inside.lower, inside.upper, inside.n) == (
        alone.difference, alone.lower, alone.upper, alone.n,
    )  # fmt: skip


def test_a_part_with_few_rows_leaves_the_decision_open_and_names_the_rows_that_it_needs():
    decision = decided(np.ones(405), np.array([0.0] * 400 + [1.0] * 5), (400, 5))
    assert decision.verdict == "undecided"
    assert "on language en" in decision.reasons[0] and "at least 20 independent rows are needed" in decision.reasons[0]
    assert "such rows would be enough" in decision.reasons[0]


def test_a_part_of_which_no_row_was_scored_is_not_known_to_be_as_good_as_before():
    """A sample, or the rows that are dealt, may have no row of a small part: without its guard the model was promoted."""
    everything, scored = table(np.ones(405)), table(np.ones(400))
    missing = unscored_parts(everything, set(scored["id"]), ["language", "length", "script"], languages(400, 5))
    assert missing == ["language en (5 held-out rows)"]
    confirmed = decided(np.ones(400), np.zeros(400), (400, 5))
    assert confirmed.verdict == "promote" and confirmed.with_unscored([]) is confirmed
    decision = confirmed.with_unscored(missing)
    assert decision.verdict == "undecided" and "no row was scored of language en" in decision.reasons[0]
    assert Decision.from_dict(decision.to_dict()) == decision
    assert "score rows of language en" in advice(decision, HeldoutRows(405))[0]
    assert confirmed.overruled("reject", "worse").with_unscored(missing).verdict == "reject"
    questions = [json.dumps([{"role": "user", "content": text}]) for text in ("what is this", "что это", "was ist das")]
    chats = pd.DataFrame({"id": ["a", "b", "c"], "prompt": questions})
    assert unscored_parts(chats, {"a", "c"}, ["script"], {}) == ["script Cyrillic (1 held-out row)"]


def test_a_plan_names_the_parts_that_even_an_unchanged_model_does_not_pass():
    lines = power_lines({"language de": [1] * 400, "language en": [1] * 5}, {"exact_match": 0.05}, 0.95, {})
    assert len(lines) == 1 and "on language en" in lines[0] and "needs 52 rows, you have 5" in lines[0]
    same = np.ones(52)
    guards = slice_guards(table(same), {"language": {"exact_match": 0.05}})
    rules = {"primary": "exact_match", "min_gain": 0.0, "guards": {}, "confidence": 0.95}
    assert decide(table(same), {"base": table(same)}, parts=guards, **rules).comparisons[1].state == "passed"
    for groups, state in ((58, "open"), (59, "passed")):
        pairs = table(np.ones(2 * groups)).assign(group=[f"g{i // 2}" for i in range(2 * groups)])
        guards = slice_guards(pairs, {"language": {"exact_match": 0.05}})
        assert decide(pairs, {"base": pairs}, parts=guards, **rules).comparisons[1].state == state
        lines = power_lines({"de": [2] * groups}, {"exact_match": 0.05}, 0.95, {"exact_match": 1.0})
        assert lines == [] or (state == "open" and "needs 59 groups of equal size, you have 58" in lines[0])


def test_another_value_of_a_field_is_another_rule():
    rules = {"language": {"exact_match": 0.05}}
    first = partition_of(slice_guards(table(np.ones(10)), rules, languages(6, 4)))
    assert first == partition_of(slice_guards(table(np.zeros(10)), rules, languages(6, 4)))
    assert first != partition_of(slice_guards(table(np.ones(10)), rules, languages(5, 5)))


def test_parts_cover_each_row_once_whatever_divides_them():
    scores = table(np.ones(50))
    for by in ("length", "script", "language", "a field that no row has"):
        ids = [row for part in divide(scores, by, languages(20, 10)) for row in part.ids]
        assert sorted(ids) == sorted(scores["id"])


def test_a_guard_of_a_part_needs_a_score_and_a_margin(recipe):
    read = load_recipe(
        recipe, {"gate.slices": {"language": {"exact_match": 0.1}}, "evaluation.slices": ["length", "tone"]}
    )
    assert read.slice_fields == ("language", "tone")
    for rules in (
        {"language": {"no_such_score": 0.1}},
        {"language": {}},
        {"language": {"exact_match": -0.1}},
        {"": {}},
    ):
        with pytest.raises(BadConfig):
            load_recipe(recipe, {"gate.slices": rules})


def test_a_field_is_read_without_a_change_of_what_the_models_are_scored_on(tmp_path):
    rows = [{"prompt": f"q{i}", "completion": "a", "language": "de" if i % 3 else "en"} for i in range(40)]
    (tmp_path / "dataset" / "files").mkdir(parents=True)
    (tmp_path / "dataset" / "files" / "chats.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    config = Data(heldout_fraction=0.5).model_dump(include=set(CheckDatasetConfig.model_fields))
    config = {
        key: value for key, value in config.items() if value is not None and key not in ("near_duplicates", "profile")
    }
    for name, more in (("without", {}), ("with", {"heldout_fields": ["language"]})):
        (tmp_path / name).mkdir()
        job = Job(stage="check_dataset", version=1, config=config | {"system": None, "limit": None} | more)
        summary = check.run(job, Inputs({"dataset": tmp_path / "dataset"}), tmp_path / name, Progress())
        assert FILE not in [file for part in summary.facets.values() for file in part]
        assert ("language" in summary.report["unread"]) == (name == "without"), "it is used"
    for file in ("train.jsonl", "heldout.jsonl"):
        assert (tmp_path / "with" / file).read_bytes() == (tmp_path / "without" / file).read_bytes()
    found = parse_field_values((tmp_path / "with" / FILE).read_bytes())
    heldout = [json.loads(line) for line in (tmp_path / "with" / "heldout.jsonl").read_text().splitlines()]
    asked = {row["id"]: int(row["messages"][0]["content"][1:]) for row in heldout}
    assert {row: values["language"] for row, values in found.items()} == {
        row: "de" if number % 3 else "en" for row, number in asked.items()
    }


def test_a_dataset_without_held_out_rows_is_not_refused_for_its_fields(tmp_path):
    write_field_values(tmp_path, [], ["language"], tmp_path)
    assert parse_field_values((tmp_path / FILE).read_bytes()) == {}


def test_a_plan_counts_the_rows_of_each_part_once_they_are_checked(recipe, dataset):
    file = dataset / "heldout.jsonl"
    rows = [json.loads(line) for line in file.read_text().splitlines()]
    for number, row in enumerate(rows):
        row["language"] = "en" if number < 3 else "de"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    settings = {"gate.slices": {"language": {"exact_match": 0.9}}, "evaluation.max_rows": None}
    workspace = Workspace(load_recipe(recipe, settings))
    assert slice_power_lines(workspace) == [], "the rows are not known yet"
    found = run_job(workspace.job(VERSION_DATASET, {}), workspace.store)
    run_job(workspace.job(CHECK_DATASET, {"dataset": found}), workspace.store)
    lines = slice_power_lines(workspace)
    assert "on language en" in lines[-1] and "needs 20 rows, you have 3" in lines[-1]
    assert slice_power_lines(Workspace(load_recipe(recipe))) == []


def test_show_champion_lists_the_parts_and_the_training_seeds():
    value = MetricValue(value=0.5, low=0.1, high=0.9, n=7)
    scored = {"exact_match": value}
    part = Slice(by="language", name="de", rows=7, values={"base": scored, "tuned": scored})
    seeds = SeedScores(metric="exact_match", values={"42": 0.4, "43": 0.6}, mean=0.5, deviation=0.141)
    metrics = {"base": {"heldout": scored}, "tuned": {"heldout": scored}}
    scores = RunScores(run="r", confidence=0.95, metrics=metrics, slices=[part], seeds=[seeds])
    shown = [" ".join(line.split()) for line in _score_lines(scores)]
    interval = "0.500 [0.100, 0.900]"
    assert shown[-4:] == [
        "by language base tuned", f"de, 7 rows, exact_match {interval} {interval}",
        "by training seed 42 43 mean deviation", "exact_match 0.400 0.600 0.500 0.141",
    ]  # fmt: skip
    beside = RunScores(run="r", confidence=0.95, metrics=metrics | {"champion": {"heldout": scored}})
    assert "intervals; tuned is this model, champion the one that it was compared with" in next(_score_lines(beside))
    assert "tuned is" not in shown[0]
