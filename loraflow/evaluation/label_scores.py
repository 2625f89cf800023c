"""Macro-F1 and confusions of a classification set: what the metric `labels` gives besides each row's accuracy.

Macro-F1 is no mean over rows, so two models cannot be compared by it row by row: the gate takes accuracy.
"""

import unicodedata
from collections import Counter
from collections.abc import Sequence

import numpy as np

from loraflow.evaluation.intervals import Interval, ratio_interval
from loraflow.evaluation.values import Confusion

WORST = 10  # labels in the report
OTHER = "(no label)"  # stands for answers that are no label of the set


def label(text: str) -> str:
    """Return a label without differences of case, white space and Unicode form."""
    return " ".join(unicodedata.normalize("NFC", text).casefold().split())


def macro_f1(
    answers: Sequence[str], references: Sequence[str], groups: np.ndarray | None, confidence: float
) -> Interval:
    """Return the mean over labels of F1, with the interval of the mean of what each row adds to it (the delta method).

    The labels are those of the references.

    Args:
        groups: a number for each row; rows with the same number are not independent.
    """
    names = {name: number for number, name in enumerate(dict.fromkeys(map(label, references)))}
    count = len(names)
    expected = np.array([names[label(text)] for text in references])
    given = np.array([names.get(label(text), count) for text in answers])
    is_right = expected == given
    right = np.bincount(expected, is_right, minlength=count)
    both = np.bincount(expected, minlength=count) + np.bincount(given, minlength=count)[:count]
    value = float((2 * right / both).mean())
    of_right, of_both = np.append(2 / both, 0), np.append(-2 * right / both**2, 0)  # derivatives; 0 for other answers
    added = value + len(expected) / count * (is_right * of_right[expected] + of_both[expected] + of_both[given])
    labels = np.arange(len(expected)) if groups is None else groups
    rows = np.bincount(labels).astype(float)
    low, high = ratio_interval(np.bincount(labels, added), rows, confidence)[1:]
    if value in (0.0, 1.0) and high - low <= 1e-9:  # no row differs: the bound is that of a share of the groups
        share = ((1 - confidence) / 2) ** float(rows @ rows / rows.sum() ** 2)
        low, high = value * share, 1 - (1 - value) * share
    return Interval(value, max(low, 0.0), min(high, 1.0))


def confusions(answers: Sequence[str], references: Sequence[str]) -> tuple[Confusion, ...]:
    """Return the labels with the lowest accuracy, each with the wrong answer that is given most often; the worst first."""
    names: dict[str, str] = {}
    for text in references:
        names.setdefault(label(text), text.strip())
    wrong: dict[str, Counter[str]] = {name: Counter() for name in names}
    rows = Counter(map(label, references))
    for answer, reference in zip(answers, references, strict=True):
        if label(answer) != label(reference):
            wrong[label(reference)][names.get(label(answer), OTHER)] += 1
    order = sorted(
        (name for name in names if wrong[name]), key=lambda name: (-wrong[name].total() / rows[name], -rows[name], name)
    )
    return tuple(
        Confusion(label=names[name], rows=rows[name], wrong=wrong[name].total(), as_label=most, as_count=count)
        for name in order[:WORST]
        for most, count in wrong[name].most_common(1)
    )
