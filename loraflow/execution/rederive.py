"""Derive a model again from what it was made of: every hash from the dataset's pin down, and the merged weights.

Nothing is written to the store. The merge is computed by a worker process in a temporary folder and compared file by file.
"""

from __future__ import annotations

import tempfile
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

from pydantic import ValidationError

from loraflow import __version__
from loraflow.config.job_runtime import JobRuntime
from loraflow.config.locations import DvcOrigin
from loraflow.config.stage_configs import StageConfig, VersionDatasetConfig
from loraflow.data import dvc
from loraflow.data.source_files import wrong_sources
from loraflow.execution.job_file import JobFile
from loraflow.execution.start_worker import WORKER
from loraflow.execution.worker_process import run_in_worker_process
from loraflow.failures import Failure
from loraflow.job import Job
from loraflow.stages import STAGES
from loraflow.store import Manifest, Ref, Store
from loraflow.store.artifact import TELEMETRY
from loraflow.store.files import HashMemo, hash_file


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
        problems = store.verify(ref)
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
            wrong.append(f"input {name}: its digest differs from the digest that was used")
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
        yield Check(what, unknown=f"the work tree pins {pinned} by now")
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
    expected = {name: entry.sha256 for name, entry in manifest.files.items() if not name.startswith(TELEMETRY)}
    names = {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()}
    names = {name for name in names if not name.startswith(TELEMETRY)}
    for name in sorted(expected.keys() | names):
        if name not in names:
            yield f"{name}: was not written again"
        elif name not in expected:
            yield f"{name}: is not in the model"
        elif hash_file(folder / name) != expected[name]:
            yield f"{name}: its bytes differ"
