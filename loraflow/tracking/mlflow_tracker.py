"""A tracker that talks to MLflow. Imported only when there is something to send: MLflow takes seconds to import."""

from __future__ import annotations

import json
import logging
import os
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TypeVar

from loraflow.credentials import MASK, mask, reveal
from loraflow.failures import Network, first_line
from loraflow.tracking.tracker import RunContent, TrackedRun, Tracking, missing_extra

RUN_TAG, COMPLETE_TAG, DIGEST_TAG = "loraflow.run", "loraflow.complete", "loraflow.digest"
TABLES_TAG = "mlflow.loggedArtifacts"  # names the files that MLflow's page shows as tables
ALIAS = "champion"
LIMIT_SECONDS = 90.0  # duration of one synchronisation: a slow server must not hold up a run
PARAMS, METRICS, TAGS = 100, 1000, 100  # MLflow's limits of one request
MAX_TAG = 5000  # characters
# MLflow waits 120 s for an answer and tries again seven times, if these are not set.
PATIENCE = {"MLFLOW_HTTP_REQUEST_TIMEOUT": "15", "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "1"}
QUIET = {
    "MLFLOW_DISABLE_TELEMETRY": "true",
    "MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR": "false",
    "MLFLOW_LOGGING_LEVEL": "ERROR",
    "MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT": "true",  # stdout is for loraflow's results, such as those of --json
}

for _name, _value in {**PATIENCE, **QUIET}.items():
    os.environ.setdefault(_name, _value)
from mlflow import MlflowClient  # noqa: E402  the variables above are read at its import
from mlflow.entities import Metric, Param, RunTag, ViewType  # noqa: E402
from mlflow.exceptions import MlflowException  # noqa: E402

for _name in ("mlflow", "alembic", "urllib3.connectionpool"):  # failures are reported here, once
    logging.getLogger(_name).setLevel(logging.ERROR)

T = TypeVar("T")


class MlflowTracker:
    """The experiment and the registered model of one MLflow server or database.

    Each method can be repeated after a failure: what was done already stays the same.

    Raises:
        Network: it does not answer, or refuses.
    """

    def __init__(self, tracking: Tracking):
        self._tracking = tracking
        self._end = time.monotonic() + LIMIT_SECONDS
        # Run records have the address without its password; MLflow reads that from MLFLOW_TRACKING_USERNAME and _PASSWORD.
        uri = reveal(tracking.uri).replace(f"{MASK}@", "")
        with self._reported():
            self._client = MlflowClient(tracking_uri=uri, registry_uri=uri)
            self._experiment = self._find_experiment(uri)

    def _find_experiment(self, uri: str) -> str:
        name = self._tracking.experiment
        found = self._client.get_experiment_by_name(name)
        if found is not None:
            return str(found.experiment_id)
        return str(self._client.create_experiment(name, artifact_location=_artifact_folder(uri)))

    def find_runs(self) -> dict[str, TrackedRun]:
        """Return the runs of the experiment, by loraflow's id. Of two with the same id, the complete one."""
        found: dict[str, TrackedRun] = {}
        token: str | None = None
        while True:
            with self._reported():
                page = self._client.search_runs(
                    [self._experiment], run_view_type=ViewType.ACTIVE_ONLY, max_results=1000, page_token=token
                )
            for run in page:
                name, complete = run.data.tags.get(RUN_TAG), COMPLETE_TAG in run.data.tags
                if name is not None and (name not in found or complete):
                    found[name] = TrackedRun(run.info.run_id, complete)
            token = page.token
            if not token:
                return found

    def start_run(self, content: RunContent) -> TrackedRun:
        """Create a run."""
        with self._reported():
            run = self._client.create_run(
                self._experiment,
                start_time=_milliseconds(content.started),
                tags={RUN_TAG: content.run, "loraflow.recipe": content.recipe},
                run_name=f"{content.recipe} {content.run}",
            )
        return TrackedRun(str(run.info.run_id), False)

    def write_run(self, run: TrackedRun, content: RunContent) -> None:
        """Write parameters, metrics, tags, files and tables. The times are the run's, so that repeating changes nothing."""
        moment = _milliseconds(content.ended)
        params = [Param(name, value) for name, value in content.params.items()]
        metrics = [Metric(point.name, point.value, moment, point.step) for point in content.points]
        tags = [RunTag(name, value[:MAX_TAG]) for name, value in content.tags.items()]
        for kind, values, most in (("params", params, PARAMS), ("metrics", metrics, METRICS), ("tags", tags, TAGS)):
            for some in _batches(values, most):
                with self._reported():
                    self._client.log_batch(run.id, **{kind: some})
        self._write_files(run, content)
        if content.tables:
            shown = [{"path": name, "type": "table"} for name in content.tables]
            with self._reported():
                self._client.set_tag(run.id, TABLES_TAG, json.dumps(shown))

    def _write_files(self, run: TrackedRun, content: RunContent) -> None:
        with tempfile.TemporaryDirectory() as folder:
            # MlflowClient.log_table would add the rows a second time, if an interrupted run is sent again.
            tables = {name: _table(columns) for name, columns in content.tables.items()}
            for name, data in {**content.files, **tables}.items():
                path = Path(folder, name)
                path.parent.mkdir(parents=True, exist_ok=True)
                path.write_bytes(data)
            with self._reported():
                self._client.log_artifacts(run.id, folder)

    def finish_run(self, run: TrackedRun, content: RunContent) -> None:
        """Set the run's state and end, and mark it as complete."""
        with self._reported():
            self._client.set_terminated(
                run.id, "FINISHED" if content.state == "done" else "FAILED", end_time=_milliseconds(content.ended)
            )
        with self._reported():
            self._client.set_tag(run.id, COMPLETE_TAG, "true")

    def find_versions(self) -> dict[str, str]:
        """Return the versions of the model; the first one of each digest."""
        found: dict[str, int] = {}
        token: str | None = None
        while True:
            with self._reported():
                page = self._client.search_model_versions(f"name = '{self._tracking.model}'", 1000, page_token=token)
            for version in page:
                digest, number = version.tags.get(DIGEST_TAG), int(version.version)
                if digest is not None:
                    found[digest] = min(number, found.get(digest, number))
            token = page.token
            if not token:
                return {digest: str(number) for digest, number in found.items()}

    def create_version(self, digest: str, run: TrackedRun, tags: Mapping[str, str], description: str) -> str:
        """Register a model of a run. Its source is the run's folder `model`, which names the weights' location.

        A server refuses any other folder of a disk as a source.
        """
        self._require_model()
        with self._reported():
            source = f"{self._client.get_run(run.id).info.artifact_uri}/model"
            version = self._client.create_model_version(
                self._tracking.model,
                source,
                run_id=run.id,
                tags={DIGEST_TAG: digest, **{name: mask(value)[:MAX_TAG] for name, value in tags.items()}},
                description=mask(description)[:MAX_TAG],
            )
        return str(version.version)

    def _require_model(self) -> None:
        with self._reported():
            try:
                self._client.get_registered_model(self._tracking.model)
            except MlflowException as error:
                if error.error_code != "RESOURCE_DOES_NOT_EXIST":
                    raise
                self._client.create_registered_model(self._tracking.model)

    def champion(self) -> str | None:
        """Return the version that the alias champion names; None if there is no such alias."""
        with self._reported():
            aliases = self._client.get_registered_model(self._tracking.model).aliases
        found = aliases.get(ALIAS)
        return None if found is None else str(found)

    def set_champion(self, version: str) -> None:
        """Move the alias champion, in one request."""
        with self._reported():
            self._client.set_registered_model_alias(self._tracking.model, ALIAS, version)

    @contextmanager
    def _reported(self) -> Iterator[None]:
        """Turn an error into a Network or MissingExtra failure, and stop if all requests together take too long."""
        if time.monotonic() > self._end:
            raise self._failure(f"not finished after {LIMIT_SECONDS:.0f} s")
        try:
            yield
        except ImportError as error:  # MLflow imports SQLAlchemy and alembic only when it opens a database
            raise missing_extra(str(error)) from error
        # MLflow raises its own errors, those of requests, urllib3 and SQLAlchemy, and OSError: there is no common class.
        except Exception as error:
            raise self._failure(first_line(error)) from error

    def _failure(self, got: str) -> Network:
        return Network(
            "MLflow did not answer, or refused a request.",
            where=self._tracking.uri,
            got=got,
            next_step="`loraflow mlflow sync` sends what is missing; "
            "a password is read from MLFLOW_TRACKING_USERNAME and MLFLOW_TRACKING_PASSWORD",
        )


def _artifact_folder(uri: str) -> str | None:
    """Return the folder beside an SQLite file; None where the server decides. MLflow's default is the current folder."""
    if not uri.startswith("sqlite:///"):
        return None
    return str(Path(uri.removeprefix("sqlite:///")).absolute().parent / "mlartifacts")


def _table(columns: Mapping[str, Sequence[object]]) -> bytes:
    """Return a table as MLflow's page reads it."""
    rows = list(map(list, zip(*columns.values(), strict=True)))
    return json.dumps({"columns": list(columns), "data": rows}, ensure_ascii=False).encode()


def _milliseconds(seconds: float) -> int:
    return int(seconds * 1000)


def _batches(values: Sequence[T], size: int) -> Iterator[Sequence[T]]:
    for start in range(0, len(values), size):
        yield values[start : start + size]
