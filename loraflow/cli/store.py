"""`loraflow runs, verify, gc`: list the runs of the store, check its artifacts, and clean it up."""

from __future__ import annotations

import json

import click

from loraflow.cli import json_option, quiet_logging, store_option
from loraflow.failures import CorruptArtifact
from loraflow.store import open_store


@click.command()
@store_option
@json_option
def runs(store: str, as_json: bool) -> None:
    """List all runs, oldest first."""
    quiet_logging()
    from loraflow.registry.runs import read_runs

    found = read_runs(open_store(store))
    if as_json:
        click.echo(json.dumps([run.model_dump() for run in found], ensure_ascii=False))
        return
    if not found:
        click.echo(f"no runs in {store}; a recipe's runtime.store may name another: --store", err=True)
    for run in found:
        computed = sum(stage.state == "computed" for stage in run.stages)
        decision = run.summary.decision if run.summary else None
        outcome = decision.verdict if decision else run.error or ""
        click.echo(
            f"{run.run}  {run.state:<6}  {run.recipe:<16}  {run.seconds:8.1f} s  "
            f"{computed} of {len(run.stages)} stages computed  {outcome}"
        )


@click.command()
@click.option("--deep", is_flag=True, help="Read every byte and compare it with the manifests.")
@store_option
def verify(deep: bool, store: str) -> None:
    """Check the manifests, names and sizes of all artifacts, with --deep also their contents. Quarantine damaged ones.

    Exit status 1 if an artifact is damaged.
    """
    quiet_logging()
    opened = open_store(store)
    damaged = checked = 0
    with opened.reader_lock():
        for ref in opened.artifacts():
            checked += 1
            problems = opened.verify(ref) if deep else opened.check(ref)
            if problems:
                damaged += 1
                quarantined = opened.quarantine(ref, problems)
                click.echo(f"damaged  {ref}: {'; '.join(problems)}; quarantined as {quarantined}", err=True)
    click.echo(f"{checked} artifacts checked{' byte by byte' if deep else ''}, {damaged} damaged")
    if damaged:
        raise CorruptArtifact(
            "The store had damaged artifacts. They are quarantined.",
            where=opened.uri,
            next_step="run the recipe again: it recomputes them",
        )


@click.command()
@store_option
@click.option(
    "--keep", default=3, show_default=True, help="Merged models to keep beside the champion and its rollback target."
)
@click.option("--dry-run", is_flag=True, help="Show what would be removed, and remove nothing.")
def gc(store: str, keep: int, dry_run: bool) -> None:
    """Remove superseded artifacts, older merged models and stale work. The champion and its rollback target are kept."""
    quiet_logging()
    from loraflow.registry.cleanup import remove_unused

    freed = 0
    for path, size, reason in remove_unused(open_store(store), keep=keep, dry_run=dry_run):
        freed += size
        click.echo(f"{'would remove' if dry_run else 'removed'}  {size / 2**20:9.1f} MiB  {path}  ({reason})")
    click.echo(f"{freed / 2**20:.1f} MiB {'could be' if dry_run else 'were'} freed")
