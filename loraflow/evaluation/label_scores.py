"""Macro-F1 and confusions of a classification set: what the metric `labels` gives besides each row's accuracy.

Macro-F1 is no mean over rows, so two models cannot be compared by it row by row: the gate takes accuracy.
"""

from __future__ import annotations

import unicodedata
from collections import Counter
from collections.abc import Sequence

import numpy as np

from loraflow.evaluation.intervals import Interval
from loraflow.evaluation.values import Confusion

RESAMPLES = 1000
WORST = 10  # labels in the report
OTHER = "(no label)"  # stands for answers that are no label of the set


def label(text: str) -> str:
    """Return a label without differences of case, white space and Unicode form."""
    return " ".join(unicodedata.normalize("NFC", text).casefold().split())


def macro_f1(
    answers: Sequence[str], references: Sequence[str], groups: np.ndarray | None, confidence: float, seed: int
) -> Interval:
    """Return the mean over labels of F1, with the percentile interval of a bootstrap of the rows.

    The labels are those of the references. A label of which a resample has neither references nor answers is left out of
    that resample's mean.

    Args:
        answers: the answers of the rows.
        references: the references of the rows.
        groups: a number for each row; rows with the same number are drawn together.
        confidence: the two-sided level.
        seed: the seed of the bootstrap.
    """
    names = {name: number for number, name in enumerate(dict.fromkeys(map(label, references)))}
    count = len(names)
    expected = np.array([names[label(text)] for text in references])
    given = np.array([names.get(label(text), count) for text in answers])

    def value(weights: np.ndarray) -> float:
        right = np.bincount(expected, weights * (expected == given), minlength=count)
        both = np.bincount(expected, weights, minlength=count) + np.bincount(given, weights, minlength=count)[:count]
        return float((2 * right[both > 0] / both[both > 0]).mean())

    _, units = np.unique(np.arange(len(expected)) if groups is None else groups, return_inverse=True)
    size, rng = int(units.max()) + 1, np.random.default_rng(seed)
    if size < 2:
        return Interval(value(np.ones(len(expected))), 0.0, 1.0)
    draws = [value(rng.multinomial(size, np.full(size, 1 / size))[units].astype(float)) for _ in range(RESAMPLES)]
    low, high = np.quantile(draws, [(1 - confidence) / 2, (1 + confidence) / 2])
    found = value(np.ones(len(expected)))
    return Interval(found, min(float(low), found), max(float(high), found))


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
