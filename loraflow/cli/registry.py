"""`loraflow registry, promote, rollback`: show the promotion log, and change the champion by hand."""

from __future__ import annotations

import json

import click

from loraflow.cli import json_option, model_option, store_option
from loraflow.failures import BadConfig, CorruptArtifact, Failure
from loraflow.identity import short
from loraflow.registry.log import HeadChanged, PromotionLog, actor
from loraflow.registry.rebuild import how_to_rebuild
from loraflow.registry.runs import RunRecord, StageRun, read_run
from loraflow.serving.models import only_model
from loraflow.store import Ref, Store, hash_memo, open_store, require_intact_in_store

reason_option = click.option("--reason", required=True, help="The reason, for readers of the promotion log.")


@click.command()
@store_option
@model_option
@json_option
def registry(store: str, model: str | None, as_json: bool) -> None:
    """Show the promotion log of a model, oldest entry first. The last entry names the champion."""
    opened = open_store(store)
    model = model or only_model(opened)
    entries = PromotionLog(opened, model).entries()
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
    if entries:
        click.echo(f"\nchampion  {opened.location(entries[-1].merged)}")
    else:
        click.echo(f"no model named {model} was promoted yet")


@click.command()
@click.argument("run")
@reason_option
@store_option
def promote(run: str, reason: str, store: str) -> None:
    """Make the model of RUN (an id of `loraflow runs`) the champion, regardless of the gate's decision."""
    opened = open_store(store)
    record = read_run(opened, run)
    if record is None or record.summary is None or record.model is None:
        raise BadConfig("There is no such finished run.", where=run, next_step="loraflow runs")
    log = PromotionLog(opened, record.model)
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


def _artifact(store: Store, record: RunRecord, stage: str) -> Ref:
    """Return the artifact of a run's stage.

    Raises:
        CorruptArtifact: it is gone or damaged.
    """
    done = record.stage(stage)
    found = store.find(stage, done.fingerprint) if done else None
    if done is None or found is None or found.digest != done.digest:
        raise CorruptArtifact(
            f"The {stage} artifact of {record.run} is gone.",
            where=store.uri,
            next_step=how_to_rebuild(store, _recorded(store, done)) if done else "loraflow runs",
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


def _recorded(store: Store, done: StageRun) -> Ref:
    return Ref(stage=done.stage, fingerprint=done.fingerprint, digest=done.digest, uri=store.uri)


@click.command()
@reason_option
@store_option
@model_option
def rollback(reason: str, store: str, model: str | None) -> None:
    """Go back to the previous champion. Later runs do not promote the same model again."""
    opened = open_store(store)
    try:
        entry = PromotionLog(opened, model or only_model(opened)).rollback(reason, actor())
    except HeadChanged:
        raise _changed_meanwhile() from None
    click.echo(f"entry {entry.seq}: back to {short(entry.merged.digest)}")


def _changed_meanwhile() -> Failure:
    return Failure(
        "Another process changed the champion at the same time.",
        next_step="look at `loraflow registry`, then run the command again",
    )
