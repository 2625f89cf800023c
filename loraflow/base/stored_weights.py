"""The tensors of safetensors files by their headers, which files hold a model's weights, and the model without its weights;
the contents stay on the disk. Weights in a pickle are refused unopened: it can run code when it is opened.

Format: 8 bytes little-endian length of the header, the header (JSON), the tensors' bytes one after another.
https://github.com/huggingface/safetensors#format
"""

from __future__ import annotations

import json
import logging
import re
import struct
from collections.abc import Iterable, Set
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, TypedDict

from pydantic import JsonValue

from loraflow.base.architecture import config_errors, read_config, reason_of
from loraflow.failures import BadModel

if TYPE_CHECKING:
    from transformers import PreTrainedModel


log = logging.getLogger(__name__)

SINGLE = "model.safetensors"
INDEX = "model.safetensors.index.json"
_MAX_HEADER = 100_000_000  # bytes; the limit of the safetensors library
_SETTINGS = (
    "config.json", "generation_config.json", "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json",
    "added_tokens.json",
)  # fmt: skip


class HeaderEntry(TypedDict):
    """A tensor in a file's header, whose keys are the tensors' names."""

    dtype: str
    shape: list[int]
    data_offsets: list[int]  # of the first byte and after the last one, counted from the end of the header


@dataclass(frozen=True)
class TensorEntry:
    """A tensor in a file, by the position of its bytes."""

    name: str
    file: Path
    dtype: str
    shape: tuple[int, ...]
    offset: int  # of the first byte, from the start of the file
    size: int  # bytes


def read_entries(file: Path) -> list[TensorEntry]:
    """Return a file's tensors, in the order of their bytes.

    Raises:
        BadModel: the header cannot be read, or its offsets are outside the file.
    """
    total = file.stat().st_size
    try:
        with file.open("rb") as handle:
            (length,) = struct.unpack("<Q", handle.read(8))
            if length > min(total - 8, _MAX_HEADER):
                raise ValueError(f"a header of {length} bytes in a file of {total}")
            header: dict[str, HeaderEntry] = json.loads(handle.read(length))
        found = []
        for name, entry in header.items():
            if name == "__metadata__":
                continue
            start, end = entry["data_offsets"]
            if not 0 <= start <= end <= total - 8 - length:
                raise ValueError(f"{name} lies outside of the file")
            found.append(
                TensorEntry(name, file, entry["dtype"], tuple(entry["shape"]), 8 + length + start, end - start)
            )
    except (ValueError, KeyError, TypeError, AttributeError, struct.error) as error:
        raise BadModel(
            "A safetensors file is damaged.", where=str(file), got=str(error)[:200], next_step="fetch it again"
        ) from error
    return sorted(found, key=lambda entry: entry.offset)


def loaded_files(folder: Path) -> list[Path]:
    """Return the files of weights that transformers would load from a model's folder, after their index if they have one.

    Other files of weights beside them, such as Mistral's consolidated.safetensors, are not read.

    Raises:
        BadModel: there are no such files, or their index is damaged.
    """
    single, index = folder / SINGLE, folder / INDEX
    if single.exists():
        return [single]  # transformers does not read an index beside it
    if index.exists():
        return [index, *(folder / name for name in sorted(set(_weight_map(index).values())))]
    raise BadModel(
        "transformers finds no weights in the folder.",
        where=str(folder),
        expected=f"{SINGLE}, or {INDEX} and the files that it names",
        got=", ".join(sorted(path.name for path in folder.glob("*.safetensors"))[:3]) or "no safetensors",
        next_step="fetch the base again: a file is missing, or these are in another program's format",
    )


def model_entries(folder: Path) -> list[TensorEntry]:
    """Return the tensors of the files that transformers would load from a model's folder, file by file.

    Raises:
        BadModel: there are no such files, or they do not hold what their index says.
    """
    index, *shards = files = loaded_files(folder)
    if not shards:
        return read_entries(files[0])
    entries = [entry for file in shards for entry in read_entries(file)]
    _check_index(index, entries)
    return entries


def _check_index(index: Path, entries: list[TensorEntry]) -> None:
    """Compare an index with the tensors that its files hold.

    transformers reads every tensor of the files, whatever the index says. So weights that the model does not load may
    differ: many indexes list the tied head, which the files lack, or miss the buffers of older versions.
    """
    weight_map, held = _weight_map(index), {entry.name: entry.file.name for entry in entries}
    if held == weight_map and len(held) == len(entries):
        return
    wrong = sorted(name for name in held.keys() | weight_map.keys() if held.get(name) != weight_map.get(name))
    unused = _not_loaded(index.parent, wrong)
    used = [name for name in wrong if name not in unused]
    if used or len(held) < len(entries):
        raise BadModel(
            "The index does not match the tensors in the files.",
            where=str(index),
            got=f"{len(used)} tensors, such as {used[0]}" if used else "a tensor in two files",
            next_step="fetch the base again, or open it with transformers and save it (save_pretrained)",
        )
    log.warning("%s and its files differ in %d tensors that the model does not load: %s.", index, len(wrong), wrong[0])


def _not_loaded(folder: Path, names: list[str]) -> set[str]:
    """Return those of the names which the model surely does not load: tied weights, and buffers that it computes.

    Names that nothing is known of count as loaded: transformers may convert them.
    """

    try:
        model = model_without_weights(folder)
    except BadModel:
        return set()
    tied = getattr(model, "all_tied_weights_keys", {}).keys()
    return not_used(model, names, model.state_dict().keys() - tied, tied)


def not_used(model: PreTrainedModel, names: Iterable[str], loaded: Set[str], others: Set[str]) -> set[str]:
    """Return those of the names that are not in `loaded`, but in `others` or computed buffers, in any spelling."""
    ignored = [*(getattr(model, "_keys_to_ignore_on_load_unexpected", None) or []), r"rotary_emb\.inv_freq$"]
    prefix, computed = f"{model.base_model_prefix}.", re.compile("|".join(f"(?:{one})" for one in ignored))

    def is_unused(name: str) -> bool:
        spellings = {name, name.removeprefix(prefix), prefix + name}
        return spellings.isdisjoint(loaded) and bool(spellings & others or computed.search(name))

    return set(filter(is_unused, names))


def _weight_map(index: Path) -> dict[str, str]:
    """Read which file holds which tensor, and refuse paths outside of the folder before any file is opened."""
    try:
        weight_map = {str(name): str(file) for name, file in json.loads(index.read_text("utf-8"))["weight_map"].items()}
        if not weight_map:
            raise ValueError("no tensors")
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise BadModel(
            "The index of the weights is damaged.",
            where=str(index),
            expected='"weight_map": {name of a tensor: name of its file}',
            got=f"{type(error).__name__}: {error}"[:200],
            next_step="fetch it again",
        ) from error
    for file in sorted(set(weight_map.values())):
        if Path(file).name != file or not file.endswith(".safetensors"):
            raise BadModel(
                "The index of the weights names a file outside of its folder.",
                where=str(index),
                expected="the name of a .safetensors file beside it",
                got=file[:200],
                next_step="do not use this checkpoint",
            )
        if not (index.parent / file).exists():
            raise BadModel("A file of weights is missing.", where=str(index), expected=file, next_step="fetch it again")
    return weight_map


PICKLES = (".bin", ".pt", ".pth", ".pkl", ".ckpt")


def refuse_damaged_settings(folder: Path, where: str | None = None) -> dict[str, JsonValue]:
    """Refuse a model's folder with a damaged file of settings or of the tokenizer. Return the content of config.json.

    Raises:
        BadModel: one of them is not a JSON object.
    """
    config: dict[str, JsonValue] = {}
    for name in _SETTINGS:
        file = folder / name
        if not file.exists():
            continue
        data = file.read_bytes().strip()
        try:
            if name == "tokenizer.json" and data[:1] + data[-1:] == b"{}":
                continue  # 28 MB take a second to parse, and most commands open it
            values = json.loads(data.decode())  # Mamba-2's config.json has Infinity
            if not isinstance(values, dict):
                raise ValueError(f"{type(values).__name__}, not an object")
        except (ValueError, RecursionError) as error:
            raise BadModel(
                "A file of the model is damaged: it is not a JSON object.",
                where=where or str(folder),
                got=f"{name}: {error}"[:200],
                next_step=f"fetch {name} again",
            ) from error
        if name == "config.json":
            config = values
    return config


def refuse_pickles(folder: Path) -> None:
    """Refuse the folder of a model or an adapter that holds no safetensors.

    Raises:
        BadModel: the weights are missing, or they are a pickle; nothing was opened.
    """
    names = sorted(path.name for path in folder.iterdir()) if folder.is_dir() else []
    if any(name.endswith(".safetensors") for name in names):
        return
    pickles = [name for name in names if name.endswith(PICKLES)]
    raise BadModel(
        "The folder has no safetensors."
        + (" A pickle can run code when it is opened, so it is refused." if pickles else ""),
        where=str(folder),
        expected="*.safetensors",
        got=", ".join(pickles or names[:5]) or "nothing",
        next_step=_next_step(folder, names, pickles),
    )


def _next_step(folder: Path, names: list[str], pickles: list[str]) -> str:
    adapters = [name for name in names if (folder / name / "adapter_config.json").exists()]
    if adapters:  # PEFT saves every adapter that is not called "default" in a folder of its own name
        return f"name one adapter: {', '.join(str(folder / name) for name in adapters[:4])}"
    if "adapter_model.bin" in pickles:
        return "load it with peft where you trust it, and save_pretrained() it again: that writes safetensors"
    if pickles:
        return "convert it where you trust it: AutoModelForCausalLM.from_pretrained(…).save_pretrained(…)"
    return "name the folder that holds the weights"


def model_without_weights(base: Path, *, trust: bool = False) -> PreTrainedModel:
    """Build a base's model from its config.json. This takes well under a second and no memory for weights.

    Raises:
        BadModel: the folder has no config of a causal model that transformers knows.
    """
    import torch
    from transformers import AutoModelForCausalLM

    config = read_config(base, trust=trust)
    try:
        with torch.device("meta"):
            model: PreTrainedModel = AutoModelForCausalLM.from_config(
                config,
                trust_remote_code=trust,
                attn_implementation="eager",  # the config's kernel may not be installed
            )
    except config_errors() as error:
        raise BadModel(
            "The base's model cannot be built from its configuration.",
            where=str(base),
            expected="config.json of a causal model",
            got=reason_of(error),
            next_step="fetch config.json again, or choose another base",
        ) from error
    return model
