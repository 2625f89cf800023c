"""A run: walks the DAG by running its stages, and keeps the record."""

from __future__ import annotations

import json
import logging
import subprocess
import time
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, TypeVar

from prefect import task
from prefect.cache_policies import NO_CACHE
from prefect.exceptions import Pause
from prefect.runtime import deployment, flow_run

from loraflow.adapters import verify as verification
from loraflow.config import load_recipe
from loraflow.config.load import find_recipe
from loraflow.data import check
from loraflow.execution.parent_death import end_with_parent
from loraflow.execution.plan import Jobs, explain_miss
from loraflow.failures import BadConfig, CorruptArtifact, Failure, from_os_error
from loraflow.registry.cleanup import remove_unused
from loraflow.registry.log import actor
from loraflow.stages import STAGES, code_digest
from loraflow.store import Ref, require_intact
from loraflow.tasks.events import announce_waiting
from loraflow.tasks.run_name import show_name
from loraflow.tasks.stages import call

log = logging.getLogger("loraflow")
T = TypeVar("T")
MAX_REPAIRS = 5


class Run:
    """One walk through the DAG."""

    def __init__(self, jobs: Jobs, recipe_file: Path, force: list[str]):
        self.jobs, self.recipe_file, self.force = jobs, recipe_file, set(force)
        self.id = f"{time.strftime('%Y%m%d-%H%M%S', time.gmtime())}-{uuid.uuid4().hex[:6]}"
        self.stages: dict[str, dict[str, Any]] = {}
        self.forced: set[str] = set()
        self.whole: set[str] = set()  # artifacts that were hashed in this run already
        self.started = time.time()
        self.result: dict[str, Any] | None = None

    def stage(self, name: str, label: str = "", /, **inputs: Ref) -> Ref:
        """Run a stage, or take it from the store.

        Raises:
            CorruptArtifact: an input is not what was written; it is set aside by now.
        """
        label = label or name
        job, store = self.jobs.job(name, inputs), self.jobs.store
        found = store.find(name, job.fingerprint)
        force = name in self.force and job.fingerprint not in self.forced
        hit = found is not None and not force
        started = time.monotonic()
        if hit:
            assert found is not None
            if store.manifest(found).provenance.get("code") != code_digest(name):
                log.warning(
                    "%s: cached, but made by other code of the same stage version (--force makes it again)", label
                )
        else:
            log.info("%s runs: %s", label, "--force" if force else "; ".join(explain_miss(store, job)))
            if name not in self.jobs.recipe.runtime.placement:  # a worker elsewhere hashes what it reads
                self._check_contents(inputs)
        ref = call(job, store, label, found, force=force)
        self.forced.add(job.fingerprint)
        if not hit:
            self.whole.add(ref.digest)
        self.stages[label] = {
            "stage": label,
            "state": "cached" if hit else "computed",
            "fingerprint": ref.fingerprint,
            "digest": ref.digest,
            "seconds": round(time.monotonic() - started, 3),
            "uri": store.location(ref),
        }
        return ref

    def _check_contents(self, inputs: dict[str, Ref]) -> None:
        for ref in inputs.values():
            if ref.digest not in self.whole:
                require_intact(self.jobs.store, ref)
                self.whole.add(ref.digest)

    def until_whole(self, walk: Callable[[Run], T]) -> T:
        """Walk the DAG; when an artifact turns out to be damaged, walk again: it is made anew, the rest is cached."""
        for _ in range(MAX_REPAIRS):
            try:
                return walk(self)
            except CorruptArtifact as failure:
                log.warning("%s", failure)
        raise Failure(
            f"Artifacts were damaged {MAX_REPAIRS} times in one run.",
            where=self.jobs.store.uri,
            next_step="check the disk; `loraflow verify --deep` looks at the whole store",
        )

    def admit(self, what: str, ref: Ref) -> None:
        """Stop here if a report is outside of the recipe's bounds."""
        _admit(self.jobs, what, ref)

    def champion(self) -> Ref | None:
        """Return the model in use."""
        return self.jobs.champion()

    def metrics(self, made: Any) -> dict[str, Any]:
        """Return the scores of base, tuned and champion."""
        sides = {"base": made.base_scores, "tuned": made.tuned_scores, "champion": made.champion_scores}
        return {side: self.jobs.store.manifest(ref).report["metrics"] if ref else None for side, ref in sides.items()}

    def summary(self, made: Any, decision: dict[str, Any], entry: int | None) -> dict[str, Any]:
        """Return the run as the one JSON document that `--json` prints."""
        store = self.jobs.store
        self.result = {
            "run": self.id,
            "recipe": self.jobs.recipe.name,
            "stages": list(self.stages.values()),
            "metrics": self.metrics(made),
            "decision": {"verdict": decision["verdict"], "reasons": decision["reasons"]},
            "registered": entry,
            "adapter": f"{store.location(made.adapter)}/adapter",
            "merged": store.location(made.merged),
        }
        return self.result

    def record(self, error: BaseException | None) -> None:
        """Keep what happened in the store. A store that cannot be written is told about by what failed before."""
        waits = isinstance(error, Pause)  # for a person's approval
        entry = {
            "run": self.id,
            "recipe": self.jobs.recipe.name,
            "recipe_text": self.recipe_file.read_text(encoding="utf-8"),
            "resolved": self.jobs.recipe.model_dump(by_alias=True),
            "started": self.started,
            "seconds": round(time.time() - self.started, 3),
            "actor": actor(),
            "commit": _commit(),
            "prefect_run": str(flow_run.id) if flow_run.id else None,
            "state": "done" if error is None else "waiting" if waits else "failed",
            "error": None
            if error is None or isinstance(error, Pause)
            else f"{type(error).__name__}: {error}".splitlines()[0],
            "stages": list(self.stages.values()),
            "summary": self.result,
        }
        document = json.dumps(entry, indent=1, sort_keys=True, ensure_ascii=False) + "\n"
        with suppress(OSError, Failure):
            self.jobs.store.write_document(f"runs/{self.id}.json", document.encode())


@contextmanager
def open_run(recipe: str, overrides: dict[str, Any], force: list[str]) -> Iterator[Run]:
    """Load the recipe, look at the outside world, and hold off `gc` until the run ends."""
    unknown = [name for name in force if name not in STAGES]
    if unknown:
        raise BadConfig(
            "There is no such stage.", where="--force", expected=f"one of {', '.join(STAGES)}", got=", ".join(unknown)
        )
    if deployment.id:  # in a process of its own, which a worker of Prefect would leave behind when it is killed
        end_with_parent()
        log.setLevel(logging.INFO)
    jobs = Jobs(load_recipe(recipe, overrides))
    if jobs.recipe.data.add:
        _add_data(jobs)
    run = Run(jobs, find_recipe(recipe), force)
    error: BaseException | None = None
    with _told_if_it_waits(), jobs.store.reader_lock():
        try:
            show_name(jobs)
            yield run
        except OSError as caught:
            error = caught
            raise from_os_error(caught, jobs.store.uri) or caught from caught
        except BaseException as caught:
            error = caught
            raise
        finally:
            jobs.save()
            run.record(error)
    if any(stage["state"] == "computed" for stage in run.stages.values()):
        _tidy(jobs)


@contextmanager
def _told_if_it_waits() -> Iterator[None]:
    try:
        yield
    except Pause:
        announce_waiting(flow_run.id)
        raise


def _tidy(jobs: Jobs) -> None:
    """Keep the store bounded: all but the newest merged models go, unless another run is at work."""
    try:
        for path, size, why in remove_unused(jobs.store, keep=jobs.recipe.runtime.keep):
            log.info("removed %s (%.0f MiB, %s)", path.parent.name[:12], size / 2**20, why)
    except (Failure, OSError) as error:  # it is a courtesy; `loraflow gc` says what stands in its way
        log.debug("not tidied: %s", error)


def _add_data(jobs: Jobs) -> None:
    from loraflow.data import dvc

    source = jobs.recipe.data.source
    folder = source.removesuffix(".dvc")
    place = Path(folder)
    if place.exists() and (not Path(source).exists() or dvc.tree_md5(place) != dvc.read_pin(".", source, None).md5):
        pin = dvc.add(folder, remote=jobs.recipe.data.remote)
        log.info("%s is versioned as %s", folder, pin.md5)


@task(name="admit", task_run_name="admit {what}", cache_policy=NO_CACHE, persist_result=False)
def _admit(jobs: Jobs, what: str, ref: Ref) -> None:
    manifest = jobs.store.manifest(ref)
    if what == "rows":
        check.admit(manifest.report, jobs.recipe.data.max_quarantined, f"{jobs.store.location(ref)}/report.json")
    else:
        verification.admit(manifest.report, jobs.recipe.merge.max_kl)


def _commit() -> str | None:
    try:
        done = subprocess.run(["git", "rev-parse", "HEAD"], capture_output=True, text=True)
    except OSError:  # no git here
        return None
    return done.stdout.strip() if done.returncode == 0 else None
