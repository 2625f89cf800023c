"""Judgements beside an answer that are the class which the answer names, as in sets for graders and moderators."""

import json

import pytest

from loraflow.data.files.readers import read_rows

LEARNED, OUT, REFUSED = "learned", "left out", "refused"


def outcomes(folder, rows):
    (folder / "t.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return [
        LEARNED if row.messages else OUT if row.is_marked_false else REFUSED
        for row in read_rows(folder, ["t.jsonl"], "auto")
    ]


def rows_of(key, pairs, prompt="q"):
    return [{"prompt": prompt, "completion": answer, key: value} for answer, value in pairs]


GRADES = [
    [("incorrect", False), ("correct", True)],
    [("Incorrect. 2 + 2 is 4.", False), ("Well done!", True)],
    [("false", "false"), ("true", "true")],
    [("0", 0), ("1", 1)],
    [("No, it is 4.", "no"), ("Yes.", "yes")],
    [("The student's answer is wrong.", 0), ("The answer is correct.", 1)],
]


@pytest.mark.parametrize("key", ["correctness", "review_result", "answer_correctness"])
@pytest.mark.parametrize("pairs", GRADES, ids=str)
def test_the_grade_that_a_grader_answers_is_learned(tmp_path, key, pairs):
    assert outcomes(tmp_path, rows_of(key, pairs)) == [LEARNED, LEARNED]


@pytest.mark.parametrize("key", ["correctness", "review_result", "answer_correctness"])
@pytest.mark.parametrize("value", [False, 0, "no", "False"])
def test_a_wrong_answer_is_left_out_if_other_answers_name_no_grade(tmp_path, key, value):
    assert outcomes(tmp_path, rows_of(key, [("no", value), ("Paris", 1)])) == [OUT, LEARNED]
    assert outcomes(tmp_path, rows_of(key, [("It is false.", value), ("Paris", 1)])) == [OUT, LEARNED]


def test_a_verdict_as_true_or_false_is_the_class_that_the_answer_is(tmp_path):
    pairs = [("false", False), ("true", True)]
    assert outcomes(tmp_path, rows_of("tests_passed", pairs)) == [LEARNED, LEARNED]
    assert outcomes(tmp_path, rows_of("tests_passed", [*pairs, ("x = 1", True)])) == [OUT, LEARNED, LEARNED]


SAFETY = ["safe", "is_safe", "response_is_safe", "is_response_safe", "response_safe"]
MODERATED = [("unsafe", "safe"), ("No.", "Yes."), ("harmful", "harmless"), ("not safe", "safe"), ("unsafe\nS1", "safe")]
VALUES = [(False, True), ("False", "True"), ("no", "yes"), (0, 1), ("0", "1")]


@pytest.mark.parametrize("key", SAFETY)
@pytest.mark.parametrize("words", MODERATED, ids=str)
def test_the_class_that_a_moderator_answers_is_learned(tmp_path, key, words):
    for values in VALUES:
        rows = rows_of(key, zip(words, values, strict=True), "Is this response safe?")
        assert outcomes(tmp_path, rows) == [LEARNED, LEARNED], values


@pytest.mark.parametrize("key", SAFETY)
@pytest.mark.parametrize("values", VALUES, ids=str)
def test_an_unsafe_answer_is_refused_in_every_spelling_and_never_left_out(tmp_path, key, values):
    assert outcomes(tmp_path, rows_of(key, zip("ab", values, strict=True))) == [REFUSED, LEARNED]


def test_true_of_harmful_says_what_false_says_of_safe(tmp_path):
    for values in ((True, False), (1, 0), ("yes", "no")):
        assert outcomes(tmp_path, rows_of("is_harmful", zip("ab", values, strict=True))) == [REFUSED, LEARNED]
        words = ("unsafe", "safe")
        assert outcomes(tmp_path, rows_of("is_harmful", zip(words, values, strict=True))) == [LEARNED, LEARNED]
    assert outcomes(tmp_path, rows_of("is_safe", [("a", 0), ("b", 3)])) == [LEARNED, LEARNED], "a score"
    decided = [("a", "approved"), ("b", "correct"), ("c", "maybe")]
    assert outcomes(tmp_path, rows_of("harmful", decided)) == [LEARNED, REFUSED, LEARNED], "a decision; a judgement"


NOT_DONE = ["review", "evaluation", "annotation", "feedback", "quality_check", "rating", "verdict", "assessment"]


@pytest.mark.parametrize("key", NOT_DONE)
@pytest.mark.parametrize("value", [False, "False", "false"])
def test_false_where_something_was_not_done_is_no_judgement(tmp_path, key, value):
    message = {"role": "assistant", "content": "a", key: value}
    rows = [
        {"prompt": "q", "completion": "a", key: value},
        {"prompt": "q", "completion": "a", "metadata": {key: value}},
        {"messages": [{"role": "user", "content": "q"}, message]},
    ]
    assert outcomes(tmp_path, rows) == [LEARNED] * 3


@pytest.mark.parametrize("between", ["med", "mid", "meh", "so-so", "average"])
@pytest.mark.parametrize(("key", "words"), [("quality", ("bad", "good")), ("rating", ("low", "high"))])
def test_grades_with_a_word_between_good_and_bad_are_learned_and_asked_about(tmp_path, between, key, words):
    rows = rows_of(key, zip("abcd", (*words, between, "fair"), strict=True))
    assert outcomes(tmp_path, rows) == [LEARNED] * 4
    (first, *_) = read_rows(tmp_path, ["t.jsonl"], "auto")
    assert first.told == ((key, words[0]),)


JUDGED = [
    ("verdict", ["WRONG_ANSWER", "OK", "TIME_LIMIT_EXCEEDED"], [REFUSED, LEARNED, REFUSED]),
    ("verdict", ["Wrong Answer", "Accepted"], [REFUSED, LEARNED]),
    ("status", ["Wrong Answer", "Accepted"], [REFUSED, LEARNED]),
    ("execution_status", ["failed", "timeout", "error", "success"], [REFUSED, REFUSED, REFUSED, LEARNED]),
    ("status", ["rejected", "timeout", "error"], [LEARNED] * 3),
    ("solution_is_valid", ["No", False, "Yes", "Incomplete"], [OUT, OUT, LEARNED, REFUSED]),
    ("answer_correctness", [0, 1], [OUT, LEARNED]),
    ("answer_correctness", [0, 1, 4], [LEARNED] * 3),
]


@pytest.mark.parametrize(("key", "values", "expected"), JUDGED, ids=str)
def test_judges_of_programs_and_solutions_are_heard(tmp_path, key, values, expected):
    assert outcomes(tmp_path, rows_of(key, [(f"a{n}", value) for n, value in enumerate(values)])) == expected
