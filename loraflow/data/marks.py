"""The marks by which datasets say that an answer is not learned, or how much: OpenAI's `weight`, axolotl's `train`,
ms-swift's `loss`, the `label` of trl's KTO, and their relatives, on a message or on a row.

A mark is honoured or refused, in any spelling: CSV has only text, and spreadsheets write `FALSE` or `0,0`.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable, Iterator, Mapping
from functools import lru_cache
from typing import NamedTuple

from pydantic import JsonValue

from loraflow.data.cell_values import Unreadable, parsed_text
from loraflow.data.chats import BadRow
from loraflow.data.judgements import label_inside, opinion, part_of_dataset, rejected_of_pair, unclear_verdict, verdict
from loraflow.data.labels import Labels, as_number, is_absent, judges_badly, label_side, reads_like_a_judgement
from loraflow.data.mark_names import (
    CONTAINERS,
    EXCLUSIONS,
    FALSE_IS_WRONG,
    HELD_OUT_FLAGS,
    JUDGEMENTS,
    KEYS,
    LABELS,
    OPINIONS,
    ROW_WEIGHTS,
    SAFETY,
    SPLITS,
    STATES,
    UNCLEAR,
    WEIGHTS,
    WITHOUT_LISTS,
    Beside,
    Judgement,
    is_object_text,
    judges_the_answer,
    normal_name,
    objects_of,
    opinion_name,
    shown,
)
from loraflow.data.preference_pairs import answer_texts

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
    said: Collection[str] = (),
    row: Mapping[str, JsonValue] | None = None,
) -> Weight:
    """Return the weight of an answer in the loss by the marks of its row or message: their product, 1 without any.

    Args:
        values: the row or message.
        used: the keys that are read as marks are added to it.
        columns: the columns that a recipe names as the answer, such as `chosen`; beside it, `rejected` is a text too.

    Raises:
        BadRow: a mark is unclear, or a weight is not between 0 and 10.
    """
    weight, excluded_by = 1.0, ""
    texts = set() if where else answer_texts(values, labels, columns, said)
    beside: Beside | None = None
    for key, value in values.items():
        if not isinstance(key, str) or key in texts or not (_may_mark(key) or _is_rejected(value)):
            continue
        beside = beside or Beside(tuple(said), None if where else labels, row)
        mark = _mark_or_opinion(key, value, where, labels, beside)
        if mark is not None:
            used.add(key)
            weight *= mark.value
            excluded_by = excluded_by or mark.excluded_by
    if row is not None and weight and (generation := judged_generation(row, said)) is not None:
        weight, excluded_by = 0.0, generation.text
    if weight > MAX_WEIGHT:
        raise BadRow(f"{where}the product of its weights is {weight:g}; expected at most {MAX_WEIGHT}")
    return Weight(weight, excluded_by)


def _is_rejected(value: JsonValue) -> bool:
    return isinstance(value, str) and len(value) < 20 and value.strip().lower() == "rejected"


@lru_cache(4096)
def _may_mark(key: str) -> bool:
    """Tell whether a key may be a mark, or an object with marks. Most keys of most rows are neither."""
    name = normal_name(key)
    return (
        name in KEYS | OPINIONS | STATES | SPLITS | HELD_OUT_FLAGS
        or judges_the_answer(name)
        or opinion_name(name) in SAFETY
        or name.removesuffix("_json") in CONTAINERS
        or name.endswith(("responses", "responses_status"))
        or normal_name(key.partition(".")[0]) in CONTAINERS
    )


def _mark_or_opinion(key: str, value: JsonValue, where: str, labels: Labels, beside: Beside) -> Weight | None:
    """Return the weight by a key; None if it says nothing.

    Raises:
        BadRow: it may say that the answer is wrong.
    """
    name = normal_name(key)
    weight = _mark(key, name, value, where, labels, beside) if name in KEYS else None
    if weight is not None:
        return Weight(weight, shown((key,), value) if weight == 0 else "")
    said = (
        rejected_of_pair((key,), value, beside)
        or opinion(name, (key,), value, beside)
        or part_of_dataset(name, (key,), value, beside)
        or contained(key, (key,), value, beside)
    )
    if said is None:
        return None
    if said.is_learned is None:
        raise BadRow(where + said.text)
    return Weight(1.0) if said.is_learned else Weight(0.0, said.text)


def excludes(key: str, value: JsonValue) -> bool:
    """Tell whether a key and its value are a mark that excludes an answer."""
    try:
        return answer_weight({key: value}, "message", set(), Labels()).value == 0
    except BadRow:
        return False


def _mark(key: str, name: str, value: JsonValue, where: str, labels: Labels, beside: Beside) -> float | None:
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
        if problem := unclear_verdict(name, (key,), value, beside):
            raise BadRow(where + problem)
        is_learned = verdict(name, (key,), value, beside)
        return None if is_learned is None else float(is_learned)
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
    """Return what the lists beside a row's generations say about the one that is its answer; None if they say nothing.

    An answer that is not complete is left out. So is one that a list such as `correctness_math_verify` says is wrong, unless
    another of these lists says that it is right.
    """
    if row.keys().isdisjoint(_GENERATIONS):
        return None
    said = {answer.strip() for answer in answers}
    for key in _GENERATIONS:
        texts = row.get(key)
        if not isinstance(texts, list) or not all(isinstance(text, str) for text in texts):
            continue
        numbers = [number for number, text in enumerate(texts) if isinstance(text, str) and text.strip() in said]
        if numbers and (found := _of_lists(row, len(texts), numbers)) is not None:
            return found
    return None


def _of_lists(row: Mapping[str, JsonValue], length: int, numbers: list[int]) -> Judgement | None:
    judged = list(_judged(row, length, numbers))
    for key, is_bad, is_final in judged:
        if is_bad and is_final:
            return Judgement(False, shown((key,), False))
    if not judged or any(not is_bad for _, is_bad, is_final in judged if not is_final):
        return None
    wrong = next((key for key, is_bad, is_final in judged if is_bad and not is_final), None)
    return None if wrong is None else Judgement(False, shown((wrong,), False))


def _judged(row: Mapping[str, JsonValue], length: int, numbers: list[int]) -> Iterator[tuple[str, bool, bool]]:
    """Yield (key, whether the answer is bad, whether nothing else can be said against that) of each list that judges it."""
    for key, values in row.items():
        if not isinstance(key, str) or not isinstance(values, list) or len(values) != length:
            continue
        name = normal_name(key)
        is_judgement = name in JUDGEMENTS or name.startswith(tuple(FALSE_IS_WRONG))
        if not (is_judgement or name in _COMPLETE) or not all(isinstance(value, bool | None) for value in values):
            continue
        found = [values[number] for number in numbers if values[number] is not None]
        if found:
            yield key, not any(found), name in _COMPLETE


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
    if (name.endswith(("responses", "responses_status"))) and (said := _responses(key, here, value, beside)):
        return said
    base = name.removesuffix("_json")
    if base in CONTAINERS or (name in JUDGEMENTS | OPINIONS and isinstance(value, list)):
        return _of_objects(key, base, here, value, beside)
    container, found, member = key.partition(".")
    if found and normal_name(container) in CONTAINERS:
        return _of_member(member, here, value, beside)
    return None


def _of_objects(key: str, name: str, here: tuple[str, ...], value: JsonValue, beside: Beside) -> Judgement | None:
    if isinstance(value, str) and is_object_text(value):
        value = _parsed(value, here)
    items = objects_of(value)
    if isinstance(value, dict):
        return _strictest(_of_member(k, (*here, k), v, beside) for k, v in items[0].items() if isinstance(k, str))
    is_map = isinstance(value, list) and not any(isinstance(item, dict) for item in value)
    if name in WITHOUT_LISTS and not is_map:
        return None
    return _agreed([_of_item(key, here, item, beside) for item in items])


def _of_item(key: str, here: tuple[str, ...], item: Mapping[str, JsonValue], beside: Beside) -> Judgement | None:
    said = [_of_member(k, (*here, k), v, beside) for k, v in item.items() if isinstance(k, str)]
    if "value" in item:  # Argilla's: what each annotator said about the answer
        said.append(_of_member(key, here, item["value"], beside))
    return _strictest(said)


def _responses(key: str, here: tuple[str, ...], value: JsonValue, beside: Beside) -> Judgement | None:
    """Return what annotators said, in Argilla's columns `correct.responses` and `correct.responses.status`."""
    if isinstance(value, str) and is_object_text(value):
        value = _parsed(value, here)
    if not isinstance(value, list) or not value:
        return None
    if key.endswith("responses.status"):
        return Judgement(False, shown(here, "discarded")) if all(status == "discarded" for status in value) else None
    head, found, _ = key.rpartition(".responses")
    return _agreed([_of_member(head, here, item, beside) for item in value]) if found else None


def _of_member(key: str, here: tuple[str, ...], value: JsonValue, beside: Beside) -> Judgement | None:
    """Return what a key of an object says. A weight between 0 and 1, and a `label` of 0, may be those of something else."""
    name, text = normal_name(key), shown(here, value)
    if name in WEIGHTS | EXCLUSIONS:
        number = as_number(value)
        return Judgement((number == 1) is (name in WEIGHTS), text) if number in (0, 1) else None
    if name == "label":
        return label_inside(here, value, beside)
    if name in LABELS:
        side = label_side(value)
        if isinstance(side, bool):
            return Judgement(side, text)
        if isinstance(value, str) and judges_badly(value):
            return Judgement(
                None, f"{text} may mark the answer as wrong: write true (it is learned) or false (it is not)"
            )
        return None
    if name in JUDGEMENTS and not isinstance(value, list):
        is_learned = verdict(name, here, value, beside)
        return None if is_learned is None else Judgement(is_learned, text)
    said = opinion(name, here, value, beside) or part_of_dataset(name, here, value, beside)
    return said or (contained(key, here, value, beside) if isinstance(value, dict | list | str) else None)


def _strictest(found: Iterable[Judgement | None]) -> Judgement | None:
    """Return what excludes the answer, else what is unclear, else what says that it is learned."""
    said = [item for item in found if item is not None]
    return min(said, key=lambda item: (False, None, True).index(item.is_learned), default=None)


def _agreed(found: list[Judgement | None]) -> Judgement | None:
    """Return what a list says: it excludes the answer only if all items that judge agree; a mix says nothing."""
    has_both = len({item.is_learned is True for item in found if item is not None}) > 1
    return None if has_both else _strictest(found)


def _parsed(text: str, here: tuple[str, ...]) -> JsonValue:
    """Parse the text of an object; None if it is none and has no mark."""
    try:
        return parsed_text(text)
    except Unreadable as error:
        names = (found.strip() for found in _KEY_IN_TEXT.findall(text))
        if mark := next((name for name in names if normal_name(name) in KEYS | OPINIONS | STATES), None):
            raise BadRow(
                f"{'.'.join(here)} is a text that begins as an object and has the mark {mark}, but cannot be read: {error}; "
                "write it as JSON, or rename the column"
            ) from None
        return None
