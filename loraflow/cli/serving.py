"""`loraflow chat, predict, serve, publish`: use a model. MODEL is champion, a run's id, or a model's or adapter's folder."""

from __future__ import annotations

import json
import logging
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import click

from loraflow.cli import json_option, quiet_logging
from loraflow.cli.store import store_option
from loraflow.failures import BadConfig, Failure

base_option = click.option("--base", metavar="FOLDER", help="The base of an adapter's folder that does not name it.")
device_option = click.option("--device", type=click.Choice(["auto", "cpu", "cuda"]), default="auto", show_default=True)
DTYPES = click.Choice(["bfloat16", "float16", "float32"])


def sampling_options(command: Callable[..., Any]) -> Callable[..., Any]:
    """Add what says how tokens are chosen."""
    for option in (
        click.option("--seed", type=int, help="Seed of sampling."),
        click.option("--max-new-tokens", type=click.IntRange(1), default=256, show_default=True),
        click.option("--top-p", type=click.FloatRange(0, 1, min_open=True), default=1.0, show_default=True),
        click.option("--temperature", type=click.FloatRange(0, 100), default=0.0, show_default=True,
                     help="0 takes the likeliest token."),
    ):  # fmt: skip
        command = option(command)
    return command


@click.command()
@click.argument("model", default="champion")
@click.option("--prompt", help="Ask this one question and end; - reads it from stdin.")
@click.option("--system", help="The system message; default: the one of the recipe's data.system.")
@sampling_options
@click.option("--compare", is_flag=True, help="Let the base answer as well.")
@base_option
@click.option("--dtype", type=DTYPES, default="bfloat16", show_default=True)
@device_option
@store_option
def chat(
    model: str, prompt: str | None, system: str | None, compare: bool, base: str | None, dtype: str, device: str,
    store: str, **sampling: Any,
) -> None:  # fmt: skip
    """Talk to MODEL. /help lists the commands; lines from a pipe are messages, too."""
    quiet_logging()
    from loraflow.serving.chat import Chat, Sampling
    from loraflow.serving.models import Model, find_model, load
    from loraflow.serving.session import Session
    from loraflow.store import open_store

    place = open_store(store)
    with place.reader_lock():
        found = find_model(place, model, base)
        both = {"base": Model("base", found.base), "tuned": found} if compare and found.base else {found.name: found}
        if compare and not found.base:
            raise BadConfig("The base of this model is not known.", where=model, next_step="name it: --base FOLDER")
        _quiet_transformers()
        chats = {
            name: Chat(load(one, dtype, device), found.system if system is None else system, Sampling(**sampling))
            for name, one in both.items()
        }
    person = sys.stdin.isatty() and prompt is None
    session = Session(chats, _say, lambda line: click.echo(line, err=True), person=person)
    if prompt is not None:
        session.ask(sys.stdin.read().strip() if prompt == "-" else prompt)
        return
    if person:
        import readline  # noqa: F401  (input() edits lines and remembers them)

        click.echo(f"{found.name}: {found.folder}\n/help lists the commands, Ctrl-D ends", err=True)
    session.run(lambda: input("› " if person else ""))


def _say(text: str) -> None:
    sys.stdout.write(text)
    sys.stdout.flush()


def _quiet_transformers() -> None:
    from transformers.utils import logging

    logging.set_verbosity_error()
    logging.disable_progress_bar()


@click.command()
@click.argument("model")
@click.argument("source", metavar="IN", type=click.Path(path_type=Path))
@click.argument("target", metavar="OUT", type=click.Path(path_type=Path))
@click.option(
    "--format",
    "form",
    default="auto",
    show_default=True,
    type=click.Choice(["auto", "messages", "sharegpt", "alpaca", "prompt_completion"]),
)
@click.option("--column", help="The column that holds the question, such as text.")
@click.option("--system", help="Put before chats that have no system message; default: the recipe's data.system.")
@sampling_options
@click.option("--batch-size", type=click.IntRange(1), default=16, show_default=True, help="Rows in memory at a time.")
@base_option
@click.option("--dtype", type=DTYPES, default="float32", show_default=True, help="float32 answers as in evaluation.")
@device_option
@store_option
@json_option
def predict(
    model: str, source: Path, target: Path, form: str, column: str | None, system: str | None, batch_size: int,
    base: str | None, dtype: str, device: str, store: str, as_json: bool, **sampling: Any,
) -> None:  # fmt: skip
    """Answer the chats of IN (.jsonl, .json, .csv, .tsv, .parquet) and write them with their answers to OUT.

    Rows keep their order and columns; `prediction`, `tokens`, `finish` and `error` are added. A run that was killed
    goes on where it was. Exit status 1 if a row has an error in place of an answer.
    """
    quiet_logging(logging.INFO)
    from loraflow.serving.chat import Sampling
    from loraflow.serving.models import find_model
    from loraflow.serving.predict import predict as answer_file
    from loraflow.store import open_store
    from loraflow.store.files import HashMemo

    place = open_store(store)
    memo = HashMemo(place.scratch / "hashes.json" if place.scratch.exists() else None)
    started = time.monotonic()
    with place.reader_lock():
        found = find_model(place, model, base)
        _quiet_transformers()
        done = answer_file(
            found, source, target, sampling=Sampling(**sampling), form=form, column=column,
            system=found.system if system is None else system, dtype=dtype, device=device, batch_size=batch_size,
            memo=memo, on_batch=_progress(started),
        )  # fmt: skip
    memo.save()
    if as_json:
        click.echo(json.dumps(done, ensure_ascii=False))
    else:
        click.echo(
            f"{done['rows']} rows in {time.monotonic() - started:.1f} s, {done['errors']} with an error: {target}"
        )
    if done["errors"]:
        raise Failure(
            f"{done['errors']} of {done['rows']} rows have no answer.",
            where=str(target),
            next_step="its column `error` says why, row by row",
        )


def _progress(started: float) -> Callable[[int, int], None]:
    """Return what shows progress on a terminal, and nothing elsewhere."""

    def show(done: int, total: int) -> None:
        if sys.stderr.isatty():
            rate = done / max(time.monotonic() - started, 1e-3)
            click.echo(f"\r{done} of {total} rows, {rate:.1f} rows/s ", nl=done == total, err=True)

    return show


@click.command(context_settings={"ignore_unknown_options": True})
@click.argument("model", default="champion")
@click.option(
    "--engine",
    type=click.Choice(["auto", "transformers", "vllm"]),
    default="auto",
    show_default=True,
    help="auto takes vllm where it is installed and CUDA is there.",
)
@click.option("--host", default="127.0.0.1", show_default=True)
@click.option("--port", type=click.IntRange(1, 65535), default=8000, show_default=True)
@click.option("--name", help="The model's name in requests; default: the champion's, the run's id, or the folder's.")
@click.option("--dtype", type=DTYPES, help="Default: that of the weights.")
@base_option
@store_option
@click.argument("engine_options", nargs=-1, type=click.UNPROCESSED)
def serve(
    model: str, engine: str, host: str, port: int, name: str | None, dtype: str | None, base: str | None, store: str,
    engine_options: tuple[str, ...],
) -> None:  # fmt: skip
    """Serve MODEL with an OpenAI-compatible server: transformers' own, or vLLM. Options behind -- go to the engine."""
    quiet_logging()
    from loraflow.serving.models import find_model
    from loraflow.serving.serve import plan_server
    from loraflow.store import open_store

    place = open_store(store)
    with place.reader_lock():
        server = plan_server(find_model(place, model, base), engine, host, port, name, dtype, engine_options)
    click.echo(server.greeting)
    server.start()


@click.command()
@click.argument("model")
@click.option("--repo", required=True, metavar="ORG/NAME", help="The hub's repository; made if it is not there.")
@click.option("--merged/--adapter", default=True, show_default=True, help="Weights as a whole, or the adapter alone.")
@click.option("--private/--public", default=True, show_default=True, help="Who may see a repository that is made.")
@click.option("--license", "licence", help="Default: the base's, as far as it is known.")
@click.option("--dry-run", is_flag=True, help="Show files and card, send nothing.")
@base_option
@store_option
def publish(
    model: str, repo: str, merged: bool, private: bool, licence: str | None, dry_run: bool, base: str | None, store: str
) -> None:
    """Put MODEL on the hub: weights, tokenizer, and a card of facts. The token is taken from HF_TOKEN."""
    quiet_logging()
    from loraflow.serving import publish as publishing
    from loraflow.serving.models import find_model
    from loraflow.store import open_store

    place, what = open_store(store), "merged" if merged else "adapter"
    with place.reader_lock():
        found = find_model(place, model, base)
        if dry_run:
            with publishing.package(place, found, repo, what, licence) as (folder, facts):
                click.echo(f"{repo}, one commit: {facts.subject}")
                for path in sorted(folder.iterdir()):
                    click.echo(f"{path.stat().st_size:>14,}  {path.name}")
                click.echo("\n" + (folder / "README.md").read_text(encoding="utf-8"))
            return
        done = publishing.publish(place, found, repo, what=what, private=private, licence=licence)
    click.echo(f"published  {done['url']}")
