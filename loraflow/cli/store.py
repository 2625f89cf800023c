"""`loraflow runs, show, verify, gc`: what is in the store."""

from __future__ import annotations

import json
from typing import Any

import click

from loraflow.cli import json_option, quiet_logging
from loraflow.failures import BadConfig, CorruptArtifact
from loraflow.identity import short
from loraflow.store import Store, open_store

store_option = click.option(
    "--store", default=".loraflow/store", show_default=True, help="The store: a folder, or s3://bucket/prefix."
)


def read_runs(store: Store) -> list[dict[str, Any]]:
    """Return the records of all runs, oldest first."""
    return [json.loads(text) for text in store.read_documents("runs/", ".json").values()]


@click.command()
@store_option
@json_option
def runs(store: str, as_json: bool) -> None:
    """List what was run, oldest first."""
    found = read_runs(open_store(store))
    if as_json:
        click.echo(json.dumps(found, ensure_ascii=False))
        return
    if not found:
        click.echo(f"no runs in {store}; a recipe's runtime.store may name another: --store", err=True)
    for run in found:
        stages = run["stages"]
        computed = sum(stage["state"] == "computed" for stage in stages)
        verdict = (run["summary"] or {}).get("decision", {}).get("verdict", run["error"] or "")
        click.echo(f"{run['run']}  {run['state']:<6}  {run['recipe']:<16}  {run['seconds']:8.1f} s  "
                   f"{computed} of {len(stages)} stages computed  {verdict}")  # fmt: skip


@click.command()
@click.argument("what")
@store_option
@json_option
def show(what: str, store: str, as_json: bool) -> None:
    """Show WHAT: a run's id, `champion`, or the fingerprint or digest of an artifact (its beginning is enough)."""
    where = open_store(store)
    record = where.read_document(f"runs/{what}.json")
    if record is not None:
        report = None if as_json else where.read_document(f"runs/{what}.md")
        click.echo((report or record).decode())
        return
    for ref in where.artifacts():
        if len(what) >= 4 and (ref.fingerprint.startswith(what) or ref.digest.startswith(what)):
            manifest = where.manifest(ref)
            if as_json:
                click.echo(manifest.model_dump_json())
                return
            click.echo(f"{ref}   {where.location(ref)}")
            click.echo(f"  made      {manifest.provenance['started']} in {manifest.provenance['seconds']} s")
            click.echo(f"  size      {manifest.size:,} bytes in {len(manifest.files)} files")
            for name, one in manifest.inputs.items():
                click.echo(f"  input     {name}: {one['stage']}/{short(one['fingerprint'])}/{short(one['digest'])}")
            for key, value in manifest.figures.items():
                click.echo(f"  {key}: {value}")
            click.echo(f"  config    {json.dumps(manifest.payload['config'], ensure_ascii=False)}")
            return
    if what == "champion":
        raise BadConfig("`loraflow registry` shows the champion.", where=what, next_step="loraflow registry")
    raise BadConfig("There is no such run or artifact.", where=what, next_step="loraflow runs")


@click.command()
@click.option("--deep", is_flag=True, help="Read every byte and compare it with the manifests.")
@store_option
def verify(deep: bool, store: str) -> None:
    """Check the store: manifests, names and sizes; with --deep, contents. What is damaged is set aside."""
    quiet_logging()
    where = open_store(store)
    damaged = checked = 0
    with where.reader_lock():
        for ref in where.artifacts():
            checked += 1
            problems = where.verify(ref) if deep else where.check(ref)
            if problems:
                damaged += 1
                aside = where.quarantine(ref, problems)
                click.echo(f"damaged  {ref}: {'; '.join(problems)}; set aside as {aside}", err=True)
    click.echo(f"{checked} artifacts checked{' byte by byte' if deep else ''}, {damaged} damaged")
    if damaged:
        raise CorruptArtifact(
            "The store had damaged artifacts; they are set aside.", next_step="run again: they are made anew"
        )


@click.command()
@store_option
@click.option("--keep", default=3, show_default=True, help="Merged models to keep beside champion and rollback target.")
@click.option("--dry-run", is_flag=True, help="Say what would be removed.")
def gc(store: str, keep: int, dry_run: bool) -> None:
    """Remove what no run needs: all but the newest merged models, superseded artifacts, old unfinished work."""
    quiet_logging()
    from loraflow.registry.cleanup import remove_unused

    freed = 0
    for path, size, why in remove_unused(open_store(store), keep=keep, dry_run=dry_run):
        freed += size
        click.echo(f"{'would remove' if dry_run else 'removed'}  {size / 2**20:9.1f} MiB  {path}  ({why})")
    click.echo(f"{freed / 2**20:.1f} MiB {'could be' if dry_run else 'were'} freed")
