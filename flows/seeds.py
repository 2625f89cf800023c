"""Train, merge, verify and score the models of the further seeds of `gate.seeds`.

They share every stage before the training with the model of the recipe's own seed. Each stage is an artifact of its own, so
an interrupted run continues with the seed where it stopped.
"""

from __future__ import annotations

from loraflow.execution.results import SeedResult
from loraflow.store import Ref
from loraflow.tasks.limits import check_merge
from loraflow.tasks.run import Run
from loraflow.tasks.stages import evaluate, merge, train, verify


def train_seed(
    run: Run, seed: int, *, tokens: Ref, base: Ref, rows: Ref, scored: Ref, probes: Ref | None
) -> SeedResult:
    """Run the stages from the training to the scores with another training seed. `scored`: the rows that are scored."""
    adapter = train(run, tokens=tokens, base=base, label=f"train seed {seed}", seed=seed)
    merged = merge(run, base=base, adapter=adapter, tokens=probes, label=f"merge seed {seed}")
    verified = verify(run, base=base, adapter=adapter, merged=merged, rows=rows, label=f"verify seed {seed}")
    check_merge(run.workspace, verified)
    scores = evaluate(run, model=merged, rows=scored, label=f"evaluate seed {seed}")
    return SeedResult(seed=seed, adapter=adapter, merged=merged, scores=scores)
