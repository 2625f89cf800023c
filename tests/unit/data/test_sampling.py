"""Samples: seeded, spread over sets, groups and labels, and hardly changed by added rows."""

import json
from collections import Counter

from hypothesis import given
from hypothesis import strategies as st

from loraflow.data.checks.split import label_values, spread_sample, spread_values
from loraflow.evaluation.score import read_rows, sampled_rows
from loraflow.execution.deal import compared_rows
from loraflow.registry.looks import row_key


def line(n, answer, **more):
    chat = [{"role": "user", "content": f"q{n}\u2028"}, {"role": "assistant", "content": answer}]
    return json.dumps({"id": f"r{n}", "set": "heldout", "messages": chat, **more}, ensure_ascii=False) + "\n"


@given(st.lists(st.sampled_from("abcdefg"), min_size=1, max_size=80), st.integers(1, 80), st.integers(0, 3))
def test_each_value_has_its_share_of_a_sample(values, size, seed):
    keys = [f"{value}{n}" for n, value in enumerate(values)]
    taken = spread_sample(keys, values, size, seed, "limit")
    assert taken == sorted(set(taken)) and len(taken) == min(size, len(values))
    have, all_of = Counter(values[n] for n in taken), Counter(values)
    assert all(abs(have[value] - len(taken) * count / len(values)) < 1 for value, count in all_of.items())


def test_a_sample_leaves_no_rare_value_out_for_certain():
    values = ["common"] * 1910 + [f"rare {n}" for n in range(90)]
    keys = [f"q{n}" for n in range(len(values))]
    taken = [spread_sample(keys, values, 50, seed, "max_rows") for seed in range(400)]
    rare = sum(n >= 1910 for rows in taken for n in rows) / len(taken)
    assert abs(rare - 50 * 90 / 2000) < 0.2  # on average 2.25 of them
    pairs = [f"pair {n // 2}" for n in range(1000)] + [f"single {n}" for n in range(1000)]
    keys = [f"q{n}" for n in range(len(pairs))]
    shares = [sum(n >= 1000 for n in spread_sample(keys, pairs, 500, seed, "max_rows")) / 500 for seed in range(20)]
    assert abs(sum(shares) / 20 - 0.5) < 0.03


def test_clusters_of_near_duplicates_do_not_replace_labels():
    answers = ["yes", "no"] * 20
    groups = ["near 1a", "near 1a", *[None] * 38]
    assert spread_values(groups, answers) == [f"label {answer}" for answer in answers]
    assert spread_values(["a", None, *[None] * 38], answers)[:2] == ["a", "label no"]
    assert spread_values(groups, [f"answer {n}" for n in range(40)]) is None


@given(st.lists(st.sampled_from("abcd"), min_size=30, max_size=60), st.sampled_from("abcde"))
def test_an_added_row_changes_few_rows_of_a_sample(values, new):
    keys = [f"{n}" for n in range(len(values))]
    before = spread_sample(keys, values, 12, 0, "limit")
    after = spread_sample([*keys, "new"], [*values, new], 12, 0, "limit")
    assert len(set(before) & set(after)) >= 12 - 5  # at most one row of each value


def test_short_answers_that_repeat_are_labels_and_others_are_not():
    assert label_values(["spam", "ham ", "ham"] * 3) == ["spam", "ham", "ham"] * 3
    assert label_values([f"answer {n}" for n in range(100)]) is None
    assert label_values(["only"] * 9) is None and label_values([]) is None
    assert label_values(["a long answer " * 10, "another"] * 9) is None


def test_scored_rows_are_spread_over_the_groups_of_data_group(tmp_path):
    file = tmp_path / "heldout.jsonl"
    file.write_text("".join(line(n, f"answer {n}", group=f"g{n // 10}") for n in range(100)))
    rows, _ = read_rows(file, 20, 0)
    assert Counter(row.group for row in rows) == {f"g{n}": 2 for n in range(10)}


def test_plan_counts_the_rows_that_evaluate_scores():
    text = "".join(line(n, f"answer {n}") for n in range(50))
    rows, _ = sampled_rows(text.split("\n")[:-1], 8, 3)
    expected = [row_key(json.dumps(row.messages[:-1], ensure_ascii=False)) for row in rows]
    assert [key for key, _ in compared_rows(text.encode(), 8, 3)] == expected and len(expected) == 8
    assert compared_rows(b"", 8, 3) == []
