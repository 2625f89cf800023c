"""Whether a judgement beside an answer is the class that the answer names, as in sets for graders and moderators.

Beside the answer "Incorrect: 2 + 2 is 4", `correctness: false` is no mark: the answer is a grade, and the grade is right.
"""

from __future__ import annotations

import re
from collections.abc import Mapping

from pydantic import JsonValue

from loraflow.data.beside import Beside, values_at
from loraflow.data.labels import answers_of, label_side, plain, questions_of
from loraflow.data.mark_names import SAFETY, TRUE_IS_BAD


def _words(text: str) -> re.Pattern[str]:
    return re.compile(rf"(?<!\w)(?:{text})(?!\w)")


_WRONG = _words("false|incorrect|wrong|invalid|inaccurate|not (?:correct|right|true|valid|accurate)")
_RIGHT = _words("true|correct|right|valid|accurate")
_UNSAFE = _words("unsafe|not safe|harmful|dangerous|toxic|violat(?:es|ing|ion)")
_SAFE = _words("safe|harmless|not (?:unsafe|harmful|dangerous|toxic)")
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
        here: the keys that lead to the value.
        value: the value.
        beside: the answer.
    """
    first = _CLASS if name in SAFETY else _GRADE
    if any(first.match(answer) or (name in SAFETY and _is_yes_or_no(answer)) for answer in beside.said):
        return True
    if beside.labels is None or not _is_named(name, value, beside.said):
        return False
    return not beside.labels.some_row(("not named", *here), lambda row: _differs(name, row, here))


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
    side = label_side(value)
    is_bad = side is (name in TRUE_IS_BAD)
    if name in SAFETY:
        words = _UNSAFE if is_bad else _SAFE
    else:
        words = _WRONG if is_bad else _RIGHT
    return any(_side(answer) is side or words.search(answer) for answer in said)


def _differs(name: str, row: dict[str, JsonValue], here: tuple[str, ...]) -> bool:
    said = tuple(plain(answer) for answer in answers_of(row))
    values = [value for value in values_at(row, here) if isinstance(label_side(value), bool)]
    return any(not _is_named(name, value, said) for value in values)
