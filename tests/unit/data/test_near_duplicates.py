"""Near-duplicates: what is found, compared with all pairs, and how rows are split so that they are on one side."""

import json
import random
import tracemalloc
from pathlib import Path

import numpy as np
import pytest

from benchmarks.near_duplicates import all_pairs, found_pairs, make_chats
from loraflow.config.data import Data
from loraflow.config.recipe import Recipe
from loraflow.config.stage_configs import CheckDatasetConfig
from loraflow.data.checks import check, row_limits
from loraflow.data.checks import near as near_module
from loraflow.data.checks.check_report import CheckReport
from loraflow.data.checks.near import Comparison, candidates_of, comparable_text, grams, jaccard
from loraflow.data.checks.near_split import near_policy
from loraflow.failures import LimitExceeded
from loraflow.job import Inputs, Job, Progress
from loraflow.reporting.rows import check_notes
from tests.job_factory import Outside

WORDS = ["".join(random.Random(n).choices("abcdefghijklmnopqrstuvwxyz", k=6)) for n in range(3000)]


def text(seed: int, words: int = 20) -> str:
    return " ".join(random.Random(seed).choices(WORDS, k=words))


def near(original: str, change: int = 0) -> str:
    """Return a near copy: one word of twenty is another one."""
    words = original.split()
    words[change % len(words)] = "other"
    return " ".join(words)


def write(file: Path, rows: list[tuple[str, str]], weight: float | None = None) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text("".join(json.dumps({"prompt": q, "completion": a, "weight": weight}) + "\n" for q, a in rows))


def run_check(folder: Path, out: Path, policy: str = "drop", **settings) -> CheckReport:
    out.mkdir()
    recipe = Recipe.model_validate(
        {"name": "x", "base": {"model": "b"}, "data": {**settings, "near_duplicates": policy}}
    )
    config = CheckDatasetConfig.from_recipe(recipe, Outside())
    job = Job(stage="check_dataset", version=1, config=config)
    return CheckReport.model_validate(check.run(job, Inputs({"dataset": folder}), out, Progress()).report)


def sides(out: Path) -> dict[str, str]:
    """Return {prompt: split}."""
    return {
        json.loads(line)["messages"][0]["content"]: side
        for side in ("train", "validation", "heldout")
        for line in (out / f"{side}.jsonl").read_text().splitlines()
    }


def test_planted_near_copies_are_found_and_no_pair_below_the_threshold():
    texts = [comparable_text(chat) for chat in make_chats(3000, 300, seed=1)]
    expected, found = all_pairs(texts), found_pairs(texts)
    assert len(expected) >= 300
    assert len(found & expected) >= 0.99 * len(expected)
    assert not found - expected


@pytest.mark.parametrize(
    "pair",
    [("", ""), ("abc", "abc"), ("abcde", "abcde"), ("naïve ﬁle 日本語のテキスト", "NAÏVE  file 日本語のテキスト")],
)
def test_texts_that_differ_in_case_spaces_and_unicode_form_are_equal(pair):
    chats = [[{"role": "system", "content": f"s{n}"}, {"role": "user", "content": t}] for n, t in enumerate(pair)]
    first, second = map(comparable_text, chats)
    assert first == second and jaccard(grams(first), grams(second)) == 1
    assert found_pairs([first, second]) == {(0, 1)}


def test_the_jaccard_index_is_that_of_sets_of_5_grams():
    assert jaccard(grams("abcdefg"), grams("abcdefh")) == 2 / 4
    assert jaccard(grams("aaaaaaaaa"), grams("aaaaaa")) == 1
    assert jaccard(grams("abc"), grams("abd")) == 0


def test_lone_surrogates_and_short_texts_are_sketched():
    assert found_pairs(["\ud800 broken text here", "", "a", "\ud800 broken text here", "b", "a"]) == {(0, 3), (2, 5)}


def test_thousands_of_rows_with_one_template_take_linear_work_and_are_counted():
    """Each row shares two thirds of its text with all others: below the threshold, and in many bands."""
    shared = text(1, 40)
    texts = [f"{shared} {text(n + 10, 12)}" for n in range(1500)]
    candidates = candidates_of(texts)
    proposed = sum(len(candidates.before(row)) for row in range(len(texts)))
    assert proposed <= 1500 * 64 * 16
    comparison = Comparison(texts.__getitem__)
    assert comparison.index(0, 1) < 0.8


@pytest.mark.parametrize("window", [2, 64])
def test_proposed_pairs_are_those_of_simple_loops(monkeypatch, window):
    """Rows of one band, at most `window` before a row in its order, if enough of the sketches is equal."""
    monkeypatch.setattr(near_module, "WINDOW", window)
    rng = np.random.default_rng(window)
    sketches = rng.integers(0, 256, (60, 80)).astype(np.uint8)
    for row in range(20, 60):  # copies of earlier rows, of which up to 40 values are others
        sketches[row] = sketches[rng.integers(row)]
        sketches[row, rng.choice(80, rng.integers(41), replace=False)] = 0
    order = rng.permutation(60)[:50]
    candidates = near_module.Candidates(sketches, np.arange(60, dtype=np.uint64), order)
    expected: dict[int, set[int]] = {row: set() for row in range(50)}
    unproposed = 0
    for start in range(0, 80, 5):
        bands: dict[bytes, list[int]] = {}
        for row, number in enumerate(order):
            before = bands.setdefault(sketches[number, start : start + 5].tobytes(), [])
            unproposed += max(len(before) - window, 0)
            for other in before[-window:]:
                if (sketches[number] == sketches[order[other]]).sum() >= near_module.MIN_EQUAL:
                    expected[row].add(other)
            before.append(row)
    assert sum(map(len, expected.values())) > 20 and (unproposed > 0) == (window == 2)
    assert [candidates.before(row) for row in range(50)] == [sorted(others) for others in expected.values()]
    assert candidates.unproposed == unproposed


def test_sketches_are_not_in_memory_together(tmp_path):
    rows = 50_000
    rng = np.random.default_rng(0)
    tracemalloc.start()
    try:
        sketches = near_module.Sketches(tmp_path)
        for _ in range(rows // 500):
            sketches.append(rng.integers(0, 256, (500, 80)).astype(np.uint8), rng.integers(0, 2**63, 500).astype("Q"))
        candidates = sketches.candidates(np.arange(rows))
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert len(candidates.first) == rows and peak < 80 * rows, peak / rows


def test_training_rows_near_a_held_out_file_are_dropped_and_named(tmp_path):
    held = [(text(n), text(n + 500, 3)) for n in range(20)]
    copies = [(near(q, n), a) for n, (q, a) in enumerate(held[:5])]
    upper = [(f"  {q.upper()} ", "another answer") for q, _ in held[5:7]]
    others = [(text(n), "y") for n in range(1000, 1050)]
    write(tmp_path / "files/heldout.jsonl", held)
    write(tmp_path / "files/train.jsonl", [*copies, *others, *upper, held[8]])
    report = run_check(tmp_path, tmp_path / "out", heldout=["heldout.jsonl"])
    assert (report.counts["near_leak"], report.counts["leak"]) == (7, 1)
    assert report.rows.train == len(others) and report.rows.heldout == len(held)
    quarantine = [json.loads(line) for line in (tmp_path / "out/quarantine.jsonl").read_text().splitlines()]
    assert quarantine[0] == {"place": "train.jsonl:1", "set": "train", "row": "",
                             "problem": "nearly the same as heldout.jsonl:1, which is held out"}  # fmt: skip


def test_refusing_names_the_rows_and_dropping_does_not_stop(tmp_path):
    held = [(text(n), "x") for n in range(5)]
    write(tmp_path / "files/heldout.jsonl", held)
    write(tmp_path / "files/train.jsonl", [(near(held[0][0]), "x"), *((text(n), "y") for n in range(50, 60))])
    report = run_check(tmp_path, tmp_path / "out", policy="refuse", heldout=["heldout.jsonl"])
    row_limits.check_limits(report.as_json(), 0.01, "here")
    with pytest.raises(LimitExceeded, match=r"1 training rows are nearly the same as held-out rows") as stopped:
        row_limits.check_limits(report.as_json(), 0.01, "here", refuse_near_leaks=True)
    assert "train.jsonl:1" in str(stopped.value) and "heldout.jsonl:1" in str(stopped.value)


def test_a_seeded_split_never_separates_near_rows(tmp_path):
    rows = [(near(text(n), change), f"answer {n}") for n in range(120) for change in range(3)]
    random.Random(0).shuffle(rows)
    write(tmp_path / "files/all.jsonl", rows)
    run_check(tmp_path, tmp_path / "out", heldout_fraction=0.2, validation_fraction=0.2)
    side = sides(tmp_path / "out")
    texts = list(side)
    assert len({*side.values()}) == 3
    pairs = all_pairs([f"{q.casefold()} answer" for q in texts])
    assert pairs and all(side[texts[a]] == side[texts[b]] for a, b in pairs)
    share = sum(s == "heldout" for s in side.values()) / len(side)
    assert 0.1 < share < 0.3


def test_added_rows_move_none_and_a_row_near_both_sides_is_dropped(tmp_path):
    old = [(text(n), "x") for n in range(300)]
    write(tmp_path / "a/files/all.jsonl", old)
    run_check(tmp_path / "a", tmp_path / "out_a", heldout_fraction=0.3)
    before = sides(tmp_path / "out_a")
    train = next(q for q, s in before.items() if s == "train")
    # Rows that lead from a training row to a held-out row in small steps: the last of them is near both.
    held = next(q for q, s in before.items() if s == "heldout")
    steps = [" ".join(held.split()[:n] + train.split()[n:]) for n in range(1, 20)]
    new = [(near(q, 3), "x") for q, _ in old[::7]] + [(q, "x") for q in steps]
    write(tmp_path / "b/files/all.jsonl", old + new, weight=0.5)
    report = run_check(tmp_path / "b", tmp_path / "out_b", heldout_fraction=0.3)
    after = sides(tmp_path / "out_b")
    assert all(after[q] == s for q, s in before.items())
    assert report.counts["near_both"] >= 1
    assert report.counts["weighted"] == report.rows.train + report.rows.validation
    texts = list(after)
    pairs = all_pairs([f"{q.casefold()} x" for q in texts])
    assert len(pairs) > 40 and all(after[texts[a]] == after[texts[b]] for a, b in pairs)


def test_rows_of_a_group_stay_together_with_their_near_rows(tmp_path):
    file = tmp_path / "files/all.jsonl"
    file.parent.mkdir()
    rows = [{"prompt": near(text(n), c), "completion": "x", "doc": f"d{n % 40}"} for n in range(120) for c in range(2)]
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    run_check(tmp_path, tmp_path / "out", heldout_fraction=0.3, group="doc")
    docs = {}
    for side in ("train", "heldout"):
        for line in (tmp_path / "out" / f"{side}.jsonl").read_text().splitlines():
            docs.setdefault(json.loads(line)["group"], set()).add(side)
    assert {*map(len, docs.values())} == {1} and {s for d in docs.values() for s in d} == {"train", "heldout"}


def test_of_few_rows_a_whole_cluster_is_held_out(tmp_path):
    rows = [(near(text(n), c), "x") for n in range(3) for c in range(2)]
    write(tmp_path / "files/all.jsonl", rows)
    report = run_check(tmp_path, tmp_path / "out", heldout_fraction=0.0001)
    assert (report.rows.heldout, report.rows.train, report.counts["held_out_of_few"]) == (2, 4, 2)


def test_report_changes_no_row_and_counts_within_and_between_sets(tmp_path):
    held = [(text(n), "x") for n in range(10)]
    extra = [(near(held[0][0]), "x"), (text(77), "x")]
    train = [(near(held[1][0]), "x"), (near(held[1][0], 5), "x"), *((text(n), "y") for n in range(200, 220))]
    write(tmp_path / "files/heldout.jsonl", held)
    write(tmp_path / "files/hard.jsonl", extra)
    write(tmp_path / "files/train.jsonl", train)
    settings = {"heldout": ["heldout.jsonl"], "extra_heldout": {"hard": "hard.jsonl"}}
    report = run_check(tmp_path, tmp_path / "out", "report", **settings)
    run_check(tmp_path, tmp_path / "off", "off", **settings)
    assert (tmp_path / "out/train.jsonl").read_bytes() == (tmp_path / "off/train.jsonl").read_bytes()
    assert report.near and (report.near.rows, report.near.clusters, report.near.largest) == (5, 2, 3)
    assert report.near.within == {"train": 1}
    assert report.near.between == {"train and heldout": 2, "hard and heldout": 1}
    lines = [json.loads(line) for line in (tmp_path / "out/clusters.jsonl").read_text().splitlines()]
    assert [line["place"] for line in lines] == [
        "train.jsonl:1",
        "train.jsonl:2",
        "hard.jsonl:1",
        "heldout.jsonl:1",
        "heldout.jsonl:2",
    ]
    assert len({line["cluster"] for line in lines}) == 2
    assert not (tmp_path / "off/clusters.jsonl").exists() and '"near"' not in (tmp_path / "off/report.json").read_text()
    notes = "\n".join(check_notes(report))
    assert "5 rows are near-duplicates, in 2 clusters" in notes and "2 rows, of train and heldout" in notes


def test_held_out_clusters_are_groups_for_the_gate_and_do_not_depend_on_training_rows(tmp_path):
    held = [(near(text(n), c), "x") for n in range(5) for c in range(2)] + [(text(9), "x")]
    bridge = [" ".join(held[0][0].split()[:n] + held[2][0].split()[n:]) for n in range(20)]
    for name, train in (("a", [(text(50), "y")]), ("b", [(text(50), "y"), *((q, "z") for q in bridge)])):
        write(tmp_path / name / "files/heldout.jsonl", held)
        write(tmp_path / name / "files/train.jsonl", train)
        run_check(tmp_path / name, tmp_path / f"out_{name}", "report", heldout=["heldout.jsonl"])
    texts = [(tmp_path / f"out_{name}/heldout.jsonl").read_text() for name in "ab"]
    assert texts[0] == texts[1]
    groups = [json.loads(line).get("group") for line in texts[0].splitlines()]
    assert len({*groups} - {None}) == 5 and groups[-1] is None
    assert all(left == right for left, right in zip(groups[:-1:2], groups[1::2], strict=True))


def test_without_the_search_a_recipe_has_the_payload_of_before():
    assert Data().near_duplicates == "off"
    configs = {policy: CheckDatasetConfig.from_recipe(Recipe.model_validate(
        {"name": "x", "base": {"model": "b"}, "data": {"near_duplicates": policy}}), Outside()).identity()
        for policy in ("off", "report", "drop", "refuse")}  # fmt: skip
    assert "near_duplicates" not in configs["off"]
    assert configs["refuse"] == configs["drop"] == {**configs["off"], "near_duplicates": "drop"}


def test_clusters_of_a_row_with_the_same_text_are_those_of_its_first():
    copied = text(1)
    candidates = candidates_of([copied, text(2), copied, near(copied)])
    assert candidates.first.tolist() == [0, 1, 0, 3] and candidates.before(3) == [0]
    assert np.array_equal(candidates.before(2), [])


def test_a_new_recipe_drops_near_rows_unless_most_rows_have_one_template():
    def chats(questions):
        return [[{"role": "user", "content": q}, {"role": "assistant", "content": "x"}] for q in questions]

    assert near_policy(chats(near(text(n), c) for n in range(40) for c in range(2))) == "drop"
    assert near_policy(chats(f"{text(1)} {n}" for n in range(80))) == "report"
