"""`loraflow verify MODEL --rederive` and `loraflow reproduce`: derive a model again, and compare its bytes."""

from __future__ import annotations

import json
import time

import click

from loraflow.cli import json_option, quiet_logging, store_option
from loraflow.failures import BadConfig, CorruptArtifact, LimitExceeded
from loraflow.store import Store, open_store


def verify_model(store: Store, what: str, model: str | None) -> None:
    """Print what holds of a model's lineage, and merge it again.

    Raises:
        BadConfig: there is no such run or champion.
        CorruptArtifact: something does not hold.
    """
    from loraflow.execution.rederive import rederive
    from loraflow.registry.rebuild import how_to_rebuild
    from loraflow.registry.runs import read_run
    from loraflow.serving.models import champion_entry, only_model
    from loraflow.store import Ref

    if what.split(":")[0] == "champion":
        merged = champion_entry(store, what.partition(":")[2] or model or only_model(store)).merged
    else:
        record = read_run(store, what)
        stage = record.stage("merge") if record else None
        if stage is None:
            raise BadConfig(
                "There is no champion or run of this name with a model.",
                where=what,
                next_step="`loraflow runs` lists the runs",
            )
        merged = Ref(stage="merge", fingerprint=stage.fingerprint, digest=stage.digest, uri=store.uri)
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

    Where a result differs, the settings, versions and hardware that differ are named. Nothing is decided or promoted.

    Exit status 1 if a result differs.
    """
    quiet_logging()
    from loraflow.execution.reproduce import reproduce as run_again
    from loraflow.registry.runs import read_run

    opened = open_store(store)
    record = read_run(opened, run)
    if record is None:
        raise BadConfig("There is no such run.", where=run, next_step="`loraflow runs` lists the runs")
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
