"""The DAG, once: `finetune` walks it by running, `loraflow plan` by asking.

version_dataset ─→ check_dataset ─→ tokenize ─→ train ─→ merge ─┬─→ verify(merged) ──────┐
resolve_base ─────────┴───────────────┴───────────┴─────────────┼─→ evaluate(tuned) ─────┼─→ gate ─→ register
      └─→ evaluate(base)    champion ─→ evaluate(champion) ─────┴────────────────────────┘
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from loraflow.execution.plan import Walker


@dataclass(frozen=True)
class Made:
    """What a walk made: refs of artifacts."""

    dataset: Any
    rows: Any
    base: Any
    tokens: Any
    adapter: Any
    merged: Any
    verified: Any
    base_scores: Any
    tuned_scores: Any
    champion_scores: Any | None


def pipeline(walk: Walker) -> Made:
    """From a pinned dataset and a base model to a merged model with its scores beside those of base and champion."""
    dataset = walk.stage("version_dataset")
    rows = walk.stage("check_dataset", dataset=dataset)
    walk.admit("rows", rows)
    base = walk.stage("resolve_base")
    tokens = walk.stage("tokenize", rows=rows, base=base)
    base_scores = walk.stage("evaluate", "evaluate base", model=base, rows=rows)
    adapter = walk.stage("train", tokens=tokens, base=base)
    probes = {"tokens": tokens} if walk.jobs.recipe.compares_merges else {}
    merged = walk.stage("merge", base=base, adapter=adapter, **probes)
    verified = walk.stage("verify", base=base, adapter=adapter, merged=merged, rows=rows)
    walk.admit("merged", verified)
    tuned_scores = walk.stage("evaluate", "evaluate tuned", model=merged, rows=rows)
    champion = walk.champion()
    champion_scores = walk.stage("evaluate", "evaluate champion", model=champion, rows=rows) if champion else None
    return Made(dataset, rows, base, tokens, adapter, merged, verified, base_scores, tuned_scores, champion_scores)
