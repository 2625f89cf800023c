"""Find answers without content, such as N/A. The same words may be real answers, such as the class `none`."""

from __future__ import annotations

from collections import Counter, defaultdict

from loraflow.data.sampling import MAX_LABEL_CHARACTERS, label_values

MIN_USUAL, USUAL_SHARE = 5, 0.01  # rows, and their share of a set, from which a word is an answer of this set
_QUOTED = 60  # characters of a quoted text
# These may be real answers: names of classes, or that a text does not say what was asked.
_WORDS = frozenset({"n/a", "na", "none", "null", "undefined"})
# These are what programs and people leave in place of an answer.
_STUBS = frozenset({"nan", "todo", "tbd", "[deleted]", "[removed]", "…"})
_MARKS = frozenset(".-–—…_?* ")


class Placeholders:
    """Look at answers one after another. Whether a word is a real answer shows only after all of them."""

    def __init__(self) -> None:
        self._found: dict[int, tuple[str, str]] = {}  # row → set, answer
        self._labels: dict[str, list[str] | None] = {}  # set → short answers; None if an answer is too long for a class
        self._words: dict[str, Counter[str]] = defaultdict(Counter)  # set → word that may be an answer → rows
        self._rows: Counter[str] = Counter()  # set → rows

    def add(self, row: int, set_name: str, answer: str) -> None:
        """Look at the answer of a row.

        Args:
            row: number of the row.
            set_name: the row's set. Each set is judged by its own answers, and by the classes of the others.
            answer: its text.
        """
        text = answer.strip()
        self._rows[set_name] += 1
        labels = self._labels.setdefault(set_name, [])
        if labels is not None:
            if len(text) > MAX_LABEL_CHARACTERS or "\n" in text:
                self._labels[set_name] = None
            else:
                labels.append(text)
        word = _word(text)
        if word in _WORDS or word in _STUBS or text == "…" or (len(text) > 1 and set(text) <= _MARKS):
            self._found[row] = (set_name, text)
            if word in _WORDS:
                self._words[set_name][word] += 1

    def rows(self) -> dict[int, str]:
        """Return {row: what was found} without the answers that are classes or usual in their set."""
        classes = {_word(label) for labels in self._labels.values() for label in label_values(labels or []) or []}
        found = {}
        for row, (name, text) in self._found.items():
            count = self._words[name][_word(text)]
            is_usual = count >= MIN_USUAL and count >= USUAL_SHARE * self._rows[name]
            if _word(text) not in classes and not is_usual:
                found[row] = f"no answer: {text[:_QUOTED]!r}"
        return found


def _word(text: str) -> str:
    return text.casefold().strip(".")
