"""One markdown report for each run, in the UI and beside the run's record."""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import Any

from prefect import task
from prefect.artifacts import create_markdown_artifact
from prefect.cache_policies import NO_CACHE

from loraflow.identity import short
from loraflow.reporting import chart
from loraflow.store import Ref

log = logging.getLogger("loraflow")

_BARS = "▁▂▃▄▅▆▇█"


def sparkline(values: list[float]) -> str:
    """Draw values as a line of bars."""
    if not values:
        return ""
    low, high = min(values), max(values)
    step = (high - low) / (len(_BARS) - 1) or 1.0
    return "".join(_BARS[round((value - low) / step)] for value in values)


def metric_rows(metrics: dict[str, Any], set_name: str) -> list[tuple[str, list[dict[str, float] | None]]]:
    """Return (metric, [base, tuned, champion]) of a set."""
    sides = [(metrics[side] or {}).get(set_name, {}) for side in ("base", "tuned", "champion")]
    return [(name, [side.get(name) for side in sides]) for name in sides[1]]


def show(cell: dict[str, float] | None) -> str:
    """Return a value with its interval."""
    return "" if cell is None else f"{cell['value']:.3f} [{cell['low']:.3f}, {cell['high']:.3f}]"


def comparison_table(metrics: dict[str, Any]) -> list[str]:
    """Return the scores of base, tuned and champion as markdown, a table for each set of rows."""
    lines = []
    for set_name, part in metrics["tuned"].items():
        n = next(iter(part.values()))["n"]
        lines += [
            f"## Scores on {set_name} ({n} rows)",
            "",
            "| metric | base | tuned | champion |",
            "|---|---|---|---|",
        ]
        lines += [f"| {name} | {' | '.join(map(show, cells))} |" for name, cells in metric_rows(metrics, set_name)]
        lines.append("")
    return lines


def markdown(run: Any, made: Any, summary: dict[str, Any], *, image: bool = False) -> str:
    """Write the report; with `image` the loss curve is one, else a line of bars that a terminal shows too."""
    store, recipe = run.jobs.store, run.jobs.recipe
    verdict = summary["decision"]["verdict"]
    lines = [f"# {recipe.name}: {verdict}", "", *[f"- {reason}" for reason in summary["decision"]["reasons"]], ""]
    lines += comparison_table(summary["metrics"])
    curve = store.read(made.adapter, "telemetry/curves.jsonl").decode()
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
    samples = store.manifest(made.tuned_scores).report["samples"][: recipe.evaluation.samples]
    lines += ["## Answers", ""] if samples else []
    for sample in samples:
        lines += [f"**{_quote(sample['prompt'])}**", "", f"- expected: `{_quote(sample['reference'])}`",
                  f"- tuned: `{_quote(sample['answer'])}`", ""]  # fmt: skip
    lines += ["## Lineage", "", "| stage | state | fingerprint | seconds | artifact |", "|---|---|---|---:|---|"]
    lines += [
        f"| {s['stage']} | {s['state']} | `{short(s['fingerprint'])}` | {s['seconds']:.1f} | `{s['uri']}` |"
        for s in summary["stages"]
    ]
    lines += [
        "",
        f"Adapter: `{summary['adapter']}`",
        "",
        f"Merged model: `{summary['merged']}`",
        "",
        f"Talk to it: `loraflow chat {summary['run']}`",
        "",
    ]
    return "\n".join(lines)


def _thin(rows: list[Any], most: int) -> list[Any]:
    if len(rows) <= most:
        return rows
    return [rows[round(i * (len(rows) - 1) / (most - 1))] for i in range(most)]


def _quote(text: str) -> str:
    flat = " ".join(text.split()).replace("`", "'").replace("|", "\\|")
    return flat if len(flat) <= 300 else flat[:299] + "…"


@task(name="report", task_run_name="report", cache_policy=NO_CACHE, persist_result=False)
def publish_report(run: Any, made: Any, summary: dict[str, Any]) -> None:
    """Publish the report in the UI and keep it beside the run's record."""
    text, shown = (markdown(run, made, summary, image=image) for image in (False, True))
    _publish(run, text, shown, "report")


@task(name="report", task_run_name="report", cache_policy=NO_CACHE, persist_result=False)
def publish_scores(run: Any, model: str, folder: Path, scores: Ref) -> dict[str, Any]:
    """Publish the scores of one model, and return them."""
    metrics = run.jobs.store.manifest(scores).report["metrics"]
    table = run.jobs.store.path(scores) / "scores.parquet"
    lines = [f"# {model} by {run.jobs.recipe.name}", ""]
    for set_name, part in metrics.items():
        n = next(iter(part.values()))["n"]
        lines += [f"## {set_name} ({n} rows)", "", "| metric | value |", "|---|---|"]
        lines += [*[f"| {name} | {show(cell)} |" for name, cell in part.items()], ""]
    text = "\n".join([*lines, f"Model: `{folder}`", "", f"Row by row: `{table}`", ""])
    _publish(run, text, text, "scores")
    return {"model": str(folder), "metrics": metrics, "uri": str(table.parent)}


def _publish(run: Any, text: str, shown: str, what: str) -> None:
    try:
        run.jobs.store.write_document(f"runs/{run.id}.md", text.encode())
        create_markdown_artifact(
            markdown=shown, key=f"{run.jobs.recipe.name}-{what}".replace("_", "-").replace(".", "-")
        )
    except Exception as error:  # the model is made and registered by now: a report that cannot be shown undoes nothing
        log.warning("no report: %s", error)
