"""`loraflow evaluate, merge`: with a run's model, the champion, or a folder."""

from __future__ import annotations

import json
import logging
import shutil
from pathlib import Path

import click

from loraflow.cli import json_option, parse_overrides, quiet_logging, set_option
from loraflow.failures import BadConfig


@click.command()
@click.argument("model")
@click.argument("recipe")
@set_option
@json_option
def evaluate(model: str, recipe: str, sets: tuple[str, ...], as_json: bool) -> None:
    """Score MODEL (champion, a run's id, or a folder) on the held-out rows of RECIPE, with its metrics."""
    quiet_logging(logging.INFO)
    from loraflow.config import load_recipe
    from loraflow.evaluation.values import EvaluationReport, scores_to_dict
    from loraflow.execution.runner import score_model

    workspace, found, ref = score_model(load_recipe(recipe, parse_overrides(sets)), model)
    scores = EvaluationReport.from_dict(workspace.store.manifest(ref).report).metrics
    location = workspace.store.location(ref)
    if as_json:
        click.echo(json.dumps({"model": str(found.folder), "metrics": scores_to_dict(scores), "uri": location}))
        return
    for name, metrics in scores.items():
        for metric, score in metrics.items():
            interval = f"{score.low:.4f}–{score.high:.4f}"
            click.echo(f"{name:<14} {metric:<14} {score.value:8.4f}  {interval}  ({score.n} rows)")
    click.echo(f"row by row: {location}/scores.parquet")


@click.command()
@click.argument("adapter", type=click.Path(exists=True, file_okay=False, path_type=Path))
@click.argument("base", type=click.Path(exists=True, file_okay=False, path_type=Path))
@click.argument("out", type=click.Path(path_type=Path))
@click.option(
    "--dtype",
    type=click.Choice(["bfloat16", "float16", "float32"]),
    help="Dtype of the merged weights. Default: the base's.",
)
@click.option("--max-shard-size-gb", default=5.0, show_default=True, help="Largest file of the merged model, in GB.")
@click.option("--threads", type=int, help="CPU threads. Default: all cores.")
def merge(
    adapter: Path, base: Path, out: Path, dtype: str | None, max_shard_size_gb: float, threads: int | None
) -> None:
    """Merge ADAPTER (a PEFT folder) into BASE (a model's folder) and write the model to OUT."""
    from loraflow.adapters.merge_folders import merge as merge_folders
    from loraflow.serving.artifacts import require_intact_files
    from loraflow.store.files import set_default_modes

    if out.exists():
        raise BadConfig("The target exists already.", where=str(out), next_step="name a folder that does not exist")
    require_intact_files(adapter, base)
    unfinished = out.with_name(out.name + ".part")
    if unfinished.exists():
        shutil.rmtree(unfinished)
    unfinished.mkdir(parents=True)
    try:
        figures = merge_folders(
            base, adapter, unfinished, dtype=dtype, max_shard_bytes=int(max_shard_size_gb * 1e9), threads=threads
        )
        set_default_modes(unfinished)
        unfinished.rename(out)
    finally:
        shutil.rmtree(unfinished, ignore_errors=True)
    click.echo(f"{figures['adapted']} matrices merged in {figures['seconds']} s ({figures['route']}): {out}")
