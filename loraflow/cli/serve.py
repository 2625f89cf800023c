"""`loraflow serve`: serve a model with an OpenAI-compatible server."""

from __future__ import annotations

import click

from loraflow.cli import quiet_logging, store_option
from loraflow.cli.model_options import DTYPES, base_option


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

    opened = open_store(store)
    with opened.reader_lock():
        server = plan_server(find_model(opened, model, base), engine, host, port, name, dtype, engine_options)
    click.echo(server.greeting)
    server.start()
