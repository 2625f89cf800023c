"""Preference pairs: which columns hold the two answers of a row, and rows whose answer is the worse one."""

from __future__ import annotations

from collections.abc import Collection, Mapping

from pydantic import JsonValue

from loraflow.data.chats import BadRow, Message
from loraflow.data.labels import Labels, label_side
from loraflow.data.mark_names import BAD_VERDICTS, normal_name

# Two answers of a pair, or two judgements of one answer: better → worse.
_PAIRS = {
    "chosen": ("rejected",),
    "preferred": ("rejected", "dispreferred"),
    "accepted": ("rejected",),
    "good": ("bad",),
    "correct": ("incorrect", "wrong"),
}
# Columns with the worse answer, and the beginning of the name of the better one.
_WORSE = {
    "rejected": "chosen",
    "rejected_response": "chosen",
    "rejected_answer": "chosen",
    "rejected_output": "chosen",
    "rejected_completion": "chosen",
    "rejected_messages": "chosen",
    "response_rejected": "response_chosen",
    "answer_rejected": "answer_chosen",
    "dispreferred": "preferred",
    "non_preferred_output": "preferred",
    "wrong_answer": "correct_answer",
    "incorrect_answer": "correct_answer",
    "bad_answer": "good_answer",
}


def answer_texts(values: Mapping[str, JsonValue], labels: Labels, read: Collection[str]) -> set[str]:
    """Return the keys of a row that are no marks, because their texts are the answers of a preference pair.

    Args:
        values: the row, without the columns that are read.
        labels: knows the other rows of the file.
        read: the columns that are read, such as `chosen`; beside it, a text `rejected` is the other answer.

    Raises:
        BadRow: the two keys of a pair may be answers or marks.
    """
    names = {normal_name(key): key for key in values if isinstance(key, str)}
    found: set[str] = set()
    if names.keys().isdisjoint(BAD_VERDICTS | {"dispreferred"}):
        return found
    read_names = {normal_name(key) for key in read}
    for better, worse in ((better, worse) for better, others in _PAIRS.items() for worse in others if worse in names):
        other = names[worse]
        if better in read_names and isinstance(values[other], str):
            found.add(other)
        elif better in names and _is_verdict_text(values[names[better]]) and _is_verdict_text(values[other]):
            found |= _texts_of_pair(names[better], other, values, labels)
    return found


def _texts_of_pair(better: str, worse: str, values: Mapping[str, JsonValue], labels: Labels) -> set[str]:
    what = labels.of_pair(better, worse)
    if what == "unclear":
        raise BadRow(
            f"{better} {values[better]!r} and {worse} {values[worse]!r} may be two answers, or say whether the answer is "
            f"right; set data.columns: {{completion: {better}}} if they are answers, else rename or remove one of them"
        )
    return {better, worse} if what == "answers" else set()


def _is_verdict_text(value: JsonValue) -> bool:
    return isinstance(value, str) and isinstance(label_side(value), bool)


def refuse_rejected(row: Mapping[str, JsonValue], messages: list[Message], read: Collection[str]) -> None:
    """Refuse a row whose answer is the rejected one of its preference pair.

    Args:
        row: the row.
        messages: its chat.
        read: columns that a recipe names as the answer: then it means what it says.

    Raises:
        BadRow: it is.
    """
    answer = messages[-1]["content"].strip()
    for key, value in row.items():
        better = _WORSE.get(normal_name(key)) if isinstance(key, str) and key not in read else None
        if better is None or not answer or _is_verdict_text(value) or _text(value) != answer:
            continue
        others = [
            other for name, other in row.items() if isinstance(name, str) and normal_name(name).startswith(better)
        ]
        if all(_text(other) != answer for other in others):
            raise BadRow(f"its answer is the text of {key}: an answer that was not chosen would be learned")


def _text(value: JsonValue) -> str | None:
    """Return the text of an answer, which may be a message or a whole chat; None if it is none."""
    if isinstance(value, list) and value:
        value = value[-1]
    if isinstance(value, dict):
        value = value.get("content", value.get("value"))
    return value.strip() if isinstance(value, str) else None
