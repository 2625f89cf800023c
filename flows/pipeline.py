"""The pipeline: from a pinned dataset and a base model to a merged model, scored beside the base and the champion.

version_dataset ─→ check_dataset ─→ tokenize ─→ train ─→ merge ─→ verify, evaluate tuned

Beside this chain, tokenize, train, merge, verify and "evaluate base" read the output of resolve_base; verify also reads the
adapter, and verify and evaluate the held-out rows of check_dataset. The gate compares the scores of base, tuned model and
champion.

With data.heldout_reserve, deal_rows follows verify: it writes the held-out rows that all three models are scored on. With
evaluation.general, check_general reads general rows, and score_general scores the base on them before the training, and the
other two models at the end. With `gate.seeds`, the chain from train on is repeated for each further seed, without general
rows: only the model of the recipe's own seed can be registered.

STEPS and `steps_of` in `loraflow/execution/plan.py` are the same steps for `loraflow plan`, which does not import prefect.
If you change one, change the other: a test compares them.
"""

from __future__ import annotations

from loraflow.execution.deal import deal_heldout
from loraflow.execution.plan_notes import warn_of_other_tokens
from loraflow.execution.workspace import PipelineResult, SeedResult
from loraflow.store import Ref
from loraflow.tasks.run import Run
from loraflow.tasks.stages import (
    check_dataset,
    check_general,
    check_general_rows,
    check_merge,
    check_rows,
    deal_rows,
    evaluate,
    merge,
    resolve_base,
    score_general,
    tokenize,
    train,
    verify,
    version_dataset,
)


def pipeline(run: Run) -> PipelineResult:
    """Run all stages, one after another. A stage whose artifact is in the store is a cache hit."""
    dataset = version_dataset(run)
    rows = check_dataset(run, dataset=dataset)
    check_rows(run.workspace, rows)
    general = read_general_rows(run, rows)
    base = resolve_base(run)
    tokens = tokenize(run, rows=rows, base=base)
    deals = run.workspace.recipe.deals_rows  # then all models are scored on rows that the new model is dealt
    base_scores = None if deals else evaluate(run, model=base, rows=rows, label="evaluate base")
    general_scores = score_on_general_rows(run, general, base=base)
    warn_of_other_tokens(run.workspace)
    adapter = train(run, tokens=tokens, base=base)
    merge_tokens = tokens if run.workspace.recipe.compares_merges else None
    merged = merge(run, base=base, adapter=adapter, tokens=merge_tokens)
    verified = verify(run, base=base, adapter=adapter, merged=merged, rows=rows)
    check_merge(run.workspace, verified)
    scored_rows = rows
    if deals:
        deal_heldout(run.workspace, rows, merged)
        scored_rows = deal_rows(run, rows=rows)
    if base_scores is None:
        base_scores = evaluate(run, model=base, rows=scored_rows, label="evaluate base")
    tuned_scores = evaluate(run, model=merged, rows=scored_rows, label="evaluate tuned")
    further = [
        train_seed(run, seed, tokens=tokens, base=base, rows=rows, scored_rows=scored_rows, merge_tokens=merge_tokens)
        for seed in run.workspace.recipe.seeds[1:]
    ]
    champion = run.workspace.champion()
    champion_scores = evaluate(run, model=champion, rows=scored_rows, label="evaluate champion") if champion else None
    return PipelineResult(
        dataset=dataset,
        rows=rows,
        base=base,
        tokens=tokens,
        adapter=adapter,
        merged=merged,
        verified=verified,
        base_scores=base_scores,
        tuned_scores=tuned_scores,
        champion_scores=champion_scores,
        further_seeds=tuple(further),
        general={**general_scores, **score_on_general_rows(run, general, tuned=merged, champion=champion)},
    )


def read_general_rows(run: Run, rows: Ref) -> Ref | None:
    """Return the general rows, which must be no training rows; None if the recipe names none."""
    if not run.workspace.recipe.scores_general:
        return None
    general = check_general(run, rows=rows)
    check_general_rows(run.workspace, general)
    return general


def score_on_general_rows(run: Run, general: Ref | None, **models: Ref | None) -> dict[str, Ref]:
    """Return the scores of models by name (base, tuned, champion), without models that do not exist."""
    if general is None:
        return {}
    return {
        name: score_general(run, model=model, general=general, label=f"score_general {name}")
        for name, model in models.items()
        if model is not None
    }


def train_seed(
    run: Run, seed: int, *, tokens: Ref, base: Ref, rows: Ref, scored_rows: Ref, merge_tokens: Ref | None
) -> SeedResult:
    """Run the stages from the training to the scores with another training seed.

    The stages before the training are those of the recipe's own seed.

    Args:
        scored_rows: the held-out rows that the models are scored on.
        merge_tokens: see `merge`.
    """
    adapter = train(run, tokens=tokens, base=base, label=f"train seed {seed}", seed=seed)
    merged = merge(run, base=base, adapter=adapter, tokens=merge_tokens, label=f"merge seed {seed}")
    verified = verify(run, base=base, adapter=adapter, merged=merged, rows=rows, label=f"verify seed {seed}")
    check_merge(run.workspace, verified)
    scores = evaluate(run, model=merged, rows=scored_rows, label=f"evaluate seed {seed}")
    return SeedResult(seed=seed, adapter=adapter, merged=merged, scores=scores)
