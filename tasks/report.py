"""One markdown report for each run, in the UI and beside the run's record."""

from __future__ import annotations

import json
import logging
from typing import Any

from prefect import task
from prefect.artifacts import create_markdown_artifact
from prefect.cache_policies import NO_CACHE

from loraflow.identity import short

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


def markdown(run: Any, made: Any, summary: dict[str, Any]) -> str:
    """Write the report."""
    store, recipe = run.jobs.store, run.jobs.recipe
    verdict = summary["decision"]["verdict"]
    lines = [f"# {recipe.name}: {verdict}", "", *[f"- {reason}" for reason in summary["decision"]["reasons"]], ""]
    for set_name, part in summary["metrics"]["tuned"].items():
        n = next(iter(part.values()))["n"]
        lines += [
            f"## Scores on {set_name} ({n} rows)",
            "",
            "| metric | base | tuned | champion |",
            "|---|---|---|---|",
        ]
        lines += [
            f"| {name} | {' | '.join(map(show, cells))} |" for name, cells in metric_rows(summary["metrics"], set_name)
        ]
        lines.append("")
    curve = store.read(made.adapter, "telemetry/curves.jsonl").decode()
    losses = [(row["step"], row["loss"]) for line in curve.splitlines() if "loss" in (row := json.loads(line))]
    if losses:
        lines += ["## Training loss", "", f"`{sparkline([loss for _, loss in losses])}`", ""]
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
    lines += ["## Lineage", "", "| stage | state | fingerprint | digest | seconds |", "|---|---|---|---|---:|"]
    lines += [
        f"| {s['stage']} | {s['state']} | `{short(s['fingerprint'])}` | `{short(s['digest'])}` | {s['seconds']:.1f} |"
        for s in summary["stages"]
    ]
    lines += ["", f"Adapter: `{summary['adapter']}`", "", f"Merged model: `{summary['merged']}`", ""]
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
    text = markdown(run, made, summary)
    try:
        run.jobs.store.write_document(f"runs/{run.id}.md", text.encode())
        create_markdown_artifact(
            markdown=text, key=f"{run.jobs.recipe.name}-report".replace("_", "-").replace(".", "-")
        )
    except Exception as error:  # the model is made and registered by now: a report that cannot be shown undoes nothing
        log.warning("no report: %s", error)
