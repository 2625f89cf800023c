"""`loraflow plan`: whether each stage is cached or will run, and why. Imports neither torch nor prefect."""

from __future__ import annotations

import json
from dataclasses import asdict
from typing import TYPE_CHECKING

import click
from pydantic import JsonValue

from loraflow.cli import json_option, parse_sets, quiet_logging, set_option

if TYPE_CHECKING:
    from loraflow.execution.plan import Verdict


@click.command()
@click.argument("recipe")
@set_option
@click.option("--force", multiple=True, metavar="STAGE", help="As for `loraflow run`.")
@json_option
def plan(recipe: str, sets: tuple[str, ...], force: tuple[str, ...], as_json: bool) -> None:
    """Show for each stage of RECIPE whether it is cached or will run, and why."""
    quiet_logging()
    from loraflow.config import load_recipe
    from loraflow.execution.plan import plan as plan_run
    from loraflow.execution.plan import training_memory
    from loraflow.execution.workspace import Workspace
    from loraflow.stages import TRAIN, check_names

    check_names(force, "--force")
    workspace = Workspace(load_recipe(recipe, parse_sets(sets)))
    verdicts = plan_run(workspace, force)
    workspace.save()
    trains = any(verdict.stage == TRAIN.name and verdict.verdict != "cached" for verdict in verdicts)
    memory = training_memory(workspace) if trains else None
    if as_json:
        document: dict[str, JsonValue] = {"stages": [asdict(verdict) for verdict in verdicts]}
        if memory:
            document["memory_bytes"] = {"least": round(memory[0]), "full_speed": round(memory[1])}
        click.echo(json.dumps(document, ensure_ascii=False))
    else:
        _show(verdicts, memory)


def _show(verdicts: list[Verdict], memory: tuple[float, float] | None) -> None:
    colours = {"cached": "green", "runs": "yellow", "depends": "cyan"}
    width = max(len(verdict.label) for verdict in verdicts)
    for verdict in verdicts:
        seconds = f"{verdict.seconds:7.1f} s" if verdict.seconds is not None else " " * 9
        click.echo(
            f"{verdict.label:<{width}}  {click.style(f'{verdict.verdict:<8}', fg=colours[verdict.verdict])}"
            f"{seconds}  {(verdict.fingerprint or '')[:12]:<12}  {'; '.join(verdict.why)}".rstrip()
        )
    if memory:
        least, fast = (size / 2**30 for size in memory)
        click.echo(
            f"\ntraining needs about {least:.1f} GiB of GPU memory at least, with activation checkpointing, "
            f"and {fast:.1f} GiB at full speed"
        )
    todo = [verdict.seconds for verdict in verdicts if verdict.verdict != "cached"]
    if todo and all(seconds is not None for seconds in todo):
        click.echo(f"\nthe stages to run took {sum(s for s in todo if s is not None):.0f} s the last time")
