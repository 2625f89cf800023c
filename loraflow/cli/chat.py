"""`loraflow chat`: talk to a model."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING

import click

from loraflow.cli import quiet_logging, store_option
from loraflow.cli.model_options import DTYPES, base_option, device_option, quiet_transformers, sampling_options
from loraflow.failures import BadConfig

if TYPE_CHECKING:
    from loraflow.serving.chat import Sampling


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
    from loraflow.serving.chat import Chat
    from loraflow.serving.models import Model, find_model, load
    from loraflow.serving.session import Session
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
