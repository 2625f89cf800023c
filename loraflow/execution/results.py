"""What a walk through the pipeline returns."""

from __future__ import annotations

from dataclasses import dataclass

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
