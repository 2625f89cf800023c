"""The section `gate` of a recipe: when a model is promoted."""

from __future__ import annotations

import re
from typing import Annotated, Literal

from pydantic import AfterValidator, Field, model_validator

from loraflow.config.evaluation import SliceBy
from loraflow.config.field_types import Positive
from loraflow.frozen import FrozenModel

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
    rows: Annotated[int, Field(ge=0)] | None = Field(None, description="Number of rows that may.")
    share: Annotated[float, Field(ge=0, lt=1)] | None = Field(None, description="Instead of it: share of the rows.")

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
    share: Annotated[float, Field(gt=0, le=1)] = Field(1.0, description="Share of the answers that must meet it.")

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
