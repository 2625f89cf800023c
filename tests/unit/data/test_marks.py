"""Answers that are marked as not to be learned: in any spelling, beside any format, on rows and on messages."""

import json
from decimal import Decimal
from pathlib import Path

import pandas as pd
import pytest

from loraflow.data.answers.marks import MarkedFalse
from loraflow.data.answers.unread_values import counted, doubtful, questions
from loraflow.data.chats import BadRow
from loraflow.data.files.readers import read_rows
from loraflow.data.formats.chat_formats import read_chat, to_prompt
from loraflow.data.tokens.loss_mask import ChatTemplate
from loraflow.data.tokens.token_labels import IGNORED
from tests.unit.data.test_check import run_check

QUESTION, ANSWER = {"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}
ROWS = [
    {"messages": [QUESTION, ANSWER]},
    {"conversations": [{"from": "human", "value": "q"}, {"from": "gpt", "value": "a"}]},
    {"instruction": "q", "input": "", "output": "a"},
    {"instruction": "q", "context": "", "response": "a"},
    {"prompt": "q", "completion": "a"},
    {"prompt": "q", "response": "a"},
    {"prompt": [QUESTION], "completion": [ANSWER]},
]
FALSE = [
    False,
    0,
    0.0,
    -0.0,
    Decimal("0.00"),
    "False",
    "false",
    "FALSE",
    " false ",
    "0",
    "0.0",
    "0,0",
    "no",
    "No",
    "n",
    "f",
    "off",
]
TRUE = [True, 1, 1.0, "True", "true", "1", "1.0", "yes", "y", "on", None, "", float("nan")]
KEYS = [
    "weight",
    "loss",
    "train",
    "training",
    "train_on_turn",
    "Weight",
    "loss_weight",
    "trainable",
    "label",
    "kto_tag",
]


@pytest.mark.parametrize("row", ROWS, ids=lambda row: "-".join(row))
@pytest.mark.parametrize("key", KEYS)
def test_a_row_that_is_marked_false_in_any_spelling_is_never_learned(row, key):
    for value in FALSE:
        with pytest.raises(MarkedFalse):
            read_chat({**row, key: value})
    for value in TRUE:
        assert read_chat({**row, key: value}).learned is None
    assert to_prompt({**row, key: False}) == [QUESTION], "it may still be asked"


@pytest.mark.parametrize("key", ["masked", "ignore", "excluded", "skip"])
def test_keys_that_exclude_an_answer_are_read_the_other_way_round(key):
    for value in [True, 1, "1", "true", "yes"]:
        with pytest.raises(MarkedFalse):
            read_chat({**ROWS[0], key: value})
    assert read_chat({**ROWS[0], key: False}).learned is None


def two_turns(**marks) -> dict:
    return {
        "messages": [
            QUESTION,
            {**ANSWER, **marks},
            {"role": "user", "content": "q2"},
            {"role": "assistant", "content": "a2"},
        ]
    }


@pytest.mark.parametrize("key", KEYS)
def test_a_message_that_is_marked_false_is_not_among_the_learned_ones(key):
    for value in FALSE:
        chat = read_chat(two_turns(**{key: value}))
        assert chat.learned == (3,) and chat.unread == ()
    for value in TRUE:
        assert read_chat(two_turns(**{key: value})).learned is None
    row = {"conversations": [{"from": "human", "value": "q"}, {"from": "gpt", "value": "a", key: "0"},
                             {"from": "human", "value": "q"}, {"from": "gpt", "value": "a"}], "system": "s"}  # fmt: skip
    assert read_chat(row).learned == (4,), "the system message counts"
    assert read_chat({"prompt": two_turns(**{key: 0})["messages"][:3], "completion": [ANSWER]}).learned == (3,)
    with pytest.raises(MarkedFalse):
        read_chat({"messages": [QUESTION, {**ANSWER, key: 0}]})


@pytest.mark.parametrize(
    "value", [-1, "-0.5", 11, 1e300, 10**400, float("inf"), "-inf", "10.01", "half", [0, 1], {"a": 0}]
)
def test_a_weight_that_cannot_be_honoured_is_refused(value):
    for row in ({**ROWS[0], "weight": value}, two_turns(weight=value)):
        with pytest.raises(BadRow, match=r"weight .*write 1 \(the answer is learned\) or 0") as caught:
            read_chat(row)
        assert not isinstance(caught.value, MarkedFalse)
    with pytest.raises(BadRow, match="does not say whether"):
        read_chat(two_turns(mask=1))
    with pytest.raises(BadRow, match="does not say whether"):
        read_chat(two_turns(training_detail=[{"begin_offset": 0, "end_offset": 1, "train": False}]))


def test_marks_on_other_messages_than_answers_change_nothing_and_true_ones_are_named():
    row = {"messages": [{**QUESTION, "weight": 0, "train": False}, {**ANSWER, "weight": 1}]}
    assert (read_chat(row).learned, read_chat(row).unread) == (None, ())
    assert read_chat({"messages": [{**QUESTION, "train": True}, ANSWER]}).unread == ("messages.train",)


def read(folder: Path, name: str, text: str, **kwargs) -> list:
    (folder / name).write_text(text)
    return list(read_rows(folder, [name], "auto", **kwargs))


def test_a_csv_of_kto_leaves_its_undesirable_rows_out(tmp_path):
    rows = read(tmp_path, "kto.csv", "prompt,completion,label\nq0,good,True\nq1,BAD,False\nq2,good,True\n")
    assert [row.is_marked_false for row in rows] == [False, True, False]
    pd.DataFrame({"prompt": ["a", "b"], "completion": ["x", "y"], "label": [1.0, 0.0]}).to_parquet(
        tmp_path / "k.parquet"
    )
    assert [row.is_marked_false for row in read_rows(tmp_path, ["k.parquet"], "auto")] == [False, True]


def test_labels_that_are_classes_are_no_marks(tmp_path):
    rows = read(tmp_path, "a.csv", "prompt,completion,label\n" + "".join(f"q{i},a,{i % 3}\n" for i in range(6)))
    assert all(row.messages and row.unused_keys == ("label",) for row in rows)
    rows = read(tmp_path, "b.csv", "prompt,completion,label\nq,a,no\nq,a,yes\nq,a,maybe\nq,a,unknown\n")
    assert all(row.messages for row in rows)
    columns = {"prompt": "text", "completion": "label"}
    rows = read(tmp_path, "c.csv", "text,label\nq,no\nr,yes\n", columns=columns)
    assert [row.messages[-1]["content"] for row in rows] == ["no", "yes"], "the answers themselves"


def test_a_label_with_one_misspelled_value_is_refused_with_its_line(tmp_path):
    rows = read(tmp_path, "a.csv", "prompt,completion,label\nq,a,True\nq,a,False\nq,a,Fasle\nq,a,-1\n")
    assert [bool(row.messages) for row in rows] == [True, False, False, False]
    assert rows[2].problem.startswith("label 'Fasle' may mark an answer as wrong")
    rows = read(tmp_path, "b.csv", "prompt,completion,label\nq,a,True\nq,a,False\nq,a,Fasle\n")
    assert rows[1].is_marked_false and rows[2].place == "b.csv:row 3"
    assert rows[2].problem.startswith("label 'Fasle' may mark an answer as wrong")
    rows = read(
        tmp_path,
        "c.jsonl",
        '{"prompt": "q", "completion": "a", "label": -1}\n{"prompt": "q", "completion": "a", "label": 1}\n',
    )
    assert "neither" in rows[0].problem and rows[1].messages


def labelled(folder: Path, labels: list, answer: str = "a", key: str = "label") -> list:
    rows = [{"prompt": f"q{n}", "completion": answer.format(label), key: label} for n, label in enumerate(labels)]
    return read(folder, "l.jsonl", "".join(json.dumps(row) + "\n" for row in rows))


@pytest.mark.parametrize(
    "labels",
    [
        ["true", "flase"], ["Ture", "Fasle"], ["fales", "flase", "true"], ["wrong", "right"], ["-1", "1"],
        [1, -1], [-1, 0, 1], [1.0, -1.0], [True, "nope"], [True, False, 2], ["sí", "no"],
        ["对", "错"], ["Richtig", "Falsch"], ["vrai", "faux"], ["correct", "incorrect"], ["good", "bad"],
        ["good", "bad", "neutral"], ["accepted", "REJECTED", "pending"], ["ok", "not_ok"], ["👍", "👎"], ["✓", "✗"],
        ["thumbs_up", "thumbs-down"], ["doğru", "yanlış"], [0.1, 0.9, 0.5],
        ["wronng", "rihgt"], [1, 2], ["Not correct", "correct"], [None, "falsch", "wahr"],
    ],
    ids=repr,
)  # fmt: skip
def test_a_label_of_two_truth_values_in_any_words_is_never_learned_silently(tmp_path, labels):
    """The brief's kind: misspelled, foreign or unusual truth values counted as classes, and their rows were learned."""
    true = {"true", "1", "right", "correct", "good", "accepted", "1.0"}
    for row, label in zip(labelled(tmp_path, labels), labels, strict=True):
        if row.messages:
            assert label is None or str(label).lower() in true, label
        else:
            assert row.is_marked_false or "write true (the answer is learned) or false" in row.problem, row


@pytest.mark.parametrize(
    "labels",
    [
        list(range(77)), [str(n) for n in range(77)], ["card_arrival"], ["card_arrival"] * 3, ["card_arrival", "lost_card"],
        [0, 1, 2], [-1, 0, 1, 2], ["entailment", "neutral", "contradiction"], ["tree", "bush", "flower"], [3, 17],
        ["left", "right", "straight"], ["yes", "no", *(f"intent {n}" for n in range(9))], ["positive", "negative", "mixed"],
    ],
    ids=repr,
)  # fmt: skip
def test_classes_are_named_as_not_read_and_their_rows_are_learned(tmp_path, labels):
    assert all(row.messages and row.unused_keys == ("label",) for row in labelled(tmp_path, labels))


def test_a_label_that_the_answer_names_is_a_class(tmp_path):
    assert all(row.messages for row in labelled(tmp_path, ["yes", "no", "no"], "{}"))
    assert all(row.told == () for row in labelled(tmp_path, ["spam", "ham"], "{}"))


PAIRS_OF_WORDS = [
    ["urgent", "normal"], ["foo", "bar"], ["A", "B"], ["kweli", "uongo"], ["positive", "negative"], ["card lost", "card arrival"],
]  # fmt: skip


@pytest.mark.parametrize(
    ("key", "labels"), [*(("label", pair) for pair in PAIRS_OF_WORDS), ("valid", ["gültig", "ungültig"])]
)
def test_two_words_of_a_label_in_no_known_language_of_judgements_are_learned_and_asked_about(tmp_path, key, labels):
    rows = labelled(tmp_path, labels, key=key)
    assert all(row.messages and row.unused_keys == (key,) for row in rows)
    (question,) = questions(doubtful(counted([row.told for row in rows]), {key: 2}))
    assert question.startswith(f"does {key} mark wrong answers? ({labels[0]} in 1 rows, {labels[1]} in 1 rows)")


NO = ["nein", "non", "nej", "nee", "nie", "ei", "нет", "いいえ", "不", "não", "아니요", "nope"]


@pytest.mark.parametrize("no", NO)
@pytest.mark.parametrize("key", ["label", "kto_tag"])
def test_no_in_another_language_is_no_class(tmp_path, key, no):
    for labels, expected in [
        ([no, no], [True, True]), ([no, None], [True, False]), ([no, "yes?"], [True, True]), ([no, "x", "z"], [True] * 3),
        (["no", "yes", no, "x"], [False, False, True, True]), ([0, 1, no, "x"], [False, False, True, True]),
    ]:  # fmt: skip
        rows = labelled(tmp_path, labels, key=key)
        assert [bool(row.problem and not row.is_marked_false) for row in rows] == expected, labels
        assert not any(row.messages for row, label in zip(rows, labels, strict=True) if label in (no, "no", 0))
    (refused, _) = labelled(tmp_path, [no, None], key=key)
    assert refused.problem.startswith(f"{key} {no!r} may mark an answer as wrong, but is neither true nor false")
    answers = labelled(tmp_path, [no, "ja", no], "{}", key=key)  # it is the class that the answer names
    assert all(row.messages for row in answers)


@pytest.mark.parametrize(
    "labels", [["no", "yes", "unknown", "na"], [0, 1, "x", "z"], ["no", "yes", *(f"intent {n}" for n in range(9))]]
)
def test_no_beside_words_that_are_classes_is_a_question(tmp_path, labels):
    rows = labelled(tmp_path, labels)
    assert all(row.messages for row in rows)
    (question,) = questions(doubtful(counted([row.told for row in rows]), {"label": len(labels)}))
    assert f"{labels[0]} in 1 rows" in question
    assert not doubtful(counted([row.told for row in labelled(tmp_path, labels, "{}")]), {"label": len(labels)})


def test_a_third_word_in_a_column_of_verdicts_is_asked_about(tmp_path):
    rows = labelled(tmp_path, ["yes", "nein", "yes"], key="accepted")
    (question,) = questions(doubtful(counted([row.told for row in rows]), {"accepted": 1}))
    assert question.startswith("does accepted mark wrong answers? (nein in 1 rows)")


@pytest.mark.parametrize("foreign", ["user", "other column", "entities"])
def test_labels_of_other_lists_and_of_questions_do_not_make_the_label_of_an_answer_a_class(tmp_path, foreign):
    rows = []
    for n in range(10):
        row = {"messages": [{**QUESTION, "content": f"q{n}"}, {**ANSWER, "content": f"a{n}", "label": n % 2}]}
        if foreign == "user":
            row["messages"][0]["label"] = f"intent {n}"
        else:
            row["turns" if foreign == "other column" else "entities"] = [{"label": f"intent {n}"}, {"label": n}]
        rows.append(row)
    found = read(tmp_path, "m.jsonl", "".join(json.dumps(row) + "\n" for row in rows))
    assert [row.is_marked_false for row in found] == [True, False] * 5


def test_labels_of_pairs_are_classes_as_those_of_messages(tmp_path):
    rows = [{"conversations": [{"human": f"q{n}", "assistant": f"a{n}", "label": n % 3}]} for n in range(6)]
    assert all(row.messages for row in read(tmp_path, "m.jsonl", "".join(json.dumps(row) + "\n" for row in rows)))


@pytest.mark.parametrize("false", [False, 0, "false", "no"])
def test_the_label_of_a_message_in_a_file_is_a_mark_unless_labels_of_messages_are_classes(tmp_path, false):
    def read_labels(labels: list) -> list:
        rows = [
            {"messages": [QUESTION, {**ANSWER, "content": f"a{n}", "label": label}]} for n, label in enumerate(labels)
        ]
        return read(tmp_path, "m.jsonl", "".join(json.dumps(row) + "\n" for row in rows))

    assert [row.marked_by for row in read_labels([True, false])] == ["", f"label: {false}"]
    assert all(row.messages and row.unused_keys == ("messages.label",) for row in read_labels([0, 1, 2, 4]))
    assert all(row.messages for row in read_labels(["nope", "greeting", "nie"])), "acts and codes of languages"
    for unclear in ("nein", -1):
        assert [row.messages is None for row in read_labels([True, unclear])] == [False, True]
    assert all(row.messages for row in read_labels([True, 0.3, "maybe"])), "other attributes"
    in_columns = {"messages": {"role": ["user", "assistant"], "content": ["q", "a"], "label": [None, false]}}
    (row,) = read(tmp_path, "m.jsonl", json.dumps(in_columns))
    assert row.marked_by == f"label: {false}"
    (row,) = read(tmp_path, "m.jsonl", json.dumps(two_turns(content=[{"type": "text", "text": "a", "label": false}])))
    assert f"label: {false} marks a part of the answer" in row.problem


def test_siblings_of_a_label_are_honoured_or_named_as_not_read(tmp_path):
    for key in ("correct", "is_good", "Accepted"):
        first, second = labelled(tmp_path, [True, False], key=key)
        assert first.messages and second.is_marked_false
        assert all(row.unused_keys == (key,) for row in labelled(tmp_path, ["Paris", "Rome"], key=key)), (
            "an answer's text"
        )
    first, second = labelled(tmp_path, [True, False], key="rejected")
    assert first.is_marked_false and second.messages
    for key, values in (("score", [0.1, -1]), ("rating", [1, 5]), ("chosen", ["v", "w"]), ("rejected", ["v", "w"]),
                        ("completion_b", ["v", "w"])):  # fmt: skip
        assert all(row.messages and row.unused_keys == (key,) for row in labelled(tmp_path, values, key=key))
    rejected = [QUESTION, {**ANSWER, "content": "BAD"}]
    assert read_chat({"messages": [QUESTION, ANSWER], "rejected": rejected}).unread == ("rejected",)
    for row in (
        {"prompt": "q", "chosen": "a", "rejected": "b"},
        {"prompt": "q", "completion_a": "a", "completion_b": "b"},
    ):
        with pytest.raises(BadRow, match="expected messages"):
            read_chat(row)
    for label in ("wrong", "flase", "false"):
        with pytest.raises(BadRow):
            read_chat({"messages": [QUESTION, {**ANSWER, "label": label}]})


def test_a_fraction_is_a_weight_and_multiplies_that_of_its_row():
    assert (read_chat(two_turns(weight=0.5)).learned, read_chat(two_turns(weight="0,5")).weights) == (
        (1, 3),
        (0.5, 1.0),
    )
    assert read_chat({**two_turns(train=2), "weight": 0.25}).weights == (0.5, 0.25)
    chat = read_chat({**two_turns(weight=0), "weight": 3})
    assert (chat.learned, chat.weights, chat.unread) == ((3,), (3.0,), ())
    assert read_chat({**two_turns(weight=1.0), "weight": True}).weights is None
    with pytest.raises(BadRow, match="the product of the row's and an answer's weight is 12"):
        read_chat({**two_turns(weight=4), "weight": 3})
    for key in ("loss", "train"):  # a measurement, or a split
        with pytest.raises(
            BadRow, match="neither 0 nor 1; if it multiplies the loss of the row, name the column weight"
        ):
            read_chat({**ROWS[0], key: 0.37})


def test_check_dataset_leaves_marked_rows_out_counts_them_and_keeps_the_others_equal(tmp_path):
    rows = [two_turns(), two_turns(weight=0), {"prompt": "p", "response": "BAD", "label": False}]
    rows += [{"prompt": f"p{i}", "response": "good", "label": True} for i in range(3)]
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    held = [{"messages": [*two_turns()["messages"][:3], {"role": "assistant", "content": "WRONG", "weight": 0}]}]
    held += [
        {
            "messages": [
                {"role": "user", "content": "h"},
                {**ANSWER, "weight": 0},
                {"role": "user", "content": "h2"},
                ANSWER,
            ]
        }
    ]
    (tmp_path / "data" / "heldout.jsonl").write_text("".join(json.dumps(row) + "\n" for row in held))
    report = run_check(
        tmp_path / "data", tmp_path / "out", train=["train.jsonl"], heldout=["heldout.jsonl"], system="s"
    )
    assert (
        report["counts"]["marked_false"] == 2
        and report["counts"]["partly_marked"] == 1
        and "malformed" not in report["counts"]
    )
    assert report["malformed_share"] == 0
    train = [json.loads(line) for line in (tmp_path / "out" / "train.jsonl").open()]
    assert [row.get("learned") for row in train] == [None, [4], None, None, None]
    assert "BAD" not in (tmp_path / "out" / "train.jsonl").read_text()
    (heldout,) = [json.loads(line) for line in (tmp_path / "out" / "heldout.jsonl").open()]
    assert "learned" not in heldout, "only the last answer of a held-out chat is used"
    assert "WRONG" not in (tmp_path / "out" / "heldout.jsonl").read_text()
    quarantine = (tmp_path / "out" / "quarantine.jsonl").read_text()
    assert "train.jsonl:3" in quarantine and "heldout.jsonl:1" in quarantine


@pytest.mark.parametrize("loss_on", ["assistant", "all", "last_assistant"])
def test_the_loss_has_every_token_of_a_learned_answer_and_none_of_another(phi3, loss_on):
    template = ChatTemplate(phi3)
    chat = [{"role": "user", "content": "one"}, {"role": "assistant", "content": "WRONG 1"},
            {"role": "user", "content": "no, again"}, {"role": "assistant", "content": "right 2"}]  # fmt: skip
    plain, marked, first = template.encode([chat] * 3, loss_on, learned=[None, [3], [1]])

    def learned(row) -> str:
        return template.tokenizer.decode(row.ids[row.labels != IGNORED].tolist(), skip_special_tokens=False)

    assert "WRONG" not in learned(marked) and "right 2<|end|>" in learned(marked)
    assert "right" not in learned(first) and ("WRONG 1" in learned(first)) == (loss_on != "last_assistant")
    (unmarked,) = template.encode([chat], loss_on)
    assert (plain.labels == unmarked.labels).all()
    # each position is that of the unmarked chat, or ignored
    assert set(marked.labels[marked.labels != unmarked.labels].tolist()) <= {IGNORED}


def test_data_show_brackets_what_is_learned(phi3, recipe, dataset, monkeypatch):
    from click.testing import CliRunner

    from loraflow.cli.data import data

    row = {
        "messages": [QUESTION, {**ANSWER, "content": "WRONG", "weight": 0}, QUESTION, {**ANSWER, "content": "right 😀"}]
    }
    text = (dataset / "train.jsonl").read_text()
    (dataset / "train.jsonl").write_text(json.dumps(row) + "\n" + text)
    done = CliRunner().invoke(data, ["show", str(recipe), "--row", "1"])
    assert done.exit_code == 0, done.output
    shown, place = done.output.rstrip("\n").rsplit("\n", 1)
    assert "⟦right 😀<|end|>" in shown and shown.count("⟦") == 1 and "WRONG" in shown.split("⟦")[0]
    assert place.startswith("train.jsonl:1: ")
    (rendered,) = ChatTemplate(phi3).render([[{k: m[k] for k in ("role", "content")} for m in row["messages"]]])
    plain = shown.replace("⟦", "").replace("⟧", "")
    assert plain.replace(" ", "").replace("\n", "") == rendered.replace(" ", "").replace("\n", ""), (
        "nothing is left out"
    )
    done = CliRunner().invoke(data, ["show", str(recipe), "--set", "training_config.max_length=3"])
    assert "longer than max_length, 3 tokens" in done.output
