"""What MLflow gets about a run: settings, curves, scores with intervals, the answers to each row, report and picture."""

from __future__ import annotations

import io
import json
import logging
import math
from collections.abc import Iterator, Mapping, Sequence

from pydantic import JsonValue

from loraflow.credentials import mask
from loraflow.failures import CorruptArtifact
from loraflow.registry.runs import RunRecord, read_report
from loraflow.reporting import chart
from loraflow.store import Ref, Store, read_intact
from loraflow.tracking.tracker import Point, RunContent

log = logging.getLogger("loraflow")
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
    ref = _artifact(store, record, "train", "train")
    if ref is None:
        return []
    try:
        lines = store.read(ref, "telemetry/curves.jsonl").decode().splitlines()
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
        ref = _artifact(store, record, f"evaluate {side}", "evaluate")
        if ref is None:
            continue
        try:
            frame = pd.read_parquet(io.BytesIO(read_intact(store, ref, "scores.parquet")))
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


def _artifact(store: Store, record: RunRecord, label: str, stage: str) -> Ref | None:
    """Return a stage's artifact if the store still has it."""
    done = record.stage(label)
    if done is None:
        return None
    ref = Ref(stage=stage, fingerprint=done.fingerprint, digest=done.digest, uri=store.uri)
    return None if store.check(ref) else ref
