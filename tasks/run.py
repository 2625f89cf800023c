"""One run of a flow: its workspace, the stages that it went through, and its record in the store."""

from __future__ import annotations

import logging
import time
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TypeVar

from prefect.exceptions import Pause
from prefect.runtime import deployment, flow_run
from pydantic import JsonValue

from loraflow.config import load_recipe
from loraflow.config.load import find_recipe
from loraflow.config.stage_configs import StageConfig
from loraflow.data import dvc
from loraflow.data.git import head_commit
from loraflow.evaluation.values import EvaluationReport, ModelScores
from loraflow.execution.cache import OTHER_CODE, Lookup, look_up
from loraflow.execution.parent_death import end_with_parent
from loraflow.execution.results import PipelineResult, Registration
from loraflow.execution.workspace import Workspace
from loraflow.failures import CorruptArtifact, Failure, from_os_error
from loraflow.job import Job
from loraflow.registry.cleanup import remove_unused
from loraflow.registry.log import actor
from loraflow.registry.runs import Publication, RecordedDecision, RunRecord, RunState, RunSummary, StageRun
from loraflow.stages import Stage, check_names
from loraflow.store import Ref, require_intact
from loraflow.tasks.compute import compute_here
from loraflow.tasks.events import announce_waiting
from loraflow.tasks.placement import compute_on_pool
from loraflow.tasks.run_name import show_name

log = logging.getLogger("loraflow")
T = TypeVar("T")
MAX_REPAIRS = 5


class Run:
    """A run of a flow. Its stages run one after another, on the main thread: the termination signal is raised there."""

    def __init__(self, workspace: Workspace, recipe_file: Path, force: list[str]):
        self.workspace, self.force = workspace, set(force)
        self.recipe_text = recipe_file.read_text(encoding="utf-8")
        self.id = f"{time.strftime('%Y%m%d-%H%M%S', time.gmtime())}-{uuid.uuid4().hex[:6]}"
        self.stages: dict[str, StageRun] = {}  # by label
        self.started = time.time()
        self.summary: RunSummary | None = None
        self.hits: dict[str, Lookup] = {}  # cache hits, by fingerprint
        self._forced: set[str] = set()  # fingerprints that --force has recomputed
        self._intact: set[str] = set()  # digests of artifacts that were hashed, or written, in this run

    def compute(self, stage: Stage, label: str = "", /, **inputs: Ref) -> Ref:
        """Return a stage's artifact: from the store, or computed here or on another work pool. Called inside its task.

        Raises:
            CorruptArtifact: an input is damaged; it is quarantined by now.
            Failure: the stage's own.
        """
        label, store, started = label or stage.name, self.workspace.store, time.monotonic()
        job = self.workspace.job(stage, inputs)
        force = stage.name in self.force and job.fingerprint not in self._forced
        found = look_up(store, job, force=force)
        ref = found.ref
        if ref is None:
            log.info("%s runs: %s", label, "; ".join(found.why()))
            ref = self._compute(job, label, force=force)
            self._forced.add(job.fingerprint)
            self._intact.add(ref.digest)
            self.hits.pop(job.fingerprint, None)
        else:
            self.hits[job.fingerprint] = found
            if found.by_other_code():
                log.warning("%s: cached, but %s", label, OTHER_CODE)
        self.stages[label] = StageRun(
            stage=label,
            state="cached" if found.ref else "computed",
            fingerprint=ref.fingerprint,
            digest=ref.digest,
            seconds=round(time.monotonic() - started, 3),
            uri=store.location(ref),
        )
        return ref

    def _compute(self, job: Job[StageConfig], label: str, *, force: bool) -> Ref:
        store, pool = self.workspace.store, job.pool
        if pool is not None:  # the worker there hashes the inputs that it reads
            return compute_on_pool(job, store, label, pool, force=force)
        for ref in job.inputs.values():
            if ref.digest not in self._intact:
                require_intact(store, ref)
                self._intact.add(ref.digest)
        return compute_here(job, store, label, force=force)

    def until_intact(self, walk: Callable[[Run], T]) -> T:
        """Walk the pipeline. When an artifact turns out to be damaged, walk again: it is recomputed, the rest is cached."""
        for _ in range(MAX_REPAIRS):
            try:
                return walk(self)
            except CorruptArtifact as failure:
                log.warning("%s", failure)
        raise Failure(
            f"Artifacts were damaged {MAX_REPAIRS} times in one run.",
            where=self.workspace.store.uri,
            next_step="check the disk; `loraflow verify --deep` checks the whole store",
        )

    def scores(self, result: PipelineResult) -> ModelScores:
        """Return the scores of base, tuned and champion."""
        champion = result.champion_scores
        return ModelScores(
            self.evaluation(result.base_scores).metrics,
            self.evaluation(result.tuned_scores).metrics,
            self.evaluation(champion).metrics if champion else None,
        )

    def evaluation(self, scores: Ref) -> EvaluationReport:
        """Return the report of an evaluation."""
        return EvaluationReport.from_dict(self.workspace.store.manifest(scores).report)

    def summarize(self, result: PipelineResult, registration: Registration) -> RunSummary:
        """Return the run as the one JSON document that `--json` prints, and keep it for the record."""
        store, decision = self.workspace.store, registration.decision
        self.summary = RunSummary(
            run=self.id,
            recipe=self.workspace.recipe.name,
            stages=list(self.stages.values()),
            metrics=dict(vars(self.scores(result))),
            decision=RecordedDecision(verdict=decision.verdict, reasons=list(decision.reasons)),
            registered=registration.entry,
            adapter=f"{store.location(result.adapter)}/adapter",
            merged=store.location(result.merged),
        )
        return self.summary

    def keep_summary(self, published: Publication | None) -> RunSummary:
        """Return the summary with the upload to the hub in it, and keep it for the record."""
        assert self.summary is not None
        self.summary = self.summary.model_copy(update={"published": published})
        return self.summary

    def as_record(self, state: RunState = "running", error: str | None = None) -> RunRecord:
        """Return the run's record as it is now."""
        return RunRecord(
            run=self.id,
            recipe=self.workspace.recipe.name,
            recipe_text=self.recipe_text,
            resolved=self.workspace.recipe.model_dump(by_alias=True, mode="json"),
            started=self.started,
            seconds=round(time.time() - self.started, 3),
            actor=actor(),
            commit=head_commit(Path.cwd()),
            prefect_run=str(flow_run.id) if flow_run.id else None,
            state=state,
            error=error,
            stages=list(self.stages.values()),
            summary=self.summary,
        )

    def write_record(self, error: BaseException | None) -> None:
        """Write the run's record. A store that cannot be written to is reported by the failure that came before."""
        if error is None:
            record = self.as_record("done")
        elif isinstance(error, Pause):  # for a person's approval
            record = self.as_record("waiting")
        else:
            record = self.as_record("failed", f"{type(error).__name__}: {error}".splitlines()[0])
        with suppress(OSError, Failure):
            self.workspace.store.write_document(f"runs/{self.id}.json", record.document)


@contextmanager
def open_run(recipe: str, overrides: dict[str, JsonValue], force: list[str]) -> Iterator[Run]:
    """Load the recipe, look at dataset and base, and keep `gc` from removing anything until the run ends."""
    check_names(force, "--force")
    if deployment.id:  # a process of its own, which a killed Prefect worker would leave behind
        end_with_parent()
        log.setLevel(logging.INFO)
    workspace = Workspace(load_recipe(recipe, overrides))
    if workspace.recipe.data.add:
        _add_data(workspace)
    run = Run(workspace, find_recipe(recipe), force)
    error: BaseException | None = None
    with _announced_if_waiting(), workspace.store.reader_lock():
        try:
            show_name(workspace)
            yield run
        except OSError as caught:
            error = caught
            raise from_os_error(caught, workspace.store.uri) or caught from caught
        except BaseException as caught:
            error = caught
            raise
        finally:
            workspace.save()
            run.write_record(error)
    if any(stage.state == "computed" for stage in run.stages.values()):
        _clean_up(workspace)


@contextmanager
def _announced_if_waiting() -> Iterator[None]:
    try:
        yield
    except Pause:
        announce_waiting(str(flow_run.id))
        raise


def _clean_up(workspace: Workspace) -> None:
    """Remove all but the newest merged models, unless another run is reading the store."""
    try:
        for path, size, why in remove_unused(workspace.store, keep=workspace.recipe.runtime.keep):
            log.info("removed %s (%.0f MiB, %s)", path.parent.name[:12], size / 2**20, why)
    except (Failure, OSError) as error:  # the run is done; `loraflow gc` shows what is in the way
        log.debug("not cleaned up: %s", error)


def _add_data(workspace: Workspace) -> None:
    """Version the dataset's folder if it differs from its pin (data.add)."""
    data = workspace.recipe.data
    folder = data.source.removesuffix(".dvc")
    if not Path(folder).exists():
        return
    if not Path(data.source).exists() or dvc.dvc_md5(Path(folder)) != dvc.read_pin(".", data.source, None).md5:
        pin = dvc.add(folder, remote=data.remote)
        log.info("%s is versioned as %s", folder, pin.md5)
