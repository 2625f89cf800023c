"""`loraflow evaluate, merge, chat`: with a run's model, the champion, or a folder."""

from __future__ import annotations

import json
import logging
import shutil
from pathlib import Path

import click

from loraflow.cli import json_option, parse_sets, quiet_logging, set_option
from loraflow.failures import BadConfig


@click.command()
@click.argument("model")
@click.argument("recipe")
@set_option
@json_option
def evaluate(model: str, recipe: str, sets: tuple[str, ...], as_json: bool) -> None:
    """Score MODEL (champion, a run's id, or a folder) on the held-out rows of RECIPE, by its protocol."""
    quiet_logging(logging.INFO)
    from loraflow.config import Recipe, load_recipe
    from loraflow.direct import Direct, find_model, open_path_as_base

    walk = Direct(load_recipe(recipe, parse_sets(sets)))
    with walk.jobs.store.reading():
        rows = walk.stage("check_dataset", dataset=walk.stage("version_dataset"))
        folder, ref = find_model(walk.jobs.store, model)
        if ref is None:
            walk = Direct(Recipe.model_validate(open_path_as_base(walk.jobs.recipe, folder)))
            ref = walk.stage("resolve_base")
        scores = walk.stage("evaluate", model=ref, rows=rows)
        walk.jobs.save()
    metrics = walk.jobs.store.manifest(scores).report["metrics"]
    if as_json:
        click.echo(json.dumps({"model": str(folder), "metrics": metrics, "uri": walk.jobs.store.where(scores)}))
        return
    for name, part in metrics.items():
        for metric, one in part.items():
            click.echo(
                f"{name:<14} {metric:<14} {one['value']:8.4f}  {one['low']:.4f}–{one['high']:.4f}  ({one['n']} rows)"
            )
    click.echo(f"row by row: {walk.jobs.store.where(scores)}/scores.parquet")


@click.command()
@click.argument("adapter", type=click.Path(exists=True, file_okay=False, path_type=Path))
@click.argument("base", type=click.Path(exists=True, file_okay=False, path_type=Path))
@click.argument("out", type=click.Path(path_type=Path))
@click.option("--dtype", type=click.Choice(["bfloat16", "float16", "float32"]), help="Default: the base's own.")
@click.option("--max-shard-size-gb", default=5.0, show_default=True)
@click.option("--threads", type=int, help="Default: all cores.")
def merge(
    adapter: Path, base: Path, out: Path, dtype: str | None, max_shard_size_gb: float, threads: int | None
) -> None:
    """Merge ADAPTER (a PEFT folder) into BASE (a model's folder) and write the model to OUT."""
    from loraflow.adapters.merge import merge as merge_folders

    if out.exists():
        raise BadConfig("The target exists already.", where=str(out), next_step="name a folder that does not exist")
    part = out.with_name(out.name + ".part")
    if part.exists():
        shutil.rmtree(part)
    part.mkdir(parents=True)
    try:
        figures = merge_folders(
            base, adapter, part, dtype=dtype, max_shard_bytes=int(max_shard_size_gb * 1e9), threads=threads
        )
        part.rename(out)
    finally:
        shutil.rmtree(part, ignore_errors=True)
    click.echo(f"{figures['adapted']} matrices merged in {figures['seconds']} s ({figures['route']}): {out}")


@click.command()
@click.argument("model", default="champion")
@click.option("--prompt", help="Ask this one question and end.")
@click.option("--system", help="The system message.")
@click.option("--max-new-tokens", default=256, show_default=True)
@click.option("--store", default=".loraflow/store", show_default=True)
def chat(model: str, prompt: str | None, system: str | None, max_new_tokens: int, store: str) -> None:
    """Talk to MODEL: champion, a run's id, or a model's folder. /reset forgets, /system TEXT sets the system message."""
    from loraflow.direct import find_model
    from loraflow.serving.chat import Chat
    from loraflow.store import open_store

    folder, _ = find_model(open_store(store), model)
    talk = Chat(folder, system, max_new_tokens)
    if prompt is not None:
        talk.answer(prompt)
        return
    click.echo(f"{folder}\n/reset forgets what was said, /system TEXT sets the system message, Ctrl-D ends")
    while True:
        try:
            said = input("› ").strip()
        except EOFError:
            click.echo()
            return
        if said == "/reset":
            talk.reset()
        elif said.startswith("/system"):
            talk.system = said.removeprefix("/system").strip() or None
            talk.reset()
        elif said:
            talk.answer(said)
