"""One markdown report for each run, in the UI and beside the run's record."""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import TypeVar

from prefect import task
from prefect.artifacts import create_markdown_artifact
from prefect.cache_policies import NO_CACHE
from pydantic import JsonValue

from loraflow.execution.results import PipelineResult
from loraflow.identity import short
from loraflow.registry.runs import RunSummary, Score, Scores, dump_scores, read_scores
from loraflow.reporting import chart
from loraflow.store import Ref
from loraflow.tasks.run import Run

log = logging.getLogger("loraflow")

T = TypeVar("T")
SidesOfScores = dict[str, Scores | None]  # base, tuned and champion
_BARS = "▁▂▃▄▅▆▇█"


def sparkline(values: list[float]) -> str:
    """Draw values as a line of bars."""
    if not values:
        return ""
    low, high = min(values), max(values)
    step = (high - low) / (len(_BARS) - 1) or 1.0
    return "".join(_BARS[round((value - low) / step)] for value in values)


def metric_rows(metrics: SidesOfScores, set_name: str) -> list[tuple[str, list[Score | None]]]:
    """Return (metric, [base, tuned, champion]) of a set."""
    sides = [(metrics.get(side) or {}).get(set_name, {}) for side in ("base", "tuned", "champion")]
    return [(name, [side.get(name) for side in sides]) for name in sides[1]]


def show(score: Score | None) -> str:
    """Return a value with its interval."""
    return "" if score is None else str(score)


def comparison_table(metrics: SidesOfScores) -> list[str]:
    """Return the scores of base, tuned and champion as markdown, a table for each set of rows."""
    lines = []
    for set_name, part in (metrics["tuned"] or {}).items():
        n = next(iter(part.values())).n
        lines += [
            f"## Scores on {set_name} ({n} rows)",
            "",
            "| metric | base | tuned | champion |",
            "|---|---|---|---|",
        ]
        lines += [f"| {name} | {' | '.join(map(show, cells))} |" for name, cells in metric_rows(metrics, set_name)]
        lines.append("")
    return lines


def markdown(run: Run, result: PipelineResult, summary: RunSummary, *, image: bool = False) -> str:
    """Write the report. The loss curve is an image, or else a line of bars that a terminal can show."""
    store, recipe, decision = run.workspace.store, run.workspace.recipe, summary.decision
    assert decision is not None
    lines = [f"# {recipe.name}: {decision.verdict}", "", *[f"- {reason}" for reason in decision.reasons], ""]
    lines += comparison_table(summary.metrics)
    curve = store.read(result.adapter, "telemetry/curves.jsonl").decode()
    losses = [(row["step"], row["loss"]) for line in curve.splitlines() if "loss" in (row := json.loads(line))]
    if losses:
        bars = f"`{sparkline([loss for _, loss in losses])}`"
        lines += ["## Training loss", "", chart.image(losses, "training loss") if image else bars, ""]
        lines += [
            "| step | loss |",
            "|---:|---:|",
            *[f"| {step} | {loss:.4f} |" for step, loss in _thin(losses, 12)],
            "",
        ]
    samples = store.manifest(result.tuned_scores).report["samples"][: recipe.evaluation.samples]
    lines += ["## Answers", ""] if samples else []
    for sample in samples:
        lines += [f"**{_quote(sample['prompt'])}**", "", f"- expected: `{_quote(sample['reference'])}`",
                  f"- tuned: `{_quote(sample['answer'])}`", ""]  # fmt: skip
    lines += ["## Lineage", "", "| stage | state | fingerprint | seconds | artifact |", "|---|---|---|---:|---|"]
    lines += [
        f"| {stage.stage} | {stage.state} | `{short(stage.fingerprint)}` | {stage.seconds:.1f} | `{stage.uri}` |"
        for stage in summary.stages
    ]
    lines += [
        "",
        f"Adapter: `{summary.adapter}`",
        "",
        f"Merged model: `{summary.merged}`",
        "",
        f"Talk to it: `loraflow chat {summary.run}`",
        "",
    ]
    return "\n".join(lines)


def _thin(rows: list[T], most: int) -> list[T]:
    if len(rows) <= most:
        return rows
    return [rows[round(i * (len(rows) - 1) / (most - 1))] for i in range(most)]


def _quote(text: str) -> str:
    flat = " ".join(text.split()).replace("`", "'").replace("|", "\\|")
    return flat if len(flat) <= 300 else flat[:299] + "…"


@task(name="report", task_run_name="report", cache_policy=NO_CACHE, persist_result=False)
def publish_report(run: Run, result: PipelineResult, summary: RunSummary) -> None:
    """Publish the report in the UI, and keep it beside the run's record."""
    text, shown = (markdown(run, result, summary, image=image) for image in (False, True))
    _publish(run, text, shown, "report")


@task(name="report", task_run_name="report", cache_policy=NO_CACHE, persist_result=False)
def publish_scores(run: Run, model: str, folder: Path, scores: Ref) -> dict[str, JsonValue]:
    """Publish the scores of one model, and return them."""
    workspace = run.workspace
    metrics = read_scores(workspace.store, scores)
    table = workspace.store.path(scores) / "scores.parquet"
    lines = [f"# {model} by {workspace.recipe.name}", ""]
    for set_name, part in metrics.items():
        n = next(iter(part.values())).n
        lines += [f"## {set_name} ({n} rows)", "", "| metric | value |", "|---|---|"]
        lines += [*[f"| {name} | {show(score)} |" for name, score in part.items()], ""]
    text = "\n".join([*lines, f"Model: `{folder}`", "", f"Row by row: `{table}`", ""])
    _publish(run, text, text, "scores")
    return {"model": str(folder), "metrics": dump_scores(metrics), "uri": str(table.parent)}


def _publish(run: Run, text: str, shown: str, what: str) -> None:
    key = f"{run.workspace.recipe.name}-{what}".replace("_", "-").replace(".", "-")
    try:
        run.workspace.store.write_document(f"runs/{run.id}.md", text.encode())
        create_markdown_artifact(markdown=shown, key=key)
    except Exception as error:  # the model is made and registered by now: a missing report must not undo that
        log.warning("the report could not be published: %s", error)
