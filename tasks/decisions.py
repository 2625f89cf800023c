"""Decisions: never cached, always in the flow's process, taken against the head of the promotion log."""

from __future__ import annotations

import logging
from typing import Any

from prefect import task
from prefect.cache_policies import NO_CACHE

from loraflow import identity
from loraflow.execution.plan import Jobs
from loraflow.failures import Failure
from loraflow.registry.log import Entry, Moved, actor
from loraflow.store import Ref

log = logging.getLogger("loraflow")


@task(name="gate", task_run_name="gate", cache_policy=NO_CACHE, persist_result=False)
def gate(jobs: Jobs, made: Any) -> dict[str, Any]:
    """Decide whether the challenger takes the champion's place: promote, reject, undecided or unchanged."""
    head = jobs.seen  # the head that the walk saw, and whose champion it scored: it may be another one by now
    return {**_decide(jobs, made, head), "seen": head.hash if head else None}


def _decide(jobs: Jobs, made: Any, head: Entry | None) -> dict[str, Any]:
    if head is not None and head.merged.digest == made.merged.digest:
        return {"verdict": "unchanged", "reasons": ["the challenger is the champion"], "comparisons": []}
    why = jobs.log.rolled_back(made.merged.digest)
    if why is not None:
        reason = f"it was rolled back ({why}); `loraflow promote` brings it back by hand"
        return {"verdict": "unchanged", "reasons": [reason], "comparisons": []}
    protocol = _protocol(jobs, made)
    known = jobs.log.decision(head, made.merged.digest, protocol)
    if known is not None and known["verdict"] != "promote":
        reason = f"decided before against this champion: {known['verdict']}"
        return {"verdict": "unchanged", "reasons": [reason, *known["reasons"]], "comparisons": known["comparisons"]}
    decision = _compare(jobs, made)
    jobs.log.remember(head, made.merged.digest, protocol, decision)
    return decision


def _protocol(jobs: Jobs, made: Any) -> str:
    """Return the identity of the rules and scores that a decision is taken by."""
    scores = [ref.digest for ref in (made.base_scores, made.tuned_scores, made.champion_scores) if ref]
    return identity.fingerprint({"gate": jobs.recipe.gate.model_dump(), "scores": scores})


def overrule(jobs: Jobs, made: Any, decision: dict[str, Any]) -> None:
    """Keep a person's decision in the place of the gate's, so that a rerun finds it."""
    jobs.log.remember(jobs.seen, made.merged.digest, _protocol(jobs, made), decision)


def _compare(jobs: Jobs, made: Any) -> dict[str, Any]:
    from loraflow.evaluation.gate import decide

    rules = jobs.recipe.gate
    others = {"base": _scores(jobs, made.base_scores)}
    if made.champion_scores is not None:
        others["champion"] = _scores(jobs, made.champion_scores)
    return decide(
        _scores(jobs, made.tuned_scores),
        others,
        primary=rules.primary,
        min_gain=rules.min_gain,
        guards=rules.guards,
        confidence=rules.confidence,
        lower_is_better=rules.lower_is_better,
        seed=jobs.recipe.evaluation.seed,
    ).to_dict()


def _scores(jobs: Jobs, ref: Ref) -> Any:
    import pandas as pd

    table = pd.read_parquet(jobs.store.path(ref) / "scores.parquet")
    return table[table["set"] == "heldout"]


@task(name="register", task_run_name="register", cache_policy=NO_CACHE, persist_result=False)
def register(jobs: Jobs, made: Any, decision: dict[str, Any]) -> int | None:
    """Write a promotion into the log and return its number; nothing for any other verdict.

    When another run wrote first, this one ends without a promotion and says so: the next run compares the two.
    """
    if decision["verdict"] != "promote":
        return None
    head = jobs.log.head()
    try:
        if (head.hash if head else None) != decision["seen"]:
            raise Moved
        return jobs.log.append(
            head,
            action="promote",
            merged=made.merged,
            adapter=made.adapter,
            inputs={"dataset": jobs.dataset["md5"], "base": jobs.recipe.base.model, "recipe": jobs.recipe.name},
            reasons=decision["reasons"],
            actor=actor(),
        ).seq
    except Moved:
        decision["verdict"] = "undecided"
        decision["reasons"] = ["another run promoted a model meanwhile; run again to compare with that one"]
        log.warning("%s", decision["reasons"][0])
        return None


@task(name="publish", task_run_name="publish", cache_policy=NO_CACHE, persist_result=False)
def publish(jobs: Jobs, made: Any, summary: dict[str, Any]) -> dict[str, Any] | None:
    """Put the model on the hub if the recipe asks for it and it is the champion, once.

    A promotion stands whatever the hub says: what goes wrong is said, and the next run tries again.
    """
    from loraflow.registry.runs import RunRecord, RunSummary
    from loraflow.serving import publish as publishing
    from loraflow.serving.models import Model

    rules, head = jobs.recipe.publish, jobs.log.head()
    if rules.repo is None or head is None or head.merged.digest != made.merged.digest:
        return None
    record = RunRecord(
        run=summary["run"],
        recipe=jobs.recipe.name,
        state="running",
        resolved=jobs.recipe.model_dump(by_alias=True),
        summary=RunSummary.model_validate(summary),
    )
    store = jobs.store
    model = Model(
        jobs.log.model,
        store.path(made.merged),
        ref=made.merged,
        tuned=made.adapter,
        base=store.path(made.base),
        run=record,
    )
    done = publishing.published(store, model, rules.repo, rules.what)
    if done is not None:
        return done.model_dump()
    try:
        done = publishing.publish(store, model, rules.repo, what=rules.what, private=rules.private)
        log.info("published: %s", done.url)
        return done.model_dump()
    except Failure as failure:
        log.warning("%s is promoted, but not published. %s", jobs.log.model, failure)
        return {"repo": rules.repo, "problem": failure.what}
