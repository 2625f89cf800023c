"""The marks by which datasets say that an answer is not learned: OpenAI's `weight`, axolotl's `train`, ms-swift's `loss`,
the `label` of trl's KTO, and their relatives, on a message or on a row.

A mark is honoured or refused, in any spelling: CSV has only text, and spreadsheets write `FALSE` or `0,0`.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterable, Mapping
from decimal import Decimal
from typing import Literal

from pydantic import JsonValue

from loraflow.data.chats import BadRow

# Keys in lower case with underscores. Of these, 0 and false exclude an answer; 1 and true do not.
_WEIGHTS = frozenset({
    "weight", "weights", "loss", "loss_weight", "sample_weight", "loss_mask", "compute_loss", "train", "training",
    "trainable", "train_on", "train_on_turn", "learn", "learned", "supervised",
})  # fmt: skip
# Of these, 1 and true exclude an answer.
_EXCLUSIONS = frozenset({
    "masked", "is_masked", "ignore", "ignored", "ignore_loss", "no_loss", "exclude", "excluded", "skip",
})  # fmt: skip
# KTO's: true is a desirable answer. Many datasets have a class by the name `label`, so other values are no mark.
_LABELS = frozenset({"label", "kto_tag", "kto_label", "desirable", "is_desirable"})
# The meaning of these depends on the tool: `mask: 1` is learned in some, and left out in others.
_UNCLEAR = frozenset({"mask", "training_detail", "train_detail"})
_KEYS = _WEIGHTS | _EXCLUSIONS | _LABELS | _UNCLEAR

_TRUE = frozenset({"true", "t", "yes", "y", "on"})
_FALSE = frozenset({"false", "f", "no", "n", "off"})
_LABEL_TRUE = _TRUE | {"desirable", "chosen"}
_LABEL_FALSE = _FALSE | {"undesirable", "rejected"}
_NUMBER = re.compile(r"[-+]?(?:\d+(?:[.,]\d*)?|[.,]\d+)(?:[eE][-+]?\d+)?")
MAX_WEIGHT = 10

Side = Literal[True, False, "other"] | None  # what a label says; None: there is no value


class MarkedFalse(BadRow):
    """A row without an answer to learn, because its marks exclude them all. It is left out and counted, not malformed."""


def is_mark(key: str) -> bool:
    """Tell whether a key of a row or message may be a mark."""
    return _normal(key) in _KEYS


def _normal(key: str) -> str:
    return key.strip().lower().replace("-", "_").replace(" ", "_")


def is_learned(values: Mapping[str, JsonValue], where: str, used: set[str], labels: Labels) -> bool:
    """Tell whether the marks of a row or message leave its answer in the loss. One mark that excludes it is enough.

    Args:
        values: the row or message.
        where: the message, for the problem's text; empty for a row.
        used: the keys that are read as marks are added to it.
        labels: tells whether a label is a class.

    Raises:
        BadRow: a mark is unclear.
    """
    learned = True
    for key, value in values.items():
        if not isinstance(key, str) or (name := _normal(key)) not in _KEYS:
            continue
        mark = _mark(key, name, value, where, labels)
        if mark is not None:
            learned &= mark
            used.add(key)
    return learned


def excludes(key: str, value: JsonValue) -> bool:
    """Tell whether a key and its value are a mark that excludes an answer."""
    try:
        return not is_learned({key: value}, "message", set(), Labels())
    except BadRow:
        return False


def _mark(key: str, name: str, value: JsonValue, where: str, labels: Labels) -> bool | None:
    if name in _LABELS:
        side = label_side(value)
        if side is None or labels.are_classes(key):
            return None
        if side == "other":
            if where:  # an attribute of a message: it is named as not read
                return None
            raise BadRow(
                f"{key} {_shown(value)} is neither true nor false, as other rows' are; if it is a class, rename it"
            )
        return side
    if name in _UNCLEAR:
        if _is_absent(value) or (isinstance(value, str) and value.strip().lower() in ("user", "human", "system")):
            return None
        raise BadRow(f"{where}{key} {_shown(value)} does not say whether the answer is learned; use weight 0 or 1")
    weight = _weight(value)
    if weight is None and _is_absent(value):
        return None
    if weight is None or weight not in (0, 1):
        raise BadRow(_unsupported(where, key, value, weight))
    return bool(weight) is not (name in _EXCLUSIONS)


def _unsupported(where: str, key: str, value: JsonValue, weight: float | None) -> str:
    if weight is None:
        why = "is not readable"
    elif weight < 0 or weight > MAX_WEIGHT:
        why = f"is outside 0 to {MAX_WEIGHT}"
    else:
        why = "is a fraction or a multiple, which is not supported yet"
    column = "" if where else "; if it is no mark, rename or remove the column"
    return f"{where}{key} {_shown(value)} {why}; write 1 (the answer is learned) or 0 (it is not){column}"


def _shown(value: JsonValue) -> str:
    return repr(value)[:60]


def _is_absent(value: JsonValue) -> bool:
    if isinstance(value, float):
        return math.isnan(value)  # pandas' missing value
    if isinstance(value, str):
        return value.strip().lower() in ("", "nan", "null", "none", "[]", "{}")
    return value is None or value in ([], {})


def _weight(value: JsonValue) -> float | None:
    """Return a mark as a number: 0 or 1 for words; None if it is none."""
    if isinstance(value, bool):
        return float(value)
    if isinstance(value, int | float | Decimal):
        try:
            number = float(value)
        except OverflowError:
            return math.inf
        return None if math.isnan(number) else number
    if not isinstance(value, str):
        return None
    text = value.strip().lower()
    if text in _TRUE or text in _FALSE:
        return float(text in _TRUE)
    return float(text.replace(",", ".")) if _NUMBER.fullmatch(text) else None


def label_side(value: JsonValue) -> Side:
    """Return what a label says: True, False, "other" for a value that is neither, None for no value."""
    if _is_absent(value):
        return None
    if isinstance(value, str):
        text = value.strip().lower()
        if text in _LABEL_TRUE or text in _LABEL_FALSE:
            return text in _LABEL_TRUE
    number = _weight(value)
    return "other" if number not in (0, 1) else number == 1


class Labels:
    """Whether the labels of a file are marks or classes.

    The file is read for it when the first label is met. Labels are classes if one is a whole number above 1, if there are
    two other texts, or if none is true or false. One other text beside true and false is a mistake, and is refused.
    """

    def __init__(self, rows: Callable[[], Iterable[JsonValue]] | None = None):
        self._rows = rows
        self._found: dict[str, bool] = {}

    def are_classes(self, key: str) -> bool:
        """Return whether the labels of a key are classes. Without rows, they are marks."""
        if self._rows is None:
            return False
        if key not in self._found:
            values = (row.get(key) if isinstance(row, dict) else None for row in self._rows())
            self._found[key] = _are_classes(values)
        return self._found[key]


def _are_classes(values: Iterable[JsonValue]) -> bool:
    others: set[str] = set()
    has_mark = False
    for value in values:
        side = label_side(value)
        if side == "other":
            number = _weight(value)
            others.add(_shown(value))
            if len(others) > 1 or (number is not None and number > 1 and number.is_integer()):
                return True
        elif side is not None:
            has_mark = True
    return not has_mark
