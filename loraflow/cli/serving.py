"""`loraflow chat, predict, serve, publish`: use a model.

MODEL is champion, a run's id, or a model's or adapter's folder.
"""

from __future__ import annotations

import json
import logging
import sys
import time
from collections.abc import Callable
from functools import wraps
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import click

from loraflow.cli import FORMATS, json_option, quiet_logging, require_free_port, store_option
from loraflow.failures import BadConfig, Failure

if TYPE_CHECKING:
    from loraflow.serving.chat import Sampling
    from loraflow.serving.predict import PredictionReport


Decorated = TypeVar("Decorated", bound=Callable[..., None])

base_option = click.option(
    "--base",
    metavar="FOLDER",
    help="Base model folder. Needed for an adapter whose adapter_config.json does not name one.",
)
device_option = click.option(
    "--device",
    type=click.Choice(["auto", "cpu", "cuda"]),
    default="auto",
    show_default=True,
    help="Where to compute; auto takes a GPU if there is one.",
)
DTYPES = click.Choice(["bfloat16", "float16", "float32"])


def sampling_options(command: Decorated) -> Decorated:
    """Add the options that choose tokens. The command gets them as one value, `sampling`."""

    @wraps(command)
    def with_sampling(
        *, temperature: float, top_p: float, max_new_tokens: int, seed: int | None, **options: Any
    ) -> None:
        from loraflow.serving.chat import Sampling

        sampling = Sampling(temperature=temperature, top_p=top_p, max_new_tokens=max_new_tokens, seed=seed)
        command(sampling=sampling, **options)

    decorated: Decorated = with_sampling  # type: ignore[assignment]  # click calls it by keyword
    for option in (
        click.option("--seed", type=int, help="Seed of sampling."),
        click.option(
            "--max-new-tokens",
            type=click.IntRange(1),
            default=256,
            show_default=True,
            help="Longest answer, in tokens.",
        ),
        click.option(
            "--top-p",
            type=click.FloatRange(0, 1, min_open=True),
            default=1.0,
            show_default=True,
            help="Sample only from the most likely tokens, up to this total probability.",
        ),
        click.option(
            "--temperature",
            type=click.FloatRange(0, 100),
            default=0.0,
            show_default=True,
            help="0 takes the most likely token.",
        ),
    ):
        decorated = option(decorated)
    return decorated


def quiet_transformers() -> None:
    """Log only errors of transformers, and show no progress bars."""
    from transformers.utils import logging as library_logging

    library_logging.set_verbosity_error()
    library_logging.disable_progress_bar()


@click.command(context_settings={"ignore_unknown_options": True})
@click.argument("model", default="champion")
@click.option(
    "--engine",
    type=click.Choice(["auto", "transformers", "vllm"]),
    default="auto",
    show_default=True,
    help="auto takes vllm if it is installed and there is a CUDA device.",
)
@click.option("--host", default="127.0.0.1", show_default=True, help="Address to listen on.")
@click.option("--port", type=click.IntRange(1, 65535), default=8000, show_default=True, help="Port to listen on.")
@click.option(
    "--name", help="Name of the model in requests. Default: the champion's name, the run's id, or the folder's name."
)
@click.option("--dtype", type=DTYPES, help="Dtype of the computation. Default: the dtype of the weights.")
@base_option
@store_option
@click.argument("engine_options", nargs=-1, type=click.UNPROCESSED)
def serve(
    model: str,
    engine: str,
    host: str,
    port: int,
    name: str | None,
    dtype: str | None,
    base: str | None,
    store: str,
    engine_options: tuple[str, ...],
) -> None:
    """Serve MODEL with an OpenAI-compatible server: transformers' own, or vLLM. Options after -- go to the engine."""
    quiet_logging()
    from loraflow.serving.models import find_model
    from loraflow.serving.serve import plan_server
    from loraflow.store import open_store

    require_free_port(host, port, f"name another port, such as --port {port + 1}")
    opened = open_store(store)
    with opened.reader_lock():
        server = plan_server(find_model(opened, model, base), engine, host, port, name, dtype, engine_options)
    click.echo(server.greeting)
    server.start()


@click.command()
@click.argument("model")
@click.option(
    "--repo", required=True, metavar="ORG/NAME", help="Repository on the hub; it is created if it does not exist."
)
@click.option(
    "--merged/--adapter", default=True, show_default=True, help="Publish the merged model, or only the adapter."
)
@click.option("--private/--public", default=True, show_default=True, help="Visibility of a new repository.")
@click.option("--license", "licence", help="Licence in the card. Default: the base's licence, if it is known.")
@click.option("--dry-run", is_flag=True, help="Show the files and the card, and upload nothing.")
@base_option
@store_option
def publish(
    model: str, repo: str, merged: bool, private: bool, licence: str | None, dry_run: bool, base: str | None, store: str
) -> None:
    """Publish MODEL on the hub: weights, tokenizer, and a card. The token is read from HF_TOKEN."""
    quiet_logging()
    from loraflow.serving import publish as publishing
    from loraflow.serving.card import PublishedForm
    from loraflow.serving.models import find_model
    from loraflow.store import open_store

    opened = open_store(store)
    what: PublishedForm = "merged" if merged else "adapter"
    with opened.reader_lock():
        found = find_model(opened, model, base)
        if dry_run:
            with publishing.package(opened, found, repo, what, licence) as (folder, facts):
                click.echo(f"{repo}, one commit: {facts.subject}")
                for path in sorted(folder.iterdir()):
                    click.echo(f"{path.stat().st_size:>14,}  {path.name}")
                click.echo("\n" + (folder / "README.md").read_text(encoding="utf-8"))
            return
        publication = publishing.publish(opened, found, repo, what=what, private=private, licence=licence)
    click.echo(f"published  {publication.url}")


@click.command()
@click.argument("model", default="champion")
@click.option("--prompt", help="Answer this one message and end; - reads it from stdin.")
@click.option("--system", help="System message. Default: the recipe's data.system.")
@sampling_options
@click.option("--compare", is_flag=True, help="Also show the base model's answer.")
@base_option
@click.option("--dtype", type=DTYPES, default="bfloat16", show_default=True, help="Dtype of the computation.")
@device_option
@store_option
def chat(
    model: str,
    prompt: str | None,
    system: str | None,
    sampling: Sampling,
    compare: bool,
    base: str | None,
    dtype: str,
    device: str,
    store: str,
) -> None:
    """Talk to MODEL. /help lists the commands. From a pipe, each line is a message."""
    quiet_logging()
    from loraflow.serving.chat import Chat, Session
    from loraflow.serving.models import Model, find_model, load
    from loraflow.store import open_store

    opened = open_store(store)
    with opened.reader_lock():
        found = find_model(opened, model, base)
        original = found.intact_base() if compare else None
        if compare and not original:
            raise BadConfig("The base of this model is not known.", where=model, next_step="name it: --base FOLDER")
        models = {"base": Model("base", original), "tuned": found} if original else {found.name: found}
        quiet_transformers()
        system = found.system if system is None else system
        chats = {name: Chat(load(each, dtype, device), system, sampling) for name, each in models.items()}
    interactive = sys.stdin.isatty() and prompt is None
    session = Session(chats, _write, lambda line: click.echo(line, err=True), interactive=interactive)
    if prompt is not None:
        session.ask(sys.stdin.read().strip() if prompt == "-" else prompt)
        return
    if interactive:
        import readline  # noqa: F401  (gives input() line editing and history)

        click.echo(f"{found.name}: {found.folder}\n/help lists the commands, Ctrl-D ends", err=True)
    session.run(lambda: input("› " if interactive else ""))


def _write(text: str) -> None:
    sys.stdout.write(text)
    sys.stdout.flush()


@click.command()
@click.argument("model")
@click.argument("source", metavar="IN", type=click.Path(path_type=Path))
@click.argument("target", metavar="OUT", type=click.Path(path_type=Path))
@click.option(
    "--format",
    "format_name",
    default="auto",
    show_default=True,
    type=click.Choice(FORMATS),
    help="Chat format of the rows; auto detects it by their keys.",
)
@click.option("--column", help="The column that holds the question, such as text.")
@click.option(
    "--tools", metavar="FILE", help="Tools of rows that have none, as a JSON list. Default: the recipe's data.tools."
)
@click.option("--system", help="System message for chats that have none. Default: the recipe's data.system.")
@sampling_options
@click.option("--batch-size", type=click.IntRange(1), default=16, show_default=True, help="Rows in memory at a time.")
@base_option
@click.option("--dtype", type=DTYPES, default="float32", show_default=True, help="float32 answers as in evaluation.")
@device_option
@store_option
@json_option
def predict(
    model: str,
    source: Path,
    target: Path,
    format_name: str,
    column: str | None,
    tools: str | None,
    system: str | None,
    sampling: Sampling,
    batch_size: int,
    base: str | None,
    dtype: str,
    device: str,
    store: str,
    as_json: bool,
) -> None:
    """Answer the chats of IN (.jsonl, .json, .csv, .tsv, .parquet) and write them with their answers to OUT.

    Rows keep their order and columns; the columns `prediction`, `tokens`, `finish` and `error` are added, and
    `tool_calls` if a row has tools. A killed run resumes where it stopped. Exit status 1 if a row has an error instead
    of an answer.
    """
    quiet_logging(logging.INFO)
    from loraflow.config.data import read_tools_file
    from loraflow.serving.models import find_model, tools_of
    from loraflow.serving.predict import PredictOptions
    from loraflow.serving.predict import predict as answer_file
    from loraflow.store import hash_memo, open_store

    opened = open_store(store)
    memo = hash_memo(opened)
    started = time.monotonic()
    with opened.reader_lock():
        found = find_model(opened, model, base, memo)
        quiet_transformers()
        report = answer_file(
            found,
            source,
            target,
            PredictOptions(
                sampling=sampling,
                format_name=format_name,
                column=column,
                system=found.system if system is None else system,
                tools=tools_of(opened, found) if tools is None else read_tools_file(tools),
                dtype=dtype,
                device=device,
                batch_size=batch_size,
            ),
            memo=memo,
            on_batch=_progress(started),
        )
    memo.save()
    _print_report(report, target, time.monotonic() - started, as_json=as_json)


def _print_report(report: PredictionReport, target: Path, seconds: float, *, as_json: bool) -> None:
    """Print how many rows were answered."""
    rows, errors = report["rows"], report["errors"]
    if as_json:
        click.echo(json.dumps(report, ensure_ascii=False))
    else:
        click.echo(f"{rows} row{'s'[: rows != 1]} in {seconds:.1f} s, {errors} with an error: {target}")
    if errors:
        raise Failure(
            f"{errors} of {rows} rows have no answer.",
            where=str(target),
            next_step="read its column `error`, which gives the reason for each row",
        )


def _progress(started: float) -> Callable[[int, int], None]:
    """Return a function that shows progress on a terminal, and does nothing elsewhere."""

    def show(done: int, total: int) -> None:
        if sys.stderr.isatty():
            rate = done / max(time.monotonic() - started, 1e-3)
            click.echo(f"\r{done} of {total} rows, {rate:.1f} rows/s ", nl=done == total, err=True)

    return show
