"""The marks by which datasets say that an answer is not learned, or how much: OpenAI's `weight`, axolotl's `train`,
ms-swift's `loss`, the `label` of trl's KTO, and their relatives, on a message or on a row.

A mark is honoured or refused, in any spelling: CSV has only text, and spreadsheets write `FALSE` or `0,0`.
"""

from __future__ import annotations

import ast
from collections.abc import Collection, Iterable, Iterator, Mapping

from pydantic import JsonValue

from loraflow.data.chats import BadRow
from loraflow.data.json_text import strict_json
from loraflow.data.labels import (
    Labels,
    as_number,
    is_absent,
    judges_badly,
    label_side,
    plain,
    reads_like_a_judgement,
)
from loraflow.data.mark_names import (
    CONTAINERS,
    EXCLUSIONS,
    GOOD,
    JUDGEMENTS,
    KEYS,
    LABELS,
    OPINIONS,
    ROW_WEIGHTS,
    STATES,
    UNCLEAR,
    WEIGHTS,
    WORD_BAD_VERDICTS,
    WORD_VERDICTS,
    normal_name,
)
from loraflow.data.preference_pairs import answer_texts

MAX_WEIGHT = 10
# What an opinion or a state says of a wrong answer, as `plain` returns it.
_WRONG = frozenset({
    "rejected", "reject", "incorrect", "wrong", "bad", "invalid", "undesirable", "not correct", "not right", "not good",
    "not accepted", "not approved", "disapproved", "unacceptable", "discarded", "deleted", "removed", "thumbs down",
    "thumbsdown", "thumb down", "downvoted", "disliked", "unusable", "👎", "❌",
})  # fmt: skip
_MAX_PYTHON = 20_000  # characters of an object in Python's notation; a longer text is none


class MarkedFalse(BadRow):
    """A row without an answer to learn, because its marks exclude them all. It is left out and counted, not malformed."""


def is_mark(key: str) -> bool:
    """Tell whether a key of a row or message may be a mark."""
    return normal_name(key) in KEYS | OPINIONS


def answer_weight(
    values: Mapping[str, JsonValue], where: str, used: set[str], labels: Labels, answers: Collection[str] = ()
) -> float:
    """Return the weight of an answer in the loss by the marks of its row or message: their product, 1 without any.

    Args:
        values: the row or message.
        where: the message, for the problem's text; empty for a row.
        used: the keys that are read as marks are added to it.
        labels: tells whether a label is a class.
        answers: the columns of a row that are read as texts, such as `chosen`; beside it, `rejected` is a text too.

    Raises:
        BadRow: a mark is unclear, or a weight is not between 0 and 10.
    """
    weight = 1.0
    texts = set() if where else answer_texts(values, labels, answers)
    for key, value in values.items():
        if not isinstance(key, str) or key in texts:
            continue
        name = normal_name(key)
        if _container_excludes(_contained(key, name, value)):
            weight = 0.0
        if _is_wrong(name, value, where):
            weight = 0.0
            used.add(key)
        if name not in KEYS:
            continue
        mark = _mark(key, name, value, where, labels)
        if mark is not None:
            weight *= mark
            used.add(key)
    if weight > MAX_WEIGHT:
        raise BadRow(f"{where}the product of its weights is {weight:g}; expected at most {MAX_WEIGHT}")
    return weight


def excludes(key: str, value: JsonValue) -> bool:
    """Tell whether a key and its value are a mark that excludes an answer."""
    try:
        return answer_weight({key: value}, "message", set(), Labels()) == 0
    except BadRow:
        return False


def _is_wrong(name: str, value: JsonValue, where: str = "") -> bool:
    """Tell whether an opinion or a state says that an answer is wrong, such as `quality: bad`.

    Raises:
        BadRow: it seems to, in another language or with other words.
    """
    if name not in OPINIONS | STATES or not isinstance(value, str):
        return False
    text = plain(value)
    if text in _WRONG or (text == "down" and name in OPINIONS):
        return True
    if name in OPINIONS and judges_badly(value):
        raise BadRow(
            f"{where}{name} {_shown(value)} may mark the answer as wrong: write wrong if it does, else rename the key"
        )
    return False


def _contained(key: str, name: str, value: JsonValue) -> Iterator[Mapping[str, JsonValue]]:
    """Yield the objects beside an answer that a key has: of one that was flattened to the columns meta.weight, … too."""
    if name.endswith("responses") or name.endswith("responses_status"):
        yield from _responses(key, value)
    if name.removesuffix("_json") in CONTAINERS or (name in JUDGEMENTS | OPINIONS and isinstance(value, list)):
        yield from _objects(value, name)
        return
    container, found, member = key.partition(".")
    if found and normal_name(container) in CONTAINERS:
        yield {member: value}


def _objects(value: JsonValue, name: str = "") -> Iterator[Mapping[str, JsonValue]]:
    """Yield an object, or the objects of a list; tables have them as text, in JSON's or Python's notation."""
    if isinstance(value, str) and value.lstrip().startswith(("{", "[")):
        value = _parsed(value)
    if isinstance(value, dict):
        yield value
    if not isinstance(value, list):
        return
    items: list[object] = list(value)
    yield {item[0]: item[1] for item in items if isinstance(item, tuple) and len(item) == 2}  # a map of Parquet
    for item in value:
        if isinstance(item, dict):
            yield item
            # Argilla's: what each annotator said about the answer
            if "value" in item and name:
                yield {name: item["value"]}


def _responses(key: str, value: JsonValue) -> Iterator[Mapping[str, JsonValue]]:
    """Yield what annotators said, in Argilla's columns `correct.responses` and `correct.responses.status`."""
    if isinstance(value, str) and value.lstrip().startswith("["):
        value = _parsed(value)
    if not isinstance(value, list) or not value:
        return
    if key.endswith("responses.status"):
        if all(status == "discarded" for status in value):
            yield {"discarded": True}
        return
    head, found, _ = key.rpartition(".responses")
    for item in value if found else ():
        yield {head: item}


def _parsed(text: str) -> JsonValue:
    try:
        return strict_json(text)
    except ValueError:
        pass
    try:
        value: JsonValue = ast.literal_eval(text.strip()[:_MAX_PYTHON])
    except (ValueError, SyntaxError, RecursionError, MemoryError):
        return None  # a text
    return value


def _container_excludes(containers: Iterable[Mapping[str, JsonValue]]) -> bool:
    """Tell whether an object beside an answer, such as `metadata`, has a mark that excludes the answer."""
    return any(_member_excludes(key, value) for members in containers for key, value in members.items())


def _member_excludes(key: JsonValue, value: JsonValue) -> bool:
    if not isinstance(key, str):
        return False
    name = normal_name(key)
    if (name in WEIGHTS and as_number(value) == 0) or (name in EXCLUSIONS and as_number(value) == 1):
        return True
    if name in JUDGEMENTS:
        return _verdict(name, value) is False
    if _is_wrong(name, value):
        return True
    return isinstance(value, dict | list | str) and _container_excludes(_contained(key, name, value))


def _verdict(name: str, value: JsonValue) -> bool | None:
    """Return what a judgement says about an answer; None if it is none, such as a text or a number of votes."""
    side = label_side(value)
    is_word = isinstance(value, bool) or (isinstance(value, str) and not value.strip().isdigit())
    if side is None or side == "other" or (name in WORD_VERDICTS | WORD_BAD_VERDICTS and not is_word):
        return None
    return side is (name in GOOD)


def _mark(key: str, name: str, value: JsonValue, where: str, labels: Labels) -> float | None:
    """Return what a mark multiplies the weight of an answer by; None if it says nothing."""
    if name in LABELS:
        side = label_side(value)
        if side is None or labels.are_classes(key):
            return None
        if side == "other":
            if where and not reads_like_a_judgement(value):  # an attribute of a message: it is named as not read
                return None
            raise BadRow(where + labels.problem(key, value))
        return float(side)
    if name in JUDGEMENTS:
        verdict = _verdict(name, value)
        return None if verdict is None else float(verdict)
    if name in UNCLEAR:
        if is_absent(value) or (isinstance(value, str) and value.strip().lower() in ("user", "human", "system")):
            return None
        raise BadRow(f"{where}{key} {_shown(value)} does not say whether the answer is learned; use weight 0 or 1")
    weight = as_number(value)
    if weight is None and is_absent(value):
        return None
    if weight is None or weight < 0 or weight > MAX_WEIGHT or (name in EXCLUSIONS and weight not in (0, 1)):
        raise BadRow(_unsupported(where, key, value, weight, is_exclusion=name in EXCLUSIONS))
    if not where and weight not in (0, 1) and name not in ROW_WEIGHTS:
        raise BadRow(
            f"{key} {_shown(value)} is neither 0 nor 1; if it multiplies the loss of the row, name the column weight"
        )
    return float(weight == 0) if name in EXCLUSIONS else weight


def _unsupported(where: str, key: str, value: JsonValue, weight: float | None, *, is_exclusion: bool) -> str:
    if weight is None:
        why = "is not readable"
    elif is_exclusion:
        why = "is neither true nor false"
    else:
        why = f"is outside 0 to {MAX_WEIGHT}"
    ways = "write 1 (the answer is left out) or 0 (it is learned)"
    if not is_exclusion:
        ways = "write 1 (the answer is learned) or 0 (it is not), or a number between that multiplies its loss"
    column = "" if where else "; if it is no mark, rename or remove the column"
    return f"{where}{key} {_shown(value)} {why}; {ways}{column}"


def _shown(value: JsonValue) -> str:
    return repr(value)[:60]
