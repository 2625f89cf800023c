"""`loraflow runs, verify, gc`: list the runs of the store, check its artifacts, and clean it up."""

from __future__ import annotations

import json
from pathlib import Path

import click

from loraflow.cli import json_option, model_option, quiet_logging, store_option
from loraflow.failures import BadConfig, CorruptArtifact, DamagedLog
from loraflow.registry.log import PromotionLog
from loraflow.store import Store, open_store


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
@click.argument("what", required=False)
@click.option("--deep", is_flag=True, help="Read every byte and compare it with the manifests.")
@click.option(
    "--rederive", is_flag=True, help="Check all that WHAT was made from, and merge base and adapter again, bit for bit."
)
@click.option(
    "--signers",
    type=click.Path(dir_okay=False, path_type=Path),
    help="Check that all entries of the promotion logs were signed by a key in this file: `NAME KEY-TYPE KEY` on each line.",
)
@model_option
@store_option
def verify(what: str | None, deep: bool, rederive: bool, signers: Path | None, model: str | None, store: str) -> None:
    """Check the manifests, names and sizes of all artifacts, with --deep also their contents. Quarantine damaged ones.

    With --rederive, WHAT is `champion`, `champion:NAME` or a run's id. Every byte of the artifacts that it was made from is
    hashed, from the dataset's md5 on, and the merge is computed again in a temporary folder ($TMPDIR). Nothing is written.

    The promotion logs and the records of looks and deals are checked too, and that the models which they need are there.

    Exit status 1 if an artifact or a log is damaged, or a champion or its rollback target is missing.
    """
    quiet_logging()
    opened = open_store(store)
    if rederive != (what is not None) or (rederive and deep) or (model and not rederive):
        raise BadConfig(
            "--rederive is about one model, and the other checks are about the whole store.",
            where="loraflow verify",
            next_step="`loraflow verify champion --rederive`, or `loraflow verify --deep`",
        )
    if what is not None:
        from loraflow.cli.rederive import verify_model

        verify_model(opened, what, model)
        return
    damaged = checked = 0
    with opened.reader_lock():
        for ref in opened.artifacts():
            checked += 1
            problems = opened.verify(ref) if deep else opened.check(ref)
            if problems:
                quarantined = opened.quarantine(ref, problems)
                if quarantined is None:
                    click.echo(f"intact   {ref}: recomputed meanwhile; it was damaged: {'; '.join(problems)}", err=True)
                    continue
                damaged += 1
                click.echo(f"damaged  {ref}: {'; '.join(problems)}; quarantined as {quarantined}", err=True)
        missing = _missing_champions(opened, signers)
    click.echo(f"{checked} artifacts checked{' byte by byte' if deep else ''}, {damaged} damaged")
    if damaged:
        raise CorruptArtifact(
            "The store had damaged artifacts. They are quarantined.",
            where=opened.uri,
            next_step=missing or "run the recipe again: it recomputes them",
        )
    if missing:
        raise CorruptArtifact(
            "The store lacks a champion or a rollback target, or a log or record is damaged.",
            where=opened.uri,
            next_step=missing,
        )


def _check_signature(log: PromotionLog, signers: Path) -> None:
    from loraflow.registry.runs import LogHead
    from loraflow.registry.signature import check_signature
    from loraflow.registry.verified_heads import remember_verified, require_not_older

    hashes = [entry.hash for entry in log.entries()]
    require_not_older(log.store, log.model, hashes, signers)
    signed = check_signature(log.store, log.model, hashes, signers)
    remember_verified(log.store, log.model, LogHead(seq=signed.entries, hash=hashes[signed.entries - 1]), signers)
    if signed.entries < len(hashes):
        raise DamagedLog(
            "Entries of the promotion log are not signed.",
            where=f"{log.store.uri}/{log.folder}/log",
            got=f"entries {signed.entries + 1} to {len(hashes)} are not signed",
            next_step="check them with `loraflow registry`; if they are right, `loraflow registry sign --key FILE`",
        )
    click.echo(f"{signed.entries} entries of {log.model} are signed by {signed.signer}")


def _missing_champions(store: Store, signers: Path | None) -> str:
    """Report damaged promotion logs and missing champions; return the next step for the first that is needed."""
    from loraflow.registry.champions import missing_models
    from loraflow.registry.deals import DealRecord, models_with_deals
    from loraflow.registry.log import models
    from loraflow.registry.looks import LookRecord, models_with_looks
    from loraflow.registry.rebuild import how_to_rebuild
    from loraflow.registry.runs import damaged_runs
    from loraflow.registry.signature import signed_models
    from loraflow.registry.verified_heads import verified_models

    steps = []
    signed = signed_models(store) | verified_models(store, signers) if signers is not None else set()
    found_models = sorted({*models(store, of_runs=True), *signed})
    if signers is not None and not found_models:
        click.echo("damaged  there is no promotion log, and no signature of one", err=True)
        steps.append("restore the store's registry and anchors from a backup (docs/backup.md)")
    for model in found_models:
        try:
            log = PromotionLog(store, model)
            if (log.entries(all_runs=True) or model in signed) and signers is not None:
                _check_signature(log, signers)
            for found in missing_models(log):
                what = f"{found.ref} of {model}, entry {found.entry.seq}: {'; '.join(found.problems[:3])}"
                click.echo(
                    f"missing  {what}{'' if found.is_needed else ' (an earlier champion, or only its adapter)'}",
                    err=True,
                )
                if found.is_needed:
                    steps.append(how_to_rebuild(store, found.ref))
        except CorruptArtifact as failure:
            click.echo(f"damaged  promotion log of {model}: {failure.got or failure.what}", err=True)
            steps.append(failure.next_step)
    looks = [("looks", name, LookRecord(store, name).check) for name in sorted(models_with_looks(store))]
    deals = [("deals", name, DealRecord(store, name).check) for name in models_with_deals(store)]
    for kind, model, check in looks + deals:
        try:
            check()
        except CorruptArtifact as failure:
            click.echo(f"damaged  record of {kind} of {model}: {failure.got}", err=True)
            steps.append(failure.next_step)
    for name, problem in damaged_runs(store).items():
        click.echo(f"damaged  {name}: {problem.got or problem.what}", err=True)
        steps.append(problem.next_step)
    return steps[0] if steps else ""


@click.command()
@store_option
@click.option("--keep", default=3, show_default=True, help="Merged models to keep beside the champions.")
@click.option(
    "--keep-champions",
    default=10,
    show_default=True,
    type=click.IntRange(min=2),
    help="Champions to keep for each registered model: the one in use, and those before it to roll back to.",
)
@click.option("--dry-run", is_flag=True, help="Show what would be removed, and remove nothing.")
def gc(store: str, keep: int, keep_champions: int, dry_run: bool) -> None:
    """Remove superseded artifacts, older merged models and stale work. Champions that a rollback can return to stay."""
    quiet_logging()
    from loraflow.registry.cleanup import remove_unused

    freed = 0
    items = remove_unused(open_store(store), keep=keep, keep_champions=keep_champions, dry_run=dry_run)
    for path, size, reason in items:
        freed += size
        click.echo(f"{'would remove' if dry_run else 'removed'}  {size / 2**20:9.1f} MiB  {path}  ({reason})")
    click.echo(f"{freed / 2**20:.1f} MiB {'could be' if dry_run else 'were'} freed")
