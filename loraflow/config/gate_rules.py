"""Rules of the gate that decide nothing, or the opposite of what they say: a recipe with one of them is refused.

A margin of 5 for a score between 0 and 1, meant as five points, guards nothing. A score that is named as lower-is-better by
mistake promotes the worse model.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Set
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from loraflow.config.recipe import Gate

# The largest difference of loraflow's own scores; the loss of a token has none that a recipe knows. A test compares this
# with the ranges by which the gate bounds them.
_LARGEST = {"chrf": 100.0}
_NO_RANGE = frozenset({"token_loss"})


def largest_difference(score: str) -> float | None:
    """Return the largest difference of two values of one of loraflow's own scores; None if it has none."""
    return None if score in _NO_RANGE else _LARGEST.get(score, 1.0)


def contradictions(gate: Gate, scored: Set[str], sets: Set[str]) -> Iterator[str]:
    """Yield what is wrong in the rules.

    Args:
        gate: the rules.
        scored: the scores of the built-in metrics that the recipe computes.
        sets: the held-out sets.
    """
    for name in gate.lower_is_better:
        if name in scored and name not in _NO_RANGE:
            yield f"gate.lower_is_better names {name}, where higher is better: the gate would promote the worse model"
    limits = {name: largest_difference(name) for name in scored}
    ranges = {name: (largest, f"{name} is between 0 and {largest:g}") for name, largest in limits.items() if largest}
    rules: list[tuple[str, Mapping[str, float]]] = [("guards", gate.guards)]
    rules += [(f"slices.{part}", margins) for part, margins in gate.slices.items()]
    for key, margins in rules:
        for name, margin in margins.items():
            if name in ranges and margin >= ranges[name][0]:
                yield f"gate.{key}: {ranges[name][1]}: a margin of {margin:g} guards nothing; 0.05 are five points of 0 to 1"
    for name, rule in gate.worst.items():
        if name in ranges and rule.drop > ranges[name][0]:
            yield f"gate.worst: {ranges[name][1]}: no row can be worse by {rule.drop:g}"
    if gate.primary in ranges and gate.min_gain >= ranges[gate.primary][0]:
        yield f"gate.min_gain: {ranges[gate.primary][1]}: no model can gain more than {gate.min_gain:g}"
    for score, margin in gate.forgetting.items():
        if score != "loss" and margin >= 1:
            yield f"gate.forgetting: {score} is between 0 and 1: a margin of {margin:g} guards nothing"
    for name, check in gate.behaviour.items():
        if check.set not in sets:
            yield f"gate.behaviour.{name}: there is no set {check.set}; the sets are {', '.join(sorted(sets))}"
