"""What a column beside an answer says about it: verdicts (`correct: no`), and opinions and states in words (`quality: bad`).

A word such as `rejected` may be about anything: a loan, an order, a film. So a word alone never leaves a row out.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import NamedTuple

from pydantic import JsonValue

from loraflow.data.container_text import Unreadable, parsed_text
from loraflow.data.labels import (
    Labels,
    answers_of,
    as_number,
    is_absent,
    judges_badly,
    label_side,
    plain,
    reads_like_a_judgement,
)
from loraflow.data.mark_names import (
    FALSE_IS_WRONG,
    GOOD,
    GRADES,
    HELD_OUT_FLAGS,
    OPINIONS,
    REACTIONS,
    RECORD_STATES,
    SAID_FALSE,
    SPLITS,
    STATES,
    TRUE_IS_BAD,
    WORD_BAD_VERDICTS,
    WORD_VERDICTS,
    judges_the_answer,
)

# What an opinion or a state says of a wrong answer, as `plain` returns it.
_WRONG = frozenset({
    "rejected", "reject", "incorrect", "wrong", "bad", "invalid", "undesirable", "not correct", "not right", "not good",
    "not accepted", "not approved", "disapproved", "unacceptable", "discarded", "deleted", "removed", "thumbs down",
    "thumbsdown", "thumb down", "downvote", "downvoted", "dislike", "disliked", "unusable", "👎", "❌",
})  # fmt: skip
_DOWN = frozenset(
    {"down", "thumbs down", "thumbsdown", "thumb down", "downvote", "downvoted", "dislike", "disliked", "👎", "❌"}
)
_UP = frozenset({"up", "thumbs up", "thumbsup", "thumb up", "upvote", "upvoted", "like", "liked", "👍", "✅"})
# Between right and wrong, or a grade: no evidence that a column with `bad` is about something else than the answer.
_BETWEEN = frozenset({
    "neutral", "unsure", "unknown", "unclear", "mixed", "partial", "partly correct", "partially correct", "n/a",
    "normal", "medium", "moderate", "average", "mediocre", "fair", "decent", "high", "very high", "low", "very low",
    "very good", "very bad", "very poor", "great", "excellent", "perfect", "best", "better", "satisfactory",
    "unsatisfactory", "terrible", "success", "successful", "succeeded",
})  # fmt: skip
_LOW = frozenset(
    {"low", "very low", "very bad", "very poor", "terrible", "unsatisfactory"}
)  # wrong in a column of grades
_HELD_OUT = frozenset({
    "test", "testing", "tests", "validation", "valid", "val", "dev", "development", "eval", "evaluation", "held out",
    "heldout", "holdout", "hold out",
})  # fmt: skip
_TRAINED_ON = frozenset({"train", "training"})
_OF_ARGILLA = frozenset({"default", "edited", "validated", "submitted", "pending", "draft", "completed"})


class Said(NamedTuple):
    """What a key says about an answer."""

    is_learned: bool | None  # None: it may say that it is wrong
    text: str  # the key and its value; what is unclear


@dataclass(frozen=True)
class Beside:
    """What a key stands beside."""

    said: tuple[str, ...] = ()  # the answers of the row, or the message, as `plain` returns them
    labels: Labels | None = None  # knows the other rows of the file; None for a message


def shown(here: tuple[str, ...], value: JsonValue) -> str:
    """Return a key and its value for people."""
    text = value if isinstance(value, str) else "" if isinstance(value, dict | list) else repr(value)
    return f"{'.'.join(here)}: {' '.join(text.split())[:40]}"


def verdict(name: str, here: tuple[str, ...], value: JsonValue, beside: Beside) -> bool | None:
    """Return what a judgement says about an answer; None if it is none: a text, a number of votes, or the answers' class.

    Args:
        name: the key's normal name.
        here: the keys that lead to the value.
        value: the value.
        beside: the answer.
    """
    side = label_side(value)
    is_word = isinstance(value, bool) or (isinstance(value, str) and not value.strip().isdigit())
    if side is None or side == "other" or (name in WORD_VERDICTS | WORD_BAD_VERDICTS and not is_word):
        return None
    # `correct: no` beside the answer no is a mark, unless the column has the answer in every row
    labels = beside.labels if isinstance(value, str) and _is_answer(value, beside.said) else None
    if labels is not None and not labels.some_row(("not the answer", *here), lambda row: _differs(row, here)):
        return None
    return side is (name in GOOD)


def opinion(name: str, here: tuple[str, ...], value: JsonValue, beside: Beside) -> Said | None:
    """Return what an opinion or a state such as `quality: bad` says about an answer; None if it says nothing.

    It leaves the answer out only if it cannot be about anything else: `vote: down`, `answer_quality: bad`. Otherwise it is
    a class of the row if the answer names it, or other rows have values that judge nothing; else it is unclear.
    """
    is_direct = judges_the_answer(name)
    if not (is_direct or name in OPINIONS | STATES):
        return None
    if name in FALSE_IS_WRONG and _is_false_of_two(value, here, beside):
        return Said(False, shown(here, value))
    text = _word(name, value)
    if text is None:
        return None
    is_down = name in REACTIONS and text in _DOWN
    is_wrong = text in _WRONG or is_down or (text == "false" and name not in STATES)
    is_unclear = text == "-1" or (name in GRADES and text in _LOW) or (name not in STATES and judges_badly(text))
    if not is_wrong and not is_unclear:
        is_right = (name in REACTIONS and text in _UP) or (is_direct and label_side(value) is True)
        return Said(True, shown(here, value)) if is_right else None
    if any(re.search(rf"(?<!\w){re.escape(text)}(?!\w)", answer) for answer in beside.said):
        return None
    if is_down or (is_direct and is_wrong) or (name in RECORD_STATES and text == "discarded"):
        return Said(False, shown(here, value))
    labels = None if is_direct else beside.labels
    if labels is not None and labels.some_row(("other", text, *here), lambda row: _has_other(row, here, text)):
        return None
    got = repr(value[:60]) if isinstance(value, str) else repr(value)
    return Said(
        None,
        f"{'.'.join(here)} {got} may mark the answer as wrong, or be a class of the row: rename the column if it "
        "is a class; if it is a mark, write it as is_correct, train or weight, whose false or 0 leaves the answer out",
    )


def _word(name: str, value: JsonValue) -> str | None:
    """Return the word of an opinion as `plain` does; None if it is a measurement, or false where that is an answer."""
    if name in TRUE_IS_BAD:
        side = label_side(value)
        return None if not isinstance(side, bool) else str(not side).lower()
    if isinstance(value, bool):
        return None if name in STATES else str(value).lower()
    if name in REACTIONS and as_number(value) == -1:
        return "-1"
    if not isinstance(value, str):
        return None
    text = plain(value)
    return None if text == "false" and name not in SAID_FALSE and not judges_the_answer(name) else text


def _is_false_of_two(value: JsonValue, here: tuple[str, ...], beside: Beside) -> bool:
    """Tell whether a value says false: 0 only if the column has nothing but 0 and 1, because it may be the lowest grade."""
    if as_number(value) != 0:
        return False
    if isinstance(value, bool) or (isinstance(value, str) and not any(sign.isdigit() for sign in value)):
        return True
    labels = beside.labels
    if labels is None or not labels.some_row(("is 1", *here), lambda row: 1.0 in _numbers_at(row, here)):
        return False
    return not labels.some_row(("above 1", *here), lambda row: bool(_numbers_at(row, here) - {0.0, 1.0}))


def part_of_dataset(name: str, here: tuple[str, ...], value: JsonValue, beside: Beside) -> Said | None:
    """Return that a row of a training file is not learned, because its column `split` says test, or `is_test` is true.

    A column without the value train says nothing: a file that consists of test rows was chosen for training.
    """
    labels = beside.labels
    if name not in SPLITS | HELD_OUT_FLAGS or labels is None or not labels.is_training:
        return None
    if _is_trained_on(name, value) is not False:
        return None
    if not labels.some_row(("train", *here), lambda row: any(_is_trained_on(name, v) for v in _values_at(row, here))):
        return None
    return Said(False, shown(here, value))


def _is_trained_on(name: str, value: JsonValue) -> bool | None:
    """Tell whether a split is for training: also `train_sft` and `test[:10%]`; None if it is no split."""
    if name in HELD_OUT_FLAGS:
        side = label_side(value)
        return not side if isinstance(side, bool) else None
    if not isinstance(value, str):
        return None
    words = {plain(value), re.split(r"[-_\[.]", value.strip().lower(), maxsplit=1)[0]}
    return True if words & _TRAINED_ON else False if words & _HELD_OUT else None


def rejected_of_pair(here: tuple[str, ...], value: JsonValue, beside: Beside) -> Said | None:
    """Return that an answer is the rejected one of its pair, if a column says chosen of some rows and rejected of others."""
    labels = beside.labels
    if labels is None or not isinstance(value, str) or plain(value) != "rejected":
        return None
    if not labels.some_row(("chosen", *here), lambda row: _is_chosen(row.get(here[0]))):
        return None
    return Said(False, shown(here, value))


def _is_chosen(value: JsonValue) -> bool:
    return isinstance(value, str) and plain(value) == "chosen"


def _numbers_at(row: dict[str, JsonValue], here: tuple[str, ...]) -> set[float]:
    return {number for value in _values_at(row, here) if (number := as_number(value)) is not None}


def objects_of(value: JsonValue) -> list[Mapping[str, JsonValue]]:
    """Return the objects of a value: itself, or those of a list; also if it is their text."""
    if isinstance(value, str) and is_object_text(value):
        try:
            value = parsed_text(value)
        except Unreadable:
            return []
    if isinstance(value, dict):
        return [value]
    if not isinstance(value, list):
        return []
    items: list[object] = list(value)
    pairs = {item[0]: item[1] for item in items if isinstance(item, tuple) and len(item) == 2}  # a map of Parquet
    return [pairs] if pairs else [item for item in value if isinstance(item, dict)]


def is_object_text(value: JsonValue) -> bool:
    """Tell whether a value is a text that begins as an object or a list."""
    return isinstance(value, str) and value.lstrip().startswith(("{", "["))


def _values_at(row: Mapping[str, JsonValue], here: tuple[str, ...]) -> list[JsonValue]:
    """Return the values of a key in a row, which may be in objects and lists."""
    found = [row.get(here[0])]
    for key in here[1:]:
        found = [members[key] for value in found for members in objects_of(value) if key in members]
    flat = [item for value in found for item in (value if isinstance(value, list) else [value])]
    return [item.get("value") if isinstance(item, dict) else item for item in flat]


def _is_answer(value: str, said: tuple[str, ...]) -> bool:
    text = plain(value).rstrip(".!")
    return any(text == answer.rstrip(".!") for answer in said)


def _differs(row: dict[str, JsonValue], here: tuple[str, ...]) -> bool:
    said = tuple(plain(answer) for answer in answers_of(row))
    return any(
        not is_absent(value) and not (isinstance(value, str) and _is_answer(value, said))
        for value in _values_at(row, here)
    )


def _has_other(row: dict[str, JsonValue], here: tuple[str, ...], text: str) -> bool:
    """Tell whether a row has a value in a column that judges nothing, such as paid or open."""
    for value in _values_at(row, here):
        if is_absent(value) or isinstance(value, dict | list):
            continue
        if text == "-1" and as_number(value) in (-1, 0, 1):
            continue
        word = plain(value) if isinstance(value, str) else ""
        is_known = word in _WRONG | _DOWN | _UP | _BETWEEN or (text == "discarded" and word in _OF_ARGILLA)
        if not is_known and label_side(value) == "other" and not reads_like_a_judgement(value):
            return True
    return False
