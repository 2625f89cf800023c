"""Find what a store lost, and recompute what can be recomputed from the records of its runs.

A damaged artifact is in the quarantine, so that a lookup misses it. The run that computed it recorded its recipe, with all
settings: the same steps compute the same artifact again. Nothing is decided or promoted.
"""

import json
import logging
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field, replace
from pathlib import PurePosixPath

from loraflow.execution.deal import recorded_workspace
from loraflow.execution.plan import ALL_STEPS, CHAMPION, Step, find_step, inputs_of, steps_of
from loraflow.execution.runner import run_stage
from loraflow.execution.workspace import Workspace
from loraflow.failures import CorruptArtifact, Failure
from loraflow.registry.champions import missing_models
from loraflow.registry.log import PromotionLog, models
from loraflow.registry.rebuild import UNKNOWN, made_by
from loraflow.registry.runs import RunRecord, StageRun
from loraflow.store import Ref, Store
from loraflow.store.artifact import MANIFEST, QUARANTINE, Manifest, result_problems
from loraflow.store.checksum import check_document

log = logging.getLogger("loraflow")
_ORDER = {step.label: number for number, step in enumerate(ALL_STEPS)}


@dataclass(frozen=True)
class LostArtifact:
    """An artifact that is damaged or missing, and what is known about computing it again."""

    ref: Ref
    problem: str
    seconds: float | None = None  # duration of its stage
    record: RunRecord | None = None  # a run that computed it
    label: str = ""  # label of the step in that run
    model: Ref | None = None  # the model that was scored, if it is a score
    why_not: str = ""  # why it cannot be recomputed; the next step of a person


@dataclass
class StoreDamage:
    """What is damaged or missing in a store."""

    artifacts: list[LostArtifact] = field(default_factory=list)
    logs: list[CorruptArtifact] = field(default_factory=list)  # damaged promotion logs

    @property
    def repairable(self) -> list[LostArtifact]:
        """The artifacts that can be recomputed, in the order of the pipeline."""
        return [lost for lost in self.artifacts if not lost.why_not]

    @property
    def irreparable(self) -> list[LostArtifact]:
        """The artifacts that no run on record computed, or that need something that is gone."""
        return [lost for lost in self.artifacts if lost.why_not]


def find_damage(store: Store) -> StoreDamage:
    """Hash all artifacts, quarantine damaged ones, and return what is lost: also by earlier checks, runs and deletions.

    Lost are quarantined artifacts that were not recomputed since, and champions and rollback targets that are missing.
    """
    with store.reader_lock():
        for ref in store.artifacts():
            if problems := result_problems(store.verify(ref)):
                store.quarantine(ref, problems)
        damage = StoreDamage()
        found = {(lost.ref.stage, lost.ref.fingerprint): lost for lost in _quarantined(store)}
        for model in models(store, of_runs=True):
            try:
                for missing in missing_models(PromotionLog(store, model)):
                    name = (missing.ref.stage, missing.ref.fingerprint)
                    what = f"entry {missing.entry.seq} of {model}: {missing.problems[0]}"
                    found[name] = replace(
                        found.get(name, LostArtifact(missing.ref, what)), ref=missing.ref, problem=what
                    )
            except CorruptArtifact as failure:
                damage.logs.append(failure)
        described = [_described(store, lost) for lost in found.values()]
    damage.artifacts = sorted(described, key=lambda lost: _ORDER.get(lost.label, len(_ORDER)))
    return damage


def _quarantined(store: Store) -> Iterator[LostArtifact]:
    """Yield the quarantined artifacts that no lookup finds by now."""
    seen = set()
    for name in store.documents(f"{QUARANTINE}/"):
        if name.count("/") != 1 or not name.endswith(".json"):
            continue
        manifest = _manifest(store.read_document(f"{name.removesuffix('.json')}/{MANIFEST}"))
        ref, problem = _name_quarantined(store, name, manifest)
        if ref is None:
            log.warning("%s: cannot tell what to recompute; run the recipe again", problem)
            continue
        job = (ref.stage, ref.fingerprint)
        if job not in seen and store.find(*job) is None:
            seen.add(job)
            seconds, inputs = (manifest.seconds, manifest.input_refs(store.uri)) if manifest else (None, {})
            yield LostArtifact(ref, problem, seconds, model=inputs.get("model"))


def _name_quarantined(store: Store, name: str, manifest: Manifest | None) -> tuple[Ref | None, str]:
    """Return which artifact a record of the quarantine is about, and why it is there; None if nothing says which.

    If the record is damaged, the manifest beside it says which, if that is intact.
    """
    try:
        record = json.loads(check_document(name, store.read_document(name) or b""))
        stage, fingerprint, digest = PurePosixPath(record["was"]).parts[-3:]
        ref = Ref(stage=stage, fingerprint=fingerprint, digest=digest, uri=store.uri)
        return ref, "; ".join(map(str, record["problems"][:3]))
    except (ValueError, KeyError, TypeError) as error:
        return (manifest.ref(store.uri) if manifest else None), f"{name} cannot be read: {error}"


def _manifest(content: bytes | None) -> Manifest | None:
    try:
        return Manifest.parse(content) if content else None
    except ValueError:  # the manifest itself was damaged
        return None


def _described(store: Store, lost: LostArtifact) -> LostArtifact:
    """Return a lost artifact with the run that computes it again, or with the reason why none can."""
    record = made_by(store, lost.ref)
    name = (lost.ref.fingerprint, lost.ref.digest)
    runs = record.stages if record else []
    stage = next((run for run in runs if (run.fingerprint, run.digest) == name and find_step(run.stage)), None)
    if record is None or stage is None:
        return replace(lost, why_not=UNKNOWN)
    seconds = stage.seconds if lost.seconds is None and stage.state == "computed" else lost.seconds
    return replace(
        lost, seconds=seconds, record=record, label=stage.stage, why_not=_why_not(store, lost, record, stage)
    )


def _why_not(store: Store, lost: LostArtifact, record: RunRecord, stage: StageRun) -> str:
    """Return why a run's recipe does not compute a lost artifact today; an empty string if nothing is known against it."""
    try:
        workspace = recorded_workspace(store, record, store.uri)
        step = _step(workspace, stage.stage)
        inputs = _inputs(workspace, step, lost.model, compute=False)
        if inputs is None or workspace.job(step.stage, inputs, step.seed).fingerprint == lost.ref.fingerprint:
            return ""
    except (Failure, OSError) as failure:
        return " ".join(str(failure).split())
    return f"the data, the base, a metric or a stage's version has changed since run {record.run}; use a backup"


def _step(workspace: Workspace, label: str) -> Step:
    return next(step for step in steps_of(workspace.recipe) if step.label == label)


def _artifact(workspace: Workspace, step: Step, champion: Ref | None, *, compute: bool) -> Ref | None:
    """Return a step's artifact; None if it, or what it needs, is missing and is not to be computed."""
    inputs = _inputs(workspace, step, champion, compute=compute)
    if inputs is None:
        return None
    if compute:
        return run_stage(workspace, step.stage, step.seed, **inputs)
    job = workspace.job(step.stage, inputs, step.seed)
    return workspace.store.find(job.stage, job.fingerprint)


def _inputs(workspace: Workspace, step: Step, champion: Ref | None, *, compute: bool) -> dict[str, Ref] | None:
    inputs: dict[str, Ref] = {}
    for name, source in inputs_of(step, compares_merges=workspace.recipe.compares_merges).items():
        ref = (
            champion
            if source == CHAMPION
            else _artifact(workspace, _step(workspace, source), champion, compute=compute)
        )
        if ref is None:
            return None
        inputs[name] = ref
    return inputs


def recompute(store: Store, lost: LostArtifact) -> Ref:
    """Compute a lost artifact again, and whatever it needs that is missing too.

    Raises:
        Failure: the stage's own; or the result differs from the artifact that was lost.
    """
    assert lost.record is not None
    workspace = recorded_workspace(store, lost.record, store.uri)
    with store.reader_lock():
        ref = _artifact(workspace, _step(workspace, lost.label), lost.model, compute=True)
    workspace.save()
    if ref is None:
        raise Failure("The scores of an unknown champion were lost.", where=str(lost.ref), next_step="run the recipe")
    if (ref.fingerprint, ref.digest) != (lost.ref.fingerprint, lost.ref.digest):
        raise CorruptArtifact(
            f"{lost.label} was recomputed, but the result differs from the lost artifact.",
            where=store.location(ref),
            expected=str(lost.ref),
            got=str(ref),
            next_step="the machine or the versions of libraries differ from those of that run; use a backup of the store",
        )
    return ref


def total_seconds(artifacts: Iterable[LostArtifact]) -> float:
    """Return the seconds that the stages of lost artifacts took, as far as that is known."""
    return sum(lost.seconds or 0.0 for lost in artifacts)
