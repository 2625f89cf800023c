"""What a run will do: for each step, whether it is cached or runs, and why. Imports no prefect; torch for `base_report`."""

from __future__ import annotations

import logging
import math
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from pydantic import JsonValue

from loraflow import identity
from loraflow.config import Recipe
from loraflow.config.locations import FolderOrigin
from loraflow.data.tokens.positions import Positions
from loraflow.evaluation.values import LARGEST_VOCABULARY
from loraflow.evaluation.values import vocabulary_of as vocabulary_in
from loraflow.execution.cache import OTHER_CODE, known_changes, look_up
from loraflow.execution.deal import checked_rows, group_sizes, preview_heldout, rows_of_a_look
from loraflow.execution.workspace import Workspace
from loraflow.failures import CorruptArtifact, Failure
from loraflow.registry.budget import gains_to_follow
from loraflow.stages import (
    CHECK_DATASET,
    CHECK_GENERAL,
    DEAL_ROWS,
    EVALUATE,
    MERGE,
    RESOLVE_BASE,
    SCORE_GENERAL,
    TOKENIZE,
    TRAIN,
    VERIFY,
    VERSION_DATASET,
    Stage,
)
from loraflow.store import LocalStore, Ref, Store

if TYPE_CHECKING:
    from loraflow.evaluation.power import GatePower


log = logging.getLogger("loraflow")


@dataclass(frozen=True)
class Step:
    """A stage in the pipeline. `inputs` names the steps that its inputs come from."""

    label: str
    stage: Stage
    inputs: Mapping[str, str] = field(default_factory=dict)
    seed: int | None = None  # training seed, if it is not the recipe's own


CHAMPION = "champion"  # an input that no step computes: the model in use

# The steps of `flows/pipeline.py`, for code that must not import prefect. A test compares the two.
STEPS = (
    Step("version_dataset", VERSION_DATASET),
    Step("check_dataset", CHECK_DATASET, {"dataset": "version_dataset"}),
    Step("resolve_base", RESOLVE_BASE),
    Step("tokenize", TOKENIZE, {"rows": "check_dataset", "base": "resolve_base"}),
    Step("evaluate base", EVALUATE, {"model": "resolve_base", "rows": "check_dataset"}),
    Step("train", TRAIN, {"tokens": "tokenize", "base": "resolve_base"}),
    Step("merge", MERGE, {"base": "resolve_base", "adapter": "train", "tokens": "tokenize"}),
    Step("verify", VERIFY, {"base": "resolve_base", "adapter": "train", "merged": "merge", "rows": "check_dataset"}),
    Step("evaluate tuned", EVALUATE, {"model": "merge", "rows": "check_dataset"}),
    Step("evaluate champion", EVALUATE, {"model": CHAMPION, "rows": "check_dataset"}),
)


_OF_SEED = re.compile(r"(train|merge|verify|evaluate) seed (\d+)")
_DEAL = Step(DEAL_ROWS.name, DEAL_ROWS, {"rows": "check_dataset"})
_CHECK_GENERAL = Step("check_general", CHECK_GENERAL, {"rows": "check_dataset"})
_GENERAL_BASE, *_GENERAL_OTHERS = (
    Step(f"score_general {name}", SCORE_GENERAL, {"model": model, "general": "check_general"})
    for name, model in (("base", "resolve_base"), ("tuned", "merge"), ("champion", CHAMPION))
)
# The steps of any recipe but those of further seeds, in the order of the pipeline.
ALL_STEPS = (*STEPS[:2], _CHECK_GENERAL, *STEPS[2:5], _GENERAL_BASE, *STEPS[5:], _DEAL, *_GENERAL_OTHERS)


def steps_of(recipe: Recipe) -> tuple[Step, ...]:
    """Return the steps of a recipe's pipeline.

    With gate.seeds, there is a training for each further seed before the champion's scores. With data.heldout_reserve, all
    models are scored on rows that are dealt. With evaluation.general, general rows are read after the dataset. The base
    is scored on them before the training, tuned model and champion at the end.
    """
    steps = _without_general(recipe)
    if not recipe.scores_general:
        return steps
    at = next(number for number, step in enumerate(steps) if step.stage == TRAIN)
    return (*steps[:2], _CHECK_GENERAL, *steps[2:at], _GENERAL_BASE, *steps[at:], *_GENERAL_OTHERS)


def _without_general(recipe: Recipe) -> tuple[Step, ...]:
    further = [step for seed in recipe.seeds[1:] for step in _steps_of_seed(seed)]
    steps = [*STEPS[:-1], *further, STEPS[-1]]
    if not recipe.deals_rows:
        return tuple(steps)
    base = next(step for step in steps if step.label == "evaluate base")
    steps.remove(base)
    at = next(number for number, step in enumerate(steps) if step.stage == EVALUATE)
    return tuple(
        replace(step, inputs={**step.inputs, "rows": DEAL_ROWS.name}) if step.stage == EVALUATE else step
        for step in (*steps[:at], _DEAL, base, *steps[at:])
    )


def find_step(label: str) -> Step | None:
    """Return the step with a label, of any recipe; None if there is none."""
    match = _OF_SEED.fullmatch(label)
    steps = ALL_STEPS if match is None else _steps_of_seed(int(match[2]))
    return next((step for step in steps if step.label == label), None)


def _steps_of_seed(seed: int) -> tuple[Step, ...]:
    """Return the steps of `train_seed` in `flows/pipeline.py`."""
    adapter, merged = f"train seed {seed}", f"merge seed {seed}"
    inputs = {"base": "resolve_base", "adapter": adapter, "merged": merged, "rows": "check_dataset"}
    return (
        Step(adapter, TRAIN, {"tokens": "tokenize", "base": "resolve_base"}, seed),
        Step(merged, MERGE, {"base": "resolve_base", "adapter": adapter, "tokens": "tokenize"}),
        Step(f"verify seed {seed}", VERIFY, inputs),
        Step(f"evaluate seed {seed}", EVALUATE, {"model": merged, "rows": "check_dataset"}),
    )


def steps_to(label: str) -> tuple[Step, ...]:
    """Return a step and all that it takes its inputs from, in the order of the pipeline."""
    labels = {label}
    for step in reversed(STEPS):
        if step.label in labels:
            labels |= set(step.inputs.values())
    return tuple(step for step in STEPS if step.label in labels)


def inputs_of(step: Step, *, compares_merges: bool) -> dict[str, str]:
    """Return the inputs that a step takes in a run: merge reads tokens only to compare two ways of merging."""
    optional = () if compares_merges else [name for name, given in step.stage.inputs.items() if given.optional]
    return {name: source for name, source in step.inputs.items() if name not in optional}


@dataclass
class PlannedStep:
    """What will happen to a step, and why."""

    label: str
    stage: str
    status: Literal["cached", "runs", "depends"]
    why: list[str] = field(default_factory=list)
    fingerprint: str | None = None
    seconds: float | None = None  # duration of the step when it was computed, or the last time

    def to_json(self) -> dict[str, JsonValue]:
        """Return the step as `loraflow plan --json` prints it, with the status under its recorded key `verdict`."""
        values = asdict(self)
        return {"verdict" if name == "status" else name: value for name, value in values.items()}


def plan(workspace: Workspace, force: Iterable[str] = (), steps: Sequence[Step] = ()) -> list[PlannedStep]:
    """Return what a recipe's run would do, step by step. Reports are not checked: only a run does that.

    Args:
        steps: the steps to plan, with the steps that they read from; by default the recipe's whole pipeline.
    """
    planned: list[PlannedStep] = []
    artifacts: dict[str, Ref | None] = {}  # each step's artifact; None if the step has to run first
    for step in steps or steps_of(workspace.recipe):
        inputs = inputs_of(step, compares_merges=workspace.recipe.compares_merges)
        if CHAMPION in inputs.values():
            try:
                champion = workspace.champion()
            except Failure as failure:
                planned.append(PlannedStep(step.label, step.stage.name, "runs", [f"will fail: {failure.what}"]))
                continue
            if champion is None:
                continue
            artifacts[CHAMPION] = champion
        refs = {name: artifacts[source] for name, source in inputs.items()}
        if step.stage == DEAL_ROWS:
            deal, artifacts[step.label] = _plan_deal(workspace, step, refs["rows"], artifacts["merge"], force)
            planned.append(deal)
            continue
        planned_step, artifacts[step.label] = _plan_step(workspace, step, inputs, refs, forced=step.stage.name in force)
        planned.append(planned_step)
    return planned


def _plan_deal(
    workspace: Workspace, step: Step, rows: Ref | None, merged: Ref | None, force: Iterable[str]
) -> tuple[PlannedStep, Ref | None]:
    """Plan deal_rows: which rows it writes depends on the model, and on what other models were scored on."""
    label, name = step.label, step.stage.name
    if rows is None:
        return PlannedStep(label, name, "runs", ["deals rows when check_dataset is done"]), None
    try:
        dealt = preview_heldout(workspace, rows, merged)
    except Failure as failure:
        return PlannedStep(label, name, "runs", [f"will fail: {failure.what}"]), None
    what = f"{dealt.rows} rows"
    if not dealt.is_new:
        planned, ref = _plan_step(workspace, step, {"rows": "check_dataset"}, {"rows": rows}, forced=name in force)
        planned.why.append(f"nothing to deal: the model already has its {what}")
        return planned, ref
    kind = "that were never scored" if dealt.state.is_fresh else "that were scored before: the reserve is used up"
    if merged is None:
        why = f"deals {what} {kind}, unless the model has its rows already"
        return PlannedStep(label, name, "depends", [why]), None
    return PlannedStep(label, name, "runs", [f"deals {what} {kind}"]), None


def _plan_step(
    workspace: Workspace, step: Step, sources: Mapping[str, str], refs: Mapping[str, Ref | None], *, forced: bool
) -> tuple[PlannedStep, Ref | None]:
    name = step.stage.name
    waiting = [sources[key] for key, ref in refs.items() if ref is None]
    if waiting:
        last_time = _seconds_last_time(workspace, name)
        certain = ["--force"] if forced else _certain_changes(workspace, step, refs)
        if certain:  # the step runs, whatever its inputs are
            return PlannedStep(step.label, name, "runs", certain, seconds=last_time), None
        first, last = ", ".join(waiting[:-1]), waiting[-1]
        names, its = (f"{first} and {last}", "their") if first else (last, "its")
        reason = f"depends on {names}: reused if {its} output does not change"
        return PlannedStep(step.label, name, "depends", [reason], seconds=last_time), None
    job = workspace.job(step.stage, {key: ref for key, ref in refs.items() if ref is not None}, step.seed)
    found = look_up(workspace.store, job, force=forced)
    if found.ref is None:
        seconds = _seconds_last_time(workspace, name)
        return PlannedStep(step.label, name, "runs", found.why(), job.fingerprint, seconds), None
    seconds = workspace.store.manifest(found.ref).seconds
    why = [OTHER_CODE] if found.by_other_code() else []
    return PlannedStep(step.label, name, "cached", why, job.fingerprint, seconds), found.ref


def _certain_changes(workspace: Workspace, step: Step, refs: Mapping[str, Ref | None]) -> list[str]:
    """Return what differs from every artifact of the stage, beside the inputs that are not computed yet."""
    stage, recipe = step.stage, workspace.recipe if step.seed is None else workspace.recipe.with_seed(step.seed)
    parts = {name: given.part for name, given in stage.inputs.items()}
    inputs = {name: ref.identity(parts[name]) for name, ref in refs.items() if ref is not None}
    config = stage.config.from_recipe(recipe, workspace).identity()
    known = identity.payload(stage.name, stage.version, inputs, config)
    return known_changes(workspace.store, known, [name for name, ref in refs.items() if ref is None])


def _seconds_last_time(workspace: Workspace, stage: str) -> float | None:
    newest = workspace.store.newest(stage)
    return newest.seconds if newest else None


def too_few_positions(workspace: Workspace) -> str:
    """Return a sentence if rows of max_length are longer than the base allows; empty if not, or if that is not known."""
    config, max_length = base_config(workspace), workspace.recipe.training_config.max_length
    positions = Positions.of_folder(config.parent) if config else Positions(None)
    limit = positions.limit
    if limit is None or max_length <= limit:
        return ""
    return (
        f"training_config.max_length is {max_length}, but rows of more than {limit} tokens are refused: the base has no "
        "more positions"
    )


def gate_power(workspace: Workspace) -> GatePower | None:
    """Return what the gate can show with the held-out rows; None if they are not in the store yet."""
    from loraflow.evaluation.power import gate_power as power_of

    recipe = workspace.recipe
    rows = checked_rows(workspace)
    compared = rows_of_a_look(workspace, rows) if rows else []
    if not compared:
        return None
    keys, groups = {key for key, _ in compared}, {row.group for _, row in compared}
    gate = recipe.gate
    number, level = workspace.looks.preview(
        keys,
        error=gate.error,
        horizon=gate.looks,
        promotions=workspace.log.entries(),
        nearly=gains_to_follow(workspace.log, workspace.looks.entries(), groups, independent=gate.independent_rows),
    )
    return power_of(
        group_sizes([row for _, row in compared]),
        look=f"look {number} of {gate.looks}",
        level=level,
        primary=gate.primary,
        min_gain=gate.min_gain,
        guards=gate.guards,
        confidence=gate.confidence,
        largest_loss=math.log(vocabulary_of(workspace)),
        ranges=gate.score_ranges,
    )


def vocabulary_of(workspace: Workspace) -> int:
    """Return the number of tokens of the base, or the largest that is assumed if it is not known."""
    config = base_config(workspace)
    return vocabulary_in(config.read_bytes() if config else None) or LARGEST_VOCABULARY


def base_config(workspace: Workspace) -> Path | None:
    """Return the base's config.json: from its artifact in a local store, or from the folder that it is taken from.

    A damaged one of the store is not used: the run that is planned recomputes the artifact.
    """
    store, origin = workspace.store, workspace.base.origin
    ref = look_up(store, workspace.job(RESOLVE_BASE, {})).ref
    folders = [store.path(ref)] if ref is not None and _has_intact_config(store, ref) else []
    if isinstance(origin, FolderOrigin):
        folders.append(Path(origin.folder))
    return next((folder / "config.json" for folder in folders if (folder / "config.json").exists()), None)


def _has_intact_config(store: Store, ref: Ref) -> bool:
    """Tell whether a local store has the config.json that a base was committed with. Its content is hashed."""
    if not isinstance(store, LocalStore):
        return False
    try:
        store.read(ref, "config.json")
    except CorruptArtifact as failure:
        log.warning("the base's config.json is damaged, so it is not used: %s", failure.where)
        return False
    return True


def base_report(workspace: Workspace) -> list[str]:
    """Return what the recipe's base is trained with, and which of its modules are adapted, a line each.

    Its model is built without weights, which imports torch. Empty if the base's config is not on this machine, or if
    the base needs code of its own.

    Raises:
        BadConfig: the recipe's peft_config names modules that the base does not have, or that cannot be trained; or the
            base's architecture does not allow packed rows or the quantization.
        BadModel: the base cannot be trained.
    """
    from loraflow.base.usable import refuse_unusable_folder

    recipe, config = workspace.recipe, base_config(workspace)
    if config is None or recipe.base.trust_remote_code:
        return []
    refuse_unusable_folder(config.parent, trust=False, known_to_transformers=True)
    # Before the base is repacked, it has other modules than training sees.
    if recipe.base.repack and look_up(workspace.store, workspace.job(RESOLVE_BASE, {})).ref is None:
        return []
    from loraflow.training.preview import preview

    return preview(config.parent, recipe)
