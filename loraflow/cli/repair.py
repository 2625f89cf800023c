"""`loraflow repair`: recompute what the store lost."""

from __future__ import annotations

import sys

import click

from loraflow.cli import quiet_logging, store_option
from loraflow.failures import CorruptArtifact, Failure
from loraflow.store import open_store


@click.command()
@click.option("--yes", is_flag=True, help="Recompute without asking.")
@store_option
def repair(yes: bool, store: str) -> None:
    """Find damaged and missing artifacts, and recompute those that a recorded run can compute again.

    All artifacts are hashed, and damaged ones quarantined, as by `loraflow verify --deep`. Then the stages to recompute and
    the seconds that they took are listed, and what cannot be recomputed. Nothing is decided or promoted.

    Exit status 1 if something is left that is damaged or missing.
    """
    quiet_logging()
    from loraflow.execution.repair import find_loss, recompute, total_seconds

    opened = open_store(store)
    loss = find_loss(opened)
    for lost in loss.repairable:
        took = "unknown time" if lost.seconds is None else f"{lost.seconds:.1f} s"
        run = lost.record.run if lost.record else ""
        click.echo(f"recompute  {lost.label:<17} {lost.ref}  took {took} in run {run}  ({lost.problem})")
    for lost in loss.irreparable:
        click.echo(
            f"lost       {lost.label or lost.ref.stage:<17} {lost.ref}  ({lost.problem})\n           {lost.why_not}"
        )
    for failure in loss.logs:
        click.echo(f"lost       promotion log     {failure.where}  ({failure.got})\n           {failure.next_step}")
    left = len(loss.irreparable) + len(loss.logs)
    if loss.repairable:
        stages = len(loss.repairable)
        cost = f"{stages} stage{'s' if stages > 1 else ''}, about {total_seconds(loss.repairable):.1f} s"
        click.echo(f"to recompute: {cost}, and whatever they need that is missing too")
        if not yes and not _confirmed():
            raise CorruptArtifact(
                "Nothing was recomputed.",
                where=opened.uri,
                got=f"{stages + left} artifacts and logs are damaged or missing",
                next_step="loraflow repair --yes",
            )
    for lost in loss.repairable:
        try:
            recompute(opened, lost)
            click.echo(f"recomputed {lost.label:<17} {lost.ref}")
        except Failure as failure:
            left += 1
            click.echo(f"failed     {lost.label:<17} {lost.ref}\n{failure}", err=True)
    if left:
        raise CorruptArtifact(
            "Not everything could be recomputed.",
            where=opened.uri,
            got=f"{left} artifacts and logs are damaged or missing",
            next_step="see above; a backup of the store has them (docs/backup.md)",
        )
    click.echo("the store is complete" if loss.repairable else "nothing is damaged or missing")


def _confirmed() -> bool:
    """Ask the person at the terminal. Without a terminal, the answer is no."""
    return sys.stdin.isatty() and click.confirm("Recompute now?")
