"""What is mirrored of a run, and where to."""

import json
import logging
import math
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from importlib.util import find_spec
from typing import NamedTuple

from pydantic import JsonValue

from loraflow.credentials import hide_in_url, mask
from loraflow.failures import CorruptArtifact, MissingExtra
from loraflow.registry.runs import RunRecord, read_report
from loraflow.reporting import chart
from loraflow.store import Ref, Store, read_table
from loraflow.training.validation_loss import CURVES

log = logging.getLogger("loraflow")


class Point(NamedTuple):
    """A value of a metric at a step."""

    name: str
    value: float
    step: int = 0


@dataclass(frozen=True)
class TrackedRun:
    """A run on the server."""

    id: str  # the server's
    is_complete: bool


@dataclass(frozen=True)
class RunContent:
    """What MLflow gets about a loraflow run."""

    run: str  # loraflow's id
    recipe: str
    started: float  # seconds since 1970
    ended: float
    state: str  # done or failed
    tags: Mapping[str, str]
    params: Mapping[str, str]
    points: Sequence[Point]
    files: Mapping[str, bytes]  # {path among the run's artifacts: content}
    tables: Mapping[str, Mapping[str, Sequence[object]]] = field(default_factory=dict)  # {path: {column: values}}


VARIABLE = "MLFLOW_TRACKING_URI"
EXPERIMENT = "loraflow"


@dataclass(frozen=True)
class Tracking:
    """An MLflow server or database. `uri` has no credentials; `loraflow.credentials.reveal` gives the one to connect to."""

    uri: str
    experiment: str
    model: str  # name in MLflow's registry
    is_asked_for: bool = True  # by the recipe or a command, and not only by the environment


def find_tracking(section: JsonValue, model: str, environment: Mapping[str, str] = os.environ) -> Tracking | None:
    """Return where to mirror to; None if nothing asks for it. This imports no part of MLflow.

    Args:
        section: `runtime.mlflow`, as in a recipe or a run's record.
    """
    given = section if isinstance(section, dict) else {}
    uri = given.get("uri") or environment.get(VARIABLE)
    if not isinstance(uri, str) or not uri:
        return None
    return Tracking(
        hide_in_url(uri),
        str(given.get("experiment") or environment.get("MLFLOW_EXPERIMENT_NAME") or EXPERIMENT),
        str(given.get("model") or model),
        is_asked_for=isinstance(section, dict),
    )


def is_installed() -> bool:
    """Tell whether the extra `mlflow` is installed."""
    return find_spec("mlflow") is not None


def missing_extra(got: str = "") -> MissingExtra:
    """Return the failure that the extra `mlflow` is not installed, or that `got` prevents its import."""
    what = "A part of the extra mlflow cannot be imported." if got else "The extra mlflow is not installed."
    return MissingExtra(what, got=got, next_step="pip install 'loraflow[mlflow]'")


MAX_VALUE = 500  # characters of a parameter that every version of MLflow takes
MAX_ROWS = 5000  # rows of the table of answers: MLflow's page loads all of it
SIDES = ("base", "tuned", "champion")


def is_news(record: RunRecord) -> bool:
    """Tell whether a run that has ended computed, decided or failed at anything. Other runs are not mirrored."""
    if record.state == "failed":
        return True
    decision = record.summary.decision if record.summary else None
    decided = decision is not None and decision.verdict != "unchanged"
    return record.state == "done" and (decided or any(stage.state == "computed" for stage in record.stages))


def content_of(store: Store, record: RunRecord) -> RunContent:
    """Return what MLflow gets about a run. Files that the store no longer has are left out."""
    files: dict[str, bytes] = {}
    try:
        report = read_report(store, record.run)
    except CorruptArtifact as failure:
        log.warning("%s", failure)
        report = None
    if report is not None:
        files["report.md"] = mask(report).encode()
    training = curves(store, record)
    losses = [(float(step), value) for name, value, step in training if name == "train/loss"]
    if losses:
        files["loss.svg"] = chart.svg(losses, "training loss").encode()
    files["recipe.yaml"] = mask(record.recipe_text).encode()
    if record.summary is not None:
        files["model/location.json"] = _location(record.summary.merged, record.summary.adapter, record.run)
    answers = _answers(store, record)
    return RunContent(
        run=record.run,
        recipe=record.recipe,
        started=record.started,
        ended=record.started + record.seconds,
        state=record.state,
        tags=_tags(record),
        params=dict(_flatten(record.resolved)),
        points=[*training, *_scores(record)],
        files=files,
        tables={"answers.json": answers} if answers else {},
    )


def content_of_lost_run(run: str, recipe: str, location: str) -> RunContent:
    """Return what MLflow gets about a promotion whose run has no record any more."""
    files = {"model/location.json": _location(location, "", run)}
    return RunContent(run, recipe, 0.0, 0.0, "done", {}, {}, [], files)


def _location(merged: str, adapter: str, run: str) -> bytes:
    """Return the file that stands for the model: the weights stay in the store."""
    return json.dumps({"merged": merged, "adapter": adapter, "run": run}, indent=1, ensure_ascii=False).encode()


def _tags(record: RunRecord) -> dict[str, str]:
    found = {"loraflow.actor": record.actor, "loraflow.commit": record.commit, "loraflow.version": record.loraflow}
    found |= {
        "loraflow.error": mask(record.error) if record.error else None,
        "loraflow.prefect_run": record.prefect_run,
    }
    summary = record.summary
    if summary is not None and summary.decision is not None:
        found["loraflow.verdict"] = summary.decision.verdict
        found["mlflow.note.content"] = "\n".join(f"- {reason}" for reason in summary.decision.reasons)
    return {name: mask(value) for name, value in found.items() if value}


def _flatten(value: JsonValue, path: str = "") -> Iterator[tuple[str, str]]:
    """Yield the settings of a recipe by their dotted keys, masked and cut."""
    if isinstance(value, dict):
        for key, inner in value.items():
            yield from _flatten(inner, f"{path}.{key}" if path else key)
    elif path:
        text = value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
        yield _key(path), mask(text)[:MAX_VALUE]


def _key(text: str) -> str:
    """Return a name with the characters that MLflow allows."""
    return "".join(c if c.isascii() and (c.isalnum() or c in "_-. :/") else "_" for c in text)[:250]


def curves(store: Store, record: RunRecord) -> list[Point]:
    """Return all numbers that training logged, by step."""
    ref = _artifact(store, record, "train")
    if ref is None:
        return []
    try:
        lines = store.read(ref, CURVES).decode().splitlines()
    except CorruptArtifact as failure:
        log.debug("no curves of %s: %s", record.run, failure)
        return []
    return [point for line in lines for point in _points_of_row(json.loads(line))]


def _points_of_row(row: Mapping[str, JsonValue]) -> Iterator[Point]:
    step = row.get("step")
    for name, value in row.items():
        if name != "step" and isinstance(value, int | float) and isinstance(step, int) and math.isfinite(value):
            yield Point(f"train/{_key(name)}", float(value), step)


def _scores(record: RunRecord) -> Iterator[Point]:
    """Yield each score with the ends of its interval, as `base/heldout/token_loss.low`."""
    metrics = record.summary.metrics if record.summary else {}
    for side, scores in metrics.items():
        for rows, part in (scores or {}).items():
            for name, value in part.items():
                key = _key(f"{side}/{rows}/{name}")
                ends = ((key, value.value), (f"{key}.low", value.low), (f"{key}.high", value.high))
                yield from (Point(end, number) for end, number in ends if math.isfinite(number))


def _answers(store: Store, record: RunRecord) -> dict[str, Sequence[object]]:
    """Return the table of rows: the scores and answer of each model to each row."""
    import pandas as pd

    frames = []
    for side in SIDES:
        ref = _artifact(store, record, f"evaluate {side}")
        if ref is None:
            continue
        try:
            frame = read_table(store, ref)
        except CorruptArtifact as failure:
            log.debug("no scores of %s: %s", record.run, failure)
            continue
        frame.insert(0, "model", side)
        frames.append(frame)
    if not frames:
        return {}
    table = pd.concat([frame.head(MAX_ROWS // len(frames)) for frame in frames], ignore_index=True)
    plain = json.loads(table.to_json(orient="columns"))
    return {str(name): list(values.values()) for name, values in plain.items()}


def _artifact(store: Store, record: RunRecord, label: str) -> Ref | None:
    done = record.stage(label)
    return None if done is None or store.check(ref := done.ref(store)) else ref
