"""Rows whose answer is one of several generations, each of which is judged in a list beside them, as in OpenR1-Math."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping

from pydantic import JsonValue

from loraflow.data.beside import Said, shown
from loraflow.data.mark_names import FALSE_IS_WRONG, JUDGEMENTS, normal_name

_GENERATIONS = ("generations", "responses", "completions", "candidates", "samples", "solutions", "answers")
_COMPLETE = frozenset(
    {"is_reasoning_complete", "reasoning_complete", "is_complete", "complete", "is_finished", "finished"}
)


def judged_generation(row: Mapping[str, JsonValue], answers: Collection[str]) -> Said | None:
    """Return what the lists beside a row's generations say about the one that is its answer; None if they say nothing.

    An answer that is not complete is left out. So is one that a list such as `correctness_math_verify` says is wrong, unless
    another of these lists says that it is right.

    Args:
        row: the row.
        answers: its answers.
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


def _of_lists(row: Mapping[str, JsonValue], length: int, numbers: list[int]) -> Said | None:
    judged = list(_judged(row, length, numbers))
    for key, is_bad, is_final in judged:
        if is_bad and is_final:
            return Said(False, shown((key,), False))
    if not judged or any(not is_bad for _, is_bad, is_final in judged if not is_final):
        return None
    wrong = next((key for key, is_bad, is_final in judged if is_bad and not is_final), None)
    return None if wrong is None else Said(False, shown((wrong,), False))


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
