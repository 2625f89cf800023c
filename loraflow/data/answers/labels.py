"""Whether a column `label` marks answers (trl's KTO: true is desirable, false is not) or names classes.

Nothing in a file says which of the two it is, so the column's values decide. A value that reads like "wrong" must never
be learned because it is misspelled or in another language: what is neither plainly a mark nor plainly a class is refused.
"""

import math
import re
import unicodedata
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from decimal import Decimal
from typing import Literal

from pydantic import JsonValue

TRUE = frozenset({"true", "t", "yes", "y", "on"})
FALSE = frozenset({"false", "f", "no", "n", "off"})
# Also honoured in a label, and not used for anything else than a judgement.
_LABEL_TRUE = frozenset({"true", "desirable", "chosen", "correct", "right", "good", "accept", "accepted", "approved"})
LABEL_FALSE = frozenset({
    "false", "undesirable", "rejected", "reject", "incorrect", "wrong", "bad", "not true", "not correct", "not right",
    "not good", "not desirable", "not accepted", "not chosen", "not approved", "disapproved",
})  # fmt: skip
# Judgements that are not honoured, because a list of words is never complete: their rows are refused. Without accents.
_LIKE_FALSE = frozenset({
    "invalid", "fail", "failed", "failure", "poor", "nok", "ko", "not ok", "dislike", "disliked", "downvote",
    "reject it", "thumbs down", "thumbsdown", "unacceptable", "unwanted", "deny", "denied", "declined", "worse",
    "worst", "negative mark", "falsch", "schlecht", "abgelehnt", "unerwunscht", "faux", "fausse", "incorrecte",
    "mauvais", "mauvaise", "rejete", "falso", "falsa", "incorrecto", "incorrecta", "malo", "mala", "mal", "rechazado",
    "errado", "errada", "incorreto", "ruim", "rejeitado", "sbagliato", "sbagliata", "errato", "scorretto",
    "rifiutato", "fout", "onjuist", "onwaar", "slecht", "falsk", "fel", "forkert", "galt", "feil", "darlig", "vaara",
    "virheellinen", "falsz", "falszywy", "zle", "zly", "bledny", "spatne", "nespravne", "hamis", "rossz", "hibas",
    "gresit", "yanlis", "yanlıs", "kotu", "salah", "buruk", "sai", "ложь", "ложно", "неверно", "неправильно", "плохо",
    "хибно", "неправда", "λαθος", "ψευδες", "خطأ", "خاطئ", "שגוי", "לא נכון", "गलत", "ผิด", "错", "错误", "錯誤", "假",
    "不正确", "坏", "差", "偽", "誤り", "間違い", "不正解", "거짓", "틀림", "오답", "👎", "❌", "✗", "✘", "×",
})  # fmt: skip
# "No" in other languages. Beside them, other words are no classes: `label: nein` may be KTO's mark. Without accents.
NO = frozenset({
    "nope", "nah", "nein", "non", "nao", "nee", "nej", "nei", "nie", "nem", "hayir", "tidak", "khong", "нет", "ні",
    "οχι", "لا", "לא", "नहीं", "否", "不", "いいえ", "아니오", "아니요", "ei", "ne",
})  # fmt: skip
_MISSPELT_FALSE = ("false", "wrong", "incorrect", "rejected", "undesirable")
_NUMBER = re.compile(r"[-+]?(?:\d+(?:[.,]\d*)?|[.,]\d+)(?:[eE][-+]?\d+)?")
_THOUSANDS = re.compile(r"[-+]?[1-9]\d{0,2},\d{3}")  # 1,000 is one or a thousand
_MAX_CLASS = 60  # characters of an answer that is a class
ENOUGH = 8  # other values beside true and false that make them classes, such as the 150 intents of CLINC
# The keys of an answer: a label that is the answer, or is named by it, is its class.
ANSWERS = ("completion", "response", "output", "answer", "messages", "conversations")

Side = Literal[True, False, "other"] | None  # what a label says; None: there is no value
Question = tuple[str, ...]  # about a file
_Kind = Literal["binary", "true", "false", "like_false", "no", "weak", "number", "score", "other"]


def label_side(value: JsonValue) -> Side:
    """Return what a label says: True, False, "other" for a value that is neither, None for no value."""
    if is_absent(value):
        return None
    if isinstance(value, str):
        text = plain(value)
        if text in TRUE or text in _LABEL_TRUE:
            return True
        if text in FALSE or text in LABEL_FALSE:
            return False
    weight = as_number(value)
    return "other" if weight not in (0, 1) else weight == 1


def judges_badly(value: str) -> bool:
    """Tell whether a text says that an answer is wrong, misspelled or in another language."""
    return _kind(value) == "like_false"


def may_be_no(value: JsonValue) -> bool:
    """Tell whether a label that has a value says no or wrong in words that are not honoured."""
    return _kind(value) in ("like_false", "no")


def is_absent(value: JsonValue) -> bool:
    """Tell whether a mark has no value: null, a blank cell, pandas' NaN."""
    if isinstance(value, float):
        return math.isnan(value)
    if isinstance(value, str):
        return value.strip().lower() in ("", "nan", "null", "none", "[]", "{}")
    return value is None or value in ([], {})


def as_number(value: JsonValue) -> float | None:
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
    if text in TRUE or text in FALSE:
        return float(text in TRUE)
    if _THOUSANDS.fullmatch(text) or not _NUMBER.fullmatch(text):
        return None
    return float(text.replace(",", "."))


def plain(text: str) -> str:
    """Return a label in lower case, with single spaces for - and _, without accents."""
    text = text.casefold()
    if not text.isascii():  # most are, and need no more
        decomposed = unicodedata.normalize("NFKD", text)
        letters = "".join(c for c in decomposed if not "\u0300" <= c <= "\u036f" and c != "\ufe0f").replace("ł", "l")
        text = unicodedata.normalize("NFC", letters.replace("ø", "o"))
    return " ".join(text.replace("_", " ").replace("-", " ").split())


def _kind(value: JsonValue) -> _Kind:
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, str):
        text = plain(value)
        if text in _LABEL_TRUE or text in LABEL_FALSE:
            return "true" if text in _LABEL_TRUE else "false"
        if text in _LIKE_FALSE or any(_is_misspelt(text, word) for word in _MISSPELT_FALSE):
            return "like_false"
        if text in NO:
            return "no"
        if text in TRUE or text in FALSE:
            return "weak"
    number = as_number(value)
    if number is None:
        return "other"
    if number in (0, 1):
        return "binary"
    return "number" if number >= -1 and number.is_integer() else "score"


def _is_misspelt(text: str, word: str) -> bool:
    """Tell whether a text is a word with one letter added, left out or replaced, or two neighbours swapped."""
    if abs(len(text) - len(word)) > 1 or text == word:
        return False
    start = next((i for i, (a, b) in enumerate(zip(text, word, strict=False)) if a != b), min(len(text), len(word)))
    a, b = text[start:], word[start:]
    swapped = len(a) > 1 and len(b) > 1 and (a[0], a[1]) == (b[1], b[0]) and a[2:] == b[2:]
    return swapped or a[1:] == b[1:] or a[1:] == b or a == b[1:]


@dataclass
class _Values:
    """The different labels of a file, as far as they are needed to decide."""

    kinds: set[_Kind] = field(default_factory=set)
    others: set[str] = field(default_factory=set)  # texts and numbers that say neither true nor false
    numbers: set[float] = field(default_factory=set)
    are_answers: bool = True  # each label is its row's answer
    answers: dict[str, str] = field(default_factory=dict)  # label → the answer that all its rows have
    are_numbers_of_answers: bool = True  # rows with one label have one answer
    rows: Counter[str] = field(default_factory=Counter)  # of each label

    def add(self, value: JsonValue, row: dict[str, JsonValue]) -> None:
        if is_absent(value):
            return
        kind = _kind(value)
        self.kinds.add(kind)
        text = plain(str(value))
        self._add_answer(text, row)
        self.are_answers = self.are_answers and any(text == plain(answer) for answer in answers_of(row))
        if kind in ("number", "binary"):
            number = as_number(value)
            assert number is not None
            self.numbers.add(number)
        if kind in ("number", "other", "no"):
            self.others.add(text)

    def _add_answer(self, label: str, row: dict[str, JsonValue]) -> None:
        if self.are_numbers_of_answers:
            answer = class_of(row)
            answer = plain(answer) if len(answer) <= _MAX_CLASS else ""
            self.rows[label] += 1
            self.are_numbers_of_answers = bool(answer) and self.answers.setdefault(label, answer) == answer

    def are_classes(self) -> bool:
        kinds, others = self.kinds, len(self.others)
        if not kinds:  # of messages that are not lists: the label that is met is not among them
            return False
        if others >= ENOUGH or self._are_of_answers():
            return True
        if not others or "score" in kinds:
            return False
        if kinds <= {"number", "binary"}:
            return max(self.numbers) > 2 or sum(number >= 0 for number in self.numbers) > 2
        if kinds & {"false", "like_false", "no"}:
            return False
        if kinds & {"true", "weak", "binary"}:
            return others >= 2
        return True

    def _are_of_answers(self) -> bool:
        """Tell whether labels are the answers, or numbers of them: 0 beside each answer "negative", 1 beside "positive"."""
        has_names = self.are_numbers_of_answers and len(set(self.answers.values())) == len(self.answers) > 1
        return self.are_answers or (has_names and min(self.rows.values()) > 1)


def answers_of(row: Mapping[str, JsonValue]) -> Iterable[str]:
    """Yield the answers of a row, as far as its usual keys have them."""
    for key in ANSWERS:
        value = row.get(key)
        last = value[-1] if isinstance(value, list) and value else None
        if isinstance(last, dict):
            value = last.get("content", last.get("value"))
        if isinstance(value, str):
            yield value


def class_of(row: Mapping[str, JsonValue]) -> str:
    """Return the only answer of a row, or the name of its class in a set for classification; empty if there is none."""
    found = set(answers_of(row)) or {
        value for key in ("label_text", "label_name") if isinstance(value := row.get(key), str)
    }
    return found.pop() if len(found) == 1 else ""


class Labels:
    """Whether the labels of a file are marks or classes. The file is read for it when the first label is met.

    docs/data.md has the rules ("Labels").

    Args:
        is_training: the file's rows may be learned; they are not all held out.

    Attributes:
        asked: what was asked of the file since this was last emptied, with the answers. Rows that are read depend on other
            rows of their file by these answers only.
    """

    def __init__(self, rows: Callable[[], Iterable[JsonValue]] | None = None, *, is_training: bool = False):
        self._rows = rows
        self.is_training = is_training
        self._found: dict[str, bool] = {}
        self._facts: dict[tuple[str, ...], bool] = {}
        self.asked: dict[Question, bool] = {}

    def some_row(self, question: tuple[str, ...], holds: Callable[[dict[str, JsonValue]], bool]) -> bool:
        """Tell whether something holds for a row of the file. Without rows, it does not."""
        if question not in self._facts:
            rows = () if self._rows is None else self._rows()
            self._facts[question] = any(holds(row) for row in rows if isinstance(row, dict))
        self.asked["row", *question] = self._facts[question]
        return self._facts[question]

    def are_classes(self, key: str, values: Callable[[dict[str, JsonValue]], list[JsonValue]] | None = None) -> bool:
        """Return whether the labels of a key are classes. Without rows, they are marks.

        Args:
            values: returns its values in a row, for a key inside an object.
        """
        if key not in self._found:
            found = _Values()
            for row in () if self._rows is None else self._rows():
                if not isinstance(row, dict):
                    continue
                for value in [row.get(key)] if values is None else values(row):
                    found.add(value, row)
                if len(found.others) >= ENOUGH:
                    break
            self._found[key] = found.are_classes()
        self.asked["classes", key] = self._found[key]
        return self._found[key]
