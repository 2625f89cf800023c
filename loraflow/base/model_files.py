"""The files of a model's folder, and copies of them."""

from __future__ import annotations

import json
import os
import re
import shutil
from pathlib import Path
from typing import TYPE_CHECKING

from loraflow.base.stored_weights import loaded_files, refuse_pickles
from loraflow.data.tokenizer_config import further_templates
from loraflow.failures import BadModel

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

# Packages with which transformers converts a tokenizer to tokenizer.json, by the end of its file's name.
_CONVERTERS = {"tekken.json": "mistral-common", ".model": "sentencepiece protobuf", ".tiktoken": "tiktoken"}
_SAMPLES = (
    "two  words\n\n\tand 12345 more.",
    " It's naïve, 你好 😀",
    '{"a": [1, 2]}',
    "def f(x):\n    return x  # two",
)
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
        raise BadModel(
            "The folder does not contain a model.",
            where=str(folder),
            expected="config.json",
            got="none",
            next_step="name the folder that holds config.json and the weights",
        )
    refuse_pickles(folder)
    return names


def _names(folder: Path, *, trust: bool) -> list[str]:
    found = [
        path.name
        for path in folder.iterdir()
        if path.is_file() and (_MODEL_FILES.match(path.name) or (trust and path.suffix == ".py"))
    ]
    if "tokenizer.json" not in found:  # it is made from these files then
        found += _tokenizer_sources(folder)
    return sorted({*found, *further_templates(folder)})


def _tokenizer_sources(folder: Path) -> list[str]:
    """Return the names of files that are a tokenizer in another form: of sentencepiece, tiktoken or mistral-common."""
    return sorted(path.name for path in folder.iterdir() if path.name.endswith(tuple(_CONVERTERS)))


def copy_model(folder: Path, out: Path, *, trust: bool, with_weights: bool = True) -> None:
    """Copy a model's files unchanged. Weights are hard links where the file system allows it.

    Files of weights that transformers does not load are left out. Which of them a hub snapshot has depends on earlier
    downloads, so they would make the artifact of a commit depend on the cache.

    Args:
        folder: the model's.
        out: an empty folder.
        trust: the model's own code may run, so it is copied too.
        with_weights: otherwise only the other files are copied.

    Raises:
        BadModel: the folder is no model's, its index of the weights is damaged, or its tokenizer cannot be read.
    """
    weights: set[str] = set()
    if with_weights:
        model_files(folder, trust)
        weights = {file.name for file in loaded_files(folder)}
    for name in _names(folder, trust=trust):
        source, target = (folder / name).resolve(), out / name
        if ".safetensors" in name and name not in weights:
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
        save_tokenizer(open_tokenizer(folder, trust=trust), out, trust=trust)
        if not (out / "tokenizer.json").exists():
            raise BadModel(
                "The base's tokenizer has no form that training reads.",
                where=str(folder),
                expected="tokenizer.json, or files that transformers converts to it",
                got=", ".join(_tokenizer_sources(folder)) or "none",
                next_step="choose a copy of the model with tokenizer.json",
            )


def open_tokenizer(folder: Path, *, trust: bool) -> PreTrainedTokenizerBase:
    """Open a tokenizer with transformers.

    Raises:
        BadModel: transformers cannot open it.
    """
    from transformers import AutoTokenizer

    try:
        tokenizer: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(folder, trust_remote_code=trust)
    except Exception as error:  # tokenizers and the model's own code raise anything
        sources = [] if (folder / "tokenizer.json").exists() else _tokenizer_sources(folder)
        found = ((package, name) for end, package in _CONVERTERS.items() for name in sources if name.endswith(end))
        needed, source = next(found, (None, None))
        raise BadModel(
            "transformers cannot open the base's tokenizer.",
            where=str(folder),
            expected="tokenizer.json and tokenizer_config.json",
            got=source or " ".join(str(error).split())[:300] or type(error).__name__,
            next_step=f"pip install {needed}; or open the tokenizer where that is installed, and save it "
            "(save_pretrained) into the base's folder"
            if needed
            else "download the base model again, or choose another base",
        ) from error
    return tokenizer


def save_tokenizer(tokenizer: PreTrainedTokenizerBase, out: Path, *, trust: bool) -> None:
    """Save a tokenizer so that, opened again, it gives the same ids.

    transformers does not save `legacy`, which old Llama tokenizers need: without it, no space is put behind special tokens.

    Args:
        tokenizer: as transformers opens it.
        out: the folder to write to, which may be its own.
        trust: run Python code that comes with the model.

    Raises:
        BadModel: what was saved gives other ids.
    """
    special = sorted(map(str, tokenizer.all_special_tokens))[:50]
    texts = [*_SAMPLES, *(f"{one}a word{one} a word\n{one}\n  {one}" for one in special)]
    before = [list(tokenizer(text, add_special_tokens=False)["input_ids"]) for text in texts]
    tokenizer.save_pretrained(out)
    if legacy := getattr(tokenizer, "legacy", False):
        file = out / "tokenizer_config.json"
        values = {**json.loads(file.read_text(encoding="utf-8")), "legacy": legacy}
        file.write_text(json.dumps(values, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    saved = open_tokenizer(out, trust=trust)
    for text, expected in zip(texts, before, strict=True):
        if (found := list(saved(text, add_special_tokens=False)["input_ids"])) != expected:
            raise BadModel(
                "The base's tokenizer gives other ids after transformers has saved it.",
                where=f"{out}: {text!r}",
                expected=str(tokenizer.convert_ids_to_tokens(expected)[:20]),
                got=str(saved.convert_ids_to_tokens(found)[:20]),
                next_step="choose a copy of the model with tokenizer.json",
            )


def _copy_without_auto_map(source: Path, target: Path) -> None:
    """Copy a JSON file without `auto_map`: it would ask everybody who opens the merged model to run the hub's code."""
    try:
        values = json.loads(source.read_text(encoding="utf-8"))
        values.pop("auto_map", None)
    except (ValueError, AttributeError) as error:
        raise BadModel(
            "A file of the base is not a JSON object.",
            where=str(source),
            got=str(error)[:200],
            next_step="fetch the base again",
        ) from error
    target.write_text(json.dumps(values, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
