"""`loraflow registry, promote, rollback`: the champion by hand."""

from __future__ import annotations

import json

import click

from loraflow.cli import json_option
from loraflow.cli.store import read_runs, store_option
from loraflow.failures import BadConfig, Failure
from loraflow.identity import short
from loraflow.registry.log import Moved, PromotionLog, actor
from loraflow.serving.models import only_model
from loraflow.store import Ref, open_store

model_option = click.option("--model", help="Name in the registry (register.model); the only one by default.")


@click.command()
@store_option
@model_option
@json_option
def registry(store: str, model: str | None, as_json: bool) -> None:
    """Show the promotion log; the last line is in force."""
    where = open_store(store)
    model = model or only_model(where)
    entries = PromotionLog(where, model).entries()
    if as_json:
        click.echo(json.dumps([entry.model_dump() for entry in entries], ensure_ascii=False))
        return
    for entry in entries:
        inputs = ", ".join(f"{k} {v}" for k, v in entry.inputs.items())
        click.echo(
            f"{entry.seq:>4}  {entry.time}  {entry.action:<8}  {short(entry.merged.digest)}  {entry.actor}  ({inputs})"
        )
        for reason in entry.reasons:
            click.echo(f"      {reason}")
    if entries:
        click.echo(f"\nchampion  {where.location(entries[-1].merged)}")
    else:
        click.echo(f"no model of the name {model} was promoted yet")


@click.command()
@click.argument("run")
@click.option("--reason", required=True, help="Why, for whoever reads the log.")
@store_option
def promote(run: str, reason: str, store: str) -> None:
    """Make the model of RUN (an id of `loraflow runs`) the champion, whatever the gate said."""
    where = open_store(store)
    record = next((one for one in read_runs(where) if one["run"] == run and one["summary"]), None)
    if record is None:
        raise BadConfig("There is no such finished run.", where=run, next_step="loraflow runs")
    model = record["resolved"]["register"]["model"]
    log = PromotionLog(where, model)
    head = log.head()
    refs: dict[str, Ref] = {}
    for stage in record["stages"]:
        if stage["stage"] in ("merge", "train"):
            found = where.find(stage["stage"], stage["fingerprint"])
            if found is None or found.digest != stage["digest"]:
                raise Failure(f"The {stage['stage']} artifact of {run} is gone.", where=store, next_step="run it again")
            refs[stage["stage"]] = found
    if head is not None and head.merged.digest == refs["merge"].digest:
        click.echo(f"it is the champion of {model} already")
        return
    try:
        entry = log.append(
            head,
            action="promote",
            merged=refs["merge"],
            adapter=refs["train"],
            inputs={"recipe": record["recipe"], "run": run},
            reasons=[reason],
            actor=actor(),
        )
    except Moved:
        raise Failure(
            "Another run promoted a model this moment.", next_step="look at `loraflow registry`, then again"
        ) from None
    click.echo(f"entry {entry.seq}: {short(entry.merged.digest)} is the champion of {model}")


@click.command()
@click.option("--reason", required=True, help="Why, for whoever reads the log.")
@store_option
@model_option
def rollback(reason: str, store: str, model: str | None) -> None:
    """Go back to the champion before this one. A rerun leaves it so."""
    where = open_store(store)
    try:
        entry = PromotionLog(where, model or only_model(where)).rollback(reason, actor())
    except Moved:
        raise Failure(
            "Another run promoted a model this moment.", next_step="look at `loraflow registry`, then again"
        ) from None
    click.echo(f"entry {entry.seq}: back to {short(entry.merged.digest)}")
