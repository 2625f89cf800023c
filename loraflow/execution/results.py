"""The values that the pipeline and the registration return."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from loraflow.evaluation.values import Decision
from loraflow.store import Ref


@dataclass(frozen=True)
class SeedResult:
    """The artifacts of a further training seed."""

    seed: int
    adapter: Ref
    merged: Ref
    scores: Ref


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
    champion_scores: Ref | None  # None if there is no champion yet
    further_seeds: tuple[SeedResult, ...] = ()  # by gate.seeds
    general: Mapping[str, Ref] = field(default_factory=dict)  # {base, tuned, champion: scores on general rows}


@dataclass(frozen=True)
class Registration:
    """A decision, and the number of its entry in the promotion log if a model was promoted."""

    decision: Decision
    entry: int | None = None
