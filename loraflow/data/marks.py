"""The marks by which datasets say that an answer is not learned, or how much: OpenAI's `weight`, axolotl's `train`,
ms-swift's `loss`, the `label` of trl's KTO, and their relatives, on a message or on a row.

A mark is honoured or refused, in any spelling: CSV has only text, and spreadsheets write `FALSE` or `0,0`.
"""

from __future__ import annotations

import ast
import re
from collections.abc import Collection, Iterable, Iterator, Mapping
from functools import lru_cache

from pydantic import JsonValue

from loraflow.data.chats import BadRow
from loraflow.data.json_text import strict_json
from loraflow.data.labels import Labels, as_number, is_absent, label_side, reads_like_a_judgement

# Keys in lower case with underscores. Of these, 0 and false exclude an answer; other numbers multiply its loss.
_WEIGHTS = frozenset({
    "weight", "weights", "loss", "loss_weight", "sample_weight", "loss_mask", "compute_loss", "train", "training",
    "trainable", "is_trainable", "train_on", "train_on_turn", "learn", "learned", "learnable", "supervised", "loss_scale",
    "loss_multiplier", "example_weight", "message_weight", "turn_weight", "calculate_loss", "use_loss", "with_loss",
    "has_loss", "requires_loss", "is_train", "to_train", "to_learn", "for_training", "use_for_training",
    "include_in_training", "include_in_loss",
})  # fmt: skip
# Of these, 1 and true exclude an answer.
_EXCLUSIONS = frozenset({
    "masked", "is_masked", "ignore", "ignored", "ignore_loss", "no_loss", "exclude", "excluded", "skip", "without_loss",
    "skip_loss", "mask_loss", "skip_training", "no_train", "do_not_train", "dont_train", "do_not_learn", "dont_learn",
    "exclude_from_training", "exclude_from_loss", "ignore_in_training", "ignore_in_loss",
})  # fmt: skip
# KTO's: true is a desirable answer. Many datasets have a class by the name `label`, so other values may be no mark.
_LABELS = frozenset({"label", "kto_tag", "kto_label", "desirable", "is_desirable"})


# Judgements that count only as true or false: other values, such as the correct answer's text, are named as not read.
def _with_is(*names: str) -> frozenset[str]:
    return frozenset(names) | {f"is_{name}" for name in names}


_VERDICTS = _with_is(
    "correct", "accepted", "approved", "good", "valid", "acceptable", "usable", "keep", "include", "included", "enabled"
)
_BAD_VERDICTS = _with_is(
    "incorrect", "rejected", "wrong", "bad", "invalid", "unusable", "deleted", "removed", "discard", "discarded", "drop",
    "dropped", "hidden", "disabled",
)  # fmt: skip
# Of these, a number may be a count of votes, or the number of an answer.
_WORD_VERDICTS = _with_is("chosen", "preferred", "passed", "thumbs_up", "upvoted", "liked")
_WORD_BAD_VERDICTS = _with_is("failed", "thumbs_down", "downvoted", "disliked")
# The meaning of these depends on the tool: `mask: 1` is learned in some, and left out in others.
_UNCLEAR = frozenset({"mask", "training_detail", "train_detail"})
_GOOD = _VERDICTS | _WORD_VERDICTS
_JUDGEMENTS = _GOOD | _BAD_VERDICTS | _WORD_BAD_VERDICTS
_KEYS = _WEIGHTS | _EXCLUSIONS | _LABELS | _JUDGEMENTS | _UNCLEAR
# Two answers of a preference pair, or two judgements of one answer: better → worse.
_PAIRS = {
    "chosen": ("rejected",),
    "preferred": ("rejected", "dispreferred"),
    "accepted": ("rejected",),
    "good": ("bad",),
    "correct": ("incorrect", "wrong"),
}
# Objects beside an answer, whose marks count only if they exclude it: a weight in there may be that of a product.
_CONTAINERS = frozenset({
    "metadata", "meta", "extra", "info", "annotation", "annotations", "attributes", "properties", "flags", "options",
    "additional_info", "extra_info", "custom", "meta_data", "metainfo", "meta_info", "feedback", "review", "reviews",
    "quality", "moderation", "evaluation", "judgement", "judgment", "verdict",
})  # fmt: skip
# A row's `loss` or `train` with other values than true and false may be a measurement, or a split.
_ROW_WEIGHTS = frozenset({
    "weight", "weights", "loss_weight", "sample_weight", "loss_scale", "loss_multiplier", "example_weight",
})  # fmt: skip
MAX_WEIGHT = 10
_MAX_PYTHON = 20_000  # characters of an object in Python's notation; a longer text is none


class MarkedFalse(BadRow):
    """A row without an answer to learn, because its marks exclude them all. It is left out and counted, not malformed."""


def is_mark(key: str) -> bool:
    """Tell whether a key of a row or message may be a mark."""
    return _normal(key) in _KEYS


_WORDS = re.compile(
    r"(?<=[a-z0-9])(?=[A-Z])|[-\s.]+"
)  # where isCorrect, is-correct and "is correct" have their underscore


@lru_cache(4096)
def _normal(key: str) -> str:
    return _WORDS.sub("_", key.strip().rstrip("?")).lower()


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
    texts = set() if where else _answer_texts(values, labels, answers)
    for key, value in values.items():
        if not isinstance(key, str) or key in texts:
            continue
        name = _normal(key)
        if _container_excludes(_contained(key, name, value)):
            weight = 0.0
        if name not in _KEYS:
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


def _answer_texts(values: Mapping[str, JsonValue], labels: Labels, answers: Collection[str]) -> set[str]:
    """Return the keys of a row that are no marks, because their texts are the answers of a preference pair.

    Raises:
        BadRow: the two keys of a pair may be answers or marks.
    """
    names = {_normal(key): key for key in values if isinstance(key, str)}
    if names.keys().isdisjoint(_BAD_VERDICTS):
        return set()
    read, found = {_normal(key) for key in answers}, set[str]()
    for better, worse in ((better, worse) for better, others in _PAIRS.items() for worse in others if worse in names):
        other = names[worse]
        if not isinstance(values[other], str):
            continue
        if better in read:
            found.add(other)
        elif better in names and all(_is_verdict_text(values[key]) for key in (names[better], other)):
            what = labels.of_pair(names[better], other)
            if what == "unclear":
                raise BadRow(
                    f"{names[better]} {_shown(values[names[better]])} and {other} {_shown(values[other])} may be two answers, "
                    f"or say whether the answer is right; set data.columns: {{completion: {names[better]}}} if they are "
                    "answers, else write true and false"
                )
            found.update((names[better], other) if what == "answers" else ())
    return found


def _is_verdict_text(value: JsonValue) -> bool:
    return isinstance(value, str) and label_side(value) in (True, False)


def _contained(key: str, name: str, value: JsonValue) -> Iterator[Mapping[str, JsonValue]]:
    """Yield the objects beside an answer that a key has: of one that was flattened to the columns meta.weight, … too."""
    if name.removesuffix("_json") in _CONTAINERS:
        yield from _objects(value)
        return
    container, found, member = key.partition(".")
    if found and _normal(container) in _CONTAINERS:
        yield {member: value}


def _objects(value: JsonValue) -> Iterator[Mapping[str, JsonValue]]:
    """Yield an object, or the objects of a list; tables have them as text, in JSON's or Python's notation."""
    if isinstance(value, str) and value.lstrip().startswith(("{", "[")):
        value = _parsed(value)
    if isinstance(value, dict):
        yield value
    for item in value if isinstance(value, list) else ():
        if isinstance(item, dict):
            yield item


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
    name = _normal(key)
    if (name in _WEIGHTS and as_number(value) == 0) or (name in _EXCLUSIONS and as_number(value) == 1):
        return True
    if name in _JUDGEMENTS:
        return _verdict(name, value) is False
    return isinstance(value, dict | list | str) and _container_excludes(_contained(key, name, value))


def _verdict(name: str, value: JsonValue) -> bool | None:
    """Return what a judgement says about an answer; None if it is none, such as a text or a number of votes."""
    side = label_side(value)
    is_word = isinstance(value, bool) or (isinstance(value, str) and not value.strip().isdigit())
    if side is None or side == "other" or (name in _WORD_VERDICTS | _WORD_BAD_VERDICTS and not is_word):
        return None
    return side is (name in _GOOD)


def _mark(key: str, name: str, value: JsonValue, where: str, labels: Labels) -> float | None:
    """Return what a mark multiplies the weight of an answer by; None if it says nothing."""
    if name in _LABELS:
        side = label_side(value)
        if side is None or labels.are_classes(key):
            return None
        if side == "other":
            if where and not reads_like_a_judgement(value):  # an attribute of a message: it is named as not read
                return None
            raise BadRow(where + labels.problem(key, value))
        return float(side)
    if name in _JUDGEMENTS:
        verdict = _verdict(name, value)
        return None if verdict is None else float(verdict)
    if name in _UNCLEAR:
        if is_absent(value) or (isinstance(value, str) and value.strip().lower() in ("user", "human", "system")):
            return None
        raise BadRow(f"{where}{key} {_shown(value)} does not say whether the answer is learned; use weight 0 or 1")
    weight = as_number(value)
    if weight is None and is_absent(value):
        return None
    if weight is None or weight < 0 or weight > MAX_WEIGHT or (name in _EXCLUSIONS and weight not in (0, 1)):
        raise BadRow(_unsupported(where, key, value, weight, is_exclusion=name in _EXCLUSIONS))
    if not where and weight not in (0, 1) and name not in _ROW_WEIGHTS:
        raise BadRow(
            f"{key} {_shown(value)} is neither 0 nor 1; if it multiplies the loss of the row, name the column weight"
        )
    return float(weight == 0) if name in _EXCLUSIONS else weight


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
