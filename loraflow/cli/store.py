"""`loraflow runs, verify, reproduce, repair, gc, backup`: list the runs of a store, check, recompute, clean and copy it."""

import json
import sys
import time
from pathlib import Path

import click

from loraflow.cli import json_option, model_option, quiet_logging, store_option
from loraflow.failures import BadConfig, CorruptArtifact, DamagedLog, Failure, LimitExceeded
from loraflow.registry.log import PromotionLog, models
from loraflow.registry.rebuild import UNKNOWN, how_to_rebuild
from loraflow.registry.runs import LogHead, damaged_runs, read_run, read_runs
from loraflow.store import Store, open_store
from loraflow.store.artifact import result_problems


@click.command()
@store_option
@json_option
def runs(store: str, as_json: bool) -> None:
    """List all runs, oldest first."""
    quiet_logging()
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

    With --rederive, WHAT is `champion`, `champion:NAME` or a run's id. All artifacts behind the model are hashed,
    from the dataset on. The merge is computed again in a temporary folder ($TMPDIR). Nothing is written to the store.

    Also checked are the promotion logs, the records of looks and deals, and whether the models that they name exist.

    Exit status 1 if an artifact or a log is damaged, or a champion or its rollback target is missing.
    """
    quiet_logging()
    opened = open_store(store)
    if rederive != (what is not None) or (rederive and deep) or (model and not rederive):
        raise BadConfig(
            "A model is verified with --rederive, and the whole store without a model.",
            where="loraflow verify",
            next_step="`loraflow verify champion --rederive`, or `loraflow verify --deep`",
        )
    if what is not None:
        verify_model(opened, what, model)
        return
    damaged = checked = 0
    with opened.reader_lock():
        for ref in opened.artifacts():
            checked += 1
            problems = opened.verify(ref) if deep else opened.check(ref)
            if problems and not result_problems(problems):
                how = how_to_rebuild(opened, ref, f" --force {ref.stage}")
                how = "" if how == UNKNOWN else f"; if you need it, {how}: the whole stage is computed again"
                click.echo(f"warning  {ref}: {'; '.join(problems)}; no result depends on it{how}", err=True)
            elif problems:
                quarantined = opened.quarantine(ref, problems)
                if quarantined is None:
                    click.echo(f"intact   {ref}: recomputed meanwhile; it was damaged: {'; '.join(problems)}", err=True)
                    continue
                damaged += 1
                click.echo(f"damaged  {ref}: {'; '.join(problems)}; quarantined as {quarantined}", err=True)
        missing = _missing_champions(opened, signers)
    click.echo(f"{checked} artifacts checked{' byte by byte' if deep else ''}, {damaged} damaged")
    if damaged or missing:
        raise CorruptArtifact(
            "The store had damaged artifacts. They are quarantined."
            if damaged
            else "The store lacks a champion or a rollback target, or a log or record is damaged.",
            where=opened.uri,
            next_step=missing or "run the recipe again: it recomputes them",
        )


def _check_signature(log: PromotionLog, signers: Path) -> None:
    from loraflow.registry.signature import check_signature, remember_verified, require_not_older

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
    from loraflow.registry.anchor import models_with
    from loraflow.registry.champions import missing_models
    from loraflow.registry.deals import DealRecord
    from loraflow.registry.looks import LookRecord
    from loraflow.registry.signature import signed_models, verified_models

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
    for kind, record in (("looks", LookRecord), ("deals", DealRecord)):
        for model in models_with(kind, store):
            try:
                record(store, model).check()
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
@click.option("--dry-run", is_flag=True, help="Show what would be removed; remove nothing.")
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


def verify_model(store: Store, what: str, model: str | None) -> None:
    """Print what holds of a model's lineage, and merge it again.

    Raises:
        BadConfig: there is no such run or champion.
        CorruptArtifact: something does not hold.
    """
    from loraflow.execution.rederive import rederive
    from loraflow.registry.rebuild import how_to_rebuild
    from loraflow.serving.models import named_champion

    if (champion := named_champion(store, what, model)) is not None:
        merged = champion.merged
    else:
        record = read_run(store, what)
        stage = record.stage("merge") if record else None
        if stage is None:
            raise BadConfig(
                "There is no champion or run of this name with a model.",
                where=what,
                next_step="`loraflow runs` lists the runs",
            )
        merged = stage.ref(store)
    started, failed = time.perf_counter(), 0
    with store.reader_lock():
        for check in rederive(store, merged):
            failed += bool(check.problems)
            word = "differs" if check.problems else "unknown" if check.unknown else "holds"
            detail = "; ".join(check.problems[:5]) or check.unknown
            click.echo(f"{word:<8} {check.what}{f' ({detail})' if detail else ''}")
    click.echo(f"{what}: {merged}, {failed} differences, {time.perf_counter() - started:.1f} s")
    if failed:
        raise CorruptArtifact(
            "The model does not match its recorded lineage.",
            where=store.location(merged),
            got=f"{failed} differences, see above",
            next_step=f"`loraflow verify --deep` quarantines damaged artifacts; {how_to_rebuild(store, merged)}",
        )


@click.command()
@click.argument("run")
@click.option("--into", required=True, help="The store to compute in: a folder that does not exist yet.")
@store_option
@json_option
def reproduce(run: str, into: str, store: str, as_json: bool) -> None:
    """Run RUN again with its recorded recipe and data, in a fresh store, and compare the digest of each stage.

    For each result that differs, the changed settings, versions and hardware are named. Nothing is decided or promoted.

    Exit status 1 if a result differs.
    """
    quiet_logging()
    from loraflow.execution.rederive import reproduce as run_again
    from loraflow.registry.runs import require_run

    opened = open_store(store)
    record = require_run(opened, run)
    results = []
    for result in run_again(opened, record, into):
        results.append(result)
        if not as_json:
            click.echo(f"{'same' if result.is_same else 'differs':<8} {result.label:<17} {result.got}")
            for reason in result.reasons:
                click.echo(f"{'':<8}   {reason}")
    if not results:
        raise BadConfig(
            "The record of this run has no stages.",
            where=run,
            next_step="choose another run: `loraflow runs` lists them",
        )
    different = [result.label for result in results if not result.is_same]
    if as_json:
        values = [
            {
                "stage": item.label,
                "expected": item.expected,
                "got": item.got,
                "same": item.is_same,
                "reasons": [*item.reasons],
            }
            for item in results
        ]
        click.echo(json.dumps({"run": run, "stages": values}, ensure_ascii=False))
    if different:
        raise LimitExceeded(
            "The run was not reproduced bit for bit.",
            where=into,
            got=f"{len(different)} of {len(results)} stages differ: {', '.join(different)}",
            next_step="the reasons are listed above; the same versions on the same kind of machine give the same bytes",
        )
    if not as_json:
        click.echo(f"all {len(results)} stages are the same, bit for bit")
        if record.stage("merge") is None:
            click.echo("the run made no model: its record ends before merge")


@click.command()
@click.argument("target", type=click.Path(file_okay=False, path_type=Path))
@store_option
def backup(target: Path, store: str) -> None:
    """Copy the artifacts, promotion logs and run records of the store to the folder TARGET, which is a store itself.

    Runs may use the store meanwhile. Repeated with the same TARGET, it copies what is new. Each copy is hashed.
    """
    quiet_logging()
    from loraflow.registry.backup import back_up, require_complete

    opened = open_store(store)
    copied = failed = size = 0
    for item in back_up(opened, target):
        if item.problem:
            failed += 1
            click.echo(f"not copied  {item.ref}: {item.problem}", err=True)
        else:
            copied, size = copied + 1, size + item.size
    click.echo(
        f"{copied} artifacts copied ({size / 2**20:.1f} MiB), with the promotion logs and run records, to {target}"
    )
    require_complete(failed, opened, target)


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
    from loraflow.execution.repair import find_damage, recompute, total_seconds

    opened = open_store(store)
    damage = find_damage(opened)
    for lost in damage.repairable:
        took = "unknown time" if lost.seconds is None else f"{lost.seconds:.1f} s"
        run = lost.record.run if lost.record else ""
        click.echo(f"recompute  {lost.label:<17} {lost.ref}  took {took} in run {run}  ({lost.problem})")
    for lost in damage.irreparable:
        click.echo(
            f"lost       {lost.label or lost.ref.stage:<17} {lost.ref}  ({lost.problem})\n           {lost.why_not}"
        )
    for failure in damage.logs:
        click.echo(f"lost       promotion log     {failure.where}  ({failure.got})\n           {failure.next_step}")
    left = len(damage.irreparable) + len(damage.logs)
    if damage.repairable:
        stages = len(damage.repairable)
        cost = f"{stages} stage{'s' if stages > 1 else ''}, about {total_seconds(damage.repairable):.1f} s"
        click.echo(f"to recompute: {cost}, and their missing inputs")
        if not yes and not (sys.stdin.isatty() and click.confirm("Recompute now?")):
            raise CorruptArtifact(
                "Nothing was recomputed.",
                where=opened.uri,
                got=f"{stages + left} artifacts and logs are damaged or missing",
                next_step="loraflow repair --yes",
            )
    for lost in damage.repairable:
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
    click.echo("the store is complete" if damage.repairable else "nothing is damaged or missing")
