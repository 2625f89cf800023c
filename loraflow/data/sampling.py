"""Seeded samples of rows, spread over the values of the rows: sets, groups, or the labels of a classification set."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from loraflow.data.split import CLUSTER, draw, sample

# A set is a classification set if its answers are few and short, and each of them has several rows on average.
MAX_LABELS = 1000
MAX_LABEL_CHARACTERS = 80
ROWS_PER_LABEL = 3


def label_values(answers: Iterable[str]) -> list[str] | None:
    """Return the label of each row of a classification set; None if its answers are no labels.

    Args:
        answers: the last answer of each row.
    """
    different: dict[str, str] = {}
    labels: list[str] = []
    for answer in answers:
        label = answer.strip()
        labels.append(different.setdefault(label, label))  # one text for all rows, which saves memory
        if len(different) > MAX_LABELS or len(label) > MAX_LABEL_CHARACTERS or "\n" in label:
            return None
    return labels if 2 <= len(different) <= len(labels) / ROWS_PER_LABEL else None


def spread_values(groups: Sequence[str | None], answers: Iterable[str]) -> list[str] | None:
    """Return the value by which each row is sampled: its group, or else its label; None if no row has one.

    Args:
        groups: the group of each row by data.group. Clusters of near-duplicates are none: most rows have no cluster.
        answers: the last answer of each row.
    """
    named = [group if group and not group.startswith(CLUSTER) else "" for group in groups]
    labels = label_values(answers)
    if labels is None:
        return named if any(named) else None
    return [group or f"label {label}" for group, label in zip(named, labels, strict=True)]


def spread_sample(keys: Sequence[str], values: Sequence[str] | None, size: int, seed: int, purpose: str) -> list[int]:
    """Return the positions of a seeded sample in which each value has its share of all rows, in ascending order.

    A value gets the whole part of its share, and one row more with about the probability of its fractional part (Pareto
    sampling, Rosén 1997): no rare value is left out for certain, and the mean over the sample estimates the mean over all
    rows. Values and rows keep their random numbers, so adding rows changes few rows of the sample.

    Args:
        keys: a key of each row, such as its prompt key.
        values: the value of each row; None for a sample that looks at no value.
        size: the number of rows to take.
        seed: the seed.
        purpose: each purpose is an independent draw.
    """
    if values is None or size >= len(keys):
        return sample(keys, size, seed, purpose)
    rows: dict[str, list[int]] = {}
    for number, value in enumerate(values):
        rows.setdefault(value, []).append(number)
    quota = {value: size * len(numbers) // len(keys) for value, numbers in rows.items()}
    rest = {value: size * len(numbers) % len(keys) / len(keys) for value, numbers in rows.items()}

    def rank(value: str) -> tuple[float, str]:
        number = (draw(value, seed, purpose) + 0.5) / 2**64
        return number / (1 - number) * (1 - rest[value]) / rest[value], value

    for value in sorted((value for value in rows if rest[value]), key=rank)[: size - sum(quota.values())]:
        quota[value] += 1
    return sorted(
        numbers[n]
        for value, numbers in rows.items()
        for n in sample([keys[number] for number in numbers], quota[value], seed, purpose)
    )
