"""`loraflow run`: run the flow on this machine, and print tables of scores and stages at the end."""

from __future__ import annotations

import json
import logging
import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import click
from pydantic import JsonValue

from loraflow.cli import json_option, parse_overrides, set_option, stop_at_second_interrupt
from loraflow.stages import STAGES, check_names

if TYPE_CHECKING:
    from rich.table import Table

    from loraflow.evaluation.values import SetScores
    from loraflow.registry.runs import RowsSummary, RunSummary


@click.command()
@click.argument("recipe")
@set_option
@click.option(
    "--force",
    multiple=True,
    metavar="STAGE",
    help=f"Recompute this stage even if it is cached; repeat for several. STAGE is one of {', '.join(STAGES)}.",
)
@json_option
@click.option("--strict-gate", is_flag=True, help="Exit with 3 when nothing was promoted.")
@click.option("--dvclive", is_flag=True, help="Write scores, settings and curves to dvclive/, where DVC reads them.")
@click.option("--quiet", "-q", is_flag=True, help="Print only warnings and the final tables.")
def run(
    recipe: str,
    sets: tuple[str, ...],
    force: tuple[str, ...],
    as_json: bool,
    strict_gate: bool,
    dvclive: bool,
    quiet: bool,
) -> None:
    """Run RECIPE: dataset, tokens, adapter, merged model, scores, gate, registry."""
    overrides = parse_overrides(sets)
    if quiet:
        os.environ["PREFECT_LOGGING_LEVEL"] = "WARNING"
    from loraflow.config.recipe_text import recipes_read_once

    check_names(force, "--force")
    with recipes_read_once():
        summary, document = _run_flow(recipe, overrides, force, quiet)
        if dvclive:
            _write_dvclive(recipe, overrides, summary.run)
    finish(summary, document, as_json=as_json, strict_gate=strict_gate)


def finish(summary: RunSummary, document: dict[str, JsonValue], *, as_json: bool, strict_gate: bool) -> None:
    """Print the outcome of a run. With `strict_gate`, exit with 3 if nothing was promoted."""
    if as_json:
        click.echo(json.dumps(document, ensure_ascii=False))
    else:
        show(summary)
    if strict_gate and (summary.decision is None or summary.decision.verdict != "promote"):
        raise click.exceptions.Exit(3)


def _run_flow(
    recipe: str, overrides: dict[str, JsonValue], force: tuple[str, ...], quiet: bool
) -> tuple[RunSummary, dict[str, JsonValue]]:
    from loraflow.base.resolve import require_base
    from loraflow.config import load_recipe
    from loraflow.execution.worker_process import import_ahead
    from loraflow.tracking.dvclive import lost_with_experiment

    read = load_recipe(recipe, overrides)  # before prefect starts, so that a mistake is reported at once
    require_base(read.base)
    if lost := lost_with_experiment(Path.cwd(), read.runtime.store):
        click.echo(f"WARNING {lost}", err=True)
    import_ahead(read)
    from loraflow.flows.finetune import finetune

    return call_flow(finetune, {"recipe": recipe, "settings": overrides, "force": list(force)}, quiet=quiet)


def _write_dvclive(recipe: str, overrides: dict[str, JsonValue], run: str) -> None:
    from loraflow.config import load_recipe
    from loraflow.registry.runs import read_run
    from loraflow.store import open_store
    from loraflow.tracking.dvclive import write_dvclive

    store = open_store(load_recipe(recipe, overrides).runtime.store)
    record = read_run(store, run)
    if record is not None:
        write_dvclive(store, record, Path("dvclive"))


SIDES = ("base", "tuned", "champion")


def show(summary: RunSummary) -> None:
    """Print scores, stages, the gate's decision and the locations of the files."""
    from rich.console import Console

    console = Console(highlight=False)
    for set_name, tuned in (summary.metrics.get("tuned") or {}).items():
        console.print(_score_table(summary, set_name, tuned))
    if summary.rows is not None:
        console.print(_row_table(summary.rows))
        for note in summary.rows.notes:
            console.print(f"note: {note}", markup=False)
    console.print(_stage_table(summary))
    decision = summary.decision
    verdict = decision.verdict if decision else "none"
    entry = f" (entry {summary.registered})" if summary.registered else ""
    console.print(f"[bold]gate: {verdict}[/bold]{entry}")
    for reason in decision.reasons if decision else ():
        console.print(f"  {reason}", markup=False, soft_wrap=True)  # it can have names from the data
    if verdict == "undecided":
        steps = [*summary.advice, f"to promote it by hand: loraflow promote {summary.run} --reason …"]
        console.print("  Nothing was promoted. What can be done:")
        for step in steps:
            console.print(f"  - {step}", markup=False, soft_wrap=True)
    if summary.reserve is not None:
        console.print(f"reserve       {summary.reserve}", soft_wrap=True)
    console.print(f"adapter       {_relative_to_cwd(summary.adapter)}", soft_wrap=True)
    console.print(f"merged model  {_relative_to_cwd(summary.merged)}", soft_wrap=True)
    if published := summary.published:
        console.print(f"published     {published.url or f'no: {published.problem}'}", soft_wrap=True)
    model = "champion" if verdict == "promote" else summary.run
    console.print(f"next          loraflow chat {model}   ·   loraflow show {summary.run}", soft_wrap=True)


def _score_table(summary: RunSummary, set_name: str, tuned: SetScores) -> Table:
    rows = next(iter(tuned.values())).n
    table = _table(f"{summary.recipe}: {set_name}, {rows} rows", "metric", *SIDES, right=SIDES)
    for name in tuned:
        cells = [(summary.metrics.get(side) or {}).get(set_name, {}).get(name) for side in SIDES]
        table.add_row(name, *["" if cell is None else cell.text("{:.3f}  {:.3f}–{:.3f}") for cell in cells])
    return table


def _table(title: str, *names: str, right: Sequence[str] = ()) -> Table:
    """Return an empty table with these columns; the values of those in `right` end at the right."""
    from rich.table import Table

    table = Table(title=title, title_justify="left")
    for name in names:
        table.add_column(name, justify="right" if name in right else "left")
    return table


def _row_table(rows: RowsSummary) -> Table:
    table = _table("rows of the dataset", "rows", "", right=[""])
    for count in rows.counts:
        table.add_row(count.what, f"{count.rows:,}")
    return table


def _stage_table(summary: RunSummary) -> Table:
    table = _table("stages", "stage", "state", "seconds", "fingerprint", right=["seconds"])
    for stage in summary.stages:
        table.add_row(stage.stage, stage.state, f"{stage.seconds:.1f}", stage.fingerprint[:12])
    return table


def _relative_to_cwd(path: str) -> str:
    here = Path.cwd()
    return str(Path(path).relative_to(here)) if Path(path).is_relative_to(here) else path


def call_flow(
    flow: Callable[..., dict[str, JsonValue]], parameters: Mapping[str, JsonValue], *, quiet: bool
) -> tuple[RunSummary, dict[str, JsonValue]]:
    """Call a flow, with a temporary server if none is configured; return its summary, also as the JSON document.

    Raises:
        Failure: the flow's own, or the server was lost.
    """
    from loraflow.flows.server.temporary_server import prepare_server
    from loraflow.registry.runs import RunSummary
    from loraflow.tasks.failure_log import is_server_error, server_lost, show_failures_once

    logging.getLogger("httpx").setLevel(logging.WARNING)
    logging.getLogger("loraflow").setLevel(logging.WARNING if quiet else logging.INFO)
    show_failures_once()
    stop_at_second_interrupt()
    prepare_server()
    try:
        document = flow(**parameters)
    except Exception as error:
        if is_server_error(error):
            raise server_lost(error) from error
        raise
    return RunSummary.model_validate(document), document
