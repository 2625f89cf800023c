"""`loraflow predict`: answer a file of chats."""

from __future__ import annotations

import json
import logging
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

import click

from loraflow.cli import json_option, quiet_logging, store_option
from loraflow.cli.model_options import DTYPES, base_option, device_option, quiet_transformers, sampling_options
from loraflow.config.data_sources import FORMATS
from loraflow.failures import Failure

if TYPE_CHECKING:
    from loraflow.serving.chat import Sampling
    from loraflow.serving.predict import PredictionReport


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
    from loraflow.config.tools_file import read_tools_file
    from loraflow.serving.model_tools import tools_of
    from loraflow.serving.models import find_model
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
    """Print how many rows were answered.

    Raises:
        Failure: a row has an error instead of an answer.
    """
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
