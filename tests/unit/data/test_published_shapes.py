"""Rows in the shapes of datasets that people publish: what of them is the prompt, what is learned, and what is left out.

The keys are those of the datasets' own pages; the expected chats are written by hand.
"""

import json

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from loraflow.data.answers.mark_names import split_hint
from loraflow.data.checks.compare import read_files
from loraflow.data.files.guess_columns import columns_of
from loraflow.data.files.readers import read_rows
from loraflow.data.formats.chat_formats import to_prompt

OUT, REFUSED = "left out", "refused"


def user(text):
    return {"role": "user", "content": text}


def answer(text, **marks):
    return {"role": "assistant", "content": text, **marks}


def human(text):
    return {"from": "human", "value": text}


def gpt(text):
    return {"from": "gpt", "value": text}


def read(folder, rows, *, is_training=True):
    (folder / "t.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    columns = columns_of(folder / "t.jsonl", "t.jsonl")
    return list(read_rows(folder, ["t.jsonl"], "auto", columns, is_training=is_training))


def outcome(row):
    if row.messages is None:
        return OUT if row.is_marked_false else REFUSED
    learned = row.learned if row.learned is not None else range(len(row.messages))
    return [
        f"{message['role'][0]}{'' if message['role'] != 'assistant' or number in learned else '-'}: {message['content']}"
        for number, message in enumerate(row.messages)
    ]


QA = ["u: q", "a: a"]
FUNCTION = {"name": "f", "description": "d", "parameters": {"type": "object", "properties": {"x": {"type": "integer"}}}}
SHAPES = {
    "OpenAssistant pairs": (
        [{"prompt": "q", "completion": "a", "review_result": value, "deleted": False} for value in (True, False, None)],
        [QA, OUT, QA]),
    "ShareGPT": ([{"id": "x", "conversations": [human("q"), gpt("a")]}], [QA]),
    "ShareGPT that ends with a question": ([{"conversations": [human("q"), gpt("a"), human("r")]}], [REFUSED]),
    "ShareGPT that begins with an answer": ([{"conversations": [gpt("hello"), human("q"), gpt("a")]}], [REFUSED]),
    "ShareGPT with weights": (
        [{"conversations": [human("q"), {**gpt("a"), "weight": 0.0}, human("r"), {**gpt("b"), "weight": 1.0}]}],
        [["u: q", "a-: a", "u: r", "a: b"]]),
    "ShareGPT with systemPrompt": ([{"systemPrompt": "s", "conversations": [human("q"), gpt("a")]}], [["s: s", *QA]]),
    "SystemPrompt": ([{"SystemPrompt": "s", "prompt": "q", "completion": "a"}], [["s: s", *QA]]),
    "flags of system messages": ([{key: value, "prompt": "q", "completion": "a"} for key, value in (
        ("system_message", True), ("systemMessage", 3), ("system_instruction", {"parts": [{"text": "s"}]}))], [QA] * 3),
    "a system column beside an event": ([{"system": "s", "system_message": "Order sent.", "prompt": "q", "completion": "a"}], [["s: s", *QA]]),
    "two texts of the system": ([{"systemPrompt": "s", "system_message": given, "prompt": "q", "completion": "a"} for given in ("s", "t", "None")],
                                [["s: s", *QA], REFUSED, ["s: s", *QA]]),
    "a system column that is no text": ([{"system_prompt": {"a": 1}, "prompt": "q", "completion": "a"}], [REFUSED]),
    "UltraChat": ([{"prompt": "q", "prompt_id": "i", "messages": [user("q"), answer("a")]}], [QA]),
    "Alpaca": ([{"instruction": "q", "input": "", "output": "a", "text": "Below is"}], [QA]),
    "Dolly": ([{"instruction": "q", "context": "c", "response": "a", "category": "x"}], [["u: q\n\nc", "a: a"]]),
    "HH-RLHF": ([{"chosen": "\n\nHuman: q\n\nAssistant: a", "rejected": "\n\nHuman: q\n\nAssistant: b"}], [REFUSED]),
    "UltraFeedback": (
        [{"prompt": "q", "chosen": [user("q"), answer("a")], "rejected": [user("q"), answer("b")], "messages": [user("q"), answer(given)]}
         for given in "ab"], [QA, REFUSED]),
    "KTO": ([{"prompt": [user("q")], "completion": [answer("a")], "label": label} for label in (True, False)], [QA, OUT]),
    "ORPO": ([{"prompt": "q", "chosen": [user("q"), answer("a")], "rejected": [user("q"), answer("b")]}], [REFUSED]),
    "OpenAI preferences": ([{"input": {"messages": [user("q")]}, "preferred_output": [answer("a")], "non_preferred_output": [answer("b")]}],
                           [REFUSED]),
    "HelpSteer": ([{"prompt": "q", "response": "a", "helpfulness": 0, "correctness": n} for n in (0, 1, 4)], [QA, QA, QA]),
    "the number of the right choice": ([{"prompt": "q", "completion": "a", "correct": n} for n in (0, 1, 2, 3)], [QA] * 4),
    "one number above 1 in a column of verdicts": ([{"prompt": "q", "completion": "a", "correct": n} for n in ("0", "1", "99")], [REFUSED, QA, QA]),
    "numbers below 1 in a column of verdicts": ([{"prompt": "q", "completion": "a", "accepted": n} for n in (0, 0.5, -1, 1)], [OUT, QA, QA, QA]),
    "verdicts with is_": (
        [{"prompt": "q", "completion": "a", key: n} for key in ("is_correct", "approved", "keep") for n in (0, 1, 2, -1, 0.5, 99)], [OUT, *[QA] * 5] * 3),
    "verdicts in metadata": ([{"prompt": "q", "completion": "a", "metadata": {"is_correct": n}} for n in (0, 0.5, 1, 2, 3)], [OUT, *[QA] * 4]),
    "graded 0 and 1": ([{"prompt": "q", "response": "a", "correctness": n} for n in (0, 1)], [OUT, QA]),
    "BeaverTails": ([{"prompt": "q", "response": "a", "is_safe": safe} for safe in (False, True)], [REFUSED, QA]),
    "WildChat": ([{"conversation": [user("q"), answer("a")], "toxic": False, "redacted": False, "language": "English"}], [QA]),
    "LMSYS arena": ([{"winner": "model_b", "conversation_a": [user("q"), answer("a")], "conversation_b": [user("q"), answer("b")]}], [REFUSED]),
    "No Robots": ([{"prompt": "q", "messages": [{"role": "system", "content": "s"}, user("q"), answer("a")]}], [["s: s", *QA]]),
    "Orca": ([{"id": "i", "system_prompt": "s", "question": "q", "response": "a"}], [["s: s", *QA]]),
    "GSM8K": ([{"question": "q", "answer": "48/2 = 24\n#### 24"}], [["u: q", "a: 48/2 = 24\n#### 24"]]),
    "MATH": ([{"problem": "q", "level": "Level 5", "solution": "a"}], [QA]),
    "OpenR1-Math": ([{"problem": "p", "answer": "1", "correctness_math_verify": [True, False], "messages": [user("q"), answer("a")]}], [QA]),
    "APIGen-MT": (
        [{"system": "s", "tools": json.dumps([FUNCTION]), "conversations": [human("q"), {"from": "function_call", "value": '{"name": "f", "arguments": {"x": 1}}'},
          {"from": "observation", "value": "1"}, gpt("a")]}], [["s: s", "u: q", "a: ", "t: 1", "a: a"]]),
    "Bespoke": ([{"system": "s", "conversations": [{"from": "user", "value": "q"}, {"from": "assistant", "value": "a"}]}], [["s: s", *QA]]),
    "SQuAD": ([{"context": "c", "question": "q", "answers": {"text": ["a"], "answer_start": [1]}}], [REFUSED]),
    "a question about a passage": ([{"question": "q", "passage": "the text", "answer": "a"}], [["u: q\n\nthe text", "a: a"]]),
    "RAG": ([{"question": "q", "contexts": ["c", "d"], "answer": "a"}], [REFUSED]),
    "MMLU": ([{"question": "q", "choices": ["w", "x"], "answer": 1}], [REFUSED]),
    "multiple choice by letter": ([{"question": "q", "options": {"A": "w", "B": "x"}, "answer": "B"}], [REFUSED]),
    "C-Eval": ([{"question": "q", "A": "w", "B": "x", "C": "y", "D": "z", "answer": "C"}], [REFUSED]),
    "SQL": ([{"question": "q", "context": "CREATE TABLE t", "answer": "SELECT"}], [["u: q\n\nCREATE TABLE t", "a: SELECT"]]),
    "MMLU as CSV": ([{"question": "q", "choices": "['w', 'x']", "answer": "B"}], [REFUSED]),
    "MedMCQA": ([{"question": "q", "opa": "w", "opb": "x", "opc": "y", "opd": "z", "answer": "B"}], [REFUSED]),
    "lettered options": ([{"question": "q", "option_a": "w", "option_b": "x", "answer": "B"}], [REFUSED]),
    "numbered choices": ([{"question": "q", "choice1": "w", "choice2": "x", "answer": "1"}], [REFUSED]),
    "ARC": ([{"question": "q", "choices": {"text": ["w", "x"], "label": ["A", "B"]}, "answer": "B"}], [REFUSED]),
    "settings as options": ([{"question": "q", "options": {"temperature": 0.7}, "answer": "a"}], [QA]),
    "a chat with settings": ([{"conversation": [user("q"), answer("a")], "options": {"temperature": 0.7}}], [QA]),
    "a chat with documents": ([{"dialog": [user("q"), answer("a")], "documents": ["d"]}], [QA]),
    "a chat with names of images": ([{"conversation": [user("q"), answer("a")], "images": ["x"]}], [QA]),
    "choices that the prompt has": (
        [{"prompt": "q A. w B. x", "options": options, "completion": "B"} for options in (["w", "x"], {"A": "w", "B": "x"}, "A. w\nB. x", "['w', 'x']")],
        [["u: q A. w B. x", "a: B"]] * 4),
    "choices that the prompt lacks": (
        [{"prompt": "q", "options": options, "completion": "B"} for options in (["w", "x"], {"A": "w", "B": "x"}, "A. w\nB. x", "['w', 'x']", {"text": ["w", "x"]})],
        [REFUSED] * 5),
    "choices of a task": ([{"instruction": "q", "choices": ["w", "x"], "output": given} for given in ("(b)", "1", "x", "It is B.")],
                          [REFUSED, REFUSED, ["u: q", "a: x"], ["u: q", "a: It is B."]]),
    "choices that are numbers": ([{"prompt": "1 + 2", "options": [3, 4], "completion": "3"}], [["u: 1 + 2", "a: 3"]]),
    "VQA": ([{"image": {"bytes": "x", "path": "p"}, "question": "q", "answer": "a"}], [REFUSED]),
    "images beside a chat": ([{"images": [{"bytes": "x", "path": "p"}], "messages": [user("q"), answer("a")]}], [REFUSED]),
    "MMMU": ([{"image_1": {"bytes": "x", "path": "p"}, "prompt": "q", "completion": "a"}], [REFUSED]),
    "a screenshot": ([{"screenshot": {"bytes": "x", "path": None}, "prompt": "q", "completion": "a"}], [REFUSED]),
    "an image under any name": ([{"page": {"bytes": "x", "path": "p"}, "prompt": "q", "completion": "a"}], [REFUSED]),
    "the second image": ([{"images": [None, {"bytes": "x", "path": "p"}], "prompt": "q", "completion": "a"}], [REFUSED]),
    "sound without a path": ([{"audio": {"array": [0.1], "sampling_rate": 8000}, "prompt": "q", "completion": "a"}], [REFUSED]),
    "a path of an image": ([{"image": {"path": "p"}, "prompt": "q", "completion": "a"}], [REFUSED]),
    "an image of a message": ([{"messages": [{**user("q"), key: value}, answer("a")]} for key, value in (
        ("images", ["iVBORw0KGgoAAAA"]), ("image", {"bytes": "x", "path": "p"}), ("image", "x.png"))], [REFUSED, REFUSED, QA]),
    "an image of a message that is left out": ([{"messages": [{**user("q"), "images": ["/9j/4AAQ"]}, answer("a", weight=0)]}], [OUT]),
    "a data URL": ([{"page": "data:image/png;base64,iVBOR", "prompt": "q", "completion": "a"}], [REFUSED]),
    "no image": ([{"image": value, "prompt": "q", "completion": "a"} for value in ({"bytes": None, "path": None}, [], "x.png")], [QA] * 3),
    "sizes and lists": ([{key: value, "prompt": "q", "completion": "a"} for key, value in (("file", {"bytes": 7, "path": "p"}), ("p", {"array": [1]}))],
                        [QA] * 2),
    "a marked image": ([{"prompt": "q", "completion": "a", "image": {"bytes": "x", "path": "p"}, **mark} for mark in ({"correct": False}, {})],
                       [OUT, REFUSED]),
    "an image beside a marked message": ([{"messages": [user("q"), answer("a", weight=0)], "image": {"bytes": "x", "path": "p"}}], [OUT]),
    "audio": ([{"audio": {"path": "p", "array": [0.1], "sampling_rate": 8000}, "prompt": "q", "completion": "a"}], [REFUSED]),
    "banking77": ([{"text": "q", "label": 11, "label_text": "a"}], [QA]),
    "NER": ([{"tokens": ["EU"], "ner_tags": [3]}], [REFUSED]),
    "translation": ([{"translation": {"en": "Hi", "de": "Hallo"}}], [REFUSED]),
    "a corrected answer": (
        [{"prompt": "q", "completion": "a", "corrected_answer": text} for text in ("b", "a", "", None)], [REFUSED, QA, QA, QA]),
    "grades": ([{"prompt": "q", "completion": "a", "quality": grade} for grade in ("bad", "medium", "high", "low")],
               [REFUSED, QA, QA, QA]),
    "bad grades and good ones": ([{"prompt": "q", "completion": "a", "quality": grade} for grade in ("bad", "high")], [REFUSED, QA]),
    **{f"the grade {grade} in {key}": ([{"prompt": "q", "completion": "a", key: text} for text in (grade, "high")], [kind, QA])
       for grade, key, kind in (("low", "answer_quality", REFUSED), ("low", "completion_rating", REFUSED), ("low", "rating", QA),
                                ("very low", "response_quality", REFUSED), ("very low", "quality", REFUSED))},
    **{f"numbers above 1 in {key}": ([{"prompt": "q", "completion": "a", key: n} for n in (0, 1, 0, 1, 10, 11)], marks)
       for key, marks in (("correct", [QA] * 6), ("incorrect", [QA, OUT, QA, OUT, QA, QA]), ("bad", [QA, OUT, QA, OUT, QA, QA]),
                          ("good", [OUT, QA, OUT, QA, QA, QA]))},
    "thumbs as numbers": ([{"prompt": "q", "completion": "a", "feedback": vote} for vote in (-1, 0, 1)], [REFUSED, QA, QA]),
    "counts of votes": ([{"prompt": "q", "completion": "a", "vote": votes} for votes in (-1, 12)], [QA, QA]),
    "results of tests": ([{"prompt": "q", "completion": "a", "execution_status": status} for status in ("failed", "success")], [REFUSED, QA]),
    "tests_passed": ([{"prompt": "q", "completion": "a", "tests_passed": passed} for passed in (False, True, 0)], [OUT, QA, QA]),
    "a label in metadata": ([{"prompt": "q", "completion": "a", "metadata": {"label": label}} for label in (False, True, "rejected", 0)],
                            [REFUSED, QA, REFUSED, REFUSED]),
    "a verdict about a claim": ([{"prompt": "q", "completion": f"It is {given}.", "verdict": given} for given in (False, True)],
                                [["u: q", "a: It is False."], ["u: q", "a: It is True."]]),
    "spam and ham": ([{"prompt": "q", "completion": "a", "label": label} for label in ("spam", "ham")], [QA, QA]),
    "a split": ([{"prompt": "q", "completion": "a", "split": part} for part in ("train", "test", "Validation", "dev", "extra")],
                [QA, OUT, OUT, OUT, QA]),
    "names of splits": ([{"prompt": "q", "completion": "a", "set": part} for part in ("train_sft", "test_sft", "test[:10%]", "tests of cars")],
                        [QA, OUT, OUT, QA]),
    "is_test": ([{"prompt": "q", "completion": "a", "is_test": value} for value in (True, False, None)], [OUT, QA, QA]),
    "pairs in long form": ([{"prompt": "q", "completion": "a", "type": value} for value in ("chosen", "rejected", "Rejected")], [QA, OUT, OUT]),
    "rejected loans": ([{"prompt": "q", "completion": "a", "loan": value} for value in ("paid", "rejected")], [QA, QA]),
    "trajectories": ([{"prompt": "q", "completion": "a", "success": value} for value in (True, False)], [QA, REFUSED]),
    "harmful answers": ([{"prompt": "q", "completion": "a", "is_harmful": value} for value in (True, False)], [REFUSED, QA]),
    "a split in metadata": ([{"prompt": "q", "completion": "a", "metadata": {"split": part}} for part in ("train", "test")], [QA, OUT]),
    "the test rows alone": ([{"prompt": "q", "completion": "a", "split": "test"}], [QA]),
}  # fmt: skip


@pytest.mark.parametrize("shape", SHAPES)
def test_a_published_shape_is_read_as_its_authors_meant_it(tmp_path, shape):
    rows, expected = SHAPES[shape]
    assert [outcome(row) for row in read(tmp_path, rows)] == expected


def test_a_split_is_named_by_its_value_and_counts_only_in_files_for_training(tmp_path):
    rows = [{"prompt": "q", "completion": "a", "split": part} for part in ("train", "test")]
    assert [row.marked_by for row in read(tmp_path, rows)] == ["", "split: test"]
    assert [row.unused_keys for row in read(tmp_path, rows, is_training=False)] == [("split",), ("split",)]


def test_choices_are_said_to_be_a_part_of_the_question(tmp_path):
    (row,) = read(tmp_path, [{"question": "q", "choices": ["w", "x"], "answer": "B"}])
    assert row.problem.endswith("choices is a part of the question: write a prompt that has it")


def test_tools_that_hermes_wrote_into_the_system_message_are_not_read_twice(tmp_path):
    chat = [
        {"from": "system", "value": "<tools> [{'name': 'f'}] </tools>"},
        human("q"),
        gpt("<tool_call>{}</tool_call>"),
    ]
    (row,) = read(tmp_path, [{"conversations": chat, "tools": json.dumps([FUNCTION])}])
    assert "tools" not in row.messages[0] and row.unused_keys == ("tools",)
    (row,) = read(tmp_path, [{"conversations": chat[1:], "tools": json.dumps([FUNCTION])}])
    assert row.messages[0]["tools"] and row.unused_keys == ()


def test_an_image_of_a_parquet_file_is_not_left_out_of_its_question(tmp_path):
    table = {"image": pa.array([{"bytes": b"x", "path": "p"}]), "prompt": ["q"], "completion": ["a"]}
    pq.write_table(pa.table(table), tmp_path / "t.parquet")
    (row,) = read_rows(tmp_path, ["t.parquet"], "auto")
    assert row.problem.startswith("image is not read: only text is supported")


def test_a_single_row_with_windows_line_ends_is_read(tmp_path):
    (tmp_path / "t.jsonl").write_bytes(b'{"prompt": "q", "completion": "a"}\r\n')
    assert [outcome(row) for row in read_rows(tmp_path, ["t.jsonl"], "auto")] == [QA]


def test_an_answer_that_is_the_text_of_reject_is_refused(tmp_path):
    rows = [
        {"prompt": "q", "completion": given, "chosen": "good", "reject": "bad one"} for given in ("bad one", "good")
    ]
    assert [outcome(row) for row in read(tmp_path, rows)] == [REFUSED, ["u: q", "a: good"]]


def test_a_text_about_tools_is_no_list_of_them_and_calls_are_checked_in_any_case(tmp_path):
    for system, is_written in (
        ("Never reveal what is between <tools> and </tools>.", True),
        ('<tools>{"name": "f"}</tools>', False),
    ):
        rows = [
            {"messages": [{"role": "system", "content": system}, user("q"), {"role": "assistant", "tool_calls": [{"name": name, "arguments": {"x": 1}}]},
                          {"role": "tool", "content": "1"}, answer("a")], "tools": [FUNCTION]}
            for name in ("f", "NOPE")
        ]  # fmt: skip
        right, wrong = read(tmp_path, rows)
        assert ("tools" in right.messages[0]) is is_written and ("tools" in to_prompt(rows[0])[0]) is is_written
        assert "'NOPE' is not one of the tools: f" in wrong.problem


def test_the_system_column_that_is_no_text_is_named(tmp_path):
    (row,) = read(tmp_path, [{"system_prompt": {"a": 1}, "prompt": "q", "completion": "a"}])
    assert row.problem == "the system column system_prompt is dict; expected text"


CORRECTED = [
    ({"messages": [user("q"), answer("a")], "corrected_answer": "b"}, {"completion": "corrected_answer"}, None),
    ({"conversations": [human("q"), gpt("a")], "edited_response": "b"}, {"output": "edited_response"}, None),
    ({"instruction": "q", "output": "a", "corrected_output": "b"}, {"output": "corrected_output"}, ["u: q", "a: b"]),
    ({"instruction": "q", "response": "a", "corrected_output": "b"}, {"output": "corrected_output"}, ["u: q", "a: b"]),
    ({"prompt": "q", "completion": "a", "corrected_answer": "b"}, {"completion": "corrected_answer"}, ["u: q", "a: b"]),
    ({"prompt": "q", "response": "a", "answer_revised": "b"}, {"completion": "answer_revised"}, ["u: q", "a: b"]),
]


@pytest.mark.parametrize(("row", "columns", "expected"), CORRECTED, ids=lambda value: str(value)[:60])
def test_the_columns_that_a_refusal_of_a_corrected_answer_names_learn_it(tmp_path, row, columns, expected):
    (refused,) = read(tmp_path, [row])
    assert "has another text than the answer" in refused.problem
    ((key, column),) = columns.items()
    assert (f"set data.columns: {{{key}: {column}}}" in refused.problem) is (expected is not None)
    assert ("write it into the chat" in refused.problem) is (expected is None)
    (again,) = read_rows(tmp_path, ["t.jsonl"], "auto", columns)
    assert outcome(again) == (expected or REFUSED)


NO_CORRECTION = [
    ("answer_edited", "no"), ("response_edited", "False"), ("answer_revised", "2024-03-01T10:00"), ("corrected_answer", "N/A"),
    ("corrected_answer", "-"), ("corrected_answer", "same"), ("corrected_answer", "no"), ("answer_revised", "01/03/2024"),
    ("corrected_answer", 5), ("correction", "none needed"), ("corrected_answer", "No correction needed."), ("correction", "looks good"),
    ("corrected_response", "Not needed!"), ("revised_answer", "no changes required"),
]  # fmt: skip
A_CORRECTION = [
    ("yes", "no"), ("Yes, it is.", "No"), ("B", "C"), ("4", 5), ("1990-01-02", "1990-02-01"), ("a", "b"),
    *(("bad", word) for word in ("good", "fine", "ok", "okay", "valid")),
]  # fmt: skip


def test_flags_dates_and_blanks_correct_no_answer(tmp_path):
    rows = [{"prompt": "q", "completion": "a text", key: value} for key, value in NO_CORRECTION]
    assert all(row.messages for row in read(tmp_path, rows))
    rows = [{"prompt": "q", "completion": given, "corrected_answer": value} for given, value in A_CORRECTION]
    assert [outcome(row) for row in read(tmp_path, rows)] == [REFUSED] * len(rows)


def test_an_answer_that_the_recipe_chose_is_learned_beside_corrections(tmp_path):
    row = {"question": "q", "answer": "a", "corrected_answer": "b", "revised_answer": "c"}
    read(tmp_path, [row])
    for chosen, given in (("answer", "a: a"), ("corrected_answer", "a: b")):
        (found,) = read_rows(tmp_path, ["t.jsonl"], "auto", {"prompt": "question", "completion": chosen})
        assert outcome(found) == ["u: q", given]


IGNORED = [
    ({"quality": "bad"}, "quality"), ({"metadata": {"label": "rejected"}}, "metadata"), ({"label": "flase"}, "label"), ({"loss": 0.3}, "loss"),
    ({"corrected_answer": "b"}, "corrected_answer"), ({"image": {"bytes": "x", "path": "p"}}, "image"),
    ({"messages": [{**user("q"), "images": ["/9j/4AAQ"]}, answer("a")]}, "images"), ({"photo": "x.png", "prompt": "<image> q"}, "photo"),
]  # fmt: skip


@pytest.mark.parametrize(("extra", "key"), IGNORED, ids=lambda value: str(value)[:40])
def test_a_key_that_the_recipe_ignores_is_not_looked_at(tmp_path, extra, key):
    (row,) = read(tmp_path, [{"prompt": "q", "completion": "a", **extra}])
    assert outcome(row) == REFUSED
    (row,) = read_rows(tmp_path, ["t.jsonl"], "auto", ignore=[key])
    assert row.messages and not {key, f"messages.{key}"} & set(row.unused_keys)


def test_refusals_name_the_key_to_ignore(tmp_path):
    for extra, key in (({"quality": "bad"}, "quality"), ({"metadata": {"quality": "bad"}}, "metadata.quality")):
        (row,) = read(tmp_path, [{"prompt": "q", "completion": "a", **extra}])
        assert f"name {key} in data.ignore" in row.problem
        (row,) = read_rows(tmp_path, ["t.jsonl"], "auto", ignore=[key])
        assert outcome(row) == QA


def test_a_key_of_a_message_is_ignored_and_rows_without_it_are_left_out_as_before(tmp_path):
    rows = [{"messages": [user("q"), answer("a", **mark)]} for mark in ({"quality": "bad"}, {"weight": 0}, {})]
    assert [outcome(row) for row in read(tmp_path, rows)] == [REFUSED, OUT, QA]
    found = read_rows(tmp_path, ["t.jsonl"], "auto", ignore=["quality"])
    assert [outcome(row) for row in found] == [QA, OUT, QA]


def test_data_diff_counts_the_rows_that_training_reads(tmp_path):
    read(
        tmp_path,
        [{"prompt": f"q{n}", "completion": "a", "split": part} for n, part in enumerate(("train_sft", "test_sft"))],
    )
    version = read_files(tmp_path, ["t.jsonl"], "auto", {})
    assert (version.read, len(version.prompts), version.malformed) == (2, 1, 0)


def test_the_way_to_score_rows_of_a_split_is_named():
    for mark in ("split: test", "metadata.split: test", "is_test: True"):
        assert split_hint({mark: 40}).endswith("put them into a file of data.heldout")
    assert split_hint({"is_correct: no": 40}) == ""
