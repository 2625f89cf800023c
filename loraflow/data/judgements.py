"""What a column beside an answer says about it: verdicts (`correct: no`), and opinions and states in words (`quality: bad`).

A word such as `rejected` may be about anything: a loan, an order, a film. So a word alone never leaves a row out.
"""

from __future__ import annotations

import re
from collections.abc import Mapping

from pydantic import JsonValue

from loraflow.data.labels import (
    answers_of,
    as_number,
    is_absent,
    judges_badly,
    label_side,
    plain,
    questions_of,
    reads_like_a_judgement,
)
from loraflow.data.mark_names import (
    FALSE_IS_WRONG,
    GOOD,
    GRADES,
    HARM_LABEL,
    HELD_OUT_FLAGS,
    OPINIONS,
    REACTIONS,
    RECORD_STATES,
    RUNS,
    SAFETY,
    SPLITS,
    STATES,
    TRUE_IS_BAD,
    TRUE_OR_FALSE,
    WORD_BAD_VERDICTS,
    WORD_VERDICTS,
    Beside,
    Judgement,
    is_answer,
    judges_the_answer,
    may_be_false,
    opinion_name,
    shown,
    values_at,
)

# Opinions and states that mark a wrong answer, as `plain` returns them.
_WRONG = frozenset({
    "rejected", "reject", "incorrect", "wrong", "bad", "invalid", "undesirable", "not correct", "not right", "not good",
    "not accepted", "not approved", "disapproved", "unacceptable", "discarded", "deleted", "removed", "thumbs down",
    "thumbsdown", "thumb down", "downvote", "downvoted", "dislike", "disliked", "unusable", "👎", "❌",
    # what judges of programs say
    "wrong answer", "runtime error", "compile error", "compilation error", "time limit exceeded", "memory limit exceeded",
    "output limit exceeded", "idleness limit exceeded", "presentation error",
})  # fmt: skip
# Results of running an answer that mark it as wrong, beside "failed".
_FAILED_RUNS = frozenset({"error", "errored", "timeout", "timed out", "time out", "crash", "crashed", "exception"})
_DOWN = frozenset(
    {"down", "thumbs down", "thumbsdown", "thumb down", "downvote", "downvoted", "dislike", "disliked", "👎", "❌"}
)
_UP = frozenset({"up", "thumbs up", "thumbsup", "thumb up", "upvote", "upvoted", "like", "liked", "👍", "✅"})
# Between right and wrong, or a grade: no evidence that a column with `bad` is about something else than the answer.
_BETWEEN = frozenset({
    "neutral", "unsure", "unknown", "unclear", "mixed", "partial", "partly correct", "partially correct", "n/a",
    "normal", "medium", "moderate", "average", "mediocre", "fair", "decent", "high", "very high", "low", "very low",
    "very good", "very bad", "very poor", "great", "excellent", "perfect", "best", "better", "satisfactory",
    "unsatisfactory", "terrible", "success", "successful", "succeeded", "med", "mid", "middle", "meh", "so so", "middling",
    "passable", "borderline", "avg", "partially accepted",
})  # fmt: skip
_LOW = frozenset({"very low", "very bad", "very poor", "terrible", "unsatisfactory"})  # wrong in a column of grades
_LOW_IS_A_QUESTION = frozenset({"quality", "rating", "grade"})  # `low` may be about anything of the row in these
_COUNTS = frozenset({"correct", "accepted"})  # verdicts that may also be the number of the right choice, or a count
# What a column of verdicts says of an answer that is not finished.
_NOT_DONE = frozenset({
    "incomplete", "not complete", "unfinished", "not finished", "not solved", "problem not solved", "unsolved", "truncated",
    "partial", "partly", "partly correct", "partially correct", "half",
})  # fmt: skip
_HELD_OUT = frozenset({
    "test", "testing", "tests", "validation", "valid", "val", "dev", "development", "eval", "evaluation", "held out",
    "heldout", "holdout", "hold out",
})  # fmt: skip
_TRAINED_ON = frozenset({"train", "training"})
_OF_ARGILLA = frozenset({"default", "edited", "validated", "submitted", "pending", "draft", "completed"})


def verdict(name: str, here: tuple[str, ...], value: JsonValue, beside: Beside) -> bool | None:
    """Return what a judgement says about an answer; None if it is none: a text, a number of votes, or the answers' class.

    Args:
        name: the key's normal name.
        here: the keys that lead to the value.
    """
    side = label_side(value)
    is_word = isinstance(value, bool) or (isinstance(value, str) and not value.strip().isdigit())
    if side is None or side == "other" or (name in WORD_VERDICTS | WORD_BAD_VERDICTS and not is_word):
        return None
    if _is_count(here, value, beside, least=2):
        return None
    # `correct: no` beside the answer no is a mark, unless the column has the answer in every row
    labels = beside.labels if isinstance(value, str | bool) and is_answer(str(value), beside.said) else None
    if labels is not None and not labels.some_row(("not the answer", *here), lambda row: _differs(row, here)):
        return None
    return side is (name in GOOD)


def is_bad_word(text: str) -> bool:
    """Tell whether a short text says that something is wrong or poor."""
    word = plain(text)
    return word in _WRONG | _LOW | _NOT_DONE | {"unsafe", "low"} or judges_badly(word)


def unclear_verdict(name: str, here: tuple[str, ...], value: JsonValue, beside: Beside) -> str | None:
    """Return the problem of a judgement with a third value, such as `is_correct: falsch` or `solution_is_valid: Incomplete`.

    None if there is none. The column must have true or false in another row: otherwise it may hold texts. Of `correct: 0`,
    a single number above 1 in the column leaves open whether it is a judgement.
    """
    if as_number(value) == 0 and _is_count(here, value, beside, least=1):
        return None if _is_count(here, value, beside, least=2) else _unclear(here, value)
    if not isinstance(value, str) or not (judges_badly(value) or plain(value) in _NOT_DONE):
        return None
    if name not in GOOD or is_answer(value, beside.said) or beside.labels is None:
        return None
    has_sides = beside.labels.some_row(("sides", *here), lambda row: isinstance(label_side(row.get(here[0])), bool))
    return _unclear(here, value) if has_sides else None


def _is_count(here: tuple[str, ...], value: JsonValue, beside: Beside, least: int) -> bool:
    """Tell whether a number may be a count, or that of a choice: its column has so many different numbers above 1."""
    is_number = str(value).strip().isdigit() or (isinstance(value, float) and value.is_integer())
    if not is_number or here[-1].lower() not in _COUNTS or beside.labels is None:
        return False
    above = set[float]()

    def holds(row: dict[str, JsonValue]) -> bool:
        above.update(number for number in _numbers_at(row, here) if number > 1)
        return len(above) >= least

    return beside.labels.some_row((f"{least} above 1", *here), holds)


def _unclear(here: tuple[str, ...], value: JsonValue) -> str:
    got = repr(value[:60]) if isinstance(value, str) else repr(value)
    return (
        f"{'.'.join(here)} {got} may mark the answer as wrong, or be a class of the row: if it is a class, "
        f"rename the column or name {'.'.join(here)} in data.ignore; if it is a mark, write it as is_correct, train or "
        "weight, whose false or 0 leaves the answer out"
    )


def label_inside(here: tuple[str, ...], value: JsonValue, beside: Beside) -> Judgement | None:
    """Return what a `label` inside an object such as `metadata` says: a word says what an opinion does.

    0 is unclear in a column of 0 and 1, unless each of them stands beside an answer of its own. Other numbers are classes.
    """
    number, labels = as_number(value), beside.labels
    if isinstance(value, str | bool) or number != 0 or labels is None:
        return opinion("human_label", here, value, beside)
    if not _is_flag(number, here, value, beside) or labels.are_classes(
        ".".join(here), lambda row: values_at(row, here)
    ):
        return None
    return Judgement(None, _unclear(here, value))


def opinion(name: str, here: tuple[str, ...], value: JsonValue, beside: Beside) -> Judgement | None:
    """Return what an opinion or a state such as `quality: bad` says about an answer; None if it says nothing.

    It leaves the answer out only if it cannot be about anything else: `vote: down`, `answer_quality: bad`. Otherwise it is
    a class of the row if the answer names it, or other rows have values that judge nothing; else it is unclear.
    """
    is_direct, inner = judges_the_answer(name), opinion_name(name)
    if not (is_direct or name in OPINIONS | STATES or inner in SAFETY):
        return None
    text = _word(name, here, value, beside)
    if text is None or (text == "false" and inner in TRUE_OR_FALSE and names_the_class(inner, here, value, beside)):
        return None
    if text == "false" and inner in FALSE_IS_WRONG:
        return Judgement(False, shown(here, value))
    is_down = name in REACTIONS and text in _DOWN
    is_wrong = text in _WRONG or is_down or text == "false"
    if not is_wrong and not _is_unclear(name, text):
        is_right = (name in REACTIONS and text in _UP) or (is_direct and label_side(value) is True)
        return Judgement(True, shown(here, value)) if is_right else None
    if inner not in TRUE_OR_FALSE and any(has_word(answer, text) for answer in beside.said):
        return None
    if is_down or (is_direct and is_wrong) or (name in RECORD_STATES and text == "discarded"):
        return Judgement(False, shown(here, value))
    if not is_direct and inner != HARM_LABEL and _is_class(name, here, text, beside):
        return None
    return Judgement(None, _unclear(here, value))


def _is_unclear(name: str, text: str) -> bool:
    """Tell whether a word of an opinion may say that the answer is wrong."""
    is_low = text in _LOW or (text == "low" and name not in _LOW_IS_A_QUESTION)
    if text == "-1" or (opinion_name(name) in GRADES and is_low) or (name in RUNS and text in _FAILED_RUNS):
        return True
    return name not in STATES and judges_badly(text)


def _is_class(name: str, here: tuple[str, ...], text: str, beside: Beside) -> bool:
    """Tell whether a word is a class of the row, by the other rows of the file or by what is asked for."""
    labels = beside.labels
    if labels is None:
        return False
    if labels.some_row(("other", text, *here), lambda row: _has_other(name, row, here, text)):
        return True
    return text not in ("false", "-1") and is_asked_for(text, here, beside)


def _word(name: str, here: tuple[str, ...], value: JsonValue, beside: Beside) -> str | None:
    """Return the word of an opinion as `plain` does; None if it is a measurement, or false where that judges nothing.

    The word of `is_harmful: true` is false.
    """
    inner, number = opinion_name(name), as_number(value)
    if inner == HARM_LABEL:
        return "false" if isinstance(value, str) and _UNSAFE.fullmatch(plain(value)) else None
    if inner in TRUE_OR_FALSE and number is not None:
        is_bad = number == float(inner in TRUE_IS_BAD) and _is_flag(number, here, value, beside)
        return "false" if is_bad else "true" if number in (0, 1) else None
    if name in REACTIONS and number == -1:
        return "-1"
    if isinstance(value, bool):
        value = str(value)
    if not isinstance(value, str):
        return None
    text = plain(value)
    return None if text == "false" and not may_be_false(name) else text


def _is_flag(number: float, here: tuple[str, ...], value: JsonValue, beside: Beside) -> bool:
    """Tell whether 0 or 1 says false or true: a digit only if the column has nothing but 0 and 1, and has both.

    Otherwise 0 may be the lowest grade.
    """
    if isinstance(value, bool) or (isinstance(value, str) and not any(sign.isdigit() for sign in value)):
        return True
    labels, other = beside.labels, 1.0 - number
    if labels is None or not labels.some_row((f"is {other}", *here), lambda row: other in _numbers_at(row, here)):
        return False
    return not labels.some_row(("above 1", *here), lambda row: bool(_numbers_at(row, here) - {0.0, 1.0}))


def part_of_dataset(name: str, here: tuple[str, ...], value: JsonValue, beside: Beside) -> Judgement | None:
    """Return that a row of a training file is not learned, because its column `split` says test, or `is_test` is true.

    A column without the value train says nothing: a file that consists of test rows was chosen for training.
    """
    labels = beside.labels
    if name not in SPLITS | HELD_OUT_FLAGS or labels is None or not labels.is_training:
        return None
    if _is_trained_on(name, value) is not False:
        return None
    if not labels.some_row(("train", *here), lambda row: any(_is_trained_on(name, v) for v in values_at(row, here))):
        return None
    return Judgement(False, shown(here, value))


def _is_trained_on(name: str, value: JsonValue) -> bool | None:
    """Tell whether a split is for training: also `train_sft` and `test[:10%]`; None if it is no split."""
    if name in HELD_OUT_FLAGS:
        side = label_side(value)
        return not side if isinstance(side, bool) else None
    if not isinstance(value, str):
        return None
    words = {plain(value), re.split(r"[-_\[.]", value.strip().lower(), maxsplit=1)[0]}
    return True if words & _TRAINED_ON else False if words & _HELD_OUT else None


def rejected_of_pair(here: tuple[str, ...], value: JsonValue, beside: Beside) -> Judgement | None:
    """Return that an answer is the rejected one of its pair, if a column says chosen of some rows and rejected of others."""
    labels = beside.labels
    if labels is None or not isinstance(value, str) or plain(value) != "rejected":
        return None
    if not labels.some_row(("chosen", *here), lambda row: _is_chosen(row.get(here[0]))):
        return None
    return Judgement(False, shown(here, value))


def _is_chosen(value: JsonValue) -> bool:
    return isinstance(value, str) and plain(value) == "chosen"


def _numbers_at(row: dict[str, JsonValue], here: tuple[str, ...]) -> set[float]:
    return {number for value in values_at(row, here) if (number := as_number(value)) is not None}


def _differs(row: dict[str, JsonValue], here: tuple[str, ...]) -> bool:
    said = tuple(plain(answer) for answer in answers_of(row))
    return any(
        not is_absent(value) and not (isinstance(value, str | bool) and is_answer(str(value), said))
        for value in values_at(row, here)
    )


def _has_other(name: str, row: dict[str, JsonValue], here: tuple[str, ...], text: str) -> bool:
    """Tell whether a row has a value in a column that judges nothing, such as paid or open."""
    for value in values_at(row, here):
        if is_absent(value) or isinstance(value, dict | list):
            continue
        if text == "-1" and as_number(value) in (-1, 0, 1):
            continue
        word = plain(value) if isinstance(value, str) else ""
        is_known = word in _WRONG | _DOWN | _UP | _BETWEEN or (text == "discarded" and word in _OF_ARGILLA)
        is_known = is_known or (name in RUNS and word in _FAILED_RUNS)
        if not is_known and label_side(value) == "other" and not reads_like_a_judgement(value):
            return True
    return False


# Whether a judgement beside an answer is the class that the answer names, as in sets for graders and moderators.
#
# Beside the answer "Incorrect: 2 + 2 is 4", `correctness: false` is no mark: the answer is a grade, and the grade is right.


def _words(text: str) -> re.Pattern[str]:
    return re.compile(rf"(?<!\w)(?:{text})(?!\w)")


_WRONG_CLASSES = _words("false|incorrect|wrong|invalid|inaccurate|not (?:correct|right|true|valid|accurate)")
_RIGHT = _words("true|correct|right|valid|accurate")
_UNSAFE = _words("unsafe|not safe|harmful|dangerous|toxic|violat(?:es|ing|ion)")
_SAFE = _words("safe|harmless|not (?:unsafe|harmful|dangerous|toxic)")
_HARMLESS = _words(
    "safe|harmless|unharmful|benign|clean|non toxic|not (?:unsafe|harmful|dangerous|toxic)"
)  # of a label
# Nobody answers another question than one for a grade or a class with these.
_GRADE = _words("incorrect|wrong|not correct")
_CLASS = _words("unsafe|not safe|harmful")
_FIRST = re.compile(r"(?:yes|no|true|false|correct|incorrect|right|wrong)(?!\w)")


def names_the_class(name: str, here: tuple[str, ...], value: JsonValue, beside: Beside) -> bool:
    """Tell whether a value that says false is the class of the row, because its answer names it.

    An answer that begins with "incorrect" or "unsafe" is a grade or a class. "No" and other words may be the wrong answer
    to a question, so they count only if the answer of each row of the file names the row's value.

    Args:
        name: the opinion's name, such as `correctness` or `is_safe`.
    """
    first = _CLASS if name in SAFETY else _GRADE
    if any(first.match(answer) or (name in SAFETY and _is_yes_or_no(answer)) for answer in beside.said):
        return True
    if beside.labels is None or not _is_named(name, value, beside.said):
        return False
    return not beside.labels.some_row(("not named", *here), lambda row: _classes_differ(name, row, here))


def is_asked_for(text: str, here: tuple[str, ...], beside: Beside) -> bool:
    """Tell whether a word such as `low` is an attribute that the questions ask for: "Write low quality code".

    All rows of the file with this word must name it in the question or answer.
    """
    if beside.labels is None or beside.row is None or not _asks_for(text, beside.row):
        return False
    return not beside.labels.some_row(
        ("not asked for", text, *here),
        lambda row: (
            any(isinstance(value, str) and plain(value) == text for value in values_at(row, here))
            and not _asks_for(text, row)
        ),
    )


def has_word(text: str, word: str) -> bool:
    """Tell whether a text contains a word; both as `plain` returns them."""
    return re.search(rf"(?<!\w){re.escape(word)}(?!\w)", text) is not None


def _asks_for(text: str, row: Mapping[str, JsonValue]) -> bool:
    return any(has_word(plain(said), text) for found in (questions_of(row), answers_of(row)) for said in found)


def _is_yes_or_no(answer: str) -> bool:
    return answer.rstrip(".!") in ("yes", "no")


def _side(answer: str) -> bool | None:
    """Return true or false if an answer is such a word, or begins with one: "no.", "yes, because …"."""
    side = label_side(answer.rstrip(".!"))
    if not isinstance(side, bool):
        found = _FIRST.match(answer)
        side = label_side(found[0]) if found else None
    return side if isinstance(side, bool) else None


def _is_named(name: str, value: JsonValue, said: tuple[str, ...]) -> bool:
    if name == HARM_LABEL:
        words = _UNSAFE if _UNSAFE.fullmatch(plain(str(value))) else _HARMLESS
        return any(words.search(answer) for answer in said)
    side = label_side(value)
    is_bad = side is (name in TRUE_IS_BAD)
    if name in SAFETY:
        words = _UNSAFE if is_bad else _SAFE
    else:
        words = _WRONG_CLASSES if is_bad else _RIGHT
    return any(_side(answer) is side or words.search(answer) for answer in said)


def _is_harm(value: JsonValue) -> bool:
    """Tell whether a value is a word for unsafe or safe."""
    word = plain(value) if isinstance(value, str) else ""
    return any(words.fullmatch(word) for words in (_UNSAFE, _HARMLESS))


def _classes_differ(name: str, row: dict[str, JsonValue], here: tuple[str, ...]) -> bool:
    said = tuple(plain(answer) for answer in answers_of(row))
    values = [
        value
        for value in values_at(row, here)
        if (_is_harm(value) if name == HARM_LABEL else isinstance(label_side(value), bool))
    ]
    return any(not _is_named(name, value, said) for value in values)
