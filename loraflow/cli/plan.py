"""`loraflow plan`: whether each stage is cached or will run, and why. Imports no prefect, and torch only if train runs."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import click
from pydantic import JsonValue

from loraflow.cli import json_option, parse_overrides, quiet_logging, set_option

if TYPE_CHECKING:
    from loraflow.evaluation.power import GatePower
    from loraflow.execution.plan import PlannedStep
    from loraflow.execution.plan_notes import PlannedMemory
    from loraflow.execution.sweep_plan import PlannedTrial
    from loraflow.execution.workspace import Workspace
    from loraflow.registry.reserve import ReserveState


@click.command()
@click.argument("recipe")
@set_option
@click.option("--force", multiple=True, metavar="STAGE", help="Plan as if `loraflow run` had this --force.")
@json_option
def plan(recipe: str, sets: tuple[str, ...], force: tuple[str, ...], as_json: bool) -> None:
    """Show for each stage of RECIPE whether it is cached or will run, and why."""
    quiet_logging()
    from loraflow.config import load_recipe
    from loraflow.execution.workspace import Workspace
    from loraflow.stages import check_names

    check_names(force, "--force")
    planned = _plan_run(Workspace(load_recipe(recipe, parse_overrides(sets))), force)
    if as_json:
        click.echo(json.dumps(_document(planned), ensure_ascii=False))
    else:
        _show_run(planned)


@dataclass
class _PlannedRun:
    """What `loraflow plan` shows."""

    steps: list[PlannedStep]
    memory: PlannedMemory | None  # None: train is cached
    base: list[str]
    sources: list[str]
    note: str  # about the base's positions
    reserve: ReserveState | None = None
    power: GatePower | None = None  # what the held-out rows can show
    slices: list[str] = field(default_factory=list)
    problem: str = ""  # why the gate cannot decide
    forgetting: list[str] = field(default_factory=list)
    tokens: list[str] = field(default_factory=list)  # warnings about the tokens of base and champion


def _plan_run(workspace: Workspace, force: tuple[str, ...]) -> _PlannedRun:
    from loraflow.execution.plan import base_report, gate_power, plan, too_few_positions
    from loraflow.execution.plan_notes import (
        forgetting_lines,
        planned_memory,
        planned_sources,
        slice_power_lines,
        token_lines,
    )
    from loraflow.failures import Failure
    from loraflow.stages import TRAIN

    steps = plan(workspace, force)
    workspace.save()
    trains = any(step.stage == TRAIN.name and step.status != "cached" for step in steps)
    planned = _PlannedRun(
        steps=steps,
        memory=planned_memory(workspace) if trains else None,
        note=too_few_positions(workspace) if trains else "",
        base=base_report(workspace) if trains else [],
        sources=planned_sources(workspace),
    )
    try:
        planned.power = gate_power(workspace)
        planned.slices = slice_power_lines(workspace)
        planned.tokens = token_lines(workspace)
    except Failure as failure:  # planning continues, as for a champion that is missing
        planned.problem = f"will fail: {failure.what}"
    planned.forgetting = forgetting_lines(workspace)
    planned.reserve = workspace.reserve
    return planned


def _document(planned: _PlannedRun) -> dict[str, JsonValue]:
    """Return the plan as the document of --json. Parts that a run does not have are left out."""
    document: dict[str, JsonValue] = {"stages": [step.to_json() for step in planned.steps]}
    if memory := planned.memory:
        document["memory_bytes"] = {
            "device": memory.device,
            **({"least": round(memory.least)} if memory.device == "cuda" else {}),
            "full_speed": round(memory.training.total),
            "training": {**memory.training.as_bytes()},
            "evaluation": {**memory.evaluation.as_bytes()},
        }
    if planned.sources:
        document["sources"] = [*planned.sources]
    if planned.base:
        document["base"] = [line.strip() for line in planned.base]
    if planned.note:
        document["note"] = planned.note
    if planned.reserve is not None:
        document["reserve"] = planned.reserve.model_dump()
    if planned.forgetting:
        document["forgetting"] = [line.strip() for line in planned.forgetting]
    if planned.tokens:
        document["champion"] = [*planned.tokens]
    if power := planned.power:
        document["gate"] = {
            "rows": power.rows,
            "look": power.look,
            "level": power.level,
            "shows": [*power.lines()[1:], *planned.slices],
        }
    if planned.problem:
        document["gate"] = {"problem": planned.problem}
    return document


def _show_run(planned: _PlannedRun) -> None:
    _show_steps(planned.steps, planned.memory, planned.base)
    for line in planned.sources:
        click.echo(line)
    if planned.note:
        click.echo(f"note: {planned.note}")
    if planned.problem:
        click.secho(f"\ngate: {planned.problem}", fg="yellow")
    if planned.reserve is not None:
        click.echo(f"\nreserve after this run: {planned.reserve}")
    if planned.power:
        click.echo()
        lines = [*planned.power.lines(), *planned.slices]
        click.secho("\n".join(lines), fg="yellow" if planned.slices or planned.power.is_warning() else None)
    if planned.forgetting:
        click.echo("\n".join(planned.forgetting))
    for line in planned.tokens:
        click.secho(f"\n{line}", fg="yellow")


def _show_steps(steps: list[PlannedStep], memory: PlannedMemory | None, base: list[str]) -> None:
    width = max(len(step.label) for step in steps)
    for step in steps:
        click.echo(step_line(step, width).rstrip())
    if base:
        click.echo("\n" + "\n".join(base))
    if memory:
        _show_memory(memory)
    if (seconds := seconds_to_run(steps)) is not None:
        click.echo(f"\nthe stages to run took {seconds:.0f} s the last time")


def step_line(step: PlannedStep | PlannedTrial, width: int) -> str:
    """Return a line about a stage or trial, whose label has this width."""
    colours = {"cached": "green", "runs": "yellow", "depends": "cyan"}
    seconds = f"{step.seconds:7.1f} s" if step.seconds is not None else " " * 9
    return (
        f"{step.label:<{width}}  {click.style(f'{step.status:<8}', fg=colours[step.status])}"
        f"{seconds}  {(step.fingerprint or '')[:12]:<12}  {'; '.join(step.why)}"
    )


def seconds_to_run(steps: Sequence[PlannedStep | PlannedTrial]) -> float | None:
    """Return how long those that are not cached took the last time; None if that is not known of all, or all are cached."""
    times = [step.seconds for step in steps if step.status != "cached"]
    known = [seconds for seconds in times if seconds is not None]
    return sum(known) if times and len(known) == len(times) else None


def _show_memory(memory: PlannedMemory) -> None:
    from loraflow.training.memory import describe

    kind = "GPU memory" if memory.device == "cuda" else "memory"
    click.echo(f"\n{kind} in GiB, estimated:")
    for name, parts in (("training", memory.training), ("evaluation", memory.evaluation)):
        click.echo(f"  {name:<11}{parts.total / 2**30:6.1f}  {describe(parts.as_bytes())}")
    if memory.device == "cuda":
        click.echo(f"  training needs {memory.least / 2**30:.1f} at least, with activation checkpointing")
