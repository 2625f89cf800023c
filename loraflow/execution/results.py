"""What the pipeline and its decision return."""

from __future__ import annotations

from dataclasses import dataclass

from loraflow.evaluation.values import Decision
from loraflow.store import Ref


@dataclass(frozen=True)
class PipelineResult:
    """The artifacts of a run."""

    dataset: Ref
    rows: Ref
    base: Ref
    tokens: Ref
    adapter: Ref
    merged: Ref
    verified: Ref
    base_scores: Ref
    tuned_scores: Ref
    champion_scores: Ref | None  # None where no model is in use yet


@dataclass(frozen=True)
class Registration:
    """What became of a decision: the decision itself, and the number of the log's entry if a model was promoted."""

    decision: Decision
    entry: int | None = None
