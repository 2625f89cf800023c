"""`loraflow plan`: per stage, cached or to run, and why. Neither torch nor prefect is imported."""

from __future__ import annotations

import json
from typing import Any

import click

from loraflow.cli import json_option, parse_sets, quiet_logging, set_option


@click.command()
@click.argument("recipe")
@set_option
@click.option("--force", multiple=True, metavar="STAGE", help="As for `loraflow run`.")
@json_option
def plan(recipe: str, sets: tuple[str, ...], force: tuple[str, ...], as_json: bool) -> None:
    """Say for each stage of RECIPE whether it is cached or will run, and why."""
    quiet_logging()
    from loraflow.config import load_recipe
    from loraflow.execution.plan import Jobs, Planner
    from loraflow.flows.pipeline import pipeline

    jobs = Jobs(load_recipe(recipe, parse_sets(sets)))
    planner = Planner(jobs, list(force))
    pipeline(planner)
    jobs.save()
    trains = any(verdict.stage == "train" and verdict.verdict != "cached" for verdict in planner.verdicts)
    memory = planner.memory() if trains else None
    if as_json:
        said: dict[str, Any] = {"stages": [verdict.__dict__ for verdict in planner.verdicts]}
        if memory:
            said["memory_bytes"] = {"least": round(memory[0]), "full_speed": round(memory[1])}
        click.echo(json.dumps(said, ensure_ascii=False))
        return
    colours = {"cached": "green", "runs": "yellow", "depends": "cyan"}
    width = max(len(verdict.label) for verdict in planner.verdicts)
    for verdict in planner.verdicts:
        seconds = f"{verdict.seconds:7.1f} s" if verdict.seconds is not None else " " * 9
        click.echo(
            f"{verdict.label:<{width}}  {click.style(f'{verdict.verdict:<8}', fg=colours[verdict.verdict])}"
            f"{seconds}  {(verdict.fingerprint or '')[:12]:<12}  {'; '.join(verdict.why)}".rstrip()
        )
    todo = [v.seconds for v in planner.verdicts if v.verdict != "cached"]
    if memory:
        least, fast = (size / 2**30 for size in memory)
        click.echo(
            f"\ntraining takes about {least:.1f} GiB of a GPU at least, with activations computed twice, "
            f"and {fast:.1f} at full speed"
        )
    if todo and all(seconds is not None for seconds in todo):
        click.echo(f"\nthe stages to run took {sum(s for s in todo if s is not None):.0f} s the last time")
