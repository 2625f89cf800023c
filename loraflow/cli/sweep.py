"""`loraflow sweep`: train a recipe with several settings, and take the best adapter to the gate."""

from __future__ import annotations

import json
import os
from typing import TYPE_CHECKING

import click

from loraflow.cli import json_option, parse_overrides, quiet_logging, set_option
from loraflow.config.grid import MAX_TRIALS, check_grid, parse_grid

if TYPE_CHECKING:
    from pydantic import JsonValue

    from loraflow.config.grid import Grid
    from loraflow.config.load import RecipeFile
    from loraflow.execution.sweep import Trial
    from loraflow.execution.sweep_plan import SweepPlan
    from loraflow.registry.sweeps import SweepRecord


@click.command()
@click.argument("recipe")
@click.option(
    "--grid",
    "grids",
    multiple=True,
    metavar="KEY=VALUE,VALUE",
    help="Values to try for a key of the recipe, such as peft_config.r=8,16; repeat for several keys.",
)
@click.option(
    "--seeds",
    type=click.IntRange(min=1),
    default=1,
    show_default=True,
    help="Train each combination with this many seeds, and compare the means.",
)
@set_option
@click.option("--plan", "plans", is_flag=True, help="Only show the trials, and which of them are trained already.")
@click.option(
    "--max-trials",
    type=click.IntRange(min=1),
    default=MAX_TRIALS,
    show_default=True,
    help="Refuse a sweep with more trials than this.",
)
@json_option
@click.option("--strict-gate", is_flag=True, help="Exit with 3 when nothing was promoted.")
@click.option("--quiet", "-q", is_flag=True, help="Print only warnings and the final tables.")
def sweep(
    recipe: str,
    grids: tuple[str, ...],
    seeds: int,
    sets: tuple[str, ...],
    plans: bool,
    max_trials: int,
    as_json: bool,
    strict_gate: bool,
    quiet: bool,
) -> None:
    """Train RECIPE with each combination of settings, and take the one with the lowest validation loss to the gate."""
    overrides, grid = parse_overrides(sets), parse_grid(grids)
    checked = check_grid(grid, seeds, overrides, max_trials)
    if quiet:
        os.environ["PREFECT_LOGGING_LEVEL"] = "WARNING"
    if plans:
        quiet_logging()
    from loraflow.base.resolve import require_base
    from loraflow.config.load import read_recipe
    from loraflow.config.recipe_text import recipes_read_once

    with recipes_read_once():
        # Before prefect starts, so that a mistake is reported at once.
        read = read_recipe(recipe, overrides)
        if plans:
            from loraflow.execution.sweep_plan import plan_sweep

            planned = plan_sweep(_make_trials(read, checked), [*grid])
            click.echo(json.dumps(planned.to_json(), ensure_ascii=False)) if as_json else _show_plan(planned)
            return
        require_base(read.recipe.base)
        if not read.recipe.data.add:  # the flow versions the dataset first, then checks the same
            _make_trials(read, checked)
        from loraflow.cli.run import call_flow, finish
        from loraflow.flows.sweep import sweep as flow

        parameters: dict[str, JsonValue] = {
            "recipe": recipe, "grid": grid, "seeds": seeds, "settings": overrides, "max_trials": max_trials,
        }  # fmt: skip
        summary, document = call_flow(flow, parameters, quiet=quiet)
    if summary.sweep is not None and not as_json:
        show_trials(summary.sweep)
    finish(summary, document, as_json=as_json, strict_gate=strict_gate)


def _make_trials(read: RecipeFile, grid: Grid) -> list[Trial]:
    from loraflow.execution.sweep import make_trials
    from loraflow.execution.workspace import Workspace

    workspace = Workspace(read.recipe)
    trials = make_trials(read, grid, workspace)
    workspace.save()
    return trials


def _show_plan(planned: SweepPlan) -> None:
    from loraflow.cli.plan import seconds_to_run, step_line
    from loraflow.stages import TRAIN_GROUP

    width = max(len(trial.label) for trial in planned.trials)
    for trial in planned.trials:
        loss = f"  validation loss {trial.loss:.4f}" if trial.loss is not None else ""
        click.echo(f"{step_line(trial, width)}{loss}".rstrip())
    click.echo()
    for note in planned.notes:
        click.echo(note)
    to_run = [f"{count} x {label}" for label, count in planned.to_run.items() if count]
    to_run += [f"{count} x {way}" for way, count in planned.trainings.items()]
    before = f"to run: {', '.join(to_run)}; then" if to_run else "all trials are trained;"
    click.echo(f"{before} the chosen trial is merged, scored, and taken to the gate")
    if (total := seconds_to_run(planned.trials)) is not None:
        apart = ", one after another" if TRAIN_GROUP.name in planned.trainings else ""
        click.echo(f"trainings like these took {total:.0f} s the last time{apart}")


def show_trials(record: SweepRecord) -> None:
    """Print the table of trials, the best combination first, and how much of its lead may be chance."""
    from rich.console import Console
    from rich.table import Table

    from loraflow.reporting.sections import sweep_table

    console = Console(highlight=False)
    table = Table(title="trials, ordered by validation loss", title_justify="left")
    header, rows = sweep_table(record)
    for name in header:
        table.add_column(name, justify="right")
    for row in rows:
        table.add_row(*row.cells, style="bold" if row.is_chosen else None)
    console.print(table)
    for text in (*record.notes, *(row.problem for row in rows if row.problem)):
        console.print(f"note: {text}", markup=False)
    console.print(f"chosen        {record.chosen}", markup=False, soft_wrap=True)
