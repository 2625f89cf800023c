"""The names of keys by which datasets mark answers, in lower case with underscores."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property, lru_cache
from typing import NamedTuple

from pydantic import JsonValue

from loraflow.data.cell_values import Unreadable, parsed_text
from loraflow.data.labels import Labels, plain

# Keys in lower case with underscores. Of these, 0 and false exclude an answer; other numbers multiply its loss.
WEIGHTS = frozenset({
    "weight", "weights", "loss", "loss_weight", "sample_weight", "loss_mask", "compute_loss", "train", "training",
    "trainable", "is_trainable", "train_on", "train_on_turn", "learn", "learned", "learnable", "supervised", "loss_scale",
    "loss_multiplier", "example_weight", "message_weight", "turn_weight", "calculate_loss", "use_loss", "with_loss",
    "has_loss", "requires_loss", "is_train", "to_train", "to_learn", "for_training", "use_for_training",
    "include_in_training", "include_in_loss", "output_with_loss",
})  # fmt: skip
# Of these, 1 and true exclude an answer.
EXCLUSIONS = frozenset({
    "masked", "is_masked", "ignore", "ignored", "ignore_loss", "no_loss", "exclude", "excluded", "skip", "without_loss",
    "skip_loss", "mask_loss", "skip_training", "no_train", "do_not_train", "dont_train", "do_not_learn", "dont_learn",
    "do_not_train_on", "exclude_from_training", "exclude_from_loss", "ignore_in_training", "ignore_in_loss",
})  # fmt: skip
# KTO's: true is a desirable answer. Many datasets have a class by the name `label`, so other values may be no mark.
LABELS = frozenset({"label", "kto_tag", "kto_label", "desirable", "is_desirable"})


# Judgements that count only as true or false: other values, such as the correct answer's text, are named as not read.
def _with_is(*names: str) -> frozenset[str]:
    return frozenset(names) | {f"is_{name}" for name in names}


VERDICTS = _with_is(
    "correct", "accepted", "approved", "good", "valid", "acceptable", "usable", "keep", "include", "included", "enabled",
    "ok", "okay", "use", "accept", "approve",
)  # fmt: skip
BAD_VERDICTS = _with_is(
    "incorrect", "rejected", "wrong", "bad", "invalid", "unusable", "deleted", "removed", "discard", "discarded", "drop",
    "dropped", "hidden", "disabled", "delete", "to_delete", "do_not_use", "dont_use", "quarantined",
    "reject", "remove", "to_remove", "corrupted", "low_quality", "filtered_out",
)  # fmt: skip
# Of these, a number may be a count of votes, or the number of an answer.
WORD_VERDICTS = _with_is(
    "chosen",
    "preferred",
    "passed",
    "thumbs_up",
    "upvoted",
    "liked",
    "selected",
    "best",
    "helpful",
    "accurate",
    "factual",
    "faithful",
    "winner",
    "tests_passed",
    "all_tests_passed",
    "passes_tests",
)
WORD_BAD_VERDICTS = _with_is(
    "failed", "thumbs_down", "downvoted", "disliked", "hallucination", "hallucinated", "unhelpful", "inaccurate"
)
# The meaning of these depends on the tool: `mask: 1` is learned in some, and left out in others.
UNCLEAR = frozenset({"mask", "training_detail", "train_detail"})
GOOD = VERDICTS | WORD_VERDICTS
JUDGEMENTS = GOOD | BAD_VERDICTS | WORD_BAD_VERDICTS
KEYS = WEIGHTS | EXCLUSIONS | LABELS | JUDGEMENTS | UNCLEAR
# Objects beside an answer, whose marks count only if they exclude it: a weight in there may be that of a product.
CONTAINERS = frozenset({
    "metadata", "meta", "extra", "info", "annotation", "annotations", "attributes", "properties", "flags", "options",
    "additional_info", "extra_info", "custom", "meta_data", "metainfo", "meta_info", "feedback", "review", "reviews",
    "quality", "moderation", "evaluation", "judgement", "judgment", "verdict",
})  # fmt: skip
# Of these, a list has what may be chosen, such as the wrong answers of a quiz, and no judgements of the answer.
WITHOUT_LISTS = frozenset({"options", "attributes", "properties"})
# A row's `loss` or `train` with other values than true and false may be a measurement, or a split.
ROW_WEIGHTS = frozenset({
    "weight", "weights", "loss_weight", "sample_weight", "loss_scale", "loss_multiplier", "example_weight",
})  # fmt: skip
# Opinions, about the answer or anything else of the row (loraflow/data/judgements.py).
OPINIONS = frozenset({
    "quality", "verdict", "judgement", "judgment", "review", "review_result", "review_status", "feedback", "human_feedback",
    "user_feedback", "evaluation", "assessment", "human_label", "correctness", "grade", "rating", "thumbs", "thumb", "vote",
    "reaction", "human_evaluation", "human_rating", "annotation", "answer_quality", "response_quality", "user_rating",
    "review_decision", "quality_label", "quality_check", "qa_status", "verification_status", "verification_result",
    "validation_status", "validation_result", "test_status", "test_result", "execution_status", "approval_status",
    "safe", "is_safe", "unsafe", "is_unsafe", "harmful", "is_harmful", "success", "successful", "is_successful", "solved",
    "is_solved", "resolved", "is_resolved",
})  # fmt: skip
# For these, true means what false means for the others.
TRUE_IS_BAD = frozenset({"unsafe", "is_unsafe", "harmful", "is_harmful"})
# Beside an answer, these may also be the class that a moderator's answer names, even in `response_is_safe`.
HARM_LABEL = "response_harm_label"  # Its values are words: harmful, unsafe.
SAFETY = TRUE_IS_BAD | {"safe", "is_safe", HARM_LABEL}
# Of these, false cannot be about anything else than the answer, or is the class that the answer names.
FALSE_IS_WRONG = frozenset({"review_result", "correctness"})
# Values of these are true and false, so 0 and "no" say what false says.
TRUE_OR_FALSE = SAFETY | FALSE_IS_WRONG | {
    "success", "successful", "is_successful", "solved", "is_solved", "resolved", "is_resolved",
}  # fmt: skip
# Of these, false is a judgement. Of the others it may be the answer to a question, as a verdict about a claim is, or say
# that something was not done or not found, as in `review: false` and `quality_check: false`.
SAID_FALSE = TRUE_OR_FALSE | {
    "quality", "answer_quality", "response_quality", "verification_result", "validation_result", "test_result",
    "human_label",
}  # fmt: skip
# The same of opinions about the answer itself, such as answer_verdict.
_SAID_FALSE_OF_ANSWER = frozenset({"quality", "verdict", "judgement", "judgment", "correctness"})
# Of these, `timeout` and `error` are results of running the answer.
RUNS = frozenset({
    "verdict", "test_status", "test_result", "execution_status", "verification_status", "verification_result",
    "validation_status", "validation_result", "qa_status",
})  # fmt: skip
# Of these, `low` is a grade.
GRADES = frozenset({"quality", "answer_quality", "response_quality", "quality_label", "rating", "grade"})
# The same, where a word such as "failed" may be about anything.
STATES = frozenset(
    {"status", "state", "result", "outcome", "decision", "annotation_status", "record_status", "response_status"}
)
# Of these, a thumb down is always one about the answer.
REACTIONS = frozenset({"feedback", "human_feedback", "user_feedback", "thumbs", "thumb", "vote", "reaction"})
# Which part of its dataset a row belongs to.
SPLITS = frozenset({
    "split", "data_split", "dataset_split", "partition", "set", "subset", "fold", "train_test", "train_test_split",
    "ml_use", "usage",
})  # fmt: skip
HELD_OUT_FLAGS = frozenset({
    "is_test", "is_validation", "is_val", "is_dev", "is_eval", "is_heldout", "is_held_out", "is_holdout", "heldout",
    "held_out", "holdout",
})  # fmt: skip
# Argilla's, which may be `discarded`.
RECORD_STATES = frozenset({"annotation_status", "record_status", "response_status"})

_SEPARATORS = re.compile(
    r"(?<=[a-z0-9])(?=[A-Z])|[-\s.]+"
)  # where isCorrect, is-correct and "is correct" have their underscore
# is_answer_correct and response_is_valid judge an answer; correct_answer may be its text
_OF_ANSWER = re.compile(
    r"(?:is_|was_)?(?:the_)?(?:answer|response|completion|output|reply|solution|label|human|annotator|row|sample|example)_(?:is_|was_)?(\w+)"
    r"|(?:question|problem|prompt|instruction|conversation|chat|dialogue)_(?:is|was)_(\w+)"
    r"|(?:is|was)_(\w+)_(?:answer|response|completion|output|reply|question|problem|prompt|instruction|conversation)"
)
_OPINION_OF_ANSWER = re.compile(
    r"(?:is_)?(?:answer|response|completion|reply)_(\w+)"
)  # not output_quality: that of a printer


def judges_the_answer(name: str) -> bool:
    """Tell whether a normal name is that of an opinion about the answer itself, such as answer_quality."""
    found = _OPINION_OF_ANSWER.fullmatch(name)
    return found is not None and found[1] in OPINIONS - SAFETY


def opinion_name(name: str) -> str:
    """Return the name of an opinion without the answer's: `correctness` for answer_correctness; others unchanged.

    Names such as response_label and response_safety are HARM_LABEL.
    """
    found = _OPINION_OF_ANSWER.fullmatch(name)
    inner = found[1] if found is not None else ""
    if inner in ("label", "harm_label", "safety", "safety_label"):
        return HARM_LABEL
    return inner if inner in OPINIONS else name


def may_be_false(name: str) -> bool:
    """Tell whether false in a column of this normal name says that the answer is wrong."""
    inner = opinion_name(name)
    return name in SAID_FALSE or inner in TRUE_OR_FALSE or (inner != name and inner in _SAID_FALSE_OF_ANSWER)


@lru_cache(4096)
def normal_name(key: str) -> str:
    """Return a key's name: `is_correct` for isCorrect and "Is correct?", `correct` for is_answer_correct."""
    name = _SEPARATORS.sub("_", key.strip().rstrip("?")).lower()
    if name not in KEYS and (found := _OF_ANSWER.fullmatch(name)):
        inner = found[1] or found[2] or found[3]
        return inner if inner in JUDGEMENTS else name
    return name


MAX_SHOWN = 5


def named_marks(marks: Mapping[str, int]) -> str:
    """Return how many rows each mark left out, the most frequent first; empty without marks.

    Args:
        marks: key and value of a mark, such as `is_correct: False` → rows.
    """
    most = sorted(marks.items(), key=lambda item: -item[1])
    names = [f"{count} by {mark}" for mark, count in most[:MAX_SHOWN]]
    return ", ".join(names) + (f" and {len(most) - MAX_SHOWN} more marks" if len(most) > MAX_SHOWN else "")


def split_hint(marks: Mapping[str, int]) -> str:
    """Return how rows are scored that a column such as `split` keeps for tests; empty if marks name none."""
    keys = {normal_name(mark.partition(": ")[0].rpartition(".")[2]) for mark in marks}
    if not keys & (SPLITS | HELD_OUT_FLAGS):
        return ""
    return "; to score the rows that a split keeps for tests, put them into a file of data.heldout"


def without_marks(unread: Mapping[str, int], marks: Mapping[str, int]) -> dict[str, int]:
    """Return the keys that were not read, without those that left rows out: they were read as marks."""
    keys = {mark.partition(": ")[0] for mark in marks}
    columns = keys | {key.partition(".")[0] for key in keys}
    return {key: count for key, count in unread.items() if key not in columns}


# What stands beside an answer: the values of a key, which may be in objects and lists, and what a key says.


class Judgement(NamedTuple):
    """What a key says about an answer."""

    is_learned: bool | None  # None: it may say that it is wrong
    text: str  # the key and its value; what is unclear


@dataclass(frozen=True)
class Beside:
    """What a key stands beside."""

    answers: tuple[str, ...] = ()  # of the row, or the message
    labels: Labels | None = None  # knows the other rows of the file; None for a message
    row: Mapping[str, JsonValue] | None = None  # the row; None for a message

    @cached_property
    def said(self) -> tuple[str, ...]:
        """The answers as `plain` returns them. Few keys need them, and long texts take time."""
        return tuple(map(plain, self.answers))


def shown(here: tuple[str, ...], value: JsonValue) -> str:
    """Return a key and its value for people."""
    text = value if isinstance(value, str) else "" if isinstance(value, dict | list) else repr(value)
    return f"{'.'.join(here)}: {' '.join(text.split())[:40]}"


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


def values_at(row: Mapping[str, JsonValue], here: tuple[str, ...]) -> list[JsonValue]:
    """Return the values of a key in a row, which may be in objects and lists."""
    found = [row.get(here[0])]
    for key in here[1:]:
        found = [members[key] for value in found for members in objects_of(value) if key in members]
    flat = [item for value in found for item in (value if isinstance(value, list) else [value])]
    return [item.get("value") if isinstance(item, dict) else item for item in flat]


def is_answer(value: str, said: tuple[str, ...]) -> bool:
    """Tell whether a text is one of the answers, which are as `plain` returns them."""
    text = plain(value).rstrip(".!")
    return any(text == answer.rstrip(".!") for answer in said)
