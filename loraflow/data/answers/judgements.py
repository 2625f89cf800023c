"""What a column beside an answer says about it: verdicts (`correct: no`), and opinions in words (`answer_quality: bad`).

A word such as `rejected` may be about anything: a loan, an order, a film. So it leaves a row out only where the column's
name says that it is about the answer. Other columns are a question to the user (loraflow/data/answers/unread_values.py).
"""

import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import NamedTuple

from pydantic import JsonValue

from loraflow.data.answers.labels import (
    LABEL_FALSE,
    Labels,
    answers_of,
    as_number,
    is_absent,
    judges_badly,
    label_side,
    plain,
)
from loraflow.data.answers.mark_names import (
    GOOD,
    GRADES,
    HARM_LABEL,
    HELD_OUT_FLAGS,
    JUDGEMENTS,
    OPINIONS,
    REACTIONS,
    RECORD_STATES,
    RUNS,
    SAFETY,
    SOLVED,
    SPLITS,
    STATES,
    SUCCESS,
    TRUE_IS_BAD,
    WITHOUT_NUMBERS,
    normal_name,
    opinion_name,
)
from loraflow.data.cell_values import objects_of

_DOWN = frozenset(
    {"down", "thumbs down", "thumbsdown", "thumb down", "downvote", "downvoted", "dislike", "disliked", "👎", "❌"}
)
# What judges of programs say, as `plain` returns it.
_OF_PROGRAMS = frozenset({
    "wrong answer", "runtime error", "compile error", "compilation error", "time limit exceeded", "memory limit exceeded",
    "output limit exceeded", "idleness limit exceeded", "presentation error",
})  # fmt: skip
# Opinions that mark a wrong answer.
_WRONG = (LABEL_FALSE - {"false", "not true"}) | (_DOWN - {"down"}) | {
    "invalid", "unacceptable", "discarded", "deleted", "removed", "unusable",
} | _OF_PROGRAMS  # fmt: skip
_WRONG_ANSWER = _OF_PROGRAMS | {"wrong", "incorrect", "not correct"}  # words that are about answers alone
# Results of running an answer that mark it as wrong, beside "failed".
FAILED_RUNS = frozenset({"error", "errored", "timeout", "timed out", "time out", "crash", "crashed", "exception"})
_UP = frozenset({"up", "thumbs up", "thumbsup", "thumb up", "upvote", "upvoted", "like", "liked", "👍", "✅"})
_LOW = frozenset({"low", "very low", "very bad", "very poor", "terrible", "unsatisfactory"})
_HIGH = frozenset({
    "great", "excellent", "perfect", "very good", "high", "very high", "success", "successful", "succeeded", "valid", "pass",
    "passed", "ok", "okay", "acceptable", "✓", "✔",
})  # fmt: skip
_COUNTS = frozenset({"correct", "accepted"})  # verdicts that may also be the number of the right choice, or a count
# What a column of verdicts says of an answer that is not finished.
_NOT_DONE = frozenset({
    "incomplete", "not complete", "unfinished", "not finished", "not solved", "problem not solved", "unsolved", "truncated",
    "partial", "partly", "partly correct", "partially correct", "half",
})  # fmt: skip
# Opinions of which false is one. Of the others, it may be the verdict about a claim, or say that something was not done.
_FALSE_IS_WRONG = frozenset({"quality", "human_label", "test_result", "verification_result", "validation_result"})
_TRAJECTORY = frozenset({"messages", "conversations", "trajectory", "patch", "model_patch"})
_FALSE_IS_WRONG_OF_ANSWER = frozenset({"quality", "verdict", "judgement", "judgment"})
HELD_OUT = frozenset({
    "test", "testing", "tests", "validation", "valid", "val", "dev", "development", "eval", "evaluation", "held out",
    "heldout", "holdout", "hold out",
})  # fmt: skip
TRAINED_ON = frozenset({"train", "training"})


class Judgement(NamedTuple):
    """What a key says about an answer."""

    is_learned: bool | None  # None: it may say that it is wrong
    text: str  # the key and its value; what is unclear


@dataclass(frozen=True)
class Beside:
    """What a key stands beside."""

    answers: tuple[str, ...] = ()  # of the row, or the message
    labels: Labels | None = None  # knows the other rows of the file; None for a message
    row: Mapping[str, JsonValue] = field(default_factory=dict)  # the row or message, with the columns that are read
    column: str = ""  # of a message
    role: tuple[str, JsonValue] = ("", None)  # of a message: its key and value

    @cached_property
    def plain_answers(self) -> tuple[str, ...]:
        """The answers as `plain` returns them. Few keys need them, and long texts take time."""
        return tuple(map(plain, self.answers))

    @property
    def is_trajectory(self) -> bool:
        """Tell whether the row is the work of an agent or a conversation, and no table of tickets."""
        return self.labels is None or not _TRAJECTORY.isdisjoint(self.row) or isinstance(self.row.get("prompt"), list)

    def some_row(self, question: tuple[str, ...], holds: Callable[[dict[str, JsonValue]], bool]) -> bool:
        """Tell whether something holds for a row of the file; without a file, it does not."""
        return self.labels is not None and self.labels.some_row(question, holds)


def shown(here: tuple[str, ...], value: JsonValue) -> str:
    """Return a key and its value for people."""
    text = value if isinstance(value, str) else "" if isinstance(value, dict | list) else repr(value)
    return f"{'.'.join(here)}: {' '.join(text.split())[:40]}"


def unclear(here: tuple[str, ...], value: JsonValue, beside: Beside) -> Judgement:
    """Return that a value may say that the answer is wrong, and how to write which of the two it is."""
    key = ".".join(here)
    name = opinion_name(normal_name(key))[0]
    is_flag = isinstance(value, bool) or name in SAFETY or (isinstance(value, str) and as_number(value) not in (-1, 0))
    way = "write it as is_correct (true or false)"
    if len(here) == 1 and beside.labels is None:
        way = "write it as the message's train (true or false)"
    elif len(here) == 1 and is_flag:
        way = f"set data.columns: {{{'exclude' if name in TRUE_IS_BAD else 'train'}: {key}}}"
    return Judgement(
        None,
        f"{key} {repr(value)[:60]} may mark the answer as wrong, or be a class: {way} to leave such answers out, or name "
        f"{key} in data.ignore to learn them",
    )


def is_bad_word(text: str) -> bool:
    """Tell whether a short text says that something is wrong or poor."""
    word = plain(text)
    return word in _WRONG | _LOW | _NOT_DONE | {"unsafe"} or judges_badly(word)


def word_side(text: str) -> bool | None:
    """Tell whether a word of an opinion says right or wrong; None for others, such as medium or paid."""
    word = plain(text)
    side = label_side(word)
    if side is False or word in _DOWN | FAILED_RUNS or is_bad_word(word) or _UNSAFE.fullmatch(word):
        return False
    return True if side is True or word in _UP | _HIGH or _SAFE.fullmatch(word) else None


def verdict(name: str, here: tuple[str, ...], value: JsonValue, beside: Beside) -> Judgement | None:
    """Return what a judgement says about an answer; None if it is none: a text, a number of votes, or the answers' class.

    A third value in a column of true and false, such as `is_correct: falsch`, is unclear. So is `correct: 0`
    beside a single number above 1 in the column; beside several, it is a count, or that of a choice.

    Args:
        name: the key's normal name.
        here: the keys that lead to the value.
    """
    side = label_side(value)
    if side is None or (name == "review_result" and as_number(value) is None):  # a word may be about a loan
        return None
    if side == "other":
        is_bad = isinstance(value, str) and (judges_badly(value) or plain(value) in _NOT_DONE)
        if not is_bad or name not in GOOD or _is_answer(value, beside.plain_answers):
            return None
        is_third = beside.some_row(
            ("sides", *here), lambda row: not {True, False}.isdisjoint(map(label_side, values_at(row, here)))
        )
        return unclear(here, value, beside) if is_third else None
    if not isinstance(value, bool) and (not isinstance(value, str) or value.strip().isdigit()):
        may_count = here[-1].lower() in _COUNTS
        if name in WITHOUT_NUMBERS or (may_count and _is_above(2, here, beside)):
            return None
        if name in GRADES and not _is_flag(float(side), here, value, beside):
            return None
        if may_count and not side and _is_above(1, here, beside):
            return unclear(here, value, beside)
    # `correct: no` beside the answer no is a mark, unless the answer of every row names its value
    is_learned = side is (name in GOOD)
    if (name not in GRADES or not is_learned) and _is_class(name, here, value, beside):
        return None
    return Judgement(is_learned, shown(here, value))


def _is_above(count: int, here: tuple[str, ...], beside: Beside) -> bool:
    """Tell whether a column has so many different numbers above 1."""
    above = set[float]()

    def holds(row: dict[str, JsonValue]) -> bool:
        above.update(number for number in _numbers_at(row, here) if number > 1)
        return len(above) >= count

    return beside.some_row((f"{count} above 1", *here), holds)


_NAMES = OPINIONS | STATES | RECORD_STATES


def opinion(name: str, here: tuple[str, ...], value: JsonValue, beside: Beside) -> Judgement | None:
    """Return what an opinion such as `answer_quality: bad` says about an answer; None if it says nothing.

    It leaves the answer out if the key names the answer. Otherwise a word such as `quality: bad` is unclear, or a class:
    beside two other values that judge nothing, or if the answer has the word.
    """
    inner, is_direct = opinion_name(name)
    if inner in SAFETY:
        return _unsafe(inner, here, value, beside)
    if name in SUCCESS or (name in SOLVED and beside.is_trajectory):
        is_failed = label_side(value) is False and _is_flag(0.0, here, value, beside)
        return unclear(here, value, beside) if is_failed else None
    if not is_direct and name not in _NAMES:
        return None
    text = plain(value) if isinstance(value, str) else ""
    if name in RECORD_STATES and text == "discarded":
        return Judgement(False, shown(here, value))
    is_reaction = name in REACTIONS
    if ((is_reaction or is_direct) and text in _UP) or (is_direct and label_side(value) is True):
        return Judgement(True, shown(here, value))
    is_wrong, is_down = _is_wrong(name, here, value, beside), is_reaction and text in _DOWN
    if not (is_wrong or is_down or _is_poor(name, value)):
        return None
    if text and any(has_word(answer, text) for answer in beside.plain_answers):
        return None
    if is_down or (is_direct and is_wrong):
        return Judgement(False, shown(here, value))
    if not is_direct and text not in _OF_PROGRAMS and _has_others(here, value, beside):
        return None
    return unclear(here, value, beside)


def _is_wrong(name: str, here: tuple[str, ...], value: JsonValue, beside: Beside) -> bool:
    inner, is_direct = opinion_name(name)
    text = plain(value) if isinstance(value, str) else ""
    if not is_direct and name not in OPINIONS:
        return text in _WRONG_ANSWER
    if name == "human_label" and label_side(value) is False and _is_flag(0.0, here, value, beside):
        return True
    is_false = value is False or text == "false"
    return text in _WRONG or (is_false and inner in (_FALSE_IS_WRONG_OF_ANSWER if is_direct else _FALSE_IS_WRONG))


def _is_poor(name: str, value: JsonValue) -> bool:
    """Tell whether an opinion says that the answer is poor or failed; `low` only if the key names the answer."""
    is_direct = opinion_name(name)[1]
    if not is_direct and name not in OPINIONS:
        return False
    text = plain(value) if isinstance(value, str) else ""
    is_low = text in _LOW and (is_direct or text != "low")
    is_failed = (name in RUNS and text in FAILED_RUNS) or (name in REACTIONS and as_number(value) == -1)
    return is_low or is_failed or judges_badly(text)


def _has_others(here: tuple[str, ...], value: JsonValue, beside: Beside) -> bool:
    """Tell whether a column has two values that judge nothing; beside -1, one other number."""
    is_number, others = as_number(value) == -1, set[str]()

    def holds(row: dict[str, JsonValue]) -> bool:
        found = filter(_judges_nothing, values_at(row, here))
        others.update(plain(str(item)) for item in found if not is_number or as_number(item) is not None)
        return len(others) > (not is_number)

    return beside.some_row(("another number" if is_number else "two others", *here), holds)


def _judges_nothing(value: JsonValue) -> bool:
    if is_absent(value) or isinstance(value, dict | list) or as_number(value) in (-1, 0, 1):
        return False
    return not isinstance(value, str) or word_side(value) is None


def _is_flag(number: float, here: tuple[str, ...], value: JsonValue, beside: Beside) -> bool:
    """Tell whether 0 or 1 says false or true: a digit only if the column has nothing but 0 and 1, and has both.

    Otherwise 0 may be the lowest grade.
    """
    if isinstance(value, bool) or (isinstance(value, str) and not any(sign.isdigit() for sign in value)):
        return True
    other = 1.0 - number
    if not beside.some_row((f"is {other}", *here), lambda row: other in _numbers_at(row, here)):
        return False
    return not beside.some_row(("above 1", *here), lambda row: bool(_numbers_at(row, here) - {0.0, 1.0}))


def part_of_dataset(name: str, here: tuple[str, ...], value: JsonValue, beside: Beside) -> Judgement | None:
    """Return that a row of a training file is not learned, because its column `split` says test, or `is_test` is true.

    A column without the value train says nothing: a file that consists of test rows was chosen for training.
    """
    if name not in SPLITS | HELD_OUT_FLAGS or beside.labels is None or not beside.labels.is_training:
        return None
    if _is_trained_on(name, value) is not False:
        return None
    if not beside.some_row(("train", *here), lambda row: any(_is_trained_on(name, v) for v in values_at(row, here))):
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
    return True if words & TRAINED_ON else False if words & HELD_OUT else None


def rejected_of_pair(here: tuple[str, ...], value: JsonValue, beside: Beside) -> Judgement | None:
    """Return that an answer is the rejected one of its pair, if a column says chosen of other rows."""
    if not isinstance(value, str) or plain(value) != "rejected":
        return None
    if not beside.some_row(("chosen", *here), lambda row: "chosen" in (plain(str(v)) for v in values_at(row, here))):
        return None
    return Judgement(False, shown(here, value))


def values_at(row: Mapping[str, JsonValue], here: tuple[str, ...]) -> list[JsonValue]:
    """Return the values of a key in a row, which may be in objects and lists."""
    found = [row.get(here[0])]
    for key in here[1:]:
        found = [members[key] for value in found for members in objects_of(value) if key in members]
    flat = [item for value in found for item in (value if isinstance(value, list) else [value])]
    return [item.get("value") if isinstance(item, dict) else item for item in flat]


def _numbers_at(row: dict[str, JsonValue], here: tuple[str, ...]) -> set[float]:
    return {number for value in values_at(row, here) if (number := as_number(value)) is not None}


def _is_answer(value: JsonValue, answers: Iterable[str]) -> bool:
    if not isinstance(value, str | bool):
        return False
    text = plain(str(value)).rstrip(".!")
    return any(text == answer.rstrip(".!") for answer in answers)


# Whether a judgement beside an answer is the class that the answer names, as in sets for graders and moderators.
#
# Beside the answer "Incorrect: 2 + 2 is 4", `correctness: false` is no mark: the answer is a grade, and the grade is right.


def _words(text: str) -> re.Pattern[str]:
    return re.compile(rf"(?<!\w)(?:{text})(?!\w)")


_UNSAFE = _words("unsafe|not safe|harmful|dangerous|toxic|violat(?:es|ing|ion)")
_SAFE = _words("safe|harmless|unharmful|benign|clean|non toxic|not (?:unsafe|harmful|dangerous|toxic)")
_WRONG_CLASSES = _words("false|incorrect|wrong|invalid|inaccurate|not (?:correct|right|true|valid|accurate)")
_RIGHT = _words("true|correct|right|valid|accurate")
# Nobody answers another question than one for a grade or a class with these.
_GRADE = _words("incorrect|wrong|not correct|unsafe|not safe|harmful")
_FIRST = re.compile(r"(?:yes|no|true|false|correct|incorrect|right|wrong)(?!\w)")


def has_word(text: str, word: str) -> bool:
    """Tell whether a text contains a word; both as `plain` returns them."""
    return re.search(rf"(?<!\w){re.escape(word)}(?!\w)", text) is not None


def _unsafe(name: str, here: tuple[str, ...], value: JsonValue, beside: Beside) -> Judgement | None:
    """Return that an answer may be harmful: `is_safe: no`, `response_label: toxic`. It is never left out by that."""
    number = as_number(value)
    if not _is_bad(name, value) or (number in (0, 1) and not _is_flag(number, here, value, beside)):
        return None
    return None if _is_class(name, here, value, beside) else unclear(here, value, beside)


def _is_bad(name: str, value: JsonValue) -> bool | None:
    if name == HARM_LABEL:
        word = plain(value) if isinstance(value, str) else ""
        return True if _UNSAFE.fullmatch(word) else False if _SAFE.fullmatch(word) else None
    side = label_side(value)
    if name in TRUE_IS_BAD and isinstance(value, str) and plain(value) in ("approved", "accepted", "chosen"):
        return None  # a moderator's decision
    is_bad_side = name in TRUE_IS_BAD or (name in JUDGEMENTS and name not in GOOD)
    return side is is_bad_side if isinstance(side, bool) else None


def _is_class(name: str, here: tuple[str, ...], value: JsonValue, beside: Beside) -> bool:
    """Tell whether a value is the class of the row, because its answer names it, as those of graders and moderators do.

    An answer that begins with "incorrect" or "unsafe" is a class. "No" and other words may be the wrong answer to a
    question, so they count only if the answer of each row names the row's value.
    """
    if name in GRADES | SAFETY - {HARM_LABEL} and any(map(_GRADE.match, beside.plain_answers)):
        return True
    if beside.labels is None or not _is_named(name, value, beside.plain_answers):
        return False
    return not beside.some_row(("not named", *here), lambda row: _classes_differ(name, row, here))


def _is_named(name: str, value: JsonValue, answers: Iterable[str]) -> bool:
    """Tell whether an answer is a value, begins with it, or is about a grade or safety and has its word."""
    if _is_answer(value, answers):
        return True
    bad, good = (_UNSAFE, _SAFE) if name in SAFETY else (_WRONG_CLASSES, _RIGHT)
    words, side = bad if _is_bad(name, value) else good, label_side(value)
    if name not in GRADES | SAFETY:
        return False
    return any((isinstance(side, bool) and _side(answer) is side) or words.search(answer) for answer in answers)


def _side(answer: str) -> bool | None:
    side = label_side(answer.rstrip(".!"))
    if not isinstance(side, bool):
        found = _FIRST.match(answer)
        side = label_side(found[0]) if found else None
    return side if isinstance(side, bool) else None


def _classes_differ(name: str, row: dict[str, JsonValue], here: tuple[str, ...]) -> bool:
    answers = tuple(plain(answer) for answer in answers_of(row))
    is_graded = name in GRADES | SAFETY  # other columns may have more values than these
    values = [v for v in values_at(row, here) if not is_absent(v) and not (is_graded and _is_bad(name, v) is None)]
    return any(not _is_named(name, value, answers) for value in values)
