"""`loraflow plan`: whether each stage is cached or will run, and why. Imports no prefect, and torch only if train runs."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING

import click
from pydantic import JsonValue

from loraflow.cli import json_option, parse_overrides, quiet_logging, set_option

if TYPE_CHECKING:
    from loraflow.execution.plan import PlannedStep
    from loraflow.execution.plan_memory import PlannedMemory


@click.command()
@click.argument("recipe")
@set_option
@click.option("--force", multiple=True, metavar="STAGE", help="Plan as if `loraflow run` had this --force.")
@json_option
def plan(recipe: str, sets: tuple[str, ...], force: tuple[str, ...], as_json: bool) -> None:
    """Show for each stage of RECIPE whether it is cached or will run, and why."""
    quiet_logging()
    from loraflow.config import load_recipe
    from loraflow.execution.plan import base_report, gate_power, too_few_positions
    from loraflow.execution.plan import plan as plan_run
    from loraflow.execution.plan_general import forgetting_lines
    from loraflow.execution.plan_memory import planned_memory
    from loraflow.execution.plan_slices import slice_power_lines
    from loraflow.execution.plan_sources import planned_sources
    from loraflow.execution.workspace import Workspace
    from loraflow.failures import Failure
    from loraflow.stages import TRAIN, check_names

    check_names(force, "--force")
    workspace = Workspace(load_recipe(recipe, parse_overrides(sets)))
    steps = plan_run(workspace, force)
    workspace.save()
    trains = any(step.stage == TRAIN.name and step.status != "cached" for step in steps)
    memory = planned_memory(workspace) if trains else None
    note = too_few_positions(workspace) if trains else ""
    base = base_report(workspace) if trains else []
    sources = planned_sources(workspace)
    power, problem = None, ""
    parts: list[str] = []
    try:
        power = gate_power(workspace)
        parts = slice_power_lines(workspace)
    except Failure as failure:  # planning goes on, as for a champion that is missing
        problem = f"will fail: {failure.what}"
    forgetting = forgetting_lines(workspace)
    if as_json:
        document: dict[str, JsonValue] = {"stages": [step.to_json() for step in steps]}
        if memory:
            document["memory_bytes"] = {
                "device": memory.device,
                **({"least": round(memory.least)} if memory.device == "cuda" else {}),
                "full_speed": round(memory.training.total),
                "training": {**memory.training.as_bytes()},
                "evaluation": {**memory.evaluation.as_bytes()},
            }
        if sources:
            document["sources"] = [*sources]
        if base:
            document["base"] = [line.strip() for line in base]
        if note:
            document["note"] = note
        if workspace.reserve is not None:
            document["reserve"] = workspace.reserve.model_dump()
        if forgetting:
            document["forgetting"] = [line.strip() for line in forgetting]
        if power:
            document["gate"] = {
                "rows": power.rows,
                "look": power.look,
                "level": power.level,
                "shows": [*power.lines()[1:], *parts],
            }
        if problem:
            document["gate"] = {"problem": problem}
        click.echo(json.dumps(document, ensure_ascii=False))
    else:
        _show(steps, memory, base)
        for line in sources:
            click.echo(line)
        if note:
            click.echo(f"note: {note}")
        if problem:
            click.secho(f"\ngate: {problem}", fg="yellow")
        if workspace.reserve is not None:
            click.echo(f"\nreserve after this run: {workspace.reserve}")
        if power:
            click.echo()
            lines = [*power.lines(), *parts]
            click.secho("\n".join(lines), fg="yellow" if parts or power.is_warning() else None)
        if forgetting:
            click.echo("\n".join(forgetting))


def _show(steps: list[PlannedStep], memory: PlannedMemory | None, base: list[str]) -> None:
    colours = {"cached": "green", "runs": "yellow", "depends": "cyan"}
    width = max(len(step.label) for step in steps)
    for step in steps:
        seconds = f"{step.seconds:7.1f} s" if step.seconds is not None else " " * 9
        click.echo(
            f"{step.label:<{width}}  {click.style(f'{step.status:<8}', fg=colours[step.status])}"
            f"{seconds}  {(step.fingerprint or '')[:12]:<12}  {'; '.join(step.why)}".rstrip()
        )
    if base:
        click.echo("\n" + "\n".join(base))
    if memory:
        _show_memory(memory)
    todo = [step.seconds for step in steps if step.status != "cached"]
    if todo and all(seconds is not None for seconds in todo):
        click.echo(f"\nthe stages to run took {sum(s for s in todo if s is not None):.0f} s the last time")


def _show_memory(memory: PlannedMemory) -> None:
    from loraflow.training.memory_parts import describe

    kind = "GPU memory" if memory.device == "cuda" else "memory"
    click.echo(f"\n{kind} in GiB, estimated:")
    for name, parts in (("training", memory.training), ("evaluation", memory.evaluation)):
        click.echo(f"  {name:<11}{parts.total / 2**30:6.1f}  {describe(parts.as_bytes())}")
    if memory.device == "cuda":
        click.echo(f"  training needs {memory.least / 2**30:.1f} at least, with activation checkpointing")
