"""The marks by which datasets say that an answer is not learned, or how much: OpenAI's `weight`, axolotl's `train`,
ms-swift's `loss`, the `label` of trl's KTO, and their relatives, on a message or on a row.

A mark is honoured or refused, in any spelling: CSV has only text, and spreadsheets write `FALSE` or `0,0`.
"""

from __future__ import annotations

from collections.abc import Mapping

from pydantic import JsonValue

from loraflow.data.chats import BadRow
from loraflow.data.labels import Labels, as_number, is_absent, label_side, reads_like_a_judgement

# Keys in lower case with underscores. Of these, 0 and false exclude an answer; other numbers multiply its loss.
_WEIGHTS = frozenset({
    "weight", "weights", "loss", "loss_weight", "sample_weight", "loss_mask", "compute_loss", "train", "training",
    "trainable", "train_on", "train_on_turn", "learn", "learned", "supervised",
})  # fmt: skip
# Of these, 1 and true exclude an answer.
_EXCLUSIONS = frozenset({
    "masked", "is_masked", "ignore", "ignored", "ignore_loss", "no_loss", "exclude", "excluded", "skip",
})  # fmt: skip
# KTO's: true is a desirable answer. Many datasets have a class by the name `label`, so other values may be no mark.
_LABELS = frozenset({"label", "kto_tag", "kto_label", "desirable", "is_desirable"})
# Judgements that count only as true or false: other values, such as the correct answer's text, are named as not read.
_VERDICTS = frozenset(
    {"correct", "is_correct", "accepted", "is_accepted", "approved", "is_approved", "good", "is_good"}
)
_BAD_VERDICTS = frozenset(
    {"incorrect", "is_incorrect", "rejected", "is_rejected", "wrong", "is_wrong", "bad", "is_bad"}
)
# The meaning of these depends on the tool: `mask: 1` is learned in some, and left out in others.
_UNCLEAR = frozenset({"mask", "training_detail", "train_detail"})
_KEYS = _WEIGHTS | _EXCLUSIONS | _LABELS | _VERDICTS | _BAD_VERDICTS | _UNCLEAR
# A row's `loss` or `train` with other values than true and false may be a measurement, or a split.
_ROW_WEIGHTS = frozenset({"weight", "weights", "loss_weight", "sample_weight"})
MAX_WEIGHT = 10


class MarkedFalse(BadRow):
    """A row without an answer to learn, because its marks exclude them all. It is left out and counted, not malformed."""


def is_mark(key: str) -> bool:
    """Tell whether a key of a row or message may be a mark."""
    return _normal(key) in _KEYS


def _normal(key: str) -> str:
    return key.strip().lower().replace("-", "_").replace(" ", "_")


def answer_weight(values: Mapping[str, JsonValue], where: str, used: set[str], labels: Labels) -> float:
    """Return the weight of an answer in the loss by the marks of its row or message: their product, 1 without any.

    Args:
        values: the row or message.
        where: the message, for the problem's text; empty for a row.
        used: the keys that are read as marks are added to it.
        labels: tells whether a label is a class.

    Raises:
        BadRow: a mark is unclear, or a weight is not between 0 and 10.
    """
    weight = 1.0
    for key, value in values.items():
        if not isinstance(key, str) or (name := _normal(key)) not in _KEYS:
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
    if name in _VERDICTS or name in _BAD_VERDICTS:
        side = label_side(value)
        return None if side is None or side == "other" else float(side is (name in _VERDICTS))
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
