"""What the gate can show with the held-out rows, before anything is trained; and what would decide an undecided run.

No numpy: `loraflow plan` and cached runs are fast.
"""

import math
from bisect import bisect_left
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from statistics import NormalDist
from types import MappingProxyType

from loraflow.config.evaluation import BINARY, RANGES
from loraflow.evaluation.values import Comparison, Decision

MINIMUM_ROWS = 20  # independent rows: with fewer, nothing is promoted or rejected
DISAGREEMENT = 0.1  # share of rows whose score of 0 or 1 differs between two models, as an example
POWER = 0.8
_NORMAL = NormalDist()


def margin_of_unchanged(
    rows: int, confidence: float, metric: str, reach: float | None = None, sizes: Sequence[int] = ()
) -> float | None:
    """Return the margin above which a guard passes if all outputs are unchanged; None if the metric has no range.

    Args:
        reach: the largest difference of a metric of the user's own, or of `token_loss`: then the rows are equally long.
        sizes: rows of each of `rows` groups.
    """
    if metric in BINARY and max(sizes, default=1) == 1:  # where Tango's bound of no differences is
        z2 = _NORMAL.inv_cdf(confidence) ** 2
        return z2 / (rows + z2)
    reach = RANGES.get(metric, reach)
    if reach is not None and len(set(sizes)) > 1:
        import numpy as np

        from loraflow.evaluation.evidence import Evidence

        weights = np.array(sizes, float)
        return -Evidence(0 * weights, weights, reach, rows=sum(sizes)).lower_bound(confidence)
    return None if reach is None else -reach * math.expm1(math.log(1 - confidence) / rows)


def rows_for_margin(margin: float, confidence: float, metric: str, reach: float | None = None) -> int | None:
    """Return the number of rows, or of equal groups, from which unchanged outputs pass a guard; None if it is not known.

    For groups, the metric is empty. The arguments are those of `margin_of_unchanged`.
    """
    if margin <= 0 or margin_of_unchanged(1, confidence, metric, reach) is None:
        return None
    return 1 + bisect_left(
        range(1, 2**62), True, key=lambda rows: (margin_of_unchanged(rows, confidence, metric, reach) or 0.0) < margin
    )


def largest_differences(largest_loss: float, ranges: Mapping[str, tuple[float, float]]) -> dict[str, float]:
    """Return the largest difference of each score that has one.

    Args:
        largest_loss: the logarithm of the vocabulary.
    """
    return {"token_loss": largest_loss, **RANGES, **{name: high - low for name, (low, high) in ranges.items()}}


def _counted(metric: str, sizes: Sequence[int]) -> str:
    """Return what a number of rows counts, for a sentence about them."""
    if max(sizes, default=1) > 1:
        return "groups of equal size"
    return "rows of equal length" if metric == "token_loss" else "rows"


def is_too_strict(margin: float, unchanged: float | None) -> bool:
    """Tell whether even unchanged outputs do not pass a guard."""
    return not margin or (unchanged is not None and unchanged >= margin)


def not_passed(
    metric: str, where: str, margin: float, needed: int | None, unchanged: float | None, sizes: Sequence[int]
) -> str:
    """Return for people that a guard is too strict for groups of these sizes."""
    if not margin:
        return f"  {metric}{where}: a margin of 0 passes only better outputs, never unchanged ones"
    unequal = " of unequal size" if len(set(sizes)) > 1 else ""
    out = "" if unchanged is None else f", which can rule out a drop of {unchanged:.2g}"
    return (
        f"  {metric}{where}: even unchanged outputs do not pass: a margin of {margin:g} needs {needed} "
        f"{_counted(metric, sizes)}, you have {len(sizes)}{unequal}{out}"
    )


def smallest_gain(
    rows: int, level: float, min_gain: float, metric: str, reach: float, sizes: Sequence[int] = ()
) -> float:
    """Return the gain that the gate shows at all, or for scores of 0 and 1 that it shows in four of five looks."""
    if metric not in BINARY or max(sizes, default=1) > 1:  # if each row gains the same; with any spread, more is needed
        unchanged = margin_of_unchanged(rows, 1 - level, "", reach, sizes) or 0.0
        return math.inf if unchanged >= reach else min_gain + (min_gain + reach) * unchanged / (reach - unchanged)
    alpha, power = _NORMAL.inv_cdf(1 - level), _NORMAL.inv_cdf(POWER)
    low, high = min_gain, 1.0
    for _ in range(60):
        gain = (low + high) / 2
        differ = max(DISAGREEMENT, gain)
        needed = alpha * math.sqrt(differ - min_gain**2) + power * math.sqrt(max(differ - gain**2, 0.0))
        low, high = (low, gain) if (gain - min_gain) * math.sqrt(rows) >= needed else (gain, high)
    return high


@dataclass(frozen=True)
class GatePower:
    """What a gate can show."""

    sizes: Sequence[int]  # of independent groups
    look: str
    level: float
    primary: str
    min_gain: float
    gain: float | None  # the smallest gain that can be shown; None if none can be
    guards: Mapping[str, tuple[float, float | None, int | None]]  # margin, margin of unchanged outputs, rows needed
    unknown: tuple[str, ...] = ()  # compared scores without a known range: no claim about them is confirmed

    @property
    def rows(self) -> int:
        """The number of independent groups."""
        return len(self.sizes)

    def lines(self) -> list[str]:
        """Return what people read in a plan."""
        is_grouped = sum(self.sizes) > self.rows
        scored = f"{sum(self.sizes)} held-out rows" + (f" in {self.rows} groups" if is_grouped else "")
        found = [f"gate: {scored}, {self.look}, level {self.level:.2g}"]
        if self.rows < MINIMUM_ROWS:
            found.append(f"  no model can be promoted: at least {MINIMUM_ROWS} independent rows are needed")
        elif self.unknown:
            found.append(
                f"  no model can be promoted: the range of {', '.join(self.unknown)} is not known: set gate.ranges"
            )
        elif self.level > 0 and self.gain is None:
            found.append(f"  no model can be promoted: so few rows show no gain over {self.min_gain:g} at this level")
        elif self.gain is None:
            found.append(
                "  no model can be promoted: gate.error is used up. After the last look, rows that were never scored get a "
                "new budget"
            )
        elif self.primary in BINARY and not is_grouped:
            found.append(
                f"  {self.primary}: a gain of {self.gain:.3g} is shown in 4 of 5 looks, if the models disagree on "
                f"{max(DISAGREEMENT, self.gain):.0%} of the rows"
            )
        else:
            found.append(
                f"  {self.primary}: no gain below {self.gain:.2g} can be shown, and more is needed if rows differ"
            )
        for metric, (margin, unchanged, needed) in self.guards.items():
            if is_too_strict(margin, unchanged):
                found.append(not_passed(metric, "", margin, needed, unchanged, self.sizes))
            elif unchanged is not None:
                kind = "groups of unequal size" if len(set(self.sizes)) > 1 else _counted(metric, self.sizes)
                found.append(
                    f"  {metric}: unchanged outputs pass; {self.rows} {kind} can rule out a drop of {unchanged:.2g}"
                )
        return found

    def is_warning(self) -> bool:
        """Tell whether the gate can never promote, or an unchanged model does not pass a guard."""
        too_strict = any(is_too_strict(margin, unchanged) for margin, unchanged, _ in self.guards.values())
        return self.rows < MINIMUM_ROWS or self.gain is None or bool(self.unknown) or too_strict


def gate_power(
    sizes: Sequence[int],
    *,
    look: str,
    level: float,
    primary: str,
    min_gain: float,
    guards: Mapping[str, float],
    confidence: float,
    largest_loss: float,
    ranges: Mapping[str, tuple[float, float]] = MappingProxyType({}),
) -> GatePower:
    """Return what a gate can show.

    Args:
        sizes: rows of each group of held-out rows: 1 for a row that is independent of all others.
        largest_loss: the logarithm of the vocabulary.
    """
    reaches = largest_differences(largest_loss, ranges)
    reach, rows = reaches.get(primary), len(sizes)
    gain = (
        smallest_gain(rows, level, min_gain, primary, reach, sizes)
        if level > 0 and rows and reach is not None
        else None
    )
    return GatePower(
        sizes=sizes,
        look=look,
        level=level,
        primary=primary,
        min_gain=min_gain,
        gain=gain if gain is not None and reach is not None and gain < reach else None,
        unknown=tuple(dict.fromkeys(name for name in (primary, *guards) if name not in reaches)),
        guards={
            metric: (
                margin,
                margin_of_unchanged(rows, confidence, metric, reaches.get(metric), sizes),
                rows_for_margin(margin, confidence, "" if sum(sizes) > rows else metric, reaches.get(metric)),
            )
            for metric, margin in guards.items()
        },
    )


PREFIX = "general_"  # names of scores on general rows begin with it in the gate's reasons
MORE = ", and add held-out rows"


@dataclass(frozen=True)
class HeldoutRows:
    """The held-out rows of a run."""

    available: int  # in the gate's set
    deals_rows: bool = False  # by data.heldout_reserve


def advice(decision: Decision, rows: HeldoutRows) -> list[str]:
    """Return what would decide, each step once; nothing for another verdict."""
    return list(dict.fromkeys(_steps(decision, rows))) if decision.verdict == "undecided" else []


def _steps(decision: Decision, rows: HeldoutRows) -> Iterator[str]:
    unsure = [comparison for comparison in decision.comparisons if comparison.state == "open"]
    most: dict[str, Comparison] = {}  # the same step for two claims: the one that needs more rows
    for comparison in unsure:
        step = _step(comparison, rows).replace(_about(comparison), "").replace(MORE, "")
        if step not in most or (comparison.rows_needed or 0) > (most[step].rows_needed or 0):
            most[step] = comparison
    for comparison in most.values():
        yield _step(comparison, rows)
    if decision.unscored:
        how = "a smaller data.heldout_reserve" if rows.deals_rows else "a larger evaluation.max_rows"
        yield f"score rows of {', '.join(decision.unscored)}: {how}, or more such rows"
    elif not unsure and len(decision.reasons) > 1:  # by gate.seeds
        yield (
            "on average, the models of all seeds are better, but the one that would be registered is not: train again, such "
            "as with another training_config.seed, which is a new look"
        )
    elif not unsure:
        yield "run again: the stages are cached, and the gate compares with the new champion"


def _step(comparison: Comparison, rows: HeldoutRows) -> str:
    independent = comparison.n if comparison.groups is None else comparison.groups
    if comparison.metric.startswith(PREFIX):
        margin = f"or raise its margin in gate.forgetting, {comparison.metric.removeprefix(PREFIX)}"
        if comparison.rows_needed is None and independent >= MINIMUM_ROWS:
            return f"more rows would not confirm {comparison.metric}: train a model that forgets less, {margin}"
        return f"add rows to the file of evaluation.general{_about(comparison)}, {margin}"
    if comparison.level == 0:
        return "add held-out rows that were never scored: after the last look they get a new budget of error"
    if not comparison.has_known_range:
        return f"set gate.ranges: the smallest and largest value of {comparison.metric} (the training stays cached)"
    if independent < MINIMUM_ROWS <= comparison.n:
        groups = f"these belong to {independent}, and {MINIMUM_ROWS} are needed"
        return f"add held-out rows of other groups (of near-duplicates, or of data.group): {groups}"
    if comparison.rows_needed is None and independent >= MINIMUM_ROWS:
        rule = "a smaller gate.min_gain" if comparison.kind == "gain" else f"a larger margin of {comparison.metric}"
        return f"more rows like these would not confirm {comparison.metric}: train a better model, or set {rule}"
    if comparison.part is not None:
        return f"add held-out rows of {comparison.part}{_about(comparison)}"
    if rows.deals_rows:
        return (
            f"score more rows in each look{_about(comparison)}: a smaller data.heldout_reserve, or more held-out rows"
        )
    if rows.available > comparison.n:
        more = "" if rows.available >= (comparison.rows_needed or 0) else MORE
        return f"raise evaluation.max_rows{more}{_about(comparison)}: there are {rows.available:,} held-out rows"
    return f"add held-out rows{_about(comparison)}"


def _about(comparison: Comparison) -> str:
    needed = max(comparison.rows_needed or 0, MINIMUM_ROWS)
    return f" (about {needed:,} are needed, {comparison.n:,} were scored)" if needed > comparison.n else ""
