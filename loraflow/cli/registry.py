"""`loraflow registry, promote, rollback, mlflow`: show the promotion log, change the champion, send both to MLflow."""

import dataclasses
import json
from collections.abc import Iterator

import click

from loraflow.cli import json_option, model_option, quiet_logging, store_option
from loraflow.credentials import hide_in_url
from loraflow.failures import BadConfig, CorruptArtifact, Failure
from loraflow.identity import short
from loraflow.registry.champions import choose_intact
from loraflow.registry.log import HeadChanged, PromotionLog, actor
from loraflow.registry.looks import LookRecord, LostLooks
from loraflow.registry.rebuild import how_to_rebuild
from loraflow.registry.runs import RunRecord, read_run, require_consistent
from loraflow.registry.signature import sign
from loraflow.serving.models import only_model
from loraflow.store import Ref, Store, hash_memo, open_store, require_intact_in_store
from loraflow.tracking.git_tags import tag_log
from loraflow.tracking.mirror import mirror_log, open_tracker, summary_line, sync, tracking_of_model

own_store_option = click.option("--store", help="The store; the default is that of `loraflow registry`.")
reason_option = click.option("--reason", required=True, help="The reason, for readers of the promotion log.")


@click.group(invoke_without_command=True)
@store_option
@model_option
@json_option
@click.pass_context
def registry(context: click.Context, store: str, model: str | None, as_json: bool) -> None:
    """Show the promotion log of a model, oldest entry first. The last entry names the champion."""
    if context.invoked_subcommand is not None:
        return
    opened = open_store(store)
    log = PromotionLog(opened, model or only_model(opened))
    entries = log.entries(all_runs=True)
    if as_json:
        click.echo(json.dumps([entry.model_dump() for entry in entries], ensure_ascii=False))
        return
    for entry in entries:
        inputs = ", ".join(f"{name} {value}" for name, value in entry.inputs.items())
        click.echo(
            f"{entry.seq:>4}  {entry.time}  {entry.action:<8}  {short(entry.merged.digest)}  {entry.actor}  ({inputs})"
        )
        for reason in entry.reasons:
            click.echo(f"      {reason}")
    for acceptance in log.acceptances():
        click.echo(f"      {acceptance.time}  {acceptance.actor} accepted a loss after entry {acceptance.kept.seq}")
        click.echo(f"      {acceptance.reason}")
    if entries:
        click.echo(f"\nchampion  {opened.location(entries[-1].merged)}")
    else:
        click.echo(f"no model named {log.model} was promoted yet")


@registry.command()
@reason_option
@own_store_option
@model_option
@click.pass_context
def accept(context: click.Context, reason: str, store: str | None, model: str | None) -> None:
    """Continue with a promotion log or a record of looks that lost entries or was changed, if there is no backup of it.

    The intact entries stay; lost looks count as spent. What is lost, who accepted it and why is stored beside the log.
    An intact log is not changed.
    """
    log = _log(context, store, model)
    lost_looks = LookRecord(log.store, log.model).accept_loss(reason, actor())
    if lost_looks is not None:
        for line in _lost_look_lines(lost_looks):
            click.echo(line)
        if log.is_intact():
            return
    acceptance = log.accept_loss(reason, actor())
    for head in acceptance.lost:
        click.echo(f"lost: entry {head.seq}{f' with hash {short(head.hash)}' if head.hash else ''}")
    for name in acceptance.set_aside:
        click.echo(f"no longer in the log: {name}")
    champion = log.head()
    if champion is not None:
        click.echo(
            f"entry {champion.seq} is the last one: {short(champion.merged.digest)} is the champion of {log.model}"
        )
    else:
        click.echo(f"the log is empty: {log.model} has no champion")


@registry.command(name="sign")
@click.option("--key", required=True, help="A private SSH key, or the public one of a key in ssh-agent.")
@own_store_option
@model_option
@click.pass_context
def sign_log(context: click.Context, key: str, store: str | None, model: str | None) -> None:
    """Sign the promotion log, so that `loraflow verify --signers FILE` notices if it is rewritten.

    All entries are signed, so read them first: `loraflow registry`.
    """
    log = _log(context, store, model)
    log.entries(all_runs=True)
    if log.last_seen is None or not log.last_seen.seq:
        raise BadConfig(
            "There is no entry to sign.",
            where=f"registry of {log.model}",
            next_step="`loraflow registry` lists the entries",
        )
    sign(log.store, log.model, log.last_seen, key, log.hashes)
    click.echo(f"signed: entry {log.last_seen.seq} of {log.model} with hash {log.last_seen.hash}")


def _log(context: click.Context, store: str | None, model: str | None) -> PromotionLog:
    """Return the promotion log that a command of `loraflow registry` is about; both take the options."""
    given = context.parent.params if context.parent else {}
    opened = open_store(store or given["store"])
    return PromotionLog(opened, model or given["model"] or only_model(opened))


def _lost_look_lines(accepted: LostLooks) -> Iterator[str]:
    """Yield what was lost of a record of looks, and what that means."""
    if accepted.lost:
        looks = "1 look" if accepted.lost == 1 else f"{accepted.lost} looks"
        yield f"lost: {looks} after look {accepted.kept.seq}; counted as spent"
    for digest in accepted.restored_rows:
        yield f"restored from its copy: the record of scored rows {short(digest)}"
    for digest in accepted.lost_rows:
        yield f"lost: the record of scored rows {short(digest)}"
    if accepted.unknown_rows or accepted.lost_rows:
        yield "which held-out rows were scored is unknown: from now on, every row counts as scored before"


@click.command()
@click.argument("run")
@reason_option
@store_option
def promote(run: str, reason: str, store: str) -> None:
    """Make the model of RUN (an id of `loraflow runs`) the champion, regardless of the gate's decision."""
    opened = open_store(store)
    record = read_run(opened, run)
    if record is None or record.summary is None or record.model is None:
        raise BadConfig("There is no such finished run.", where=run, next_step="`loraflow runs` lists the runs")
    require_consistent(opened, record)
    log = PromotionLog(opened, record.model)
    with opened.reader_lock():  # a cleanup at the same time could remove the model before the log names it
        head = log.head()
        merged, adapter = (_artifact(opened, record, stage) for stage in ("merge", "train"))
        if head is not None and head.merged.digest == merged.digest:
            click.echo(f"this model is the champion of {log.model} already")
            return
        try:
            entry = log.append(
                head,
                action="promote",
                merged=merged,
                adapter=adapter,
                inputs={"recipe": record.recipe, "run": run},
                reasons=[reason],
                actor=actor(),
            )
        except HeadChanged:
            raise _changed_meanwhile() from None
    click.echo(f"entry {entry.seq}: {short(entry.merged.digest)} is the champion of {log.model}")
    mirror_log(opened, log.model)
    tag_log(opened, log.model)


def _artifact(store: Store, record: RunRecord, stage: str) -> Ref:
    """Return the artifact of a run's stage."""
    done = record.stage(stage)
    found = store.find(stage, done.fingerprint) if done else None
    if done is None or found is None or found.digest != done.digest:
        raise CorruptArtifact(
            f"The {stage} artifact of {record.run} is gone.",
            where=store.uri,
            next_step=how_to_rebuild(store, done.ref(store)) if done else "`loraflow runs` lists the runs",
        )
    try:
        require_intact_in_store(store, found, hash_memo(store))
    except CorruptArtifact as failure:
        raise CorruptArtifact(
            f"The {stage} artifact of {record.run} is damaged, so it is not promoted.",
            where=failure.where,
            got=failure.got,
            next_step=how_to_rebuild(store, found),
        ) from failure
    return found


@click.command()
@reason_option
@store_option
@model_option
@click.option("--skip-missing", is_flag=True, help="Go further back if the previous model is missing or damaged.")
def rollback(reason: str, store: str, model: str | None, skip_missing: bool) -> None:
    """Go back to the previous champion, after hashing its files. Later runs do not promote the same model again."""
    opened = open_store(store)
    log = PromotionLog(opened, model or only_model(opened))
    with opened.reader_lock():
        try:
            entry = log.rollback(
                reason, actor(), lambda targets: choose_intact(opened, targets, skip_missing=skip_missing)
            )
        except HeadChanged:
            raise _changed_meanwhile() from None
    click.echo(f"entry {entry.seq}: back to {short(entry.merged.digest)}")
    mirror_log(opened, log.model)
    tag_log(opened, log.model)


def _changed_meanwhile() -> Failure:
    return Failure(
        "Another process changed the champion at the same time.",
        next_step="look at `loraflow registry`, then run the command again",
    )


@click.group()
def mlflow() -> None:
    """Show runs and the champion in MLflow. The store stays the truth; MLflow is a view of it."""


@mlflow.command("sync")
@store_option
@model_option
@click.option("--uri", help="MLflow's address; the default is that of the model's newest run, or MLFLOW_TRACKING_URI.")
@click.option("--experiment", help="Name of MLflow's experiment.")
def sync_command(store: str, model: str | None, uri: str | None, experiment: str | None) -> None:
    """Send the runs that are missing, register promoted models, and move the alias champion to the champion."""
    quiet_logging()
    opened = open_store(store)
    name = model or only_model(opened)
    tracking = tracking_of_model(opened, name, uri)
    if tracking is None:
        raise BadConfig(
            "The address of MLflow is not set.",
            where="runtime.mlflow.uri, MLFLOW_TRACKING_URI or --uri",
            expected="an address such as http://localhost:5000 or sqlite:///mlflow.db",
            next_step="loraflow mlflow sync --uri ADDRESS",
        )
    if experiment:
        tracking = dataclasses.replace(tracking, experiment=experiment)
    with opened.reader_lock():
        done = sync(opened, name, open_tracker(tracking))
    click.echo(summary_line(done, name, hide_in_url(tracking.uri)))
