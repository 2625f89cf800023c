"""Run a recorded run again, in a fresh store, and say stage by stage whether the results are the same bytes.

The run's record has its recipe with all settings; its version of the data comes from DVC. Nothing is decided or promoted,
and the scores of the champion of that time are left out: it may have been another model.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

from loraflow import identity
from loraflow.config.load import parse_recipe
from loraflow.execution.deal import use_dealt_rows
from loraflow.execution.plan import CHAMPION, inputs_of, steps_of
from loraflow.execution.runner import run_stage
from loraflow.execution.workspace import Workspace
from loraflow.failures import BadConfig, Failure
from loraflow.registry.rebuild import revision_of
from loraflow.registry.runs import RunRecord, StageRun
from loraflow.serving.lineage import device_of
from loraflow.stages import DEAL_ROWS, MERGE
from loraflow.store import Manifest, Ref, Store

_MACHINE = ("python", "machine")  # keys of a manifest's provenance


@dataclass(frozen=True)
class Reproduced:
    """A stage that ran again."""

    label: str
    expected: str  # digest in the run's record
    got: str
    reasons: tuple[str, ...] = ()  # what differs: settings, versions, hardware

    @property
    def is_same(self) -> bool:
        """Whether the results are the same bytes."""
        return self.expected == self.got


def reproduce(store: Store, record: RunRecord, fresh: str) -> Iterator[Reproduced]:
    """Compute the stages of a run again in another store, in their order.

    Args:
        store: the store with the run's record and, if they are still there, its artifacts.
        record: the run's record.
        fresh: the address of a store without artifacts.

    Raises:
        BadConfig: the record has no recipe, or `fresh` has artifacts.
        Failure: a stage's own.
    """
    if not record.recipe_text:
        raise BadConfig(
            "The record of this run has no recipe, so it cannot run again.",
            where=record.run,
            next_step="run its recipe with `loraflow run`; records since version 0.1 have it",
        )
    settings = {**record.overrides, **revision_of(store, record), "runtime.store": fresh}
    name = f"the recipe of run {record.run}"
    workspace = Workspace(parse_recipe(record.recipe_text, name=name, overrides=settings, is_recorded=True))
    if next(workspace.store.artifacts(), None) is not None:
        raise BadConfig(
            "The target store already has artifacts, which would be reused instead of recomputed.",
            where=fresh,
            next_step="name a folder that does not exist yet: --into FOLDER",
        )
    merged = record.stage(MERGE.name)
    if merged is not None:
        use_dealt_rows(workspace, store, merged.digest, record.stage(DEAL_ROWS.name))
    done: dict[str, Ref] = {}
    with workspace.store.reader_lock():
        for step in steps_of(workspace.recipe):
            sources = inputs_of(step, compares_merges=workspace.recipe.compares_merges)
            if CHAMPION in sources.values():
                continue
            done[step.label] = run_stage(
                workspace, step.stage, step.seed, **{name: done[source] for name, source in sources.items()}
            )
            stage = record.stage(step.label)
            if stage is not None:
                yield _compared(store, stage, workspace.store, workspace.store.manifest(done[step.label]))


def _compared(store: Store, stage: StageRun, fresh: Store, now: Manifest) -> Reproduced:
    if stage.digest == now.digest:
        return Reproduced(stage.stage, stage.digest, now.digest)
    ref = Ref(stage=now.stage, fingerprint=stage.fingerprint, digest=stage.digest, uri=store.uri)
    try:
        before = store.manifest(ref)
    except Failure:
        reasons = ["the artifact of the run is gone from its store, so its versions and hardware are not known"]
        if stage.fingerprint != now.fingerprint:
            reasons.append("its settings or inputs differ")
        return Reproduced(stage.stage, stage.digest, now.digest, tuple(reasons))
    devices = device_of(store, before, ref), device_of(fresh, now, now.ref(fresh.uri))
    reasons = [*identity.explain(before.payload, now.payload), *_machine(before, now, devices), *_files(before, now)]
    return Reproduced(stage.stage, stage.digest, now.digest, tuple(reasons))


def _machine(before: Manifest, now: Manifest, devices: tuple[str | None, str | None]) -> Iterator[str]:
    """Yield the versions and the hardware that differ."""
    old, new = _facts(before, devices[0]), _facts(now, devices[1])
    same = True
    for name in sorted(old.keys() | new.keys()):
        if old.get(name) != new.get(name):
            same = False
            yield f"{name} {old.get(name, 'not recorded')} → {new.get(name, 'not recorded')}"
    if same:
        yield "versions and hardware are the recorded ones"


def _facts(manifest: Manifest, device: str | None) -> dict[str, str]:
    versions = manifest.provenance.get("versions")
    found = {name: str(value) for name, value in (versions if isinstance(versions, Mapping) else {}).items()}
    for name in _MACHINE:
        if manifest.provenance.get(name) is not None:
            found[name] = str(manifest.provenance[name])
    return found if device is None else {**found, "device": device}


def _files(before: Manifest, now: Manifest) -> Iterator[str]:
    changed = [
        name
        for name in sorted(before.files.keys() | now.files.keys())
        if not name.startswith("telemetry/")
        and (name not in before.files or name not in now.files or before.files[name].sha256 != now.files[name].sha256)
    ]
    yield f"files that differ: {', '.join(changed[:5])}{f' and {len(changed) - 5} more' if len(changed) > 5 else ''}"
