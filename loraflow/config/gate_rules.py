"""Refuse rules of the gate that decide nothing, or the opposite of what their author means.

A margin of 5 for a score between 0 and 1, meant as five points, guards nothing. A score that is named as lower-is-better by
mistake promotes the worse model. Recorded recipes are not checked: a run that was made can be made again.
"""

from __future__ import annotations

from collections.abc import Iterator, Set

from loraflow.config.evaluation import SCORES
from loraflow.config.gate import Gate
from loraflow.config.recipe import Recipe

# The largest difference of loraflow's own scores; the loss of a token has none that a recipe knows. A test compares this
# with the ranges by which the gate bounds them.
_LARGEST = {"chrf": 100.0}
# Columns of a score table that are not scores, and scores that are no mean over rows. A test compares this, too.
NOT_SCORES = frozenset(
    {"id", "set", "group", "prompt", "reference", "reference_calls", "reference_tokens", "answer", "answer_tokens"}
    | {"finish", "nll", "perplexity", "macro_f1"}
)
_NO_RANGE = frozenset({"token_loss"})


def largest_difference(score: str) -> float | None:
    """Return the largest difference of two values of one of loraflow's own scores; None if it has none."""
    return None if score in _NO_RANGE else _LARGEST.get(score, 1.0)


def contradictions(recipe: Recipe) -> Iterator[tuple[tuple[str, ...], str]]:
    """Yield what is wrong in the rules: the path of the key, and the problem."""
    gate, metrics = recipe.gate, recipe.evaluation.metrics
    scored = {"stops"}.union(*(SCORES.get(name, ()) for name in metrics))
    if any(name not in SCORES and "/" not in name for name in metrics):
        return  # there is no such metric, which loraflow/evaluation/metric_modules.py says
    knows_all = all(name in SCORES for name in metrics)  # scores of other metrics are known once they have run
    if knows_all:
        yield from _names_of_no_score(gate, scored)
    else:
        yield from _names_that_no_score_has(gate)
        yield from _names_of_other_metrics(gate, scored)
        yield from _scores_without_range(gate, scored)
    for name in gate.lower_is_better:
        if name in scored and name not in _NO_RANGE:
            yield (
                ("gate", "lower_is_better"),
                f"gate.lower_is_better names {name}, where higher is better: the gate would promote the worse model",
            )
    for name in gate.ranges:
        if name in scored:
            yield (
                ("gate", "ranges", name),
                f"gate.ranges names {name}, whose range is known: it is for your own metrics",
            )
        elif knows_all:
            yield ("gate", "ranges", name), f"gate.ranges names {name}, which is not a score of evaluation.metrics"
    for key, name, margin in _margins(gate):
        limit = _largest(gate, name, scored)
        if limit is not None and margin >= limit:
            is_gain = key[-1] == "min_gain"
            why = f"no model can gain more than {margin:g}" if is_gain else f"a margin of {margin:g} guards nothing"
            low = gate.ranges[name][0] if name in gate.ranges else 0
            points = "" if name in gate.ranges else "; 0.05 are five points of 0 to 1"
            yield key, f"{'.'.join(key)}: {name} is between {low:g} and {low + limit:g}: {why}{points}"
    for name, rule in gate.worst.items():
        limit = _largest(gate, name, scored)
        if limit is not None and rule.drop > limit:
            yield (
                ("gate", "worst", name),
                f"gate.worst: {name} differs by at most {limit:g}: no row can be worse by {rule.drop:g}",
            )
    for score, margin in gate.forgetting.items():
        if score != "loss" and margin >= 1:
            yield (
                ("gate", "forgetting", score),
                f"gate.forgetting: {score} is between 0 and 1: a margin of {margin:g} guards nothing",
            )
    sets = {"heldout", *recipe.data.extra_heldout}
    for name, check in gate.behaviour.items():
        if check.set not in sets:
            problem = f"there is no set {check.set}; the sets are {', '.join(sorted(sets))}"
            yield ("gate", "behaviour", name), f"gate.behaviour.{name}: {problem}"


def _named(gate: Gate) -> Iterator[tuple[tuple[str, ...], str]]:
    """Yield the scores that the gate names, with the paths of their keys, apart from those of gate.ranges."""
    for path, name, _ in _margins(gate):
        yield ("gate", "primary") if path[-1] == "min_gain" else path, name
    yield from ((("gate", "worst", name), name) for name in gate.worst)
    yield from ((("gate", "lower_is_better"), name) for name in gate.lower_is_better)


def _key(path: tuple[str, ...], name: str) -> str:
    return ".".join(path[:-1] if path[-1] == name else path)


def _names_of_no_score(gate: Gate, scored: Set[str]) -> Iterator[tuple[tuple[str, ...], str]]:
    """Yield the names of scores that the evaluation does not compute."""
    known = ", ".join(sorted(scored))
    for path, name in _named(gate):
        what = f"{_key(path, name)} names {name}, which is"
        if name == "macro_f1":
            yield path, f"{what} no mean over rows, so models cannot be compared by it row by row; use accuracy"
        elif name not in scored:
            yield path, f"{what} not a score of evaluation.metrics; its scores are {known}"


def _names_that_no_score_has(gate: Gate) -> Iterator[tuple[tuple[str, ...], str]]:
    """Yield the names that a score of the user's metrics cannot have, either: the gate would fail after the training."""
    ranges = ((("gate", "ranges", name), name) for name in gate.ranges)
    for path, name in (*_named(gate), *ranges):
        if name in NOT_SCORES:
            key = _key(path, name)
            yield path, f"{key} names {name}, which the gate cannot compare row by row: it is no score of a metric"


def _names_of_other_metrics(gate: Gate, scored: Set[str]) -> Iterator[tuple[tuple[str, ...], str]]:
    """Yield the names of scores of built-in metrics that the recipe does not compute.

    The gate compares a score of such a name by the built-in metric's range, so a metric of the user's may not have it.
    """
    owners = {score: metric for metric, scores in SCORES.items() for score in scores if score not in scored}
    ranges = ((("gate", "ranges", name), name) for name in gate.ranges)
    for path, name in (*_named(gate), *ranges):
        if name in owners:
            yield (
                path,
                f"{_key(path, name)} names {name}, a score of the built-in metric {owners[name]}, which evaluation.metrics "
                "does not have. Add it; if the score is of your own metric, give it another name in the metric's module",
            )


def _scores_without_range(gate: Gate, scored: Set[str]) -> Iterator[tuple[tuple[str, ...], str]]:
    """Yield the compared scores of the user's metrics without a range: no scores of them confirm a claim.

    A mean has no valid bound if a row can be of any value (Bahadur and Savage 1956): docs/trust.md has what happens without.
    """
    known = {*scored, *gate.ranges, *NOT_SCORES}.union(*SCORES.values())  # `_names_of_other_metrics` names the others
    unknown: dict[str, tuple[str, ...]] = {}
    compared = {"primary", "guards", "slices"}  # the others only count rows
    for path, name in _named(gate):
        if name not in known and path[1] in compared:
            unknown.setdefault(name, path)
    for name, path in unknown.items():
        yield (
            path,
            f"{'.'.join(path)}: no model can be promoted by {name} without its range, because a failure that no row shows "
            f"could be of any size. Say between which numbers it is, such as gate.ranges: {{{name}: [0, 1]}}",
        )


def _largest(gate: Gate, score: str, scored: Set[str]) -> float | None:
    """Return the largest difference of a score that the recipe computes, or whose range it says; None if there is none."""
    if score in gate.ranges:
        return gate.ranges[score][1] - gate.ranges[score][0]
    return largest_difference(score) if score in scored else None


def _margins(gate: Gate) -> Iterator[tuple[tuple[str, ...], str, float]]:
    """Yield the path, the score and the margin of each rule that compares means of held-out rows."""
    yield ("gate", "min_gain"), gate.primary, gate.min_gain
    for name, margin in gate.guards.items():
        yield ("gate", "guards", name), name, margin
    for part, margins in gate.slices.items():
        for name, margin in margins.items():
            yield ("gate", "slices", part, name), name, margin
