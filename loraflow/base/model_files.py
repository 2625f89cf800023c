"""The files of a model's folder, and copies of them."""

from __future__ import annotations

import json
import os
import re
import shutil
from pathlib import Path
from typing import TYPE_CHECKING

from loraflow.base.weight_files import refuse_pickles
from loraflow.data.tokenizer_config import TOOL_TEMPLATE
from loraflow.failures import BadModel

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_MODEL_FILES = re.compile(
    r"^(config|generation_config)\.json$|^(tokenizer|special_tokens_map|added_tokens|vocab|merges|chat_template).*"
    r"|^.*\.safetensors(\.index\.json)?$"
)


def model_files(folder: Path, trust: bool) -> list[str]:
    """Return the names of the files that make a model; with `trust`, the Python code that comes with it as well.

    Raises:
        BadModel: the folder has no config.json, or no safetensors.
    """
    names = _names(folder, trust=trust)
    if "config.json" not in names:
        raise BadModel("The folder does not contain a model.", where=str(folder), expected="config.json", got="none")
    refuse_pickles(folder)
    return names


def _names(folder: Path, *, trust: bool) -> list[str]:
    found = [
        path.name
        for path in folder.iterdir()
        if path.is_file() and (_MODEL_FILES.match(path.name) or (trust and path.suffix == ".py"))
    ]
    return sorted(found + [TOOL_TEMPLATE] * (folder / TOOL_TEMPLATE).is_file())


def copy_model(folder: Path, out: Path, *, trust: bool, with_weights: bool = True) -> None:
    """Copy a model's files unchanged. Weights are hard links where the file system allows it.

    Args:
        folder: the model's.
        out: an empty folder.
        trust: the model's own code may run, so it is copied too.
        with_weights: otherwise only the other files are copied.

    Raises:
        BadModel: the folder is no model's, or its tokenizer cannot be read.
    """
    if with_weights:
        model_files(folder, trust)
    for name in _names(folder, trust=trust):
        source, target = (folder / name).resolve(), out / name
        if ".safetensors" in name and not with_weights:
            continue
        if name.endswith(".safetensors"):
            try:
                os.link(source, target)  # the store hashes what it reads, so it notices an edit in place
            except OSError:
                shutil.copyfile(source, target)
        elif name in ("config.json", "tokenizer_config.json") and not trust:
            _copy_without_auto_map(source, target)
        else:
            target.parent.mkdir(exist_ok=True)
            shutil.copyfile(source, target)
    if not (out / "tokenizer.json").exists() or not (out / "tokenizer_config.json").exists():
        from transformers import AutoTokenizer

        try:
            tokenizer: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(folder, trust_remote_code=trust)
        except (ValueError, OSError) as error:
            raise BadModel(
                "The base's tokenizer cannot be read.",
                where=str(folder),
                expected="tokenizer.json and tokenizer_config.json",
                got=str(error).splitlines()[0][:200],
            ) from error
        tokenizer.save_pretrained(out)


def _copy_without_auto_map(source: Path, target: Path) -> None:
    """Copy a JSON file without `auto_map`: it would ask everybody who opens the merged model to run the hub's code."""
    try:
        values = json.loads(source.read_text(encoding="utf-8"))
        values.pop("auto_map", None)
    except (ValueError, AttributeError) as error:
        raise BadModel("A file of the base is not a JSON object.", where=str(source), got=str(error)[:200]) from error
    target.write_text(json.dumps(values, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
