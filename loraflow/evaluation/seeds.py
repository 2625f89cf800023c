"""Scores of models that were trained with several seeds: their mean for the gate, and how much they differ (`gate.seeds`).

The gate compares the mean of each row's scores, so that a lucky seed does not look like a better recipe. Only the model
of the first seed is registered: choosing the best model by the held-out rows would favour luck again.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping, Sequence
from dataclasses import replace
from statistics import fmean, stdev
from typing import TYPE_CHECKING

import numpy as np

from loraflow.evaluation.gate import paired_rows, require_comparable, rules_of
from loraflow.evaluation.pairing import pair, scores
from loraflow.evaluation.score import score_columns
from loraflow.evaluation.values import Decision, SeedScores, SetScores

if TYPE_CHECKING:
    import pandas as pd

    from loraflow.evaluation.guards import SliceGuard


def mean_scores(tables: Mapping[int, pd.DataFrame]) -> pd.DataFrame:
    """Return a score table with the mean of each row's scores; everything else, such as answers, is the first table's.

    Args:
        tables: {seed: score table of one set}. The first one is that of the model that would be registered.

    Raises:
        BadData: the tables have different rows, or a score is not a finite number.
    """
    first = next(iter(tables.values()))
    if len(tables) == 1:
        return first
    require_comparable(first, {f"seed {seed}": table for seed, table in tables.items()}, ())
    ordered = {seed: table.set_index("id").loc[first["id"]] for seed, table in tables.items()}
    names = [*score_columns(first), *(["stops"] if "finish" in first else [])]
    means = {
        name: np.mean([scores(table, name, f"seed {seed}") for seed, table in ordered.items()], axis=0)
        for name in dict.fromkeys(names)
    }
    return first.assign(**means)


def seed_scores(values: Mapping[int, SetScores]) -> list[SeedScores]:
    """Return each metric's value for each seed, with their mean and standard deviation.

    Args:
        values: {seed: the scores of the gate's set, as they are reported}.
    """
    first = next(iter(values.values()))
    found = []
    for metric in first:
        each = {str(seed): part[metric].value for seed, part in values.items() if metric in part}
        if len(each) == len(values) and all(map(math.isfinite, each.values())):
            numbers = [*each.values()]
            found.append(SeedScores(metric=metric, values=each, mean=fmean(numbers), deviation=stdev(numbers)))
    return found


def with_seeds(
    decision: Decision,
    own: pd.DataFrame,
    others: Mapping[str, pd.DataFrame],
    *,
    seeds: Sequence[int],
    primary: str,
    min_gain: float,
    guards: Mapping[str, float],
    lower_is_better: Collection[str] = (),
    parts: Sequence[SliceGuard] = (),
) -> Decision:
    """Return the decision about the mean, unless the model that would be registered is itself shown as worse.

    Args:
        seeds: of all models, the registered one first.
    """
    names = ", ".join(map(str, seeds))
    noted = decision.with_reason(
        f"the mean of {len(seeds)} models (seeds {names}) is compared; the scores of `tuned` are those of seed "
        f"{seeds[0]} alone"
    )
    if decision.verdict != "promote":
        return noted
    worse = []
    for name, own_rows, other_rows in paired_rows(own, others):
        for rule in rules_of(primary, min_gain, guards, parts):
            own_part, other_part = rule.rows_of(own_rows), rule.rows_of(other_rows)
            found = pair(own_part, other_part, rule.metric, name, lower_is_better=lower_is_better).reported
            if found <= rule.bound:
                worse.append(
                    f"{rule.about} against {name}: {found:+.4f} for the model of seed {seeds[0]}, which would be "
                    f"registered; more than {rule.bound:+g} is needed"
                )
    return replace(noted, verdict="undecided", reasons=(*worse, *noted.reasons)) if worse else noted
