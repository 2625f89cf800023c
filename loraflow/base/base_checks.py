"""Checks of a base's files: resolve_base runs them before anything is trained, `loraflow doctor --base` at any time."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory

from loraflow.base.model_files import copy_model
from loraflow.base.stored_weights import INDEX, PICKLES, refuse_pickles
from loraflow.base.template_check import check_template, conversations
from loraflow.base.weight_checks import check_fits_config, check_weights, refuse_non_finite_weights
from loraflow.data.loss_mask import ChatTemplate, eos_ids, vocabulary_of
from loraflow.data.served_template import write_served_template
from loraflow.data.tokenizer_config import FILE
from loraflow.failures import BadModel


@contextmanager
def named_in_failures(copy: Path, original: str) -> Iterator[None]:
    """Name the base as its user does in failures of a block that reads a copy of it."""
    try:
        yield
    except BadModel as failure:
        failure.where, failure.got = (text.replace(str(copy), original) for text in (failure.where, failure.got))
        raise


def prepare_tokenizer(out: Path, chosen: str | None = None, *, no_thinking: bool, trust: bool) -> str | None:
    """Write the template that the model is served with, and compare it with transformers' rendering and tokens.

    Args:
        out: the folder with the tokenizer's files, which are changed.
        chosen: the recipe's template; None uses the model's own.
        no_thinking: answers come after an empty think block.
        trust: run Python code that comes with the model.

    Returns:
        the date that is fixed in the template; None if it prints no date.

    Raises:
        BadModel: training would render or tokenize differently from transformers; or no answer can be learned.
    """
    date = None
    if (out / FILE).exists():
        date = write_served_template(out, chosen, no_thinking=no_thinking)
    check_template(out, trust=trust)
    return date


def describe_files(folder: Path, *, weights: bool = True) -> list[str]:
    """Check a base's files, without changing them, and return what was found, a line each.

    Args:
        folder: the model's. Without weights, only the tokenizer's files are checked.
        weights: check the weights, if there are any. Which of them a hub snapshot has depends on earlier downloads.

    Raises:
        BadModel: resolve_base would refuse the base, for the same reason.
    """
    files, lines = [path.name for path in folder.iterdir()], []
    if weights and (any(name.endswith((".safetensors", *PICKLES)) for name in files) or INDEX in files):
        refuse_pickles(folder)
        check_weights(folder)
        unused = check_fits_config(folder)
        refuse_non_finite_weights(folder)
        lines.append("  weights: complete, finite, and of the shapes in config.json")
        if unused:
            lines.append(f"  weights that the model does not use: {len(unused)}, such as {unused[0]}")
    else:
        lines.append("  not checked: the weights" + (", which are not in the folder" if weights else ""))
    with TemporaryDirectory() as copy, named_in_failures(out := Path(copy), str(folder)):
        copy_model(folder, out, trust=False, with_weights=False)
        date = prepare_tokenizer(out, no_thinking=False, trust=False)
        template = ChatTemplate(out)
        stops = sorted(template.stop_ids() | eos_ids(out))
        rows = vocabulary_of(out)
        beyond = [] if rows is None else [stop for stop in stops if stop >= rows]
        names = ", ".join(
            f"{template.tokenizer.id_to_token(stop) or 'an id without a token'} ({stop})"
            for stop in stops
            if stop not in beyond
        )
        inserted = template.inserted()
    lines += [
        f"  template: {len(conversations())} conversations are rendered and tokenized as transformers does it",
        f"  answers end at {names}",
    ]
    if beyond:
        lines.append(f"  no answer ends at {', '.join(map(str, beyond))}: eos_token_id is beyond the {rows} embeddings")
    if inserted:
        lines.append(f"  the template writes {inserted!r} before each answer")
    if date is not None:
        lines.append(f"  the template prints a date, which is fixed to {date} in training and in the served model")
    return lines
