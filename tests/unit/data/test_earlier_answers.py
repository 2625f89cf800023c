"""A training row whose earlier answer is a held-out reference is left out, as if its prompt were held out."""

import json

import pytest

from tests.unit.data.test_near_duplicates import run_check

TURNS = 3


def expanded(conversations):
    """Yield each conversation after each of its answers, as exports of chat logs have them."""
    for number in range(conversations):
        chat = []
        for turn in range(TURNS):
            chat += [
                {"role": "user", "content": f"question {turn} of customer {number}"},
                {"role": "assistant", "content": f"answer {turn} to customer {number}"},
            ]
            yield [dict(message) for message in chat]


def write(file, chats):
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text("".join(json.dumps({"messages": chat}) + "\n" for chat in chats))


def read(file):
    return [json.loads(line) for line in file.read_text().splitlines()]


def texts(messages):
    return tuple(message["content"] for message in messages)


@pytest.mark.parametrize("policy", ["off", "drop"])
@pytest.mark.parametrize("system", [None, "be brief"])
def test_no_training_row_begins_with_a_held_out_chat(tmp_path, policy, system):
    chats = list(expanded(60))
    write(tmp_path / "d/files/train.jsonl", chats)
    report = run_check(tmp_path / "d", tmp_path / "out", policy, heldout_fraction=0.1, system=system)
    held = {texts(row["messages"]) for row in read(tmp_path / "out/heldout.jsonl")}
    train = [texts(row["messages"]) for row in read(tmp_path / "out/train.jsonl")]
    assert len(held) > 8
    assert not any(chat[:end] in held for chat in train for end in range(len(chat) + 1))
    assert report.counts["leak"] > 3
    assert len(train) + len(held) + len(read(tmp_path / "out/quarantine.jsonl")) == len(chats)


def test_the_problem_names_both_rows_and_other_beginnings_stay(tmp_path):
    files, out = tmp_path / "d/files", tmp_path / "out"
    first, second, *_ = expanded(1)
    write(files / "test.jsonl", [first])
    other = [first[0], {"role": "assistant", "content": "another answer"}, *second[2:]]
    unlearned = [first[0], {**first[1], "weight": 0}, {"role": "user", "content": "and?"}, second[3]]
    write(files / "train.jsonl", [second, other, unlearned])
    report = run_check(tmp_path / "d", out, "off", heldout=["test.jsonl"])
    assert [row["place"] for row in read(out / "train.jsonl")] == ["train.jsonl:2", "train.jsonl:3"]
    (dropped,) = read(out / "quarantine.jsonl")
    assert dropped["place"] == "train.jsonl:1" and report.counts["leak"] == 1
    assert dropped["problem"] == "a chat that it begins with is held out (test.jsonl:1)"


def test_a_held_out_chat_that_is_longer_than_a_training_row_is_no_leak(tmp_path):
    files, out = tmp_path / "d/files", tmp_path / "out"
    first, second, *_ = expanded(1)
    write(files / "test.jsonl", [second])
    write(files / "train.jsonl", [first])
    run_check(tmp_path / "d", out, "off", heldout=["test.jsonl"])
    assert len(read(out / "train.jsonl")) == 1
