"""The marks by which datasets say that an answer is not learned, or how much: OpenAI's `weight`, axolotl's `train`,
ms-swift's `loss`, the `label` of trl's KTO, and their relatives, on a message or on a row.

A mark is honoured or refused, in any spelling: CSV has only text, and spreadsheets write `FALSE` or `0,0`.
"""

import re
from collections.abc import Collection, Iterable, Iterator, Mapping
from functools import lru_cache, partial
from typing import NamedTuple

from pydantic import JsonValue

from loraflow.data.answers.judgements import (
    Beside,
    Judgement,
    opinion,
    part_of_dataset,
    rejected_of_pair,
    shown,
    verdict,
    word_side,
)
from loraflow.data.answers.labels import Labels, as_number, is_absent, judges_badly, label_side, may_be_no
from loraflow.data.answers.mark_names import (
    CONTAINERS,
    EXCLUSIONS,
    HELD_OUT_FLAGS,
    JUDGEMENTS,
    KEYS,
    LABELS,
    OPINIONS,
    RECORD_STATES,
    ROW_WEIGHTS,
    SAFETY,
    SOLVED,
    SPLITS,
    STATES,
    SUCCESS,
    UNCLEAR,
    WEIGHTS,
    WITHOUT_LISTS,
    normal_name,
    opinion_name,
)
from loraflow.data.answers.preference_pairs import answer_texts
from loraflow.data.cell_values import Unreadable, is_object_text, objects_of, parsed_text
from loraflow.data.chats import BadRow

MAX_WEIGHT = 10


class MarkedFalse(BadRow):
    """A row without an answer to learn, because its marks exclude them all. It is left out and counted, not malformed.

    Args:
        by: the keys and values of the marks, such as `is_correct: False`.
    """

    def __init__(self, problem: str, by: str):
        super().__init__(f"{problem}, by {by}")
        self.by = by


class Weight(NamedTuple):
    """The weight of an answer in the loss."""

    value: float
    excluded_by: str = ""  # the key and the value of the mark that excludes the answer


def is_mark(key: str) -> bool:
    """Tell whether a key of a row or message may be a mark."""
    return normal_name(key) in KEYS | OPINIONS


def answer_weight(
    values: Mapping[str, JsonValue],
    where: str,
    used: set[str],
    labels: Labels,
    columns: Collection[str] = (),
    answers: Collection[str] = (),
    row: Mapping[str, JsonValue] | None = None,
    role: tuple[str, JsonValue] = ("", None),
) -> Weight:
    """Return the weight of an answer in the loss by the marks of its row or message: their product, 1 without any.

    Args:
        values: the row or message.
        used: the keys that are read as marks are added to it.
        columns: the columns that a recipe names as the answer, such as `chosen`; beside it, `rejected` is a text too.
            Of a message: the column that has it.
        answers: the texts of the row's or message's answers.
        row: the row, with the columns that are read.
        role: of a message: its key and value.

    Raises:
        BadRow: a mark is unclear, or a weight is not between 0 and 10.
    """
    weight, excluded_by = 1.0, ""
    texts = set() if where else answer_texts(values, labels, columns, answers)
    beside: Beside | None = None
    for key, value in values.items():
        is_rejected = isinstance(value, str) and len(value) < 20 and value.strip().lower() == "rejected"
        if not isinstance(key, str) or key in texts or not (is_rejected or _may_mark(key)):
            continue
        beside = beside or Beside(
            tuple(answers), None if where else labels, row or values, next(iter(columns), ""), role
        )
        mark = _mark(key, value, where, labels, beside)
        if mark is not None:
            used.add(key)
            weight *= mark.value
            excluded_by = excluded_by or mark.excluded_by
    if row is not None and weight and (generation := judged_generation(row, answers)) is not None:
        weight, excluded_by = 0.0, generation.text
    if weight > MAX_WEIGHT:
        raise BadRow(f"{where}the product of its weights is {weight:g}; expected at most {MAX_WEIGHT}")
    return Weight(weight, excluded_by)


@lru_cache(4096)
def _may_mark(key: str) -> bool:
    """Tell whether a key may be a mark, or an object with marks. Most keys of most rows are neither."""
    name = normal_name(key)
    inner, is_direct = opinion_name(name)
    return (
        is_direct
        or inner in SAFETY
        or name in KEYS | OPINIONS | SPLITS | HELD_OUT_FLAGS | RECORD_STATES | STATES | SUCCESS | SOLVED
        or name.removesuffix("_json") in CONTAINERS
        or name.endswith(("responses", "responses_status"))
        or normal_name(key.partition(".")[0]) in CONTAINERS
    )


def excludes(key: str, value: JsonValue) -> bool:
    """Tell whether a key and its value are a mark that excludes an answer."""
    try:
        return answer_weight({key: value}, "message", set(), Labels()).value == 0
    except BadRow:
        return False


def _mark(key: str, value: JsonValue, where: str, labels: Labels, beside: Beside) -> Weight | None:
    name, here = normal_name(key), (key,)
    found: Judgement | None = None
    if name in LABELS:
        found = _label(key, value, where, labels, beside)
    elif name in JUDGEMENTS:
        found = verdict(name, here, value, beside)
    elif name in UNCLEAR:
        if not is_absent(value) and not (
            isinstance(value, str) and value.strip().lower() in ("user", "human", "system")
        ):
            raise BadRow(f"{where}{key} {_shown(value)} does not say whether the answer is learned; use weight 0 or 1")
    elif name in WEIGHTS | EXCLUSIONS:
        weight = _weight(key, name, value, where)
        return None if weight is None else Weight(weight, shown(here, value) if weight == 0 else "")
    found = (
        found
        or rejected_of_pair(here, value, beside)
        or opinion(name, here, value, beside)
        or part_of_dataset(name, here, value, beside)
        or contained(key, here, value, beside)
    )
    if found is None:
        return None
    if found.is_learned is None:
        raise BadRow(where + found.text)
    return Weight(1.0) if found.is_learned else Weight(0.0, found.text)


def _label(key: str, value: JsonValue, where: str, labels: Labels, beside: Beside) -> Judgement | None:
    side = label_side(value)
    path, of_messages = key, None
    if where:
        path, of_messages = f"{beside.column}.{beside.role[1]}.{key}", partial(_of_messages, key, beside)
    is_class = labels.are_classes(path, of_messages)
    if side is None or is_class:
        return None
    if side != "other":
        return Judgement(side, shown((key,), value))
    if where and not (isinstance(value, str) and judges_badly(value)):
        may_be_false = may_be_no(value) or as_number(value) == -1
        if not may_be_false or not labels.some_row(
            ("true", path), lambda row: True in map(label_side, _of_messages(key, beside, row))
        ):
            return None  # an attribute of a message: it is named as not read
    raise BadRow(
        f"{where}{key} {_shown(value)} may mark an answer as wrong, but is neither true nor false: write true (the "
        f"answer is learned) or false (it is not); if it is a class, name {key} in data.ignore"
    )


def _of_messages(key: str, beside: Beside, row: dict[str, JsonValue]) -> list[JsonValue]:
    """Return the values of a key in a row's messages with the same role, and in their parts."""
    role_key, role = beside.role
    turns = [turn for turn in _objects_in([row.get(beside.column)]) if turn.get(role_key, role) == role]
    return [item[key] for item in (*turns, *_objects_in(v for turn in turns for v in turn.values())) if key in item]


def _objects_in(values: Iterable[JsonValue]) -> list[dict[str, JsonValue]]:
    return [item for value in values if isinstance(value, list) for item in value if isinstance(item, dict)]


def _weight(key: str, name: str, value: JsonValue, where: str) -> float | None:
    """Return what a weight or an exclusion multiplies the weight of an answer by; None without a value."""
    weight = as_number(value)
    if weight is None and is_absent(value):
        return None
    if weight is None and name == "train" and isinstance(value, str):  # a column of words that a recipe names
        side = word_side(value)
        weight = None if side is None else float(side)
    if weight is None or weight < 0 or weight > MAX_WEIGHT or (name in EXCLUSIONS and weight not in (0, 1)):
        raise BadRow(_unsupported(where, key, value, weight, is_exclusion=name in EXCLUSIONS))
    if not where and weight not in (0, 1) and name not in ROW_WEIGHTS:
        raise BadRow(
            f"{key} {_shown(value)} is neither 0 nor 1; if it multiplies the loss of the row, name the column weight; "
            f"if it is a measurement, name {key} in data.ignore"
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
    column = "" if where else "; if it is no mark, rename the column or name it in data.ignore"
    return f"{where}{key} {_shown(value)} {why}; {ways}{column}"


def _shown(value: JsonValue) -> str:
    return repr(value)[:60]


# Rows whose answer is one of several generations, each of which is judged in a list beside them, as in OpenR1-Math.

_GENERATIONS = ("generations", "responses", "completions", "candidates", "samples", "solutions", "answers")
_COMPLETE = frozenset(
    {"is_reasoning_complete", "reasoning_complete", "is_complete", "complete", "is_finished", "finished"}
)


def judged_generation(row: Mapping[str, JsonValue], answers: Collection[str]) -> Judgement | None:
    """Return what lists beside a row's generations say about the one that is its answer; None if they say nothing.

    It is left out if it is not complete, or wrong by a list such as `correctness_math_verify` and right by none.
    """
    if row.keys().isdisjoint(_GENERATIONS):
        return None
    stripped = {answer.strip() for answer in answers}
    for texts in (row.get(key) for key in _GENERATIONS):
        if not isinstance(texts, list) or not all(isinstance(text, str) for text in texts):
            continue
        numbers = [number for number, text in enumerate(texts) if str(text).strip() in stripped]
        judged = dict(_judged(row, len(texts), numbers))
        unfinished = [key for key, is_bad in judged.items() if is_bad and normal_name(key) in _COMPLETE]
        verdicts = {key: is_bad for key, is_bad in judged.items() if normal_name(key) not in _COMPLETE}
        wrong = unfinished or (list(verdicts) if all(verdicts.values()) else [])
        if wrong:
            return Judgement(False, shown((wrong[0],), False))
    return None


def _judged(row: Mapping[str, JsonValue], length: int, numbers: list[int]) -> Iterator[tuple[str, bool]]:
    """Yield the key of each list that judges generations with these numbers, and whether they are bad."""
    for key, values in row.items():
        if not isinstance(key, str) or not isinstance(values, list) or len(values) != length:
            continue
        name = normal_name(key)
        if not (name in JUDGEMENTS | _COMPLETE or name.startswith("correctness")):
            continue
        flags = [values[number] for number in numbers if isinstance(values[number], bool)]
        if flags and all(isinstance(value, bool | None) for value in values):
            yield key, not any(flags)


MAX_DEPTH = 50  # of objects in objects
_KEY_IN_TEXT = re.compile(r"([A-Za-z][\w -]*?)[\"']?\s*[:=]")


def contained(key: str, here: tuple[str, ...], value: JsonValue, beside: Beside) -> Judgement | None:
    """Return what the objects of a key say about an answer: of one that was flattened to the columns meta.weight, … too.

    Raises:
        BadRow: objects are nested too deeply, or a text that seems to have a mark cannot be parsed.
    """
    if len(here) > MAX_DEPTH:
        raise BadRow(f"{'.'.join(here[:3])}…: objects that are nested more than {MAX_DEPTH} deep")
    name = normal_name(key)
    if name.endswith(("responses", "responses_status")) and (found := _responses(key, here, value, beside)):
        return found
    base = name.removesuffix("_json")
    if base in CONTAINERS or (name in JUDGEMENTS | OPINIONS and (isinstance(value, list) or is_object_text(value))):
        return _of_objects(key, base, here, value, beside)
    container, dot, member = key.partition(".")
    return _of_member(member, here, value, beside) if dot and normal_name(container) in CONTAINERS else None


def _of_objects(key: str, name: str, here: tuple[str, ...], value: JsonValue, beside: Beside) -> Judgement | None:
    if isinstance(value, str) and is_object_text(value):
        value = _parsed(value, here)
    items = objects_of(value)
    if isinstance(value, dict):
        return _strictest(_of_member(k, (*here, k), v, beside) for k, v in items[0].items() if isinstance(k, str))
    is_map = isinstance(value, list) and not any(isinstance(item, dict) for item in value)
    if name in WITHOUT_LISTS and not is_map:
        return None
    if name in JUDGEMENTS and isinstance(value, list) and all(isinstance(item, bool) for item in value):
        return None if _is_beside_texts(value, beside) else _agreed([verdict(name, here, v, beside) for v in value])
    return _agreed([_of_item(key, here, item, beside) for item in items])


def _is_beside_texts(flags: list[JsonValue], beside: Beside) -> bool:
    """Tell whether flags are those of another list's texts, such as choices, and not of judges."""
    lists = (value for value in beside.row.values() if isinstance(value, list) and len(value) == len(flags) > 1)
    return any(isinstance(value[0], str) for value in lists)


def _of_item(key: str, here: tuple[str, ...], item: Mapping[str, JsonValue], beside: Beside) -> Judgement | None:
    found = [_of_member(k, (*here, k), v, beside) for k, v in item.items() if isinstance(k, str)]
    if "value" in item:  # Argilla's: what each annotator said about the answer
        found.append(_of_member(key, here, item["value"], beside))
    return _strictest(found)


def _responses(key: str, here: tuple[str, ...], value: JsonValue, beside: Beside) -> Judgement | None:
    if isinstance(value, str) and is_object_text(value):
        value = _parsed(value, here)
    if not isinstance(value, list) or not value:
        return None
    if key.endswith("responses.status"):
        return Judgement(False, shown(here, "discarded")) if all(status == "discarded" for status in value) else None
    head, dot, _ = key.rpartition(".responses")
    return _agreed([_of_member(head, here, item, beside) for item in value]) if dot else None


def _of_member(key: str, here: tuple[str, ...], value: JsonValue, beside: Beside) -> Judgement | None:
    """Return what a key of an object says. A weight between 0 and 1, and a `label`, may be those of something else."""
    name, text = normal_name(key), shown(here, value)
    if name in WEIGHTS | EXCLUSIONS:
        number = as_number(value)
        return Judgement((number == 1) is (name in WEIGHTS), text) if number in (0, 1) else None
    if name in LABELS:
        side = label_side(value)
        if name != "label" and isinstance(side, bool):
            return Judgement(side, text)
        return opinion("human_label", here, value, beside)
    if name in JUDGEMENTS and not isinstance(value, list):
        return verdict(name, here, value, beside)
    found = opinion(name, here, value, beside) or part_of_dataset(name, here, value, beside)
    return found or (contained(key, here, value, beside) if isinstance(value, dict | list | str) else None)


def _strictest(found: Iterable[Judgement | None]) -> Judgement | None:
    """Return what excludes the answer, else what is unclear, else what says that it is learned."""
    judged = [item for item in found if item is not None]
    return min(judged, key=lambda item: (False, None, True).index(item.is_learned), default=None)


def _agreed(found: list[Judgement | None]) -> Judgement | None:
    has_both = len({item.is_learned is True for item in found if item is not None}) > 1
    return None if has_both else _strictest(found)


def _parsed(text: str, here: tuple[str, ...]) -> JsonValue:
    """Parse the text of an object; None if it is none and has no mark."""
    try:
        return parsed_text(text)
    except Unreadable as error:
        names = (found.strip() for found in _KEY_IN_TEXT.findall(text))
        if mark := next((name for name in names if normal_name(name) in KEYS | OPINIONS), None):
            raise BadRow(
                f"{'.'.join(here)} is a text that begins as an object and has the mark {mark}, but cannot be read: {error}; "
                "write it as JSON, or rename the column"
            ) from None
        return None
