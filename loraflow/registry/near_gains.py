"""Which looks nearly showed a gain: the next looks at rows that were never scored may spend more (`budget.py`)."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from pydantic import ValidationError

from loraflow.evaluation.values import Decision
from loraflow.registry.budget import FOLLOWERS, Look, is_nearly_shown
from loraflow.registry.log import PromotionLog


def gains_to_follow(
    log: PromotionLog, looks: Sequence[Look], groups: Iterable[str | None], *, independent: bool
) -> set[int] | None:
    """Return the looks that the next one may follow with a higher level (`near_gains`); None without the recipe's word.

    Rows of a group depend on each other, and no record says which groups the rows of earlier looks had. So rows with a
    group follow none.

    Args:
        log: the promotion log.
        looks: all looks of the model.
        groups: of the rows of the next look; None for a row without one.
        independent: gate.independent_rows.
    """
    if not independent:
        return None
    return set() if any(group is not None for group in groups) else near_gains(log, looks)


def near_gains(log: PromotionLog, looks: Sequence[Look]) -> set[int]:
    """Return the numbers (seq) of those of the last looks that nearly showed a gain, and did not promote.

    The bound on false promotions needs no truth of this: an edited or lost decision only changes which looks spend more.
    """
    return {look.seq for look in looks[-FOLLOWERS:] if any(_is_near(one, look) for one in _decisions(log, look))}


def _decisions(log: PromotionLog, look: Look) -> list[Decision]:
    found = []
    for values in log.decisions_about(look.challenger):
        try:
            found.append(Decision.from_dict(values))
        except ValidationError:  # of another version
            continue
    return [decision for decision in found if decision.look == look.seq]


def _is_near(decision: Decision, look: Look) -> bool:
    gains = [one.p_value for one in decision.comparisons if one.kind == "gain" and one.p_value is not None]
    return decision.verdict != "promote" and bool(gains) and is_nearly_shown(max(gains), look.horizon)
