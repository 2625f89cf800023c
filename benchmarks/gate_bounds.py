"""Compare lower bounds of a mean difference that lies between -1 and 1: how wide they are, and how often they are wrong.

    python benchmarks/gate_bounds.py            # about six minutes on one core
    python benchmarks/gate_bounds.py --short    # a tenth of the repetitions
    python benchmarks/gate_bounds.py --nights   # instead: what any test could find on new rows every night; seconds

- Gaffke's bound is the gate's.
- Betting: Waudby-Smith and Ramdas (2023, https://arxiv.org/abs/2010.09686), predictable plug-in, and its capital averaged
  over orders of the rows, which stays valid for a fixed number of rows.
- Recalculated betting: Voracek and Orabona (2025, https://arxiv.org/abs/2505.22422): each stake is the one that would reach
  1 / error in the rows that are left. Valid for any distribution, but the bound depends on the order of the rows.
- Empirical Bernstein: Maurer and Pontil (2009), for a fixed number of rows.
- "t or unseen": the lower one of the t bound and of what rows of which none was seen can cost, 1 - error^(1/n) of the rows.
"""

from __future__ import annotations

import argparse
import itertools
from collections.abc import Callable

import numpy as np
from scipy import optimize, stats

from loraflow.evaluation.evidence import gaffke_p_value

ERROR = 0.05
ORDERS = 16  # of the rows, over which the capital is averaged
Bound = Callable[[np.ndarray], float]


def gaffke(values: np.ndarray) -> float:
    """Return the gate's lower bound."""

    def excess(mean: float) -> float:
        return gaffke_p_value(values - mean, -1 - mean) - ERROR

    return float(optimize.brentq(excess, -1 + 1e-9, values.mean(), xtol=1e-6))


def t_bound(values: np.ndarray) -> float:
    """Return the lower bound of a t interval."""
    n = len(values)
    quantile = float(stats.t.ppf(1 - ERROR, n - 1))
    return float(values.mean()) - quantile * float(values.std(ddof=1)) / float(np.sqrt(n))


def t_or_unseen(values: np.ndarray) -> float:
    """Return the t bound, but no more than the mean less the largest loss that can be unseen."""
    mean = float(values.mean())
    unseen = 1.0 - float(ERROR ** (1 / len(values)))
    return min(t_bound(values), mean - unseen * (1 + mean))


def empirical_bernstein(values: np.ndarray) -> float:
    """Return Maurer and Pontil's lower bound."""
    n, log = len(values), np.log(2 / ERROR)
    spread = float(np.sqrt(2 * values.var(ddof=1) * log / n))
    return float(values.mean()) - spread - 2 * 7 * float(log) / (3 * (n - 1))


def betting(values: np.ndarray, orders: int = 1) -> float:
    """Return the smallest mean at which the capital stays below 1 / error."""
    scaled, n, rng = (values + 1) / 2, len(values), np.random.default_rng(0)
    x = np.stack([scaled, *(rng.permutation(scaled) for _ in range(orders - 1))])
    count = np.arange(1, n + 1)
    means = (0.5 + x.cumsum(1)) / (count + 1)
    variances = (0.25 + ((x - means) ** 2).cumsum(1)) / (count + 1)
    before = np.concatenate([np.full((orders, 1), 0.25), variances[:, :-1]], 1)
    stakes = np.sqrt(2 * np.log(1 / ERROR) / (n * before))

    def excess(mean: float) -> float:
        capital = np.log1p(np.minimum(stakes, 0.75 / mean) * (x - mean)).cumsum(1)
        largest = capital.max() if orders == 1 else np.log(np.exp(capital[:, -1]).mean())
        return float(largest - np.log(1 / ERROR))

    low, high = 1e-6, float(scaled.mean())
    return 2 * float(optimize.brentq(excess, low, high, xtol=1e-6)) - 1 if excess(high) < 0 < excess(low) else -1.0


def averaged_betting(values: np.ndarray) -> float:
    """Return the betting bound with the capital averaged over orders of the rows."""
    return betting(values, ORDERS)


def recalculated_betting(values: np.ndarray) -> float:
    """Return the smallest mean at which the capital does not reach 1 / error, if the stakes are computed for that aim."""
    scaled = (values + 1) / 2
    low, high = 1e-6, float(scaled.mean())
    for _ in range(3):  # each time between two neighbours of the grid before
        means = np.linspace(low, high, 30)
        open_ = ~_reaches_target(scaled, means)
        if open_[0]:
            return 2 * low - 1 if low > 1e-6 else -1.0
        first = int(open_.argmax()) if open_.any() else len(means) - 1
        low, high = float(means[first - 1]), float(means[first])
    return 2 * low - 1


def _reaches_target(scaled: np.ndarray, means: np.ndarray) -> np.ndarray:
    """Tell for each mean whether a player against it multiplies the capital by 1 / error [means]."""
    n, target, capital = len(scaled), float(np.log(1 / ERROR)), np.zeros(len(means))
    count, total, squares = 1, 0.5, 0.25
    for number, x in enumerate(scaled):
        missing = np.maximum(target - capital, 0.0)  # 0: the player stops
        stakes = np.minimum(np.sqrt(2 * missing * count / ((n - number) * squares)), 0.999 / means)
        capital += np.log1p(stakes * (x - means))
        count, total = count + 1, total + x
        squares += (x - total / count) ** 2
    reached: np.ndarray = capital >= target - 1e-12
    return reached


BOUNDS: dict[str, Bound] = {
    "Gaffke": gaffke,
    "betting": betting,
    "betting, averaged over orders": averaged_betting,
    "recalculated betting": recalculated_betting,
    "empirical Bernstein": empirical_bernstein,
    "t or unseen": t_or_unseen,
    "t": t_bound,
}


def width(bound: Bound, n: int, times: int) -> float:
    """Return how far the bound is below the mean of normal differences with a spread of 0.2, on average."""
    rng = np.random.default_rng(n)
    draws = rng.normal(0.04, 0.2, (times, n))
    return float(np.mean([values.mean() - bound(values) for values in draws]))


def largest_error(bound: Bound, times: int) -> tuple[float, str]:
    """Return the largest rate at which a mean gain of 0 is called a gain, over rare failures and spreads, and where."""
    worst = 0.0, ""
    for n, share, spread in itertools.product((50, 100, 500), (0.005, 0.01, 0.02, 0.03), (0.001, 0.05, 0.1, 0.2)):
        rng, gain = np.random.default_rng(n), share / (1 - share)  # a failure costs 1, so the mean is 0
        wrong = 0
        for _ in range(times):
            values = np.where(rng.random(n) < share, -1.0, gain + spread * rng.uniform(-1.7, 1.7, n))
            wrong += values.mean() > 0 and bound(values) > 0
        if wrong / times > worst[0]:
            worst = wrong / times, f"n = {n}, failures {share:.1%}, spread {spread:g}"
    return worst


def spread_over_orders(bound: Bound, n: int, orders: int = 60) -> float:
    """Return the standard deviation of a bound over orders of the same rows."""
    rng = np.random.default_rng(n)
    values = rng.normal(0.04, 0.2, n)
    return float(np.std([bound(rng.permutation(values)) for _ in range(orders)]))


EQUAL, BETTER = (0.05, 0.05), (0.075, 0.025)  # rates of wins and losses at a disagreement of 0.1
NIGHTS = 365


def most_powerful(n: int, levels: np.ndarray) -> np.ndarray:
    """Return the power of Neyman and Pearson's test of EQUAL against exactly BETTER on n rows: no test has more [levels].

    It is randomized, so it uses each level as a whole.
    """
    wins, losses = np.meshgrid(np.arange(n // 4), np.arange(n // 4), indexing="ij")  # more have a probability of 1e-40
    equal, better = (
        (stats.binom.pmf(losses, n, lose) * stats.binom.pmf(wins, n - losses, win / (1 - lose))).ravel()
        for win, lose in (EQUAL, BETTER)
    )
    ratio = wins * np.log(BETTER[0] / EQUAL[0]) + losses * np.log(BETTER[1] / EQUAL[1])
    order = np.argsort(-ratio.ravel(), kind="stable")
    found: np.ndarray = np.interp(levels, np.cumsum(equal[order]), np.cumsum(better[order]))
    return found


def found_in_three(n: int, spent: float, full: float, half: float) -> float:
    """Return the power of a rule in three nights of which each may spend the same error, whatever nights have in common.

    If nights may depend on each other, a valid rule promotes where weights f(p) of the nights add up to 1, and the mean of
    f of an equal model is what the night may spend (the dual of the coupling that makes most errors).

    Args:
        spent: error that a night may spend.
        full: share of it for f = 1: the night is enough alone.
        half: share of the rest for f = 1/2; what is left is for f = 1/3.
    """
    first, rest = full * spent, (1 - full) * spent
    limits = np.array([first, first + 2 * half * rest, first + 2 * half * rest + 3 * (1 - half) * rest])
    one, two, three = np.diff(most_powerful(n, limits), prepend=0.0)  # a night with f = 1, 1/2, 1/3
    none = 1 - one - two - three
    too_little = none**3 + 3 * none**2 * (two + three) + 3 * none * three**2 + 6 * none * two * three
    return float(1 - too_little)


def print_nights(n: int = 500) -> None:
    """Print what any valid rule could find in three nights of new rows, where no model was promoted before."""
    print(
        f"| {n} new rows every night, +5 points, three nights | one night | fixed levels | levels, or sums of nights |"
    )
    print("|---|---:|---:|---:|")
    for name, spent in (("half for the first look", ERROR / 2 / (NIGHTS - 1)), ("equal levels", ERROR / NIGHTS)):
        night = float(most_powerful(n, np.array([spent]))[0])
        shares = itertools.product(np.linspace(0, 1, 21), repeat=2)
        best = max(found_in_three(n, spent, float(full), float(half)) for full, half in shares)
        print(f"| {name}, {spent:.6f} each | {night:.1%} | {1 - (1 - night) ** 3:.1%} | {best:.1%} |")


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--short", action="store_true", help="a tenth of the repetitions")
    parser.add_argument("--bound", choices=BOUNDS, action="append", help="only this one; may be repeated")
    parser.add_argument("--nights", action="store_true", help="what any test could find on new rows every night")
    arguments = parser.parse_args()
    if arguments.nights:
        return print_nights()
    part = 10 if arguments.short else 1
    print("| bound at 95 % | below the mean, 100 rows | 500 rows | largest error | where |\n|---|---:|---:|---:|---|")
    for name in arguments.bound or BOUNDS:
        bound = BOUNDS[name]
        widths = [width(bound, n, 100 // part) for n in (100, 500)]
        error, where = largest_error(bound, 1000 // part)
        print(f"| {name} | {widths[0]:.3f} | {widths[1]:.3f} | {error:.1%} | {where} |", flush=True)
    spreads = [spread_over_orders(recalculated_betting, n) for n in (100, 500)]
    print(f"\nrecalculated betting over orders of the rows: standard deviation {spreads[0]:.4f}, {spreads[1]:.4f}")


if __name__ == "__main__":
    main()
