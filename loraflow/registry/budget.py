"""How much error each look of a model may make: one budget over all held-out sets. No store here.

`gate.error` is the probability of any false promotion in `gate.looks` looks in a row, on whatever rows. Half of it is
spent on the first look, the other half evenly on the others. A look that promotes its challenger passes its level on: half
to the next look, half evenly to a fifth of the horizon after that. No level is given twice, so all levels of looks without
a true gain add up to at most `gate.error`, whatever the looks have in common (the online graphical procedure of Tian and
Ramdas 2021, https://arxiv.org/abs/1910.04900). See docs/decisions/0016-one-budget.md.

With `gate.independent_rows`, the others share 0.38 of the error. The last 0.12 are for looks that follow a nearly shown
gain, on rows that were never scored: a p-value of at most 1 / looks without a promotion gives each of the next two looks
0.02 of the error. Which looks get it depends on earlier scores, so the bound then needs rows that are independent of earlier
ones. A lost look counts as one that had 0.02 more. See docs/decisions/0024-following-looks.md.

When the looks of a period are used up, the next period begins with rows of which none was ever scored.
"""

from collections.abc import Iterable, Mapping, Sequence, Set
from typing import NamedTuple

from pydantic import JsonValue, ValidationError

from loraflow.evaluation.values import Decision
from loraflow.registry.entry import ChainedEntry, Entry, active_promotions
from loraflow.registry.log import PromotionLog

_PASSED_AT_ONCE = 0.5  # share of a promotion's level that the next look gets
_PASSED_LATER = 5  # the rest goes to this fraction of the horizon
# Shares of the error: of the first look, of all others, and a further one: evenly of all others too, or with
# gate.independent_rows of looks after a nearly shown gain.
_FIRST, _OTHERS, _FURTHER = 0.5, 0.38, 0.12
FOLLOWERS = 2  # looks that follow a nearly shown gain
_MOST_FOLLOWERS = 6  # in `looks` looks in a row
_ROUNDING = 1e-12  # a level that is not larger is a rounding error


class Look(ChainedEntry):
    """A line of the record: one comparison of a challenger with base and champion."""

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
    following: float | None = None  # part of `spent` for a gain that a look before it nearly showed

    def stored(self) -> dict[str, JsonValue]:
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


def share_of_error(number: int, horizon: int, *, independent: bool = False) -> float:
    """Return the share of the error that a look may spend in any case: half for the first, half evenly for the others.

    Args:
        independent: gate.independent_rows: then the others share 0.38.
    """
    if number > horizon:
        return 0.0
    if horizon == 1:
        return 1.0
    return _FIRST if number == 1 else (_OTHERS if independent else _OTHERS + _FURTHER) / (horizon - 1)


def share_of_following(horizon: int) -> float:
    """Return the further share of the error of a look that follows a nearly shown gain."""
    return _FURTHER / min(_MOST_FOLLOWERS, horizon - 1) if horizon > 1 else 0.0


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
    nearly: Set[int] | None = None,
) -> NextLook:
    """Return what the look at these rows may spend.

    Args:
        looks: all looks of the model, oldest first.
        sets: the keys of the rows of each digest in `looks`.
        assumed: looks right before this one that have no record.
        nearly: numbers (seq) of looks that nearly showed a gain, and did not promote; None without gate.independent_rows.
    """
    fresh = len(rows - set().union(*sets.values()))
    period = max((look.period or 1 for look in looks), default=1)
    counted = _counted(looks, sets, rows, period)
    number = 1 + assumed + sum(1 + look.assumed for look in counted)
    declared = max((look.horizon for look in counted if look.spent > 0), default=horizon)
    if number > declared and fresh == len(rows) and not assumed:
        period, counted, number = period + 1, [], 1
    further = _further_left(looks, counted, assumed, error, horizon)
    spent, following = _own_level(counted, number, assumed, error, horizon, further, is_kept=nearly is not None), 0.0
    is_next = nearly is not None and not nearly.isdisjoint(look.seq for look in looks[-FOLLOWERS:])
    if is_next and fresh == len(rows) and not assumed and number <= horizon:
        following = _positive(min(share_of_following(horizon) * error, further))
    passed = _recycled(counted, number, promotions)
    level = min(spent + following + passed, error)  # the recipe may have lowered the error
    return NextLook(number, spent + following, level, assumed, period, fresh, following or None)


def error_of_period(looks: Iterable[Look], look: Look) -> float:
    """Return the probability of any false promotion that the looks up to this one of its period may have.

    A recipe that lowers gate.error takes nothing back from the looks before.
    """
    return max(earlier.error for earlier in _until(looks, look))


def has_followers(looks: Iterable[Look], look: Look) -> bool:
    """Tell whether a look of the period up to this one followed a nearly shown gain: the error needs independent rows."""
    return any(earlier.following for earlier in _until(looks, look))


def _until(looks: Iterable[Look], look: Look) -> list[Look]:
    """Return the looks of a look's period, up to this one."""
    return [earlier for earlier in looks if earlier.seq <= look.seq and (earlier.period or 1) == (look.period or 1)]


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


def _further_left(looks: Sequence[Look], counted: Sequence[Look], assumed: int, error: float, horizon: int) -> float:
    """Return what is left of the further 0.12 of the error, in this period and in `horizon` looks in a row."""
    if horizon == 1:
        return 0.0
    lost = assumed * share_of_following(horizon) * error
    used = max(sum(map(_further_of, some)) for some in (counted, looks[-(horizon - 1) :]))
    return max(_FURTHER * error - used - lost, 0.0)


def _further_of(look: Look) -> float:
    """Return what a look spent of the further 0.12, with the lost looks before it, each of which may have followed one."""
    share = share_of_error(look.number, look.horizon, independent=True) * look.error
    return max(look.spent - share, 0.0) + look.assumed * share_of_following(look.horizon) * look.error


def _own_level(
    counted: Sequence[Look], number: int, assumed: int, error: float, horizon: int, further: float, *, is_kept: bool
) -> float:
    """Return what a look may spend in any case: its share, but not more than the looks before have left.

    `further` is kept for looks that follow a nearly shown gain, or the look has its even part of it.
    """
    before = _lost_level(number, assumed, error, horizon)
    before += sum(look.spent + _lost_level(look.number, look.assumed, look.error, look.horizon) for look in counted)
    share = share_of_error(number, horizon, independent=True) * error
    even = share_of_error(number, horizon) * error - share
    return _positive(
        min(share, error - before - further) if is_kept else min(share + min(even, further), error - before)
    )


def _lost_level(number: int, assumed: int, error: float, horizon: int) -> float:
    """Return the most that the lost looks right before the look of this number may have spent."""
    own = sum(share_of_error(k, horizon, independent=True) for k in range(number - assumed, number))
    return (own + min(assumed * share_of_following(horizon), _FURTHER)) * error


def _positive(level: float) -> float:
    return level if level > _ROUNDING else 0.0


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
            # What a look has for a nearly shown gain depends on scores, so a look at scored rows must not get it.
            kept = look.level - (look.following or 0.0)
            found += kept * passed_on(number - position, look.horizon)
        position += 1
    return found


def gains_to_follow(
    log: PromotionLog, looks: Sequence[Look], groups: Iterable[str | None], *, independent: bool
) -> set[int] | None:
    """Return the looks that the next look may follow with a higher level (`near_gains`); None if not `independent`.

    Rows of a group depend on each other, and no record says which groups the rows of earlier looks had. So rows with a
    group follow none.

    Args:
        groups: of the rows of the next look; None for a row without a group.
        independent: gate.independent_rows.
    """
    if not independent:
        return None
    return set() if any(group is not None for group in groups) else near_gains(log, looks)


def near_gains(log: PromotionLog, looks: Sequence[Look]) -> set[int]:
    """Return the numbers (seq) of those of the last looks that nearly showed a gain, and did not promote.

    The bound on false promotions needs no truth of this: an edited or lost decision only changes which looks spend more.
    """
    return {
        look.seq for look in looks[-FOLLOWERS:] if any(_is_near(decision, look) for decision in _decisions(log, look))
    }


def _decisions(log: PromotionLog, look: Look) -> list[Decision]:
    found = []
    for values in log.decisions_about(look.challenger):
        try:
            found.append(Decision.from_dict(values))
        except ValidationError:  # of another version
            continue
    return [decision for decision in found if decision.look == look.seq]


def _is_near(decision: Decision, look: Look) -> bool:
    gains = [found.p_value for found in decision.comparisons if found.kind == "gain" and found.p_value is not None]
    return decision.verdict != "promote" and bool(gains) and is_nearly_shown(max(gains), look.horizon)
