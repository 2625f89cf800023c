"""The gate as a task. It is never cached, and compares with the champion whose scores this run has read."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from prefect import task
from prefect.cache_policies import NO_CACHE
from pydantic import JsonValue, ValidationError

from loraflow import identity
from loraflow.evaluation.values import BehaviourResult, Decision, vocabulary_of
from loraflow.execution.workspace import PipelineResult, Workspace
from loraflow.failures import BadData
from loraflow.registry.budget import error_of_period, gains_to_follow, has_followers
from loraflow.registry.champions import require_champion_intact
from loraflow.registry.log import actor
from loraflow.registry.looks import Look, row_key
from loraflow.store import Ref, read_intact, read_table, require_unchanged
from loraflow.tasks.guards import (
    heldout_scores,
    read_field_values,
    read_general_guards,
    read_unscored_parts,
    require_general_comparable,
)

if TYPE_CHECKING:
    import pandas as pd

    from loraflow.evaluation.guards import GeneralGuard, SliceGuard


@task(name="gate", task_run_name="gate", cache_policy=NO_CACHE, persist_result=False)
def gate(workspace: Workspace, result: PipelineResult) -> Decision:
    """Decide whether the challenger replaces the champion: promote, reject, undecided or unchanged.

    Raises:
        CorruptArtifact: scores, or the files of the champion, are damaged; they are quarantined by now.
    """
    head, merged = workspace.seen_head, result.merged.digest  # another run may have promoted since; `register` checks
    if head is not None:  # in use: a change of its files must not wait for the next user
        is_challenger = head.merged.digest == merged
        challenger_files = [result.merged, result.adapter] if is_challenger else []
        for ref in challenger_files:  # this run recomputes damaged ones
            require_unchanged(workspace.store, ref, workspace.memo)
        if any(ref is not None and ref not in challenger_files for ref in (head.merged, head.adapter)):
            require_champion_intact(workspace.store, head, workspace.memo)
        if is_challenger:
            return Decision.unchanged("the challenger is the champion")
    why = workspace.log.rollback_reason(merged)
    if why is not None:
        return Decision.unchanged(f"it was rolled back ({why}); `loraflow promote` promotes it again by hand")
    protocol = _protocol(workspace, result)
    known = _decided_before(workspace, merged, protocol)
    if known is not None and known.verdict != "promote":
        against = "" if head is None else " against this champion"
        return Decision.unchanged(f"decided before{against}: {known.verdict}", known)
    decision = _compare(workspace, result, protocol)
    workspace.log.write_decision(head, merged, protocol, decision.to_dict())
    return decision


def _decided_before(workspace: Workspace, merged: str, protocol: str) -> Decision | None:
    """Return the stored decision about these models under these rules; None if there is none that can be read."""
    stored = workspace.log.read_decision(workspace.seen_head, merged, protocol)
    try:
        return Decision.from_dict(stored) if stored is not None else None
    except ValidationError:  # written by another version: the models are compared again, in the same look
        return None


def record_decision(workspace: Workspace, result: PipelineResult, decision: Decision) -> None:
    """Record a person's decision in place of the gate's, so that a rerun finds it."""
    protocol = _protocol(workspace, result)
    workspace.log.write_decision(workspace.seen_head, result.merged.digest, protocol, decision.to_dict())


def _protocol(workspace: Workspace, result: PipelineResult) -> str:
    """Return the identity of the rules and scores that a decision is taken by."""
    scores = [ref.digest for ref in (result.base_scores, result.tuned_scores, result.champion_scores) if ref]
    scores += [further.scores.digest for further in result.further_seeds]
    scores += [ref.digest for ref in result.general.values()] if workspace.recipe.gate.forgetting else []
    rules = workspace.recipe.gate.model_dump()
    # Decisions of earlier versions, which did not have these, stay valid.
    for name in ("worst", "behaviour", "slices", "forgetting", "ranges", "independent_rows"):
        if not rules[name]:
            del rules[name]
    if rules["seeds"] == 1:
        del rules["seeds"]
    for check in rules.get("behaviour", {}).values():
        if check["consistent"] is None:
            del check["consistent"]
    if rules.get("slices"):
        from loraflow.evaluation.guards import partition_of

        # Another value of a row's field is another rule, although no score changed.
        rules["partition"] = partition_of(_slice_guards(workspace, result))
        unscored = _unscored_parts(workspace, result)
        rules |= {"unscored": unscored} if unscored else {}
    return identity.fingerprint({"gate": rules, "scores": scores})


def _slice_guards(workspace: Workspace, result: PipelineResult) -> list[SliceGuard]:
    """Return the guards of gate.slices, for the parts of the rows that were scored."""
    from loraflow.evaluation.gate import require_comparable
    from loraflow.evaluation.guards import slice_guards

    rules = workspace.recipe.gate.slices
    if not rules:
        return []
    table = heldout_scores(workspace, result.tuned_scores)
    require_comparable(table, {}, ())
    return slice_guards(table, rules, read_field_values(workspace, result))


def _unscored_parts(workspace: Workspace, result: PipelineResult) -> list[str]:
    return read_unscored_parts(workspace, result, set(heldout_scores(workspace, result.tuned_scores)["id"]))


@dataclass(frozen=True)
class _Tables:
    """The score tables of a comparison, with the rules that need rows."""

    registered: pd.DataFrame  # of the model that would be registered: that of the first seed
    challenger: pd.DataFrame  # the mean over gate.seeds
    others: dict[str, pd.DataFrame]  # of the base and the champion
    parts: list[SliceGuard]
    general: list[GeneralGuard]
    behaviour: tuple[BehaviourResult, ...]
    unscored: list[str]


def _compare(workspace: Workspace, result: PipelineResult, protocol: str) -> Decision:
    """Spend a look at the held-out rows, then compare. A crash in between loses the look, and grants none.

    A comparison that cannot promote, because of its numbers of rows, spends none.
    """
    from loraflow.evaluation.guards import why_not_promoted

    tables = _comparable_tables(workspace, result)
    obstacles = why_not_promoted(tables.challenger, tables.parts, tables.general, tables.unscored)
    look = None if obstacles else _take_look(workspace, result, protocol, tables.challenger)
    decision = _decide(workspace, result, tables, look)
    if look is None:
        return replace(decision, budget=f"No look was used: it could not promote ({'; '.join(obstacles)}).")
    looks = workspace.looks.entries()
    is_free = not (workspace.recipe.gate.independent_rows or has_followers(looks, look))
    budget = _budget(look, len(tables.challenger), error_of_period(looks, look), is_free=is_free)
    return replace(decision, look=look.seq, budget=budget)


def _comparable_tables(workspace: Workspace, result: PipelineResult) -> _Tables:
    """Read all tables, and refuse those that cannot be compared, before a look is spent."""
    from loraflow.evaluation.gate import require_comparable

    rules = workspace.recipe.gate
    _require_one_protocol(workspace, result)
    registered = heldout_scores(workspace, result.tuned_scores)
    challenger = _mean_over_seeds(workspace, result, registered)
    others = {"base": heldout_scores(workspace, result.base_scores)}
    if result.champion_scores is not None:
        others["champion"] = heldout_scores(workspace, result.champion_scores)
    parts = _slice_guards(workspace, result)
    named = {rules.primary, *rules.guards, *rules.worst, *rules.lower_is_better, *(guard.metric for guard in parts)}
    require_comparable(challenger, others, named | rules.ranges.keys(), rules.score_ranges)
    general = read_general_guards(workspace, result)
    require_general_comparable(general)
    behaviour = _check_behaviour(workspace, result)  # refuses a set without rows
    return _Tables(registered, challenger, others, parts, general, behaviour, _unscored_parts(workspace, result))


def _decide(workspace: Workspace, result: PipelineResult, tables: _Tables, look: Look | None) -> Decision:
    """Compare the means of scores, then apply the rules that can only prevent a promotion."""
    from loraflow.evaluation.behaviour import WorseLimit, find_worse, with_behaviour, with_worse_rows
    from loraflow.evaluation.gate import decide
    from loraflow.evaluation.seeds import with_seeds

    rules = workspace.recipe.gate
    decision = decide(
        tables.challenger,
        tables.others,
        primary=rules.primary,
        min_gain=rules.min_gain,
        guards=rules.guards,
        confidence=rules.confidence,
        lower_is_better=rules.lower_is_better,
        level=None if look is None else look.level,
        look="" if look is None else str(look),
        vocabulary=_vocabulary(workspace, result.base_scores),
        ranges=rules.score_ranges,
        parts=tables.parts,
        general=tables.general,
    )
    if result.further_seeds:
        decision = with_seeds(
            decision,
            tables.registered,
            tables.others,
            seeds=workspace.recipe.seeds,
            primary=rules.primary,
            min_gain=rules.min_gain,
            guards=rules.guards,
            lower_is_better=rules.lower_is_better,
            parts=tables.parts,
        )
    decision = decision.with_unscored(tables.unscored)
    limits = {metric: WorseLimit(rule.drop, rule.rows, rule.share) for metric, rule in rules.worst.items()}
    worse = find_worse(tables.registered, tables.others, limits, rules.lower_is_better)
    return with_behaviour(with_worse_rows(decision, worse), tables.behaviour)


def _require_one_protocol(workspace: Workspace, result: PipelineResult) -> None:
    """Refuse scores that were computed with other settings or on other rows than the challenger's.

    A run scores all models in the same way, so this finds scores that were put in its place by hand.
    """
    further = {f"seed {seed_result.seed}": seed_result.scores for seed_result in result.further_seeds}
    others = {"base": result.base_scores, "champion": result.champion_scores, **further}
    _require_scored_alike(workspace, result.tuned_scores, others, "evaluate")
    if "tuned" in result.general:
        general = {f"{name} on general rows": ref for name, ref in result.general.items()}
        _require_scored_alike(workspace, result.general["tuned"], general, "score_general")


def _require_scored_alike(workspace: Workspace, tuned: Ref, others: Mapping[str, Ref | None], stage: str) -> None:
    expected = _scored_how(workspace, tuned)
    for name, ref in others.items():
        found = expected if ref is None else _scored_how(workspace, ref)
        differs = sorted(key for key in expected.keys() | found.keys() if expected.get(key) != found.get(key))
        if differs:
            raise BadData(
                "The challenger and the other model were scored in different ways.",
                where=f"scores of {name}",
                expected=f"{differs[0]}: {expected.get(differs[0])}",
                got=f"{differs[0]}: {found.get(differs[0])}",
                next_step=f"score them again with one protocol: `loraflow run RECIPE --force {stage}`",
            )


def _mean_over_seeds(workspace: Workspace, result: PipelineResult, registered: pd.DataFrame) -> pd.DataFrame:
    """Return the mean of each row's scores over the models of gate.seeds."""
    from loraflow.evaluation.seeds import mean_scores

    further = {seed_result.seed: heldout_scores(workspace, seed_result.scores) for seed_result in result.further_seeds}
    return mean_scores({workspace.recipe.training_config.seed: registered, **further})


def _scored_how(workspace: Workspace, ref: Ref) -> dict[str, JsonValue]:
    """Return version, settings and rows of an evaluation: its payload without the model."""
    payload = workspace.store.manifest(ref).payload
    flat: dict[str, JsonValue] = {"version": payload["version"]}
    for part in ("config", "inputs"):
        values = payload[part]
        if isinstance(values, dict):
            flat.update({f"{part} {key}": value for key, value in values.items() if key != "model"})
    return flat


def _check_behaviour(workspace: Workspace, result: PipelineResult) -> tuple[BehaviourResult, ...]:
    """Check the answers to all sets of rows by gate.behaviour."""
    from loraflow.evaluation.behaviour import BehaviourRule, check_behaviour

    checks = workspace.recipe.gate.behaviour
    if not checks:
        return ()
    refs = {"base": result.base_scores, "champion": result.champion_scores}
    others = {name: read_table(workspace.store, ref) for name, ref in refs.items() if ref is not None}
    rules = {name: BehaviourRule(**check.model_dump()) for name, check in checks.items()}
    return check_behaviour(read_table(workspace.store, result.tuned_scores), others, rules)


def _budget(look: Look, rows: int, error: float, *, is_free: bool) -> str:
    """Return for people which look it was, what is left, how many of the rows were new, and the error of all looks."""
    fresh = "" if look.fresh is None else f", of which {look.fresh} were never scored before"
    near = (
        f" Its level includes an extra {look.following:.2g}, because an earlier look almost confirmed a gain."
        if look.following
        else ""
    )
    lowered = f" gate.error was {error:g} at an earlier look, and is {look.error:g} now." if error > look.error else ""
    holds = ", whatever its held-out rows" if is_free else ", if each run's new rows are independent of earlier ones"
    return (
        f"{str(look).capitalize()}, {look.left} left, at {rows} held-out rows{fresh}: at most {100 * error:.4g}% for any "
        f"false promotion in {look.horizon} looks of this model{holds}.{near}{lowered}"
    )


def _take_look(workspace: Workspace, result: PipelineResult, protocol: str, table: pd.DataFrame) -> Look:
    head, rules = workspace.seen_head, workspace.recipe.gate
    key = identity.fingerprint(
        {"head": head.hash if head else None, "merged": result.merged.digest, "protocol": protocol}
    )
    groups = table["group"].dropna() if "group" in table else ()
    return workspace.looks.take(
        key,
        challenger=result.merged.digest,
        rows={row_key(prompt) for prompt in table["prompt" if "prompt" in table else "id"]},
        error=rules.error,
        horizon=rules.looks,
        promotions=workspace.log.entries(),
        actor=actor(),
        nearly=gains_to_follow(workspace.log, workspace.looks.entries(), groups, independent=rules.independent_rows),
    )


def _vocabulary(workspace: Workspace, base_scores: Ref) -> int | None:
    """Return the number of tokens that the base's config names; None if it names none."""
    store = workspace.store
    base = store.manifest(base_scores).input_refs(store.uri).get("model")
    return vocabulary_of(read_intact(store, base, "config.json")) if base else None
