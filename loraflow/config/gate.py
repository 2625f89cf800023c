"""The section `gate` of a recipe: when a model is promoted."""

from __future__ import annotations

import re
from collections.abc import Iterator, Set
from typing import TYPE_CHECKING, Annotated, Literal

from pydantic import AfterValidator, Field, model_validator

from loraflow.config.evaluation import OF_ALL_ROWS, RANGES, ROW_COLUMNS, SCORES, SliceBy
from loraflow.frozen import FrozenModel, Positive

if TYPE_CHECKING:
    from loraflow.config.recipe import Recipe

Margin = Annotated[float, Field(ge=0, allow_inf_nan=False)]


def _increasing(ends: list[float]) -> list[float]:
    if not ends[0] < ends[1]:
        raise ValueError(f"the first number must be smaller than the second one, not {ends[0]:g} and {ends[1]:g}")
    return ends


_Finite = Annotated[float, Field(ge=-1e100, le=1e100, allow_inf_nan=False)]
ScoreRange = Annotated[list[_Finite], Field(min_length=2, max_length=2), AfterValidator(_increasing)]


class WorstRule(FrozenModel):
    """How many held-out rows may get worse by at least `drop`."""

    drop: Annotated[float, Field(gt=0, allow_inf_nan=False)] = Field(
        ..., description="A row counts if its score is worse by at least this, in the score's unit."
    )
    rows: Annotated[int, Field(ge=0)] | None = Field(None, description="Number of rows that may be worse.")
    share: Annotated[float, Field(ge=0, lt=1)] | None = Field(None, description="Instead of `rows`: share of the rows.")

    @model_validator(mode="after")
    def _one_limit(self) -> WorstRule:
        if (self.rows is None) == (self.share is None):
            raise ValueError("gate.worst needs `rows` or `share` for each score, and not both")
        return self


class BehaviourCheck(FrozenModel):
    """A condition on the tuned model's answers to a set of rows, and the share of them that must meet it."""

    set: str = Field("heldout", description="The rows: `heldout`, or a set of data.extra_heldout.")
    contains: list[str] | None = Field(None, description="Texts that an answer must contain, in any case.")
    matches: str | None = Field(None, description="A regular expression that must be found in an answer.")
    json_fields: list[str] | None = Field(None, description="An answer must be a JSON object with these fields.")
    refuses: bool | None = Field(None, description="true: an answer must refuse, in English; false: it must not.")
    consistent: Literal[True] | None = Field(
        None,
        description="true: answers to paraphrases must be the same. Paraphrases have the same value of data.group.",
    )
    share: Annotated[float, Field(gt=0, le=1)] = Field(
        1.0, description="Share of the answers that must meet the condition."
    )

    @model_validator(mode="after")
    def _one_condition(self) -> BehaviourCheck:
        conditions = ("contains", "matches", "json_fields", "refuses", "consistent")
        is_empty = self.contains == [] or "" in (self.contains or ()) or self.matches == ""  # any answer meets it
        if sum(getattr(self, name) is not None for name in conditions) != 1 or is_empty:
            raise ValueError(f"a check of gate.behaviour needs one of {', '.join(conditions)}")
        try:
            re.compile(self.matches or "")
        except re.error as error:
            raise ValueError(f"`matches` is not a regular expression: {error}") from None
        return self


class Gate(FrozenModel):
    """The conditions for a promotion: they are tested against the base and against the champion.

    Names of scores are checked before the run only if all metrics are built-in: the scores of your own metrics are not
    known before they have run.
    """

    primary: str = Field(
        "token_loss",
        description="The score that must improve. A score of your own metric is first checked when the gate decides.",
    )
    min_gain: Annotated[float, Field(ge=0, allow_inf_nan=False)] = Field(
        0.0, description="The improvement must be larger than this, in the score's unit."
    )
    guards: dict[str, Margin] = Field({}, description="{score: largest drop that is allowed, in the score's unit}.")
    worst: dict[str, WorstRule] = Field(
        {},
        description="{score: {drop: POINTS, rows: NUMBER}}, or `share` instead of `rows`: how many rows may get worse by at "
        "least `drop`. More of them reject the challenger; the report lists them.",
    )
    slices: dict[SliceBy, Annotated[dict[str, Margin], Field(min_length=1)]] = Field(
        {},
        description="{part: {score: largest drop that is allowed}}: guards for each part of the held-out rows. `part` is "
        "`length`, `script`, or a field of the rows, as in evaluation.slices.",
    )
    behaviour: dict[str, BehaviourCheck] = Field(
        {},
        description="{name: {set: SET, CONDITION, share: SHARE}}: what a set's answers must look like. CONDITION is one of "
        "`contains`, `matches`, `json_fields`, `refuses` and `consistent`. A check that fails rejects the challenger.",
    )
    forgetting: dict[
        Literal["loss", "accuracy", "accuracy_norm"], Annotated[float, Field(gt=0, allow_inf_nan=False)]
    ] = Field(
        {},
        description="{score: how much worse the tuned model may be on the rows of evaluation.general}: `loss` of the "
        "chats in nats per token; `accuracy` of the questions by the likelihood of a choice, `accuracy_norm` by its "
        "likelihood per character.",
    )
    lower_is_better: list[str] = Field([], description="Scores of your own metrics for which lower is better.")
    ranges: dict[str, ScoreRange] = Field(
        {},
        description="{score: [smallest, largest]}: the possible values of scores of your own metrics. The gate "
        "compares such a score only with its range.",
    )
    error: Annotated[float, Field(gt=0, lt=0.5)] = Field(
        0.05,
        description="Probability of any false promotion in all looks of the model, whatever its held-out rows; with "
        "`independent_rows`, if each run's new rows are independent of earlier ones.",
    )
    independent_rows: bool = Field(
        False,
        description="true: the new held-out rows of each run are independent of those of earlier runs, such as rows of new "
        "users or new documents. Then looks at new rows after a nearly shown gain have a higher level.",
    )
    looks: Positive = Field(365, description="Number of challengers that share this error: a year of nights.")
    seeds: Annotated[int, Field(ge=1, le=20)] = Field(
        1,
        description="Number of models to train, with the seeds training_config.seed, seed + 1 and so on. The gate compares "
        "the mean of their scores. The model of the first seed is registered.",
    )
    confidence: Annotated[float, Field(gt=0.5, lt=1)] = Field(
        0.95, description="Confidence level of the guards, and of the one-sided bounds that are shown."
    )

    @property
    def score_ranges(self) -> dict[str, tuple[float, float]]:
        """The smallest and the largest value of scores, by `ranges`."""
        return {score: (ends[0], ends[1]) for score, ends in self.ranges.items()}

    @property
    def forgetting_margins(self) -> dict[str, float]:
        """The margins of `forgetting`, by the name of the score."""
        return {str(score): margin for score, margin in self.forgetting.items()}


# What the gate cannot compare row by row: columns that are not scores, and scores that are no mean over rows.
NOT_SCORES = ROW_COLUMNS | (OF_ALL_ROWS - {"stops"})


def contradictions(recipe: Recipe) -> Iterator[tuple[tuple[str, ...], str]]:
    """Yield the rules that decide nothing, or the opposite of what their author means: the path of the key, and the problem.

    A margin of 5 for a score between 0 and 1, meant as five points, guards nothing. A score that is named as lower-is-better
    by mistake promotes the worse model. Recorded recipes are not checked: a run that was made can be made again.
    """
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
        if name in scored and name in RANGES:
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
    return RANGES.get(score) if score in scored else None


def _margins(gate: Gate) -> Iterator[tuple[tuple[str, ...], str, float]]:
    """Yield the path, the score and the margin of each rule that compares means of held-out rows."""
    yield ("gate", "min_gain"), gate.primary, gate.min_gain
    for name, margin in gate.guards.items():
        yield ("gate", "guards", name), name, margin
    for part, margins in gate.slices.items():
        for name, margin in margins.items():
            yield ("gate", "slices", part, name), name, margin
