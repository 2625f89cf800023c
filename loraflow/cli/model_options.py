"""Options of the commands that use a model. MODEL is champion, a run's id, or a model's or adapter's folder."""

from __future__ import annotations

from collections.abc import Callable
from functools import wraps
from typing import Any, TypeVar

import click

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
    from transformers.utils import logging

    logging.set_verbosity_error()
    logging.disable_progress_bar()
