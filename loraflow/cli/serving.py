"""`loraflow chat, predict, serve, publish`: use a model. MODEL is champion, a run's id, or a model's or adapter's folder."""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any

import click

from loraflow.cli import quiet_logging
from loraflow.cli.store import store_option
from loraflow.failures import BadConfig

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
    from loraflow.store import LocalStore

    place = LocalStore(store)
    with place.reading():
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
