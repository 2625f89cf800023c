"""One run of a flow: find the artifact of each stage in the store, or run the stage."""

from __future__ import annotations

import logging
import time
import uuid
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

import httpx
from prefect.client.orchestration import get_client
from prefect.context import FlowRunContext
from prefect.exceptions import Pause, PrefectHTTPStatusError, TerminationSignal
from prefect.runtime import deployment, flow_run
from pydantic import JsonValue

from loraflow import identity
from loraflow.config import Recipe
from loraflow.config.load import RecipeFile, read_recipe
from loraflow.credentials import mask, mask_json, protect_output
from loraflow.data.checks.check_report import DataDrift
from loraflow.data.versions import dvc
from loraflow.execution.cache import OTHER_CODE, Lookup, look_up
from loraflow.execution.launcher import run_job
from loraflow.execution.parent_death import end_with_parent
from loraflow.execution.workspace import Workspace
from loraflow.failures import BudgetSpent, DamagedLog, Failure, Preempted, from_os_error, mask_errors
from loraflow.registry.cleanup import remove_unused
from loraflow.registry.runs import RunRecord, RunSummary, StageRun
from loraflow.registry.sweeps import SweepRecord
from loraflow.stages import STAGES, Stage, check_names
from loraflow.store import Ref, Store, require_intact
from loraflow.tasks.continuation import schedule_continuation, schedule_continuation_after_signal
from loraflow.tasks.events import ProgressArtifact, announce_waiting
from loraflow.tasks.failure_log import shorten_failures
from loraflow.tasks.gpu_lease import gpu_lease
from loraflow.tasks.placement import run_on_pool
from loraflow.tasks.run_record import write_record
from loraflow.tracking import mirror
from loraflow.tracking.git_tags import tag_log

log = logging.getLogger("loraflow")


@dataclass(frozen=True)
class StageResult:
    """The artifact of a stage, and what the store had for its job before the stage ran."""

    ref: Ref
    lookup: Lookup

    @property
    def is_cached(self) -> bool:
        """Whether the artifact was in the store."""
        return self.lookup.ref is not None


class Run:
    """A run of a flow. Its stages run one after another on the main thread, which receives the termination signal."""

    def __init__(self, workspace: Workspace, recipe_file: RecipeFile, force: list[str]):
        self.workspace, self.recipe_file, self.force = workspace, recipe_file, set(force)
        self.id = f"{time.strftime('%Y%m%d-%H%M%S', time.gmtime())}-{uuid.uuid4().hex[:6]}"
        self.stages: dict[str, StageRun] = {}  # by label
        self.started = time.time()
        self.summary: RunSummary | None = None
        self.sweep: SweepRecord | None = None  # the trials, in a sweep
        self.recompute: set[str] = set()  # fingerprints whose artifacts lack something that this run needs
        self.drift: DataDrift | None = None  # of the training rows since the champion; only retrain measures it
        self.is_deployed = False  # whether a deployment started it; set once, because Prefect asks the server each time
        self._forced: set[str] = set()  # fingerprints that --force has recomputed
        self._verified_digests: set[str] = set()  # artifacts that this run hashed or wrote

    def find_or_run(self, stage: Stage, label: str = "", seed: int | None = None, /, **inputs: Ref) -> StageResult:
        """Find a stage's artifact in the store, or run the stage. Call it inside the stage's task.

        Args:
            label: the stage's name in this run, if it runs several times.
            seed: the training seed, if it is not the recipe's own.

        Raises:
            CorruptArtifact: an input is damaged; it is quarantined by now.
            Failure: the stage failed.
        """
        label, store, started = label or stage.name, self.workspace.store, time.monotonic()
        job = self.workspace.job(stage, inputs, seed)
        force = stage.name in self.force or job.fingerprint in self.recompute
        force = force and job.fingerprint not in self._forced
        lookup = look_up(store, job, force=force)
        ref = lookup.ref
        if ref is None:
            log.info("%s runs: %s", label, "; ".join(lookup.why()))
            if job.pool is not None:  # the worker there hashes the inputs that it reads
                ref = run_on_pool(job, store, label, job.pool, force=force)
            if ref is None:
                for source in job.inputs.values():
                    if source.digest not in self._verified_digests:
                        require_intact(store, source)
                        self._verified_digests.add(source.digest)
                show = ProgressArtifact(label).show_figures
                with gpu_lease(job):
                    ref = run_job(job, store, show, force=force, run_started=self.started)
            self._forced.add(job.fingerprint)
            self._verified_digests.add(ref.digest)
        elif lookup.by_other_code():
            log.warning("%s: cached, but %s", label, OTHER_CODE)
        result = StageResult(ref, lookup)
        earlier = self.stages.get(label)
        if earlier is None or earlier.digest != ref.digest or not result.is_cached:  # else this run has computed it
            self.stages[label] = StageRun(
                stage=label,
                state="cached" if result.is_cached else "computed",
                fingerprint=ref.fingerprint,
                digest=ref.digest,
                seconds=round(time.monotonic() - started, 3),
                uri=store.location(ref),
            )
        return result

    @property
    def computed(self) -> list[str]:
        """The labels of the stages that this run computed, rather than finding them in the cache."""
        return [stage.stage for stage in self.stages.values() if stage.state == "computed"]


@contextmanager
def open_run(
    recipe: str,
    overrides: dict[str, JsonValue],
    force: list[str],
    find_settings: Callable[[Recipe], Mapping[str, JsonValue]] | None = None,
    *,
    rename: bool = True,
) -> Iterator[Run]:
    """Load the recipe, hold the store's reader lock so that `gc` removes nothing, and write the run's record at the end.

    The recipe's file is read once. `find_settings` returns further overrides of its `data` section; if it fails, the run
    has a record that says so.
    """
    shorten_failures()
    check_names(force, "--force")
    protect_output()
    is_deployed = _has_deployment()
    if is_deployed:  # a process of its own, which a killed Prefect worker would leave behind
        end_with_parent()
        log.setLevel(logging.INFO)
    mask_parameters({"recipe": recipe, **overrides})
    recipe_file = _retry_system_error(lambda: read_recipe(recipe, overrides))
    run = Run(Workspace(recipe_file.recipe), recipe_file, force)
    run.is_deployed = is_deployed
    store = run.workspace.store
    error: BaseException | None = None
    with mask_errors(), _announce_suspension(), store.reader_lock():
        try:
            if find_settings is not None:
                found = find_settings(recipe_file.recipe)
                run.recipe_file = recipe_file.with_overrides({**overrides, **found})
                run.workspace = Workspace(run.recipe_file.recipe)
            if run.workspace.recipe.data.add:
                _add_data(run.workspace)
            if rename:
                _retry_system_error(lambda: show_name(run.workspace))
            yield run
        except BaseException as caught:
            error = caught
            if is_deployed and isinstance(caught, BudgetSpent):
                schedule_continuation(caught, run.computed)
            elif is_deployed and isinstance(caught, TerminationSignal) and run.workspace.recipe.runtime.preemptible:
                schedule_continuation_after_signal(run.computed)
            elif isinstance(caught, OSError):
                raise from_os_error(caught, store.uri) or caught from caught
            raise
        finally:
            run.workspace.save()
            mirror_run(run, write_record(run, error), error)
    if run.computed:
        _clean_up(run.workspace)


def _has_deployment() -> bool:
    """Return whether a deployment started this run. Prefect asks the server, which a run of a command does not need."""
    context = FlowRunContext.get()
    run = context.flow_run if context else None
    is_called = run is not None and run.deployment_id is None and run.parent_task_run_id is None
    return not is_called and bool(deployment.id)


T = TypeVar("T")


def _retry_system_error(step: Callable[[], T]) -> T:
    """Run a step that is not in a task; after a SystemError, run it once more (see `is_retryable` for tasks)."""
    try:
        return step()
    except SystemError as error:
        log.warning("trying again after an error of the Python interpreter: %s", error)
        return step()


@contextmanager
def _announce_suspension() -> Iterator[None]:
    try:
        yield
    except Pause:
        announce_waiting(str(flow_run.id))
        raise


def _clean_up(workspace: Workspace) -> None:
    """Clean up the store as `loraflow gc` does, unless another run is using it."""
    try:
        bounds, seeds = workspace.recipe.runtime, workspace.recipe.gate.seeds
        keep = bounds.keep if seeds == 1 else max(bounds.keep, seeds + 1)  # else the next run would merge them again
        for path, size, why in remove_unused(workspace.store, keep=keep, keep_champions=bounds.keep_champions):
            log.info("removed %s (%.0f MiB, %s)", path.parent.name[:12], size / 2**20, why)
    except DamagedLog as failure:  # another model's log is damaged: the store grows until a person resolves it
        log.warning("the store was not cleaned up: %s", failure)
    except (Failure, OSError) as error:  # the run is done; `loraflow gc` shows what prevents it
        log.debug("the store was not cleaned up: %s", error)


def _add_data(workspace: Workspace) -> None:
    """Version the dataset's folder if it differs from its pin (data.add)."""
    data = workspace.recipe.data
    folder = data.source.removesuffix(".dvc")
    if not Path(folder).exists():
        return
    if not Path(data.source).exists() or dvc.work_tree_md5(Path(folder)) != dvc.read_pin(".", data.source, None).md5:
        pin = dvc.add(folder, remote=data.remote)
        log.info("%s is versioned as %s", folder, pin.md5)


def mirror_run(run: Run, record: RunRecord, error: BaseException | None) -> None:
    """Mirror a run that has ended. A run that was asked to end leaves that to the next one.

    Nothing that happens here changes the run's outcome: its record and the promotion log are written by now.
    """
    store: Store = run.workspace.store
    try:
        if isinstance(error, Preempted) or (error is not None and not isinstance(error, Exception)):
            mirror.postpone(store, record)
        else:
            mirror.mirror_run(store, record)
    except Exception as problem:  # a mistake in the mirror must not fail a run that is done
        mirror.warn_of_mistake(problem)
    if error is None and record.model is not None and record.summary is not None and record.summary.registered:
        tag_log(store, record.model)


SHOWN_CHARACTERS = 8  # of the dataset's md5 and of the fingerprint


def run_name() -> str:
    """Return the name of a run before its recipe is read: the recipe's file name."""
    return Path(mask(flow_run.parameters["recipe"])).stem


def mask_parameters(given: Mapping[str, JsonValue]) -> None:
    """Mask credentials in the run's parameters on the server, such as a URL with a password that was typed into the form.

    This process still has them. A retry, or the same run after an approval, is a new process and has not.
    """
    if not flow_run.id or all(mask_json(value) == value for value in given.values()):
        return
    try:
        with get_client(sync_client=True) as client:
            run = client.read_flow_run(flow_run.id)  # type: ignore[arg-type]
            masked = {name: mask_json(value) for name, value in run.parameters.items()}
            client.update_flow_run(run.id, parameters=masked).raise_for_status()
        log.warning(
            "credentials in the run's parameters are masked on Prefect's server; a retry of this run does not have them. "
            "Set up a git credential helper on the worker instead."
        )
    except (httpx.HTTPError, PrefectHTTPStatusError) as error:
        log.warning("credentials in the run's parameters could not be masked on Prefect's server: %s", error)


def full_name(workspace: Workspace) -> str:
    """Return recipe, md5 of the dataset, and a fingerprint over what every stage takes from the recipe."""
    configs = {name: stage.config.from_recipe(workspace.recipe, workspace) for name, stage in STAGES.items()}
    slices = {name: config.identity() for name, config in configs.items() if config.identity()}
    md5 = workspace.dataset.md5
    whole = identity.fingerprint({"dataset": md5, "stages": slices})
    return f"{workspace.recipe.name} {md5[:SHOWN_CHARACTERS]} {whole[:SHOWN_CHARACTERS]}"


def show_name(workspace: Workspace) -> None:
    """Give the run its full name. If the server refuses it, the run keeps its name and continues."""
    name = full_name(workspace)
    if not flow_run.id:
        return
    try:
        with get_client(sync_client=True) as client:
            client.update_flow_run(flow_run.id, name=name)  # type: ignore[arg-type]
    except (httpx.HTTPError, PrefectHTTPStatusError) as error:
        log.warning("the run could not be renamed: %s", error)
