"""How much error each look of a model may make: one budget over all held-out sets. No store here.

`gate.error` is the probability of any false promotion in `gate.looks` looks in a row, on whatever rows. Half of it is
spent on the first look, 0.38 of it evenly on the others. A look that promotes its challenger passes its level on: half
to the next look, half evenly to a fifth of the horizon after that. No level is given twice, so all levels of looks without
a true gain add up to at most 0.88 of `gate.error`, whatever the looks have in common (the online graphical procedure of Tian
and Ramdas 2021, https://arxiv.org/abs/1910.04900). See docs/decisions/0016-one-budget.md.

The last 0.12 are for looks that follow a nearly shown gain, on rows that were never scored: a p-value of at most 1 / looks
without a promotion gives each of the next two looks 0.02 of the error. Which looks get it depends on earlier scores, so
it adds up only where a look's rows are independent of them. See docs/decisions/0024-following-looks.md.

When the looks of a period are used up, the next period begins with rows of which none was ever scored.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping, Sequence, Set
from typing import NamedTuple

from pydantic import BaseModel, ConfigDict

from loraflow.identity import canonical
from loraflow.registry.entry import Entry, active_promotions

_PASSED_AT_ONCE = 0.5  # share of a promotion's level that the next look gets
_PASSED_LATER = 5  # the rest goes to this fraction of the horizon
# Shares of the error: of the first look, of all others, and of looks after a nearly shown gain.
_FIRST, _OTHERS, _FOLLOWING = 0.5, 0.38, 0.12
FOLLOWERS = 2  # looks that follow a nearly shown gain
_MOST_FOLLOWERS = 6  # in `looks` looks in a row
_ROUNDING = 1e-12  # a level that is not larger is a rounding error


class Look(BaseModel):
    """A line of the record: one comparison of a challenger with base and champion."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    seq: int
    before: str | None  # hash of the look before this one
    model: str
    key: str  # identity of scores, rules and champion: the same comparison again is the same look
    challenger: str  # digest of the merged model
    rows: str  # digest of the rows' keys
    number: int  # number of looks in this period, this one included
    horizon: int  # gate.looks
    error: float  # gate.error
    spent: float  # error that this look takes, without what promotions before passed on
    level: float  # `spent`, and what promotions before passed on
    assumed: int  # earlier looks that have no record, but must be counted
    actor: str
    time: str
    # Looks of earlier versions do not have these: each set of rows had a budget of its own.
    period: int | None = None  # from 1; looks of one period share one budget
    fresh: int | None = None  # rows that were never scored before
    following: float | None = None  # part of `spent` that it has because a look before it nearly showed a gain

    @property
    def hash(self) -> str:
        """The hash that the next look is chained to."""
        return hashlib.sha256(canonical(self.stored())).hexdigest()

    def stored(self) -> dict[str, str | int | float | None]:
        """Return the values of the file, without those that earlier versions did not have."""
        return {name: value for name, value in self.model_dump().items() if not (name in _NEW and value is None)}

    @property
    def left(self) -> int:
        """The number of looks of this period after this one."""
        return max(self.horizon - self.number, 0)

    def __str__(self) -> str:
        return f"look {self.number} of {self.horizon}"


_NEW = frozenset({"period", "fresh", "following"})


class NextLook(NamedTuple):
    """What the next look may spend."""

    number: int
    spent: float
    level: float
    assumed: int
    period: int
    fresh: int
    following: float | None = None


def share_of_error(number: int, horizon: int) -> float:
    """Return the share of the error that a look may spend in any case: half for the first, 0.38 evenly for the others."""
    if number > horizon:
        return 0.0
    if horizon == 1:
        return 1.0
    return _FIRST if number == 1 else _OTHERS / (horizon - 1)


def share_of_following(horizon: int) -> float:
    """Return the further share of the error of a look that follows a nearly shown gain."""
    return _FOLLOWING / min(_MOST_FOLLOWERS, horizon - 1) if horizon > 1 else 0.0


def is_nearly_shown(p_value: float, horizon: int) -> bool:
    """Tell whether a gain that was not confirmed is a reason to test the next looks at a higher level.

    With equal models, one look of the horizon is.
    """
    return p_value <= 1 / horizon


def passed_on(distance: int, horizon: int) -> float:
    """Return the share of a promotion's level that the look this many looks later gets."""
    later = max(horizon // _PASSED_LATER, 1)
    if distance == 1:
        return _PASSED_AT_ONCE
    return (1 - _PASSED_AT_ONCE) / later if 1 < distance <= 1 + later else 0.0


def next_look(
    looks: Sequence[Look],
    sets: Mapping[str, Set[str]],
    rows: Set[str],
    *,
    error: float,
    horizon: int,
    assumed: int,
    promotions: Sequence[Entry],
    nearly: Set[int] = frozenset(),
) -> NextLook:
    """Return what the look at these rows may spend.

    Args:
        looks: all looks of the model, oldest first.
        sets: the keys of the rows of each digest in `looks`.
        rows: the keys of the rows of this look.
        error: gate.error.
        horizon: gate.looks.
        assumed: looks right before this one that have no record.
        promotions: the entries of the promotion log.
        nearly: numbers (seq) of looks that nearly showed a gain, and did not promote.
    """
    fresh = len(rows - set().union(*sets.values()))
    period = max((look.period or 1 for look in looks), default=1)
    counted = _counted(looks, sets, rows, period)
    number = 1 + assumed + sum(1 + look.assumed for look in counted)
    declared = max((look.horizon for look in counted if look.spent > 0), default=horizon)
    if number > declared and fresh == len(rows) and not assumed:
        period, counted, number = period + 1, [], 1
    kept = _kept_for_following(counted, error, horizon)
    spent, following = _own_level(counted, number, assumed, error, horizon, kept), 0.0
    if fresh == len(rows) and not assumed and nearly & {look.seq for look in looks[-FOLLOWERS:]}:
        following = _following(looks, kept, number, error, horizon)
    passed = _recycled(counted, number, promotions)
    level = min(spent + following + passed, error)  # the recipe may have lowered the error
    return NextLook(number, spent + following, level, assumed, period, fresh, following or None)


def error_of_period(looks: Iterable[Look], look: Look) -> float:
    """Return the probability of any false promotion that the looks up to this one of its period may have.

    A recipe that lowers gate.error takes nothing back from the looks before.
    """
    return max(
        earlier.error for earlier in looks if earlier.seq <= look.seq and (earlier.period or 1) == (look.period or 1)
    )


def _counted(looks: Sequence[Look], sets: Mapping[str, Set[str]], rows: Set[str], period: int) -> list[Look]:
    """Return the looks that share the budget: all of the period, and in the first one those of earlier versions.

    Earlier versions gave each set of rows a budget of its own. Their looks count if they share rows with a later look or
    with this one, directly or through others.
    """
    own = {look.seq for look in looks if look.period == period}
    if period > 1:
        return [look for look in looks if look.seq in own]
    seen = set(rows).union(*(sets[look.rows] for look in looks if look.seq in own))
    rest = {look.rows for look in looks if look.period is None}
    while joined := {digest for digest in rest if not seen.isdisjoint(sets[digest])}:
        rest -= joined
        seen.update(*(sets[digest] for digest in joined))
    return [look for look in looks if look.seq in own or (look.period is None and look.rows not in rest)]


def _kept_for_following(counted: Sequence[Look], error: float, horizon: int) -> float:
    """Return the error that only looks which follow a nearly shown gain may spend.

    Looks of earlier versions spent half of the error evenly, so a period in which they are has less of it.
    """
    used = 0.0
    for look in counted:
        following = look.following or 0.0
        share = share_of_error(look.number, look.horizon) * look.error
        used += following + max(look.spent - following - share, 0.0)
    return max(_FOLLOWING * error - used, 0.0) if horizon > 1 else 0.0


def _own_level(counted: Sequence[Look], number: int, assumed: int, error: float, horizon: int, kept: float) -> float:
    """Return what a look may spend in any case: its share, but not more than the looks before have left."""
    before = sum(share_of_error(k, horizon) for k in range(number - assumed, number)) * error
    for look in counted:
        before += look.spent + sum(
            share_of_error(k, look.horizon) * look.error for k in range(look.number - look.assumed, look.number)
        )
    own = min(share_of_error(number, horizon) * error, error - before - kept)
    return own if own > _ROUNDING else 0.0


def _following(looks: Sequence[Look], kept: float, number: int, error: float, horizon: int) -> float:
    """Return what a look may spend because one before it nearly showed a gain.

    In `horizon` looks in a row, of whatever periods, it is at most 0.12 of the error.
    """
    if number > horizon or horizon == 1:
        return 0.0
    recent = sum(look.following or 0.0 for look in looks[-(horizon - 1) :])
    found = min(share_of_following(horizon) * error, _FOLLOWING * error - recent, kept)
    return found if found > _ROUNDING else 0.0


def _recycled(counted: Sequence[Look], number: int, promotions: Sequence[Entry]) -> float:
    """Return what the promotions of these looks pass on to the look of this number.

    A look of an earlier version has passed its level on already, unless it was the last of them.
    """
    of_earlier = [look for look in counted if look.period is None]
    active = {(entry.inputs.get("look"), entry.merged.digest) for entry in active_promotions(promotions)}
    position, found = 1, 0.0
    for look in counted:
        position += look.assumed
        if (str(look.seq), look.challenger) in active and (look.period is not None or look is of_earlier[-1]):
            kept = look.level - (
                look.following or 0.0
            )  # that part depends on scores, so a look at scored rows gets none
            found += kept * passed_on(number - position, look.horizon)
        position += 1
    return found
