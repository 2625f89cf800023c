"""`loraflow run`: the whole flow, here, with a closing table."""

from __future__ import annotations

import json
import logging
import os
from pathlib import Path
from typing import Any

import click

from loraflow.cli import json_option, parse_sets, set_option


@click.command()
@click.argument("recipe")
@set_option
@click.option("--force", multiple=True, metavar="STAGE", help="Compute a stage again although it is cached.")
@json_option
@click.option("--strict-gate", is_flag=True, help="Exit with 3 when nothing was promoted.")
@click.option("--quiet", "-q", is_flag=True, help="Print warnings and the closing table only.")
def run(
    recipe: str, sets: tuple[str, ...], force: tuple[str, ...], as_json: bool, strict_gate: bool, quiet: bool
) -> None:
    """Run RECIPE: dataset, tokens, adapter, merged model, scores, gate, registry."""
    overrides = parse_sets(sets)
    if quiet:
        os.environ["PREFECT_LOGGING_LEVEL"] = "WARNING"
    from loraflow.config import load_recipe

    load_recipe(recipe, overrides)  # before prefect starts: a typing error should not cost its start
    from loraflow.flows.finetune import finetune
    from loraflow.flows.server.temporary_server import start_temporary_server

    logging.getLogger("httpx").setLevel(logging.WARNING)
    logging.getLogger("loraflow").setLevel(logging.WARNING if quiet else logging.INFO)
    start_temporary_server()
    summary = finetune(recipe=recipe, settings=overrides, force=list(force))  # type: ignore[arg-type]
    if as_json:
        click.echo(json.dumps(summary, ensure_ascii=False))
    else:
        show(summary)
    if strict_gate and summary["decision"]["verdict"] != "promote":
        raise click.exceptions.Exit(3)


def show(summary: dict[str, Any]) -> None:
    """Print the closing table: scores, stages, verdict, where things are."""
    from rich.console import Console
    from rich.table import Table

    console = Console(highlight=False)
    for set_name, tuned in summary["metrics"]["tuned"].items():
        n = next(iter(tuned.values()))["n"]
        table = Table(title=f"{summary['recipe']}: {set_name}, {n} rows", title_justify="left")
        table.add_column("metric")
        for side in ("base", "tuned", "champion"):
            table.add_column(side, justify="right")
        for name in tuned:
            table.add_row(name, *[_cell((summary["metrics"][side] or {}).get(set_name, {}).get(name))
                                  for side in ("base", "tuned", "champion")])  # fmt: skip
        console.print(table)
    stages = Table(title="stages", title_justify="left")
    for column, justify in (("stage", "left"), ("state", "left"), ("seconds", "right"), ("fingerprint", "left")):
        stages.add_column(column, justify=justify)  # type: ignore[arg-type]
    for one in summary["stages"]:
        stages.add_row(one["stage"], one["state"], f"{one['seconds']:.1f}", one["fingerprint"][:12])
    console.print(stages)
    verdict = summary["decision"]["verdict"]
    console.print(
        f"[bold]gate: {verdict}[/bold]" + (f" (entry {summary['registered']})" if summary["registered"] else "")
    )
    for reason in summary["decision"]["reasons"]:
        console.print(f"  {reason}")
    console.print(f"adapter       {_near(summary['adapter'])}", soft_wrap=True)
    console.print(f"merged model  {_near(summary['merged'])}", soft_wrap=True)
    if published := summary["published"]:
        console.print(f"published     {published.get('url') or 'not: ' + published['problem']}", soft_wrap=True)
    console.print(f"next          loraflow chat {'champion' if verdict == 'promote' else summary['run']}   ·   "
                  f"loraflow show {summary['run']}", soft_wrap=True)  # fmt: skip


def _cell(value: dict[str, float] | None) -> str:
    return "" if value is None else f"{value['value']:.3f}  {value['low']:.3f}–{value['high']:.3f}"


def _near(path: str) -> str:
    place = Path(path)
    return str(place.relative_to(Path.cwd())) if place.is_relative_to(Path.cwd()) else path
