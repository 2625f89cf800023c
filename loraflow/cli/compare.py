"""`loraflow compare`: the models of two or three runs beside each other."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import click

from loraflow.cli import json_option, quiet_logging, store_option
from loraflow.failures import BadConfig
from loraflow.store import open_store


@click.command()
@click.argument("models", nargs=-1, required=True, metavar="A B [C]")
@click.option("--html", type=click.Path(dir_okay=False), help="Write a page with everything to this file.")
@store_option
@json_option
def compare(models: tuple[str, ...], html: str | None, store: str, as_json: bool) -> None:
    """Compare the models of two or three runs, or `champion`: B and C against A, on the held-out rows that both have.

    Shown are the scores, paired differences with bounds, changed settings, and the rows that changed most. No look at the
    held-out rows is counted, so do not choose a model by it: that is what the gate is for.
    """
    quiet_logging()
    if not 2 <= len(models) <= 3:
        raise BadConfig(
            "Two or three models can be compared.",
            where="loraflow compare",
            got=str(len(models)),
            next_step="`loraflow runs` lists the runs",
        )
    from loraflow.serving.compared import compare_models
    from loraflow.serving.comparison_page import html_page, terminal_lines

    comparison = compare_models(open_store(store), models)
    if html is not None:
        Path(html).write_text(html_page(comparison), encoding="utf-8")
    if as_json:
        pairings = [dataclasses.asdict(pairing) for pairing in comparison.pairings]
        click.echo(json.dumps({"models": [*models], "against_first": pairings}, ensure_ascii=False))
        return
    for line in terminal_lines(comparison):
        click.echo(line)
    if html is not None:
        click.echo(f"page: {html}")
