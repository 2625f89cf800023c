"""Values that other packages read: scores, samples of answers, and the gate's decision. No numpy or pandas here.

Reading ignores unknown keys, so that documents of other versions stay readable.
"""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Literal, TypeAlias

from pydantic import BeforeValidator, JsonValue, TypeAdapter, field_serializer
from pydantic.dataclasses import dataclass

from loraflow.frozen import StoredModel

LARGEST_SCORE = 1e100  # squares and sums of larger ones may be no finite numbers
LARGEST_VOCABULARY = 2**18  # assumed if the base's config does not say how many tokens there are


def vocabulary_of(config: bytes | None) -> int | None:
    """Return the number of tokens that a model's config.json names; None if it names none."""
    try:
        found = json.loads(config or b"{}")
    except ValueError:
        return None
    size = found.get("vocab_size") or (found.get("text_config") or {}).get("vocab_size")
    return size if isinstance(size, int) and size > 1 else None


Verdict = Literal["promote", "reject", "undecided", "unchanged"]


# JSON has no infinite numbers: a bound that does not exist is null there. Earlier versions wrote Infinity.
_Lower = Annotated[float, BeforeValidator(lambda value: -math.inf if value is None else value)]
_Upper = Annotated[float, BeforeValidator(lambda value: math.inf if value is None else value)]


class MetricValue(StoredModel):
    """A metric's value on a set of rows, with its two-sided interval; infinite ends say nothing, as for one row."""

    value: _Upper  # infinite only as the perplexity of an enormous loss
    low: _Lower
    high: _Upper
    n: int  # rows

    @field_serializer("value", "low", "high")
    def _without_infinity(self, number: float) -> float | None:
        return number if math.isfinite(number) else None

    def __str__(self) -> str:
        return self.text("{:.3f} [{:.3f}, {:.3f}]")

    def text(self, form: str) -> str:
        """Return the value with its interval, in this format."""
        if not math.isfinite(self.high - self.low):  # earlier perplexities: 0 and infinity
            form = f"{form.split()[0]} (no interval)"
        return form.format(self.value, self.low, self.high)


SetScores: TypeAlias = Mapping[str, MetricValue]  # metric → value
Scores: TypeAlias = Mapping[str, SetScores]  # set of rows → metric → value


def scores_to_dict(scores: Scores) -> dict[str, JsonValue]:
    """Return scores as JSON values, as in `metrics.json`."""
    return {rows: {name: value.model_dump() for name, value in part.items()} for rows, part in scores.items()}


def write_metrics(scores: Scores, folder: Path) -> dict[str, float]:
    """Write metrics.json; return its values as figures of a manifest."""
    text = json.dumps(scores_to_dict(scores), indent=1, sort_keys=True) + "\n"
    (folder / "metrics.json").write_text(text, encoding="utf-8")
    return {f"{rows}.{name}": round(value.value, 6) for rows, part in scores.items() for name, value in part.items()}


class Sample(StoredModel):
    """A held-out question with its reference and the model's answer, for reports."""

    id: str
    prompt: str
    reference: str
    answer: str


class Confusion(StoredModel):
    """A label that is often answered wrongly, and the wrong answer that is given most often."""

    label: str
    rows: int  # rows of this label
    wrong: int
    as_label: str  # a label of the set, or (no label)
    as_count: int


class EvaluationReport(StoredModel):
    """The report in the manifest of an evaluate artifact."""

    metrics: Scores
    samples: tuple[Sample, ...] = ()
    available: Mapping[str, int] = {}  # held-out rows of each set, of which at most evaluation.max_rows are scored
    control_tokens: int = 0  # scored rows with a control token in a message's text
    longest: int = 0  # tokens of the longest scored row
    confusions: Mapping[str, tuple[Confusion, ...]] = {}  # set → its worst labels; with the metric `labels` only

    def to_dict(self) -> dict[str, JsonValue]:
        """Return the report as JSON values."""
        return self.model_dump(mode="json", exclude=set() if self.confusions else {"confusions"})


class Slice(StoredModel):
    """The scores of some of the gate's rows."""

    by: str  # length, script, or a field of the rows
    name: str
    rows: int
    values: Mapping[str, SetScores]  # model → metric → value


class SeedScores(StoredModel):
    """A metric's value on the gate's rows for each training seed, the registered model's seed first."""

    metric: str
    values: Mapping[str, float]  # seed → value
    mean: float
    deviation: float  # standard deviation of the values, with n - 1


@dataclasses.dataclass(frozen=True)
class ModelScores:
    """The scores of the three models that a run compares."""

    base: Scores
    tuned: Scores
    champion: Scores | None = None

    def to_dict(self) -> dict[str, JsonValue]:
        """Return the scores as JSON values, as in a run's summary."""
        return {
            "base": scores_to_dict(self.base),
            "tuned": scores_to_dict(self.tuned),
            "champion": None if self.champion is None else scores_to_dict(self.champion),
        }


@dataclass(frozen=True)
class Comparison:
    """The challenger against another model by one metric.

    `difference` is the mean of the paired differences, `lower` and `upper` its one-sided bounds: positive where the
    challenger is better, also for a loss, and infinite if there is none.
    """

    against: str  # base or champion
    metric: str
    kind: Literal["gain", "guard"]
    difference: float
    lower: _Lower
    upper: _Upper
    n: int  # rows
    state: Literal["passed", "failed", "open"]
    reason: str
    p_value: float | None = None  # the p-value of the gain
    level: float | None = None  # the largest p-value that confirms the gain
    groups: int | None = None  # groups of rows that are independent of each other
    effective_rows: float | None = None  # independent rows with the same standard error
    part: str | None = None  # a part of the rows, by gate.slices; None: all rows
    rows_needed: int | None = None  # rows that would confirm an inconclusive claim; None: no number would
    has_known_range: bool = True  # the score; otherwise nothing is confirmed

    def to_dict(self) -> dict[str, JsonValue]:
        """Return JSON values, without values that are not set, and with null for an infinite bound."""
        values = {name: value for name, value in dataclasses.asdict(self).items() if value is not None}
        if self.has_known_range:
            del values["has_known_range"]
        ends = {name: values[name] for name in ("lower", "upper")}
        return values | {name: end if math.isfinite(end) else None for name, end in ends.items()}


@dataclass(frozen=True)
class WorseRow:
    """A row on which the challenger is worse."""

    id: str
    score: float  # the challenger's score
    other: float  # the other model's score
    question: str = ""  # the last message before the answer, cut
    answer: str = ""  # the challenger's answer, cut


@dataclass(frozen=True)
class WorseRows:
    """The rows on which the challenger is worse by at least `drop`, and how many may be."""

    against: str  # base or champion
    metric: str
    drop: float
    count: int
    allowed: int
    reason: str
    rows: tuple[WorseRow, ...] = ()  # the worst ones

    @property
    def holds(self) -> bool:
        """Whether there are no more rows than allowed."""
        return self.count <= self.allowed


@dataclass(frozen=True)
class FailedRow:
    """A row whose answer does not meet a condition."""

    id: str
    question: str  # the last message before the answer, cut
    answer: str  # cut


@dataclass(frozen=True)
class BehaviourResult:
    """How many answers of a set meet a condition of gate.behaviour, and which do not."""

    name: str
    set: str
    passed: int
    total: int
    share: float  # the share of the answers that must meet the condition
    reason: str
    failed: tuple[FailedRow, ...] = ()  # the first ones

    @property
    def holds(self) -> bool:
        """Whether enough answers meet the condition."""
        return self.passed >= self.share * self.total - 1e-9


@dataclass(frozen=True)
class Decision:
    """A verdict with its reasons, and the comparisons behind it. Changes return a new value."""

    verdict: Verdict
    reasons: tuple[str, ...]
    comparisons: tuple[Comparison, ...] = ()
    look: int | None = None  # number of the look in the record of looks
    budget: str = ""  # which look it was, and what is left; or why none was used
    worse: tuple[WorseRows, ...] = ()  # by gate.worst
    behaviour: tuple[BehaviourResult, ...] = ()  # by gate.behaviour
    unscored: tuple[str, ...] = ()  # parts of gate.slices of which no row was scored

    @classmethod
    def from_dict(cls, values: Mapping[str, JsonValue]) -> Decision:
        """Read a decision from JSON values.

        Raises:
            pydantic.ValidationError: they are not a decision.
        """
        return TypeAdapter(Decision).validate_python(values)

    def to_dict(self) -> dict[str, JsonValue]:
        """Return the decision as JSON values, without values that are not set."""
        values: dict[str, JsonValue] = {
            "verdict": self.verdict,
            "reasons": [*self.reasons],
            "comparisons": [comparison.to_dict() for comparison in self.comparisons],
        }
        if self.unscored:
            values["unscored"] = [*self.unscored]
        if self.worse:
            values["worse"] = [dataclasses.asdict(entry) for entry in self.worse]
        if self.behaviour:
            values["behaviour"] = [dataclasses.asdict(entry) for entry in self.behaviour]
        if self.look is not None:
            values["look"] = self.look
        return {**values, "budget": self.budget} if self.budget else values

    @classmethod
    def unchanged(cls, reason: str, known: Decision | None = None) -> Decision:
        """Return the decision that nothing changes; `known` is an earlier decision that still holds."""
        if known is None:
            return cls("unchanged", (reason,))
        then = "When it was decided: "  # other looks may have followed
        budget = then + known.budget.removeprefix(then) if known.budget else ""
        reasons = known.reasons if known.reasons[:1] == (reason,) else (reason, *known.reasons)
        return dataclasses.replace(known, verdict="unchanged", reasons=reasons, budget=budget)

    def with_reason(self, reason: str) -> Decision:
        """Return the same decision with one more reason."""
        return dataclasses.replace(self, reasons=(*self.reasons, reason))

    def with_unscored(self, parts: Sequence[str]) -> Decision:
        """Return the decision if parts that a guard names were not scored: they may have got worse."""
        if not parts:
            return self
        why = f"gate.slices: no row was scored of {', '.join(parts)}"
        verdict: Verdict = "undecided" if self.verdict == "promote" else self.verdict
        return dataclasses.replace(self, verdict=verdict, reasons=(why, *self.reasons), unscored=tuple(parts))

    def rejected_for(self, reasons: Sequence[str]) -> Decision:
        """Return the decision, rejected if there are reasons. Its own reasons follow, unless they were for a promotion."""
        if not reasons:
            return self
        others = () if self.verdict == "promote" else self.reasons
        return dataclasses.replace(self, verdict="reject", reasons=(*reasons, *others))

    def overruled(self, verdict: Verdict, reason: str) -> Decision:
        """Return another verdict with a single reason. The comparisons stay."""
        return dataclasses.replace(self, verdict=verdict, reasons=(reason,))
