"""Error rates, power and speed of the gate, simulated with its own code.

    python benchmarks/gate.py            # all tables; some minutes on one core
    python benchmarks/gate.py --short    # a twentieth of the repetitions
    python benchmarks/gate.py --table budget    # or looks, reserve, nights, groups, tails, power, speed

Only counts of wins and losses are simulated for long streams of nights; `exact_p_value` and `share_of_error` decide them
as in a run. The tables about groups, catastrophes and speed call `decide` on score tables.
"""

from __future__ import annotations

import argparse
import functools
import math
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import NamedTuple

import numpy as np
import pandas as pd
from scipy import stats

from loraflow.evaluation.evidence import exact_p_value
from loraflow.evaluation.gate import decide
from loraflow.registry.budget import FOLLOWERS, passed_on, share_of_error, share_of_following
from loraflow.registry.reserve import ReserveRow, deal, rows_of_a_look

ERROR, LOOKS = 0.05, 365
FURTHER, MOST = ERROR * share_of_following(LOOKS), 6  # of a look that follows a nearly shown gain; such looks in a year
Row = tuple[str, float, float]  # what, share, upper 95 % limit of the share


def upper(count: int, of: int) -> float:
    """Return Clopper and Pearson's upper 95 % limit of a share, one-sided."""
    return 1.0 if count == of else float(stats.beta.ppf(0.95, count + 1, of - count))


def level_of(number: int, *, independent: bool = False) -> float:
    """Return the level of a look before which no challenger was promoted.

    Args:
        number: of the look.
        independent: gate.independent_rows; then without what a look has that follows a nearly shown gain.
    """
    return ERROR * share_of_error(number, LOOKS, independent=independent)


def p_values(wins: np.ndarray, losses: np.ndarray, n: int, levels: np.ndarray) -> np.ndarray:
    """Return the p-value of the gain of each pair of counts, for a test at its level; 1 where it is far above all levels."""
    found = np.ones(len(wins))
    for i in np.flatnonzero(wins - losses > 1.5 * np.sqrt(wins + losses)):  # below, p is above 0.06
        found[i] = exact_p_value(int(wins[i]), int(losses[i]), n, 0.0, float(levels[i]))
    return found


def confirmed(wins: np.ndarray, losses: np.ndarray, n: int, level: float) -> np.ndarray:
    """Return for each pair of counts whether the gain is confirmed at a level [streams]."""
    found: np.ndarray = p_values(wins, losses, n, np.full(len(wins), level)) <= level
    return found


class HeldOut(NamedTuple):
    """How the held-out rows of a stream of nights change."""

    name: str
    first: int
    new: int = 0  # each night
    keep: bool = True  # rows of the nights before

    def is_fresh(self, night: int, nights: int) -> bool:
        """Tell whether no row of a night was scored before it."""
        return night == 1 or (not self.keep and self.new >= self.first)

    def drawn(self, rng: np.random.Generator, streams: int, nights: int, right: float = 0.5) -> Iterator[np.ndarray]:
        """Yield for each night [streams, 2] how many of its rows the base answers wrong and right.

        A model's answers differ from the base's independently each night, so these two numbers are all that nights with
        common rows have in common.
        """
        total, batches = self.first, [rng.binomial(self.first, right, streams)]
        yield np.stack([total - batches[0], batches[0]], 1)
        per_night, oldest = self.new or 1, self.first // (self.new or 1)
        if not self.keep and 0 < self.new < self.first:  # a window, of which `new` rows are replaced
            batches = [rng.binomial(per_night, right, streams) for _ in range(oldest)]
        for _ in range(nights - 1):
            if self.new:
                batches.append(rng.binomial(per_night, right, streams))
                if self.keep:
                    total += per_night
                else:
                    batches = batches[-oldest:]
            hits = np.sum(batches, axis=0)
            yield np.stack([total - hits, hits], 1)


STREAMS = (
    HeldOut("500 new rows every night", 500, 500, keep=False),
    HeldOut("100 new rows every night", 100, 100, keep=False),
    HeldOut("rotation: 500 rows, of which 100 are new every night", 500, 100, keep=False),
    HeldOut("500 rows, and 5 more every night", 500, 5),
)


EQUAL, BETTER = (0.05, 0.05), (0.075, 0.025)  # rates of wins and losses at a disagreement of 0.1


class Reserve(NamedTuple):
    """Held-out rows that `loraflow.registry.reserve` deals, night by night (data.heldout_reserve)."""

    name: str
    rows: int  # at first
    reserve: int  # of them
    new: int = 0  # that are collected each night

    @functools.cache  # noqa: B019
    def dealt(self, nights: int) -> tuple[Counter[int], ...]:
        """Return for each night its rows: how many of them were dealt first in which night.

        The order of the rows does not depend on scores, so it is the same in all streams.
        """
        size, rows = rows_of_a_look(self.reserve, self.rows), [ReserveRow(str(i)) for i in range(self.rows)]
        nightly: list[Counter[int]] = []
        first: dict[str, int] = {}  # row → the night in which it was dealt first
        for night in range(nights):
            found = deal(rows, first.keys(), size, 0)
            first |= dict.fromkeys(found.keys - first.keys(), night)
            nightly.append(Counter(first[key] for key in found.keys))
            rows += [ReserveRow(str(i)) for i in range(len(rows), len(rows) + self.new)]
        return tuple(nightly)

    def is_fresh(self, night: int, nights: int) -> bool:
        """Tell whether no row of a night was dealt before it."""
        return self.dealt(nights)[night - 1].keys() == {night - 1}

    def drawn(self, rng: np.random.Generator, streams: int, nights: int, right: float = 0.5) -> Iterator[np.ndarray]:
        """Yield for each night [streams, 2] how many of its rows the base answers wrong and right."""
        batches: dict[int, np.ndarray] = {}
        for dealt in self.dealt(nights):
            for batch, rows in dealt.items():  # a batch is dealt again as a whole
                if batch not in batches:
                    batches[batch] = rng.binomial(rows, right, streams)
            hits = np.sum([batches[batch] for batch in dealt], axis=0)
            yield np.stack([dealt.total() - hits, hits], 1)


RESERVES = (
    Reserve("500 rows of 5,500, then all of them", 5500, 5000),
    Reserve("100 rows of 2,000, and 20 new rows every night", 2000, 1900, new=20),
)


def power_of_reserve(reserve: Reserve, *, independent: bool = False) -> Iterator[tuple[str, float]]:
    """Yield the exact probability that +5 points are promoted within three nights, at disagreement 0.1.

    Rows that were dealt before are counted as if other challengers were scored on them: each night's outcome is its own.
    """
    rows = [dealt.total() for dealt in reserve.dealt(60)]
    for first in (1, 6, 57):
        nights = range(first, first + 3)
        if all(reserve.is_fresh(night, 60) and rows[night - 1] == rows[0] for night in range(1, first + 3)):
            share = found_in_three(rows[0], first, level_of, independent=independent)
        else:
            levels = {night: level_of(night, independent=independent) for night in nights}
            share = any_of(chance(rows[night - 1], *BETTER, level) for night, level in levels.items())
        yield f"{reserve.name}, nights {first} to {first + 2} ({rows[first - 1]:,} rows)", share


def false_promotions(
    rng: np.random.Generator,
    streams: int,
    nights: int,
    held_out: HeldOut | Reserve,
    gain: float,
    *,
    independent: bool = False,
) -> Row:
    """Count the streams with any promotion: each night a challenger of the same true gain over the base.

    Base and challenger disagree on a tenth of the rows, the base answers half of them right.
    """
    promoted, since, used = np.zeros(streams, dtype=bool), np.full(streams, FOLLOWERS), np.zeros(streams, dtype=int)
    for night, counts in enumerate(held_out.drawn(rng, streams, nights), 1):
        wins, losses = rng.binomial(counts[:, 0], 0.1 + gain), rng.binomial(counts[:, 1], 0.1 - gain)
        follows = (since < FOLLOWERS) & (used < MOST) & (independent and held_out.is_fresh(night, nights))
        levels = level_of(night, independent=independent) + follows * FURTHER
        p = p_values(wins, losses, int(counts[0].sum()), levels)
        promoted |= p <= levels
        used += follows
        since = np.where((p > levels) & (p <= 1 / LOOKS), 0, since + 1)
    count = int(promoted.sum())
    rows = ", gate.independent_rows" if independent else ""
    return f"{held_out.name}, true gain {100 * gain:+.0f} points{rows}", count / streams, upper(count, streams)


def correlated_nights(rng: np.random.Generator, streams: int, block: int, correlation: float) -> Row:
    """Count the streams with any promotion of equal models whose scores are correlated within blocks of nights.

    So are those of new rows of the same users in `block` nights. Each night's p-value is of a normal test, as of many rows.
    """
    shared = np.repeat(rng.normal(size=(streams, -(-LOOKS // block))), block, axis=1)[:, :LOOKS]
    gains = math.sqrt(correlation) * shared + math.sqrt(1 - correlation) * rng.normal(size=(streams, LOOKS))
    needed = stats.norm.isf([level_of(night) for night in range(1, LOOKS + 1)])
    count = int((gains >= needed).any(axis=1).sum())
    what = f"new rows every night, correlation {correlation:g} within {block} nights"
    return what, count / streams, upper(count, streams)


def level_after_promotion(number: int, *, independent: bool = False) -> float:
    """Return the level of a look if the first one promoted its challenger, and no other one did."""
    return level_of(number, independent=independent) + level_of(1) * passed_on(number - 1, LOOKS)


@functools.cache
def chance(n: int, win: float, lose: float, level: float, limit: float | None = None) -> float:
    """Return the exact probability that a challenger with these rates of wins and losses is promoted on n rows.

    With `limit`, it is the probability that its p-value at this level is at most the limit.
    """
    total, enough = 0.0, 0
    for losses in range(int(stats.binom.isf(1e-12, n, lose)) + 1):
        enough = max(enough, losses)
        while enough <= n - losses and exact_p_value(enough, losses, n, 0.0, level) > (limit or level):
            enough += 1  # with more losses, more wins are needed
        total += float(stats.binom.pmf(losses, n, lose) * stats.binom.sf(enough - 1, n - losses, win / (1 - lose)))
    return total


def any_of(chances: Iterable[float]) -> float:
    """Return the probability that any of some independent nights promotes."""
    return 1 - math.prod(1 - one for one in chances)


def none_promoted(
    n: int, levels: Sequence[float], rates: Sequence[tuple[float, float]], *, independent: bool = False
) -> list[float]:
    """Return for each night the exact probability that no challenger was promoted until then, on n new rows every night.

    Args:
        n: rows of a night.
        levels: of the nights, without what looks have that follow a nearly shown gain.
        rates: of wins and losses of each night's challenger.
        independent: gate.independent_rows.
    """
    states = {(FOLLOWERS, 0): 1.0}  # (looks since the last that nearly showed a gain, looks that had more for one)
    found = []
    for level, (win, lose) in zip(levels, rates, strict=True):
        following: dict[tuple[int, int], float] = {}
        for (since, used), share in states.items():
            follows = independent and since < FOLLOWERS and used < MOST
            allowed = level + FURTHER * follows
            promoted = chance(n, win, lose, allowed)
            near = max(chance(n, win, lose, allowed, 1 / LOOKS) - promoted, 0.0)
            for after, part in ((0, near), (min(since + 1, FOLLOWERS), 1 - promoted - near)):
                state = after, used + follows
                following[state] = following.get(state, 0.0) + share * part
        states = following
        found.append(sum(states.values()))
    return found


def exact_false_promotions(n: int, nights: int, *, independent: bool = False) -> Iterator[tuple[str, float]]:
    """Yield the probability of any false promotion on n new rows every night: such nights are independent.

    Base and challenger disagree on a tenth of the rows. In the second stream the first challenger is better for certain, and
    each later one is as good as the champion, so whatever the promotion passes on can be lost.
    """
    levels = [level_of(night, independent=independent) for night in range(1, nights + 1)]
    none = none_promoted(n, levels, [EQUAL] * nights, independent=independent)
    yield f"{n} new rows every night, exact", 1 - none[-1]
    levels = [level_after_promotion(night, independent=independent) for night in range(2, nights + 1)]
    none = none_promoted(n, levels, [EQUAL] * (nights - 1), independent=independent)
    yield "the same, after a right promotion at look 1, exact", 1 - none[-1]


def found_in_three(
    n: int, first: int, level: Callable[..., float], start: int = 1, *, independent: bool = False
) -> float:
    """Return the exact probability that +5 points are promoted in nights `first` to `first + 2` on n new rows every night.

    Models of the nights before are as good as the base, and none of them since `start` was promoted.
    """
    nights = range(start, first + 3)
    rates = [EQUAL] * (first - start) + [BETTER] * 3
    levels = [level(night, independent=independent) for night in nights]
    none = none_promoted(n, levels, rates, independent=independent)
    return 1 - none[-1] / (none[-4] if len(none) > 3 else 1.0)


def power_in_three_nights(*, independent: bool = False) -> Iterator[tuple[str, float]]:
    """Yield the exact probability that +5 points are promoted within three nights, at disagreement 0.1."""
    late, found = (
        level_of(100, independent=independent),
        functools.partial(found_in_three, 500, independent=independent),
    )
    yield "500 new rows every night, nights 1 to 3", found(1, level_of)
    for first in (2, 40, 72):
        name = f"the same, nights {first} to {first + 2}, a promotion at look 1"
        yield name, found(first, level_after_promotion, start=2)
    for first in (100, 200, 300, 363):
        yield f"the same, nights {first} to {first + 2}, no promotion before", found(first, level_of)
    kept = any_of(chance(rows, *BETTER, late) for rows in (500, 1000, 1500))
    yield "rows of three nights kept: 500, 1,000, 1,500, at any night", kept


def power(rng: np.random.Generator, n: int, differ: float, gain: float, level: float, times: int) -> float:
    """Return the share of challengers with a true gain that are promoted over their base at a level."""
    counts = rng.multinomial(n, [(differ + gain) / 2, (differ - gain) / 2, 1 - differ], times)
    return float(confirmed(counts[:, 0], counts[:, 1], n, level).mean())


def promoted_share(make: Callable[[], tuple[pd.DataFrame, pd.DataFrame, str]], times: int) -> tuple[float, float]:
    """Return the share of gates that promote, at the level 0.05 of a single look, and its upper limit."""
    count = 0
    for _ in range(times):
        ours, theirs, metric = make()
        decision = decide(ours, {"base": theirs}, primary=metric, min_gain=0.0, guards={}, confidence=0.95)
        count += decision.verdict == "promote"
    return count / times, upper(count, times)


def grouped(rng: np.random.Generator, groups: int, size: int, metric: str) -> tuple[pd.DataFrame, pd.DataFrame, str]:
    """Return two equal models on groups of near-equal rows."""
    n = groups * size
    name = np.repeat([f"g{i}" for i in range(groups)], size)

    def scores() -> np.ndarray:
        rate = np.repeat(rng.choice([0.1, 0.9], groups), size)
        if metric == "exact_match":
            return (rng.random(n) < rate).astype(float)
        return np.clip(rate + rng.normal(0, 0.05, n), 0, 1)

    ids = [f"r{i}" for i in range(n)]
    ours, theirs = (pd.DataFrame({"id": ids, "group": name, metric: scores()}) for _ in range(2))
    return ours, theirs, metric


def catastrophes(rng: np.random.Generator, n: int, metric: str) -> tuple[pd.DataFrame, pd.DataFrame, str]:
    """Return a model that is a little better on 99 rows of a hundred, and fails on one: its mean gain is 0."""
    failed = rng.random(n) < 0.01
    ids = [f"r{i}" for i in range(n)]
    noise = rng.normal(0, 0.001, n)
    if metric == "token_loss":
        ours, theirs = np.where(failed, 10.0, 1.0 - 9.0 / 99) + noise, np.ones(n)
    else:
        ours, theirs = np.where(failed, 0.0, 0.9 + 0.9 / 99) + np.abs(noise), np.full(n, 0.9)
    return pd.DataFrame({"id": ids, metric: ours}), pd.DataFrame({"id": ids, metric: theirs}), metric


def seconds_of_ten_metrics(rng: np.random.Generator, n: int = 5000) -> float:
    """Return the time of a decision with ten graded and 0/1 metrics, against base and champion."""
    metrics = ["exact_match", "json_valid", "token_f1", "field_f1", "rouge1", "rouge2", "rougeL", "rougeLsum", "chrf"]

    def table() -> pd.DataFrame:
        columns = {name: rng.beta(2, 1, n) for name in metrics} | {"token_loss": rng.lognormal(0, 0.5, n)}
        columns |= {name: (rng.random(n) < 0.7).astype(float) for name in metrics[:2]}
        return pd.DataFrame({"id": [f"r{i}" for i in range(n)], "reference_tokens": 50, **columns})

    tables = table(), table(), table()
    started = time.perf_counter()
    decide(
        tables[0],
        {"base": tables[1], "champion": tables[2]},
        primary="token_loss",
        min_gain=0.0,
        guards=dict.fromkeys(metrics, 0.02),
        confidence=0.95,
        level=level_of(2),
    )
    return time.perf_counter() - started


def looks_table(rng: np.random.Generator, part: int) -> None:
    """Print the false promotions of streams on one held-out set."""
    print("| any false promotion in 365 nights | share | upper 95 % limit |\n|---|---:|---:|")
    for n, gain in ((100, 0.0), (500, 0.0), (100, -0.01), (500, -0.01)):
        what, share, limit = false_promotions(rng, 2000 // part, LOOKS, HeldOut(f"the same {n} rows", n), gain)
        print(f"| {what} | {share:.1%} | {limit:.1%} |", flush=True)


def budget_table(rng: np.random.Generator, part: int) -> None:
    """Print the false promotions of streams with held-out rows that change."""
    print("| any false promotion in 365 nights | share | upper 95 % limit |\n|---|---:|---:|")
    for independent in (False, True):
        rows = ", gate.independent_rows" if independent else ""
        for n in (500, 100):
            for what, share in exact_false_promotions(n, LOOKS, independent=independent):
                print(f"| {what}{rows} | {share:.2%} | – |", flush=True)
    for stream in STREAMS:
        what, share, limit = false_promotions(rng, 2000 // part, LOOKS, stream, 0.0)
        print(f"| {what} | {share:.1%} | {limit:.1%} |", flush=True)
    for nights, correlation in ((3, 0.5), (3, 0.8), (7, 0.9)):
        what, share, limit = correlated_nights(rng, 40_000 // part, nights, correlation)
        print(f"| {what} | {share:.1%} | {limit:.1%} |", flush=True)


def reserve_table(rng: np.random.Generator, part: int) -> None:
    """Print the false promotions and the power of streams with a reserve of held-out rows."""
    print("| data.heldout_reserve, any false promotion in 365 nights | share | upper 95 % limit |\n|---|---:|---:|")
    for reserve in RESERVES:
        for gain in (0.0, -0.01):
            what, share, limit = false_promotions(rng, 2000 // part, LOOKS, reserve, gain)
            print(f"| {what} | {share:.1%} | {limit:.1%} |", flush=True)
    print(
        "\n| +5 points, disagreement 0.1, found within three nights | default | gate.independent_rows |\n|---|---:|---:|"
    )
    for reserve in RESERVES:
        shares = zip(power_of_reserve(reserve), power_of_reserve(reserve, independent=True), strict=True)
        for (what, share), (_, independent) in shares:
            print(f"| {what} | {share:.1%} | {independent:.1%} |", flush=True)


def nights_table(rng: np.random.Generator, part: int) -> None:
    """Print the power of streams with held-out rows that change."""
    print(
        "| +5 points, disagreement 0.1, found within three nights | default | gate.independent_rows |\n|---|---:|---:|"
    )
    for (what, share), (_, independent) in zip(
        power_in_three_nights(), power_in_three_nights(independent=True), strict=True
    ):
        print(f"| {what} | {share:.1%} | {independent:.1%} |", flush=True)


def groups_table(rng: np.random.Generator, part: int) -> None:
    """Print how often equal models are promoted if rows are in groups."""
    print("| one gate at level 0.05, equal models | share | upper 95 % limit |\n|---|---:|---:|")
    for metric in ("exact_match", "token_f1"):
        for groups, size in ((100, 5), (10, 50), (50, 10), (20, 5)):
            share, limit = promoted_share(lambda g=groups, s=size, m=metric: grouped(rng, g, s, m), 1000 // part)
            print(f"| {groups} groups of {size}, {metric} | {share:.1%} | {limit:.1%} |", flush=True)


def tails_table(rng: np.random.Generator, part: int) -> None:
    """Print how often a model with rare failures is promoted."""
    print("| one gate at level 0.05, true gain 0 | share | upper 95 % limit |\n|---|---:|---:|")
    for metric in ("token_f1", "token_loss", "own score without a range"):
        for n in (50, 100, 500):
            share, limit = promoted_share(lambda n=n, m=metric: catastrophes(rng, n, m), 1000 // part)
            print(f"| one catastrophe in 100 rows, {metric}, n = {n} | {share:.1%} | {limit:.1%} |", flush=True)


def power_table(rng: np.random.Generator, part: int) -> None:
    """Print the power of single looks."""
    print("| +5 points, 0/1 metric | promoted |\n|---|---:|")
    for differ in (0.1, 0.2, 0.4):
        share = power(rng, 500, differ, 0.05, level_of(1), 4000 // part)
        print(f"| first look, 500 rows, disagreement {differ} | {share:.1%} |")
    for n in (500, 1000):
        print(f"| later look, {n} rows, disagreement 0.1 | {power(rng, n, 0.1, 0.05, level_of(2), 4000 // part):.1%} |")


def speed_table(rng: np.random.Generator, part: int) -> None:
    """Print the time of a decision with ten metrics."""
    print(f"ten metrics, 5,000 rows, base and champion: {seconds_of_ten_metrics(rng):.2f} s")


TABLES = {
    "looks": looks_table,
    "budget": budget_table,
    "reserve": reserve_table,
    "nights": nights_table,
    "groups": groups_table,
    "tails": tails_table,
    "power": power_table,
    "speed": speed_table,
}


def main() -> None:
    """Print the tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--short", action="store_true", help="a twentieth of the repetitions")
    parser.add_argument("--table", choices=TABLES, action="append", help="only this one; may be repeated")
    arguments = parser.parse_args()
    for name in arguments.table or TABLES:
        TABLES[name](np.random.default_rng(0), 20 if arguments.short else 1)
        print()


if __name__ == "__main__":
    main()
