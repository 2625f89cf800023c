"""Checks of a base's files: resolve_base runs them before anything is trained, `loraflow doctor --base` at any time."""

from __future__ import annotations

import json
import logging
from collections.abc import Mapping
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, TypedDict, cast

from loraflow.base.load import refuse_missing_weights
from loraflow.base.model_config import config_errors, reason_of
from loraflow.base.model_files import copy_model
from loraflow.base.template_check import check_template, conversations
from loraflow.data.loss_mask import ChatTemplate, eos_ids
from loraflow.data.served_template import write_served_template
from loraflow.data.tokenizer_config import FILE
from loraflow.failures import BadModel

if TYPE_CHECKING:
    from torch import Tensor
    from transformers import PreTrainedModel

log = logging.getLogger(__name__)


class _LoadReport(TypedDict):
    """What transformers says of the weights that it loaded."""

    missing_keys: set[str]
    unexpected_keys: set[str]
    mismatched_keys: set[tuple[str, tuple[int, ...], tuple[int, ...]]]  # name, shape in the file, shape in the model


def check_weights(folder: Path) -> None:
    """Check that a folder's files of weights can be opened, and that none is missing.

    Raises:
        BadModel: one is damaged or missing.
    """
    from safetensors import SafetensorError, safe_open

    for file in folder.glob("*.safetensors"):
        try:
            with safe_open(file, "np") as tensors:
                tensors.keys()
        except (SafetensorError, OSError) as error:
            raise BadModel("A file of weights is damaged.", where=file.name, got=str(error)[:200]) from error
    index = folder / "model.safetensors.index.json"
    if index.exists():
        missing = set(json.loads(index.read_text())["weight_map"].values()) - {p.name for p in folder.iterdir()}
        if missing:
            raise BadModel("Files of weights are missing.", where="base.model", got=", ".join(sorted(missing)))


def check_fits_config(folder: Path) -> None:
    """Check that a folder's files have every weight of the model that its config.json describes, in the right shape.

    transformers opens the model on torch's meta device: it reads names and shapes only, and converts names of older files.

    Args:
        folder: the model's; its architecture is transformers' own.

    Raises:
        BadModel: a weight is missing, which transformers would fill with random numbers, or has another shape; or the
            config says that two weights are one, and the files have them with different values.
    """
    from transformers import AutoModelForCausalLM
    from transformers.utils import logging as their_logging

    verbosity = their_logging.get_verbosity()
    their_logging.set_verbosity_error()  # its table of names says the same in many lines
    try:
        loaded = AutoModelForCausalLM.from_pretrained(
            folder, device_map="meta", output_loading_info=True, use_safetensors=True, ignore_mismatched_sizes=True
        )
    except config_errors() as error:
        raise BadModel(
            "transformers cannot open the base's weights.",
            where=str(folder),
            expected="weights that fit config.json",
            got=reason_of(error),
            next_step="fetch the base again, or choose another one",
        ) from error
    finally:
        their_logging.set_verbosity(verbosity)
    model, report = cast("tuple[PreTrainedModel, _LoadReport]", loaded)
    refuse_missing_weights(folder, {"missing_keys": report["missing_keys"]})
    for name, found, expected in sorted(report["mismatched_keys"]):
        raise BadModel(
            "A weight of the base has another shape than config.json says.",
            where=f"{folder}: {name}",
            expected=str(list(expected)),
            got=str(list(found)),
            next_step="fetch the base again: config.json and weights are of two models",
        )
    _refuse_two_values(folder, getattr(model, "all_tied_weights_keys", {}))
    if unused := sorted(report["unexpected_keys"]):
        log.warning("The base's files have %d weights that its model does not use, such as %s.", len(unused), unused[0])


def _refuse_two_values(folder: Path, tied: Mapping[str, str]) -> None:
    """Refuse weights that are one weight by the config, but are stored with different values.

    transformers 5 trains them as two, and a server that follows the config serves them as one.

    Args:
        folder: the model's.
        tied: names of such weights → the name of the weight that they are.

    Raises:
        BadModel: there are such weights.
    """
    import torch
    from safetensors import safe_open

    stored: dict[str, Path] = {}
    for file in sorted(folder.glob("*.safetensors")):
        with safe_open(file, "pt") as tensors:
            stored |= dict.fromkeys(tensors.keys(), file)
    for pair in tied.items():
        if not all(name in stored for name in pair):
            continue
        first, second = (_read(stored[name], name) for name in pair)
        if not torch.equal(first, second):
            raise BadModel(
                "config.json says that two weights are one, but the base's files have them with different values.",
                where=f"{folder}: {', '.join(pair)}",
                expected="tie_word_embeddings: false, or equal weights",
                got="tie_word_embeddings: true, which is also the default of some architectures",
                next_step="set tie_word_embeddings to false in config.json, if the head is a weight of its own",
            )


def _read(file: Path, name: str) -> Tensor:
    from safetensors import safe_open

    with safe_open(file, "pt") as tensors:
        tensor: Tensor = tensors.get_tensor(name)
        return tensor


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


def describe_files(folder: Path) -> list[str]:
    """Check a base's files, without changing them, and return what was found, a line each.

    Args:
        folder: the model's. Without weights, only the tokenizer's files are checked.

    Raises:
        BadModel: resolve_base would refuse the base, for the same reason.
    """
    check_weights(folder)
    if any(folder.glob("*.safetensors")):
        check_fits_config(folder)
    with TemporaryDirectory() as copy:
        out = Path(copy)
        copy_model(folder, out, trust=False, with_weights=False)
        date = prepare_tokenizer(out, no_thinking=False, trust=False)
        template = ChatTemplate(out)
        stops = sorted(template.stop_ids() | eos_ids(out))
        names = ", ".join(f"{template.tokenizer.id_to_token(stop)} ({stop})" for stop in stops)
        inserted = template.inserted()
    lines = [
        f"  template: {len(conversations())} conversations are rendered and tokenized as transformers does it",
        f"  answers end at {names}",
    ]
    if inserted:
        lines.append(f"  the template writes {inserted!r} before each answer")
    if date is not None:
        lines.append(f"  the template prints a date, which is fixed to {date} in training and in the served model")
    return lines
