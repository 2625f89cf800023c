"""Derive a model again, and compare its bytes: from its artifacts (`rederive`), or by running a recorded run (`reproduce`).

Nothing is written to the store. `rederive` checks every hash from the dataset's pin down; a worker process computes the
merge in a temporary folder, and its files are compared.
"""

import tempfile
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

from pydantic import ValidationError

from loraflow import __version__, identity
from loraflow.config.job_runtime import JobRuntime
from loraflow.config.locations import DvcOrigin
from loraflow.config.stage_configs import StageConfig, VersionDatasetConfig
from loraflow.data.versions import dvc
from loraflow.data.versions.version import wrong_sources
from loraflow.execution.deal import recorded_workspace
from loraflow.execution.job_file import JobFile
from loraflow.execution.plan import CHAMPION, inputs_of, steps_of
from loraflow.execution.runner import run_stage
from loraflow.execution.start_worker import WORKER
from loraflow.execution.worker_process import run_in_worker_process
from loraflow.failures import BadConfig, Failure
from loraflow.job import Job
from loraflow.registry.runs import RunRecord, StageRun
from loraflow.serving.lineage import device_of
from loraflow.stages import STAGES
from loraflow.store import Manifest, Ref, Store
from loraflow.store.artifact import TELEMETRY, result_hashes, result_problems
from loraflow.store.files import HashMemo, files_below, hash_file


@dataclass(frozen=True)
class Check:
    """One thing that was checked. `problems` is empty if it holds; `unknown` says why it could not be checked."""

    what: str
    problems: tuple[str, ...] = ()
    unknown: str = ""


def rederive(store: Store, merged: Ref) -> Iterator[Check]:
    """Check the artifacts that a merged model was made from, from the dataset on, and merge base and adapter again.

    Each artifact is hashed byte by byte. Its name is the hash of what it was computed from, and its inputs are the artifacts
    that are checked.
    """
    chain = _chain(store, merged)
    manifests: dict[str, Manifest] = {}
    for ref in chain:
        problems = result_problems(store.verify(ref))
        if not problems:
            manifests[ref.digest] = store.manifest(ref)
            problems = _wrong_inputs(manifests[ref.digest], store, manifests)
        yield Check(f"{ref}: every byte, its name, and the names of its inputs", tuple(problems))
        if ref.stage == "version_dataset" and not problems:
            yield from _check_dataset(store, ref, manifests[ref.digest])
    if all(ref.digest in manifests for ref in chain):
        yield _merge_again(store, manifests[merged.digest])


def _chain(store: Store, merged: Ref) -> list[Ref]:
    """Return a model's artifact and all that it was made from, inputs first."""
    found: dict[str, Ref] = {}

    def add(ref: Ref) -> None:
        if ref.digest in found:
            return
        try:
            inputs = [*store.manifest(ref).input_refs(store.uri).values()]
        except Failure:  # missing or damaged, which the check of the artifact says
            inputs = []
        for source in inputs:
            add(source)
        found[ref.digest] = ref

    add(merged)
    return list(found.values())


def _wrong_inputs(manifest: Manifest, store: Store, checked: Mapping[str, Manifest]) -> list[str]:
    """Return the inputs whose digest differs from the digest that the artifact's name was computed from.

    The digests of an input's parts are those of its own manifest, which was checked before.
    """
    named = manifest.payload.get("inputs")
    used = named if isinstance(named, dict) else {}
    refs = manifest.input_refs(store.uri)
    wrong = [f"input {name}: not named in the manifest" for name in sorted(used.keys() - refs.keys())]
    for name, ref in refs.items():
        own = checked.get(ref.digest)
        if used.get(name) not in {ref.digest, *(own.facets.values() if own else ())}:
            wrong.append(f"input {name}: its digest is not the one that was used")
    return wrong


def _check_dataset(store: Store, ref: Ref, manifest: Manifest) -> Iterator[Check]:
    """Compute DVC's md5 of the dataset's files, and compare it with the recorded one and with the pin in the project."""
    config = manifest.payload["config"]
    recorded = config.get("md5") if isinstance(config, dict) else None
    files = store.path(ref) / "files"
    if isinstance(config, dict) and config.get("sources"):
        sources = VersionDatasetConfig.model_validate(config).sources
        wrong = tuple(wrong_sources(files, sources))
        yield Check(f"the files of {len(sources)} sources have their recorded md5", wrong)
        return
    is_folder = isinstance(recorded, str) and recorded.endswith(".dir")
    source = files if is_folder else next(iter(sorted(files.iterdir())), files)
    got = dvc.dvc_md5(source, HashMemo(None))
    wrong = () if got == recorded else (f"the files have md5 {got}",)
    yield Check(f"the dataset's files have the md5 that DVC pins, {recorded}", wrong)
    runtime = manifest.provenance.get("runtime")
    try:
        origin = DvcOrigin.model_validate((runtime if isinstance(runtime, dict) else {}).get("origin"))
    except ValueError:
        yield Check("the pin in git", unknown="the dataset is a folder without a .dvc file")
        return
    revision = origin.commit or origin.rev
    what = f"{origin.dvc_file} {f'at {revision} ' if revision else ''}pins this md5"
    try:
        pinned = dvc.read_pin(origin.repo, origin.dvc_file, revision).md5
    except Failure as failure:
        yield Check(what, unknown=failure.what)
        return
    if pinned == recorded:
        yield Check(what)
    elif revision is None:
        yield Check(what, unknown=f"the work tree now pins {pinned}")
    else:
        yield Check(what, (f"it pins {pinned}",))


def _merge_again(store: Store, manifest: Manifest) -> Check:
    """Merge base and adapter into a temporary folder, and compare each file with the recorded hash."""
    what = f"the merged files, computed again by loraflow {__version__}, are the same bit for bit"
    stage = STAGES[manifest.stage]
    if manifest.stage != "merge":
        return Check(what, unknown=f"the model is the result of {manifest.stage}, not of a merge")
    try:
        job = Job[StageConfig](
            stage=manifest.stage,
            version=manifest.version,
            inputs=manifest.input_refs(store.uri),
            config=manifest.payload["config"],
            runtime=JobRuntime.model_validate(manifest.provenance.get("runtime") or {}),
        )
    except ValidationError as error:
        return Check(what, unknown=f"this version does not read the settings of the merge: {error.errors()[0]['msg']}")
    with tempfile.TemporaryDirectory(prefix="loraflow-rederive-") as folder:
        out, work = Path(folder, "out"), Path(folder, "work")
        out.mkdir()
        work.mkdir()
        folders = {name: store.path(ref) for name, ref in job.inputs.items()}
        # In a process of its own, as in a run: its memory and its crash are not this process's.
        run_in_worker_process(WORKER, JobFile(job, out, folders, work), None)
        problems = list(_differences(out, manifest))
    if problems and manifest.version != stage.version:
        problems.append(f"it was merged by version {manifest.version} of the stage, this is version {stage.version}")
    return Check(what, tuple(problems))


def _differences(folder: Path, manifest: Manifest) -> Iterator[str]:
    expected = result_hashes(manifest.files)
    written = {name: hash_file(path) for name, path in files_below(folder) if not name.startswith(TELEMETRY)}
    for name in sorted(expected.keys() | written.keys()):
        if name not in written:
            yield f"{name}: was not written again"
        elif name not in expected:
            yield f"{name}: is not in the model"
        elif written[name] != expected[name]:
            yield f"{name}: its bytes differ"


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

    The run's record has its recipe with all settings; its version of the data comes from DVC. Nothing is decided or
    promoted, and the scores of the champion of that time are left out: it may have been another model.

    Args:
        store: the store with the run's record and, if they are still there, its artifacts.
        fresh: the address of a store without artifacts.

    Raises:
        BadConfig: the record has no recipe, or `fresh` has artifacts.
        Failure: a stage's own.
    """
    if not record.recipe_text:
        raise BadConfig(
            "The record of this run has no recipe, so it cannot run again.",
            where=record.run,
            next_step="run its recipe with `loraflow run`; records have the recipe since version 0.1",
        )
    workspace = recorded_workspace(store, record, fresh)
    if next(workspace.store.artifacts(), None) is not None:
        raise BadConfig(
            "The target store is not empty: its artifacts would be reused instead of recomputed.",
            where=fresh,
            next_step="name a folder that does not exist yet: --into FOLDER",
        )
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
    ref = stage.ref(store)
    try:
        before = store.manifest(ref)
    except Failure:
        reasons = ["the artifact of the run is gone from its store, so its versions and hardware are unknown"]
        if stage.fingerprint != now.fingerprint:
            reasons.append("its settings or inputs differ")
        return Reproduced(stage.stage, stage.digest, now.digest, tuple(reasons))
    devices = device_of(store, before, ref), device_of(fresh, now, now.ref(fresh.uri))
    reasons = [*identity.explain(before.payload, now.payload), *_machine(before, now, devices), *_files(before, now)]
    return Reproduced(stage.stage, stage.digest, now.digest, tuple(reasons))


def _machine(before: Manifest, now: Manifest, devices: tuple[str | None, str | None]) -> Iterator[str]:
    """Yield the versions and the hardware that differ."""
    old, new = _facts(before, devices[0]), _facts(now, devices[1])
    for name in sorted({name for name, _ in old.items() ^ new.items()}):
        yield f"{name} {old.get(name, 'not recorded')} → {new.get(name, 'not recorded')}"
    if old == new:
        yield "versions and hardware are the recorded ones"


def _facts(manifest: Manifest, device: str | None) -> dict[str, str]:
    versions = manifest.provenance.get("versions")
    machine = {name: manifest.provenance.get(name) for name in ("python", "machine")}
    found = {**(versions if isinstance(versions, dict) else {}), **machine, "device": device}
    return {name: str(value) for name, value in found.items() if value is not None}


def _files(before: Manifest, now: Manifest) -> Iterator[str]:
    changed = sorted({name for name, _ in result_hashes(before.files).items() ^ result_hashes(now.files).items()})
    yield f"files that differ: {', '.join(changed[:5])}{f' and {len(changed) - 5} more' if len(changed) > 5 else ''}"
