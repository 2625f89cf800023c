"""The gate: decide from per-example scores whether the challenger is promoted or rejected, with reasons.

A model is promoted if, against both base and champion, the primary metric improves by more than `min_gain` and no guard
metric gets worse by more than its margin. If a claim is clearly wrong, the model is rejected. If the data cannot decide,
the verdict is undecided.

- The gain is tested at the level of this look: `gate.error` is the probability of any false promotion in `gate.looks`
  looks of a model (`loraflow/registry/budget.py`).
- All must hold, so neither the comparisons with base and champion nor the guards need a correction (an intersection-union
  test, Berger 1982). Guards are tested at `confidence`.
- One of several claims that is wrong is enough to reject, so these tests are corrected by Holm's method.
"""

from __future__ import annotations

import bisect
import math
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Literal

from loraflow.data.chats import GATE_SET
from loraflow.evaluation.evidence import Evidence
from loraflow.evaluation.guards import GeneralGuard, SliceGuard
from loraflow.evaluation.intervals import Bounds
from loraflow.evaluation.pairing import NO_RANGES, pair, refusal, require_in_range, require_same_tokens, scores
from loraflow.evaluation.power import MINIMUM_ROWS
from loraflow.evaluation.slices import Part
from loraflow.evaluation.values import Comparison, Decision

if TYPE_CHECKING:
    import pandas as pd

_REPEATS = (2, 3, 4, 6, 8, 12, 16, 24, 32, 48, 64)  # of the rows, to find how many would be enough
_MOST_ROWS = 1_000_000  # for which that is computed


@dataclass(frozen=True)
class Rule:
    """A test of one metric's difference: a gain must be above `bound`; a guard must not fall below it."""

    metric: str
    bound: float
    kind: Literal["gain", "guard"]
    part: Part | None = None  # of the rows; None: all of them

    def rows_of(self, table: pd.DataFrame) -> pd.DataFrame:
        """Return the rows that the rule is about, of a table with its ids as the index."""
        return table if self.part is None else table[table.index.isin(self.part.ids)]

    @property
    def about(self) -> str:
        """The score, and the rows if they are a part."""
        return self.metric if self.part is None else f"{self.metric} on {self.part}"

    def __str__(self) -> str:
        return f"gain over {self.bound:g}" if self.kind == "gain" else f"drop within {-self.bound:g}"


@dataclass(frozen=True)
class _Test:
    """A rule against one model, with the scores that decide it."""

    rule: Rule
    against: str
    evidence: Evidence
    reported: float  # the difference of the reported values
    bounds: Bounds  # one-sided at `confidence`
    confidence: float
    level: float  # of the gain

    @property
    def has_enough_rows(self) -> bool:
        return self.evidence.groups >= MINIMUM_ROWS

    def is_confirmed(self, times: int = 1) -> bool:
        """Tell whether the claim is shown; with `times`, whether it would be if each row were there that often."""
        if not self.evidence.has_known_range:
            return False  # no bound is valid: a failure that no row shows can be of any size
        if self.evidence.groups * times < MINIMUM_ROWS or self.reported <= self.rule.bound:
            return False  # whatever is capped or weighted, a model that the report shows as worse is not promoted
        if self.rule.kind == "gain":
            return self.level > 0 and self.p_value(times) <= self.level
        if self.evidence.binary:
            return self.evidence.lower_bound(self.confidence, times) > self.rule.bound
        return self.evidence.p_above(self.rule.bound, 1 - self.confidence, times) < 1 - self.confidence

    def is_refuted(self, level: float) -> bool:
        if not self.has_enough_rows:
            return False
        if self.evidence.binary:
            upper = -self.evidence.flipped().lower_bound(1 - level)
            return upper < self.rule.bound or (self.rule.kind == "gain" and upper <= self.rule.bound)
        return self.evidence.flipped().p_above(-self.rule.bound, level) <= level

    def p_value(self, times: int = 1) -> float:
        """Return the p-value of the claim."""
        return self.evidence.p_above(self.rule.bound, max(self.level, 1e-12), times)

    def rows_needed(self) -> int | None:
        """Return a number of rows at which these scores, repeated, would confirm the claim; None if none would."""
        enough = [times for times in _REPEATS if self.evidence.rows * times <= _MOST_ROWS]
        found = bisect.bisect_left(enough, True, key=self.is_confirmed)
        return self.evidence.rows * enough[found] if found < len(enough) else None


def decide(
    challenger: pd.DataFrame,
    others: Mapping[str, pd.DataFrame],
    *,
    primary: str,
    min_gain: float,
    guards: Mapping[str, float],
    confidence: float,
    lower_is_better: Collection[str] | None = None,
    level: float | None = None,
    look: str = "",
    vocabulary: int | None = None,
    ranges: Mapping[str, tuple[float, float]] = NO_RANGES,
    parts: Sequence[SliceGuard] = (),
    general: Sequence[GeneralGuard] = (),
) -> Decision:
    """Compare score tables of one set, row by row.

    Args:
        challenger: a table with columns id and metrics. Rows with the same `group` or `prompt` are not independent.
        others: {"base": table, "champion": table}; a champion may be missing.
        primary: the metric that must gain by more than `min_gain`.
        lower_is_better: metrics, in addition to loraflow's own, where lower is better.
        level: largest p-value of the gain; by default 1 - confidence. 0 promotes nothing.
        vocabulary: number of tokens of the models, which limits a loss.
        ranges: {metric: (smallest, largest value)} of the user's metrics. Without one, nothing is confirmed.
        general: guards on tables of other rows (gate.forgetting).

    Raises:
        BadData: an id is missing, duplicated or not a text, the tables have different rows, or a score is not a finite
            number. Such scores are never compared in part.
        BadConfig: there is no score of this name, or it is a loss per token of different tokens.
    """
    tests, allowed = [], 1 - confidence if level is None else level
    for name, challenger_rows, other_rows in paired_rows(challenger, others):
        for rule in rules_of(primary, min_gain, guards, parts):
            evidence, reported = pair(
                rule.rows_of(challenger_rows),
                rule.rows_of(other_rows),
                rule.metric,
                name,
                lower_is_better=lower_is_better or (),
                vocabulary=vocabulary,
                ranges=ranges,
            )
            tests.append(_Test(rule, name, evidence, reported, evidence.bounds(confidence), confidence, allowed))
    tests += [test for guard in general for test in _general_tests(guard, confidence, allowed, vocabulary)]
    return _decision(tests, 1 - confidence, look)


def rules_of(primary: str, min_gain: float, guards: Mapping[str, float], parts: Sequence[SliceGuard]) -> Iterator[Rule]:
    """Yield what must hold against each other model."""
    yield Rule(primary, min_gain, "gain")
    for metric, margin in guards.items():
        yield Rule(metric, -margin, "guard")
    for guard in parts:
        yield Rule(guard.metric, -guard.margin, "guard", guard.part)


def _decision(tests: Sequence[_Test], error: float, look: str) -> Decision:
    """Return the verdict of all tests, with the reasons that are decisive for it."""
    refuted = _refuted(tests, error)
    comparisons = [_comparison(test, number in refuted, look) for number, test in enumerate(tests)]
    states = {comparison.state for comparison in comparisons}
    decisive = [comparison for comparison in comparisons if comparison.state != "passed"] or comparisons
    return Decision(
        verdict="reject" if "failed" in states else "undecided" if "open" in states else "promote",
        reasons=tuple(comparison.reason for comparison in decisive),
        comparisons=tuple(comparisons),
    )


def _general_tests(guard: GeneralGuard, confidence: float, allowed: float, vocabulary: int | None) -> Iterator[_Test]:
    for name, challenger_rows, other_rows in paired_rows(guard.challenger, guard.others):
        evidence, reported = pair(challenger_rows, other_rows, guard.metric, name, vocabulary=vocabulary)
        # score_general computes shares of right answers: 0 or 1 in each row.
        evidence = replace(evidence, is_assumed=False)
        rule = Rule(guard.name, -guard.margin, "guard")
        yield _Test(rule, name, evidence, reported, evidence.bounds(confidence), confidence, allowed)


def require_comparable(
    challenger: pd.DataFrame,
    others: Mapping[str, pd.DataFrame],
    metrics: Collection[str],
    ranges: Mapping[str, tuple[float, float]] = NO_RANGES,
) -> None:
    """Check score tables before a look is spent on them.

    Raises:
        BadData: they cannot be compared; see `decide`.
        BadConfig: there is no score of a name, or it is a loss per token of different tokens.
    """
    _require_scores(_by_id(challenger, "challenger"), metrics, ranges, "challenger")
    for name, challenger_rows, other_rows in paired_rows(challenger, others):
        _require_scores(other_rows, metrics, ranges, name)
        if "token_loss" in metrics:
            require_same_tokens(challenger_rows, other_rows, name)


def _require_scores(
    table: pd.DataFrame, metrics: Collection[str], ranges: Mapping[str, tuple[float, float]], where: str
) -> None:
    for metric in metrics:
        scores(table, metric, where)
        if metric in ranges:
            require_in_range(table, ranges[metric], metric, where)


def _refuted(tests: Sequence[_Test], error: float) -> set[int]:
    """Return the numbers of the claims that are wrong, by Holm's method: at most `error` for any mistake."""
    refuted: set[int] = set()
    while len(refuted) < len(tests):
        level = error / (len(tests) - len(refuted))
        found = {n for n, test in enumerate(tests) if n not in refuted and test.is_refuted(level)}
        if not found:
            break
        refuted |= found
    return refuted


def heldout_rows(table: pd.DataFrame, where: str) -> pd.DataFrame:
    """Return the rows of a score table that the gate compares.

    Raises:
        BadData: a row's set is missing or not a text, or there are no such rows.
    """
    _require_texts(table, "set", where)
    rows = table[table["set"] == GATE_SET]
    if rows.empty:
        found = ", ".join(sorted(set(table["set"]))) or "no rows"
        raise refusal("A score table has no rows that the gate compares.", where, f"rows of the set {GATE_SET}", found)
    return rows


def paired_rows(
    challenger: pd.DataFrame, others: Mapping[str, pd.DataFrame]
) -> Iterator[tuple[str, pd.DataFrame, pd.DataFrame]]:
    """Yield for each other model its name, the challenger's rows and its own, both sorted by id, or raise BadData."""
    rows = _by_id(challenger, "challenger")
    for name, other in others.items():
        other_rows = _by_id(other, name)
        _require_same_rows(rows, other_rows, name)
        yield name, rows, other_rows


def _by_id(table: pd.DataFrame, where: str) -> pd.DataFrame:
    """Return a score table with its ids as the index, sorted."""
    if not table.columns.is_unique:
        repeated = ", ".join(sorted(set(table.columns[table.columns.duplicated()])))
        raise refusal("A column is duplicated in a score table.", where, "each column once", repeated)
    _require_texts(table, "id", where)
    if table.empty:
        raise refusal("A score table has no rows.", where, "a row for each held-out example", "no rows")
    repeated_ids = table["id"][table["id"].duplicated()]
    if len(repeated_ids):
        raise refusal("An example is duplicated in a score table.", where, "each id once", str(repeated_ids.iloc[0]))
    return table.set_index("id").sort_index()


def _require_texts(table: pd.DataFrame, column: str, where: str) -> None:
    """Refuse a table with a missing or other value in a column of texts: such rows would be dropped, or join each other."""
    if column not in table:
        raise refusal(
            f"A score table has no column `{column}`.", where, f"a column `{column}`", ", ".join(table.columns)
        )
    others = [value for value in table[column] if not isinstance(value, str)]
    if others:
        got = f"{others[0]!r} in {len(others)} of {len(table)} rows"
        raise refusal(f"A row of a score table has no valid `{column}`.", where, "a text in every row", got)


def _require_same_rows(challenger_rows: pd.DataFrame, other_rows: pd.DataFrame, name: str) -> None:
    common = challenger_rows.index.intersection(other_rows.index)
    if not len(challenger_rows) == len(other_rows) == len(common):
        raise refusal(
            "Challenger and other model were not scored on the same examples.",
            name,
            f"{len(challenger_rows)} examples in common",
            str(len(common)),
        )
    if "set" in challenger_rows and "set" in other_rows and not (challenger_rows["set"] == other_rows["set"]).all():
        raise refusal("Challenger and other model have an example in different sets.", name, "equal sets", "other ones")
    if "prompt" in challenger_rows and "prompt" in other_rows:
        asked: list[str] = list(challenger_rows["prompt"])
        others: list[str] = list(other_rows["prompt"])
        ids: list[str] = list(challenger_rows.index)
        differs = [row for row, prompt, other in zip(ids, asked, others, strict=True) if prompt != other]
        if differs:
            got = f"another prompt in {len(differs)} of {len(ids)} rows, the first of them {differs[0]}"
            raise refusal("Challenger and other model were asked different questions.", name, "equal prompts", got)


def _comparison(test: _Test, is_refuted: bool, look: str) -> Comparison:
    rule, evidence = test.rule, test.evidence
    state: Literal["passed", "failed", "open"] = "failed" if is_refuted else "passed" if test.is_confirmed() else "open"
    p_value = test.p_value() if rule.kind == "gain" else None
    needed = test.rows_needed() if state == "open" else None
    outcome = _outcome(test, state, look, needed)
    return Comparison(
        against=test.against,
        metric=rule.metric,
        kind=rule.kind,
        difference=test.bounds.mean,
        lower=test.bounds.lower,
        upper=test.bounds.upper,
        n=evidence.rows,
        state=state,
        reason=f"{rule.about} against {test.against}: {_shown(test.bounds)} (one-sided "
        f"{100 * test.confidence:.4g} % bounds), {rule} {outcome}",
        p_value=p_value,
        level=test.level if rule.kind == "gain" else None,
        groups=evidence.groups,
        effective_rows=evidence.effective_rows,
        part=None if rule.part is None else str(rule.part),
        rows_needed=needed,
        has_known_range=evidence.has_known_range,
    )


def _shown(bounds: Bounds) -> str:
    """Return a difference with its bounds: with four decimals, or four digits if they are very small or large."""
    largest = max(map(abs, bounds))
    style = "+.4f" if bounds.mean == 0 or 1e-3 <= largest < 1e6 or math.isinf(largest) else "+.4g"
    return f"{bounds.mean:{style}} [{bounds.lower:{style}}, {bounds.upper:{style}}]"


def _outcome(test: _Test, state: str, look: str, needed: int | None) -> str:
    """Return how a claim was decided, in words."""
    evidence = test.evidence
    rows = f"{evidence.rows} rows"
    if evidence.groups < evidence.rows:
        rows += f" in {evidence.groups} groups, worth {evidence.effective_rows:.0f} independent rows"
    parts = []
    if test.rule.kind == "gain" and state != "failed" and test.has_enough_rows:
        if test.level <= 0:
            parts.append(
                f"gate.error is used up at {look or 'this look'}; after the last look, held-out rows that were never "
                "scored get a new budget"
            )
        else:
            parts.append(f"p {test.p_value():.2g}, {test.level:.2g} allowed{f' at {look}' if look else ''}")
    if test.reported != test.bounds.mean and abs(test.reported - test.bounds.mean) > 1e-9:
        parts.append(f"losses capped; uncapped {test.reported:+.4f}")
    if not evidence.has_known_range and state != "failed":
        parts.append(
            f"the range of {test.rule.metric} is not known, so no claim about it is confirmed: set gate.ranges"
        )
    if not math.isfinite(test.bounds.lower) or not math.isfinite(test.bounds.upper):
        parts.append(f"no bound from {evidence.groups} independent rows without a range")
    if state == "open":
        if not test.has_enough_rows:
            parts.append(f"at least {MINIMUM_ROWS} independent rows are needed")
        if needed is not None:
            parts.append(f"about {needed:,} such rows would be enough")
        elif test.reported <= test.rule.bound and evidence.has_known_range:
            parts.append("more rows like these would not confirm it")
    word = {"passed": "confirmed", "failed": "refuted", "open": f"inconclusive with {rows}"}[state]
    if state != "open" and evidence.groups < evidence.rows:
        parts.append(rows)
    return f"{word} ({'; '.join(parts)})" if parts else word
