"""How often the reported intervals cover the true value: of scores, and of differences between two models.

    python benchmarks/gate_intervals.py            # about ten minutes on one core
    python benchmarks/gate_intervals.py --short    # a tenth of the repetitions

All intervals are two-sided at 95 %. For differences, the table also has the coverage between the gate's two one-sided
95 % bounds (90 % if both are exact). Seed 0.
"""

from __future__ import annotations

import argparse
import functools
from collections.abc import Callable, Iterator
from typing import NamedTuple

import numpy as np

from loraflow.evaluation.evidence import Evidence, mean_interval
from loraflow.evaluation.label_scores import macro_f1

ROWS = (100, 200, 500)
Draw = Callable[[np.random.Generator, int], np.ndarray]  # n scores, or n differences


class Sample(NamedTuple):
    """Scores or differences with their true mean."""

    values: np.ndarray
    truth: float
    weights: np.ndarray | None = None  # tokens
    groups: np.ndarray | None = None


def _mixed(share: float, usual: float, others: Draw) -> Draw:
    """Return draws of which this share is `usual`, and the rest is drawn."""
    return lambda rng, n: np.where(rng.random(n) < share, usual, others(rng, n))


def _two_models(rng: np.random.Generator, n: int) -> np.ndarray:
    """Differences of F1 scores: 7 of 10 answers are right, and the models give the same answer to 6 of 10 questions."""
    draw = _mixed(0.7, 1.0, lambda rng, n: rng.beta(1, 2, n))
    return np.where(rng.random(n) < 0.6, 0.0, draw(rng, n) - draw(rng, n))


def _failures(share: float) -> Draw:
    """Return small gains, and failures that cost 1."""
    return lambda rng, n: np.where(rng.random(n) < share, -1.0, 0.01 + 0.1 * rng.uniform(-1.7, 1.7, n))


SCORES: dict[str, Draw] = {
    "graded, beta(2, 1)": lambda rng, n: rng.beta(2, 1, n),
    "graded, beta(0.5, 5)": lambda rng, n: rng.beta(0.5, 5, n),
    "graded, 70 % are 1": _mixed(0.7, 1.0, lambda rng, n: rng.beta(1, 2, n)),
    "graded, 90 % are 1": _mixed(0.9, 1.0, lambda rng, n: rng.beta(1, 2, n)),
    "graded, 95 % are 1": _mixed(0.95, 1.0, lambda rng, n: rng.beta(1, 2, n)),
    "graded, 90 % are 0": _mixed(0.9, 0.0, lambda rng, n: rng.beta(2, 1, n)),
    "graded, 97 % are 0": _mixed(0.97, 0.0, lambda rng, n: rng.beta(0.5, 5, n)),
}
DIFFERENCES: dict[str, Draw] = {
    "normal, spread 0.2": lambda rng, n: rng.normal(0.04, 0.2, n),
    "F1 of two models": _two_models,
    "90 % are 0": _mixed(0.9, 0.0, lambda rng, n: rng.uniform(-0.8, 1, n)),
    "95 % are 0": _mixed(0.95, 0.0, lambda rng, n: rng.uniform(-0.5, 1, n)),
    "skewed, exponential": lambda rng, n: np.maximum(0.1 - rng.exponential(0.1, n), -1.0),
    "losses of 0.5 in 5 %": _mixed(0.95, 0.01, lambda rng, n: -rng.beta(2, 2, n)),
    "failures in 1 %": _failures(0.01),
    "failures in 3 %": _failures(0.03),
}


@functools.cache
def _mean(draw: Draw) -> float:
    rng = np.random.default_rng(1)
    return float(np.mean([draw(rng, 1_000_000).mean() for _ in range(8)]))


@functools.cache
def _true_loss() -> float:
    tokens = np.ceil(np.random.default_rng(0).lognormal(3.5, 0.8, 4_000_000))
    return float(np.exp(0.18) * (tokens**0.8).sum() / tokens.sum())


def losses(rng: np.random.Generator, n: int) -> Sample:
    """Losses that fall with the length of the answer: E[loss·tokens] / E[tokens] is known."""
    tokens = np.ceil(rng.lognormal(3.5, 0.8, n))
    return Sample(rng.lognormal(0.0, 0.6, n) * tokens**-0.2, _true_loss(), tokens)


def loss_differences(rng: np.random.Generator, n: int) -> Sample:
    """Gains of a loss that fall with the length of the answer, too."""
    sample = losses(rng, n)
    return sample._replace(values=sample.values - 0.5 + rng.normal(0, 0.3, n), truth=sample.truth - 0.5)


def failures_of_unequal_rows(share: float, rng: np.random.Generator, n: int) -> Sample:
    """Return small gains and failures that cost 1, of rows, or of groups of equal rows, with unequal weights."""
    draw, weights = _failures(share), np.ceil(rng.lognormal(3.5, 0.8, n))
    return Sample(draw(rng, n), (1 - share) * 0.01 - share, weights)


def grouped(rng: np.random.Generator, groups: int, size: int, *, binary: bool, models: int) -> Sample:
    """Scores of near-equal rows in groups, or the differences of two models on them."""
    labels, values = np.repeat(np.arange(groups), size), np.zeros(groups * size)
    for sign in (1, -1)[:models]:
        rate = np.repeat(rng.choice([0.1, 0.9], groups), size)
        graded = np.clip(rate + rng.normal(0, 0.05, len(rate)), 0, 1)
        values += sign * ((rng.random(len(rate)) < rate) if binary else graded)
    return Sample(values, 0.5 if models == 1 else 0.0, groups=labels)


def covers(sample: Sample) -> bool:
    """Tell whether the reported interval of a score covers its true mean."""
    largest = 1.0 if sample.weights is None else None
    _, low, high = mean_interval(sample.values, 0.95, sample.weights, sample.groups, largest)
    return bool(low <= sample.truth <= high)


def differences_covered(sample: Sample, *, binary: bool = False, reach: float = 1.0) -> tuple[bool, bool]:
    """Tell whether a difference is in its reported interval, and between the gate's two bounds."""
    weights = np.ones(len(sample.values)) if sample.weights is None else sample.weights
    labels = np.arange(len(weights)) if sample.groups is None else sample.groups
    sums, sizes = np.bincount(labels, sample.values * weights), np.bincount(labels, weights)
    evidence = Evidence(sums, sizes, reach, binary, len(weights))
    (_, low, high), (_, lower, upper) = evidence.interval(0.95), evidence.bounds(0.95)
    return bool(low <= sample.truth <= high), bool(lower <= sample.truth <= upper)


def score_rows(rng: np.random.Generator, times: int) -> Iterator[tuple[str, str]]:
    """Yield the coverage of the intervals of scores."""
    for n in ROWS:
        rates = np.repeat(np.linspace(0.02, 0.98, 49), max(times // 20, 2))
        yield (
            f"0/1, mean over rates of 0.02 to 0.98, {n} rows",
            _share([covers(Sample((rng.random(n) < rate).astype(float), rate)) for rate in rates]),
        )
        for name, draw in SCORES.items():
            yield f"{name}, {n} rows", _share([covers(Sample(draw(rng, n), _mean(draw))) for _ in range(times)])
        yield f"token-weighted loss, {n} rows", _share([covers(losses(rng, n)) for _ in range(times)])
        yield f"macro_f1 of 5 labels, {n} rows", _share([macro_f1_covers(rng, n) for _ in range(times // 4)])
    for binary, (groups, size) in ((b, g) for b in (True, False) for g in ((100, 5), (50, 10), (20, 5))):
        found = [covers(grouped(rng, groups, size, binary=binary, models=1)) for _ in range(times)]
        yield f"{'0/1' if binary else 'graded'}, {groups} groups of {size} rows", _share(found)


def macro_f1_covers(rng: np.random.Generator, n: int) -> bool:
    """Tell whether the interval of macro F1 covers the value of very many rows, for labels of equal and unequal size."""
    draw = functools.partial(_labels, np.array([0.4, 0.3, 0.15, 0.1, 0.05]))
    answers, references = draw(rng, n)
    _, low, high = macro_f1(answers, references, None, 0.95)
    return bool(low <= _true_macro_f1() <= high)


def _labels(rates: np.ndarray, rng: np.random.Generator, n: int) -> tuple[list[str], list[str]]:
    references = rng.choice(len(rates), n, p=rates)
    answers = np.where(rng.random(n) < 0.8, references, rng.choice(len(rates), n))
    return list(map(str, answers)), list(map(str, references))


@functools.cache
def _true_macro_f1() -> float:
    rates = np.array([0.4, 0.3, 0.15, 0.1, 0.05])  # right: 0.8 and a fifth of 0.2; answered: 0.8 of the rate and 0.04
    return float(np.mean(2 * 0.84 * rates / (rates + 0.8 * rates + 0.04)))


def difference_rows(rng: np.random.Generator, times: int) -> Iterator[tuple[str, str]]:
    """Yield the coverage of the intervals of differences, and between the gate's bounds."""
    for n in ROWS:
        for differ in (0.02, 0.05, 0.1, 0.2, 0.4):
            p, found = [0.6 * differ, 0.4 * differ, 1 - differ], []
            for _ in range(times):
                values = rng.choice([1.0, -1.0, 0.0], n, p=p)
                found.append(differences_covered(Sample(values, 0.2 * differ), binary=True))
            yield f"0/1, disagreement {differ}, {n} rows", _shares(found)
        for name, draw in DIFFERENCES.items():
            samples = (Sample(draw(rng, n), _mean(draw)) for _ in range(times))
            yield f"{name}, {n} rows", _shares([differences_covered(sample) for sample in samples])
        samples = (loss_differences(rng, n) for _ in range(times))
        yield f"token loss, {n} rows", _shares([differences_covered(sample, reach=10.0) for sample in samples])
    yield from weighted_rows(rng, times)
    for binary, (groups, size) in ((b, g) for b in (True, False) for g in ((100, 5), (50, 10), (20, 5))):
        samples = (grouped(rng, groups, size, binary=binary, models=2) for _ in range(times))
        what = f"{'0/1' if binary else 'graded'}, {groups} groups of {size} rows"
        yield what, _shares([differences_covered(sample) for sample in samples])


def weighted_rows(rng: np.random.Generator, times: int) -> Iterator[tuple[str, str]]:
    """Yield the coverage of differences of rows with unequal weights, of which few fail."""
    for share, n in ((share, n) for share in (0.01, 0.03, 0.05) for n in (60, *ROWS)):
        samples = (failures_of_unequal_rows(share, rng, n) for _ in range(times))
        found = [differences_covered(sample) for sample in samples]
        yield f"failures in {share:.0%} of {n} rows or groups with unequal weights", _shares(found)


def _share(found: list[bool]) -> str:
    return f"{np.mean(found):.1%}"


def _shares(found: list[tuple[bool, bool]]) -> str:
    return " | ".join(f"{share:.1%}" for share in np.mean(found, axis=0))


def main() -> None:
    """Print the tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--short", action="store_true", help="a tenth of the repetitions")
    parser.add_argument("--scores", action="store_true", help="only the table of scores")
    options, rng = parser.parse_args(), np.random.default_rng(0)
    times = 200 if options.short else 2000
    print("| score | interval covers |\n|---|---:|")
    for what, share in score_rows(rng, times):
        print(f"| {what} | {share} |", flush=True)
    if options.scores:
        return
    print("\n| difference | interval covers | between the gate's bounds |\n|---|---:|---:|")
    for what, shares in difference_rows(rng, times // 2):
        print(f"| {what} | {shares} |", flush=True)


if __name__ == "__main__":
    main()
