"""The tokenizer and the chat template of a model with an adapter: the adapter's own, if it has them, else the base's.

trl and peft's users save the tokenizer that they trained with beside the adapter: with other tokens, or another template.
Prompts must have the form that was trained, so these files take precedence over the base's.
"""

import hashlib
import json
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from loraflow.data.templates.tokenizer_config import (
    DEFAULT_TEMPLATE,
    FILE,
    TEMPLATE,
    TOOL_TEMPLATE,
    find_template,
    find_tool_template,
    further_templates,
    read_tokenizer,
)
from loraflow.failures import BadModel
from loraflow.frozen import StoredModel

VOCABULARY = "tokenizer.json"
# Which base and template an adapter was trained with, or a merged model was made from.
ORIGIN = "loraflow.json"  # beside the files of an adapter or a merged model
_OF_CHATS = (TEMPLATE, DEFAULT_TEMPLATE)
_TEMPLATES = (*_OF_CHATS, TOOL_TEMPLATE)
_PREFIXES = ("tokenizer", "chat_template", "special_tokens_map", "added_tokens", "vocab", "merges", "spiece")


def tokenizer_files(folder: Path) -> list[str]:
    """Return the names of a folder's files of tokenizer and templates, sorted."""
    found = [path.name for path in folder.iterdir() if path.is_file() and path.name.startswith(_PREFIXES)]
    return sorted([*found, *further_templates(folder)])


def copy_tokenizer_files(folder: Path, out: Path, *, templates: bool = True) -> None:
    """Copy a folder's files of tokenizer and templates.

    Args:
        templates: otherwise the files of templates are left out.
    """
    for name in tokenizer_files(folder):
        if templates or name not in _TEMPLATES:
            (out / name).parent.mkdir(exist_ok=True)
            shutil.copyfile(folder / name, out / name)


def has_own(adapter: Path) -> bool:
    """Tell whether an adapter has a tokenizer or a template of its own."""
    return bool(tokenizer_files(adapter))


def check_tokenizer_files(adapter: Path) -> None:
    """Refuse a part of a tokenizer beside an adapter: together with the base's files, it would be a third one.

    Raises:
        BadModel: the folder has files of a tokenizer, but not all that are needed.
    """
    names = set(tokenizer_files(adapter)) - {*_TEMPLATES}
    missing = sorted({VOCABULARY, FILE} - names)
    if names and missing:
        raise BadModel(
            "The adapter's tokenizer is incomplete.",
            where=str(adapter),
            expected=f"{VOCABULARY} and {FILE}, or neither",
            got=", ".join(sorted(names)),
            next_step="save it there with AutoTokenizer's save_pretrained, or remove it to use the base's",
        )


def own_template(adapter: Path) -> str | None:
    """Return the chat template beside an adapter; None if it has none.

    Raises:
        BadModel: it is damaged.
    """
    return find_template(adapter) if any((adapter / name).exists() for name in (*_OF_CHATS, FILE)) else None


def write_tokenizer(base: Path, adapter: Path, out: Path) -> None:
    """Write tokenizer and template of base and adapter to a folder; it has no such files yet.

    Args:
        adapter: PEFT's folder; its tokenizer replaces all files of the base's, its template the base's template.

    Raises:
        BadModel: a file is damaged.
    """
    has_tokenizer = (adapter / VOCABULARY).exists()
    if has_tokenizer:
        copy_tokenizer_files(adapter, out)
        if find_template(out) is None and (base / FILE).exists():
            _write_templates(base, out)
        return
    has_template = any((adapter / name).exists() for name in _OF_CHATS)
    copy_tokenizer_files(base, out, templates=not has_template)
    if has_template:
        copy_tokenizer_files(adapter, out)


def _write_templates(base: Path, out: Path) -> None:
    for name, template in ((TEMPLATE, find_template(base)), (TOOL_TEMPLATE, find_tool_template(base))):
        if template is not None:
            (out / name).parent.mkdir(exist_ok=True)
            (out / name).write_text(template, encoding="utf-8")


@contextmanager
def served_folder(base: Path, adapter: Path | None) -> Iterator[Path]:
    """Provide a folder with the tokenizer, the template and the configurations that a model is served with.

    Args:
        base: the model's folder, which is returned unless the adapter has files of its own.
    """
    if adapter is None or not has_own(adapter):
        yield base
        return
    with tempfile.TemporaryDirectory(prefix="loraflow-tokenizer-") as name:
        folder = Path(name)
        for config in ("config.json", "generation_config.json"):
            if (base / config).exists():
                shutil.copyfile(base / config, folder / config)
        write_tokenizer(base, adapter, folder)
        yield folder


def refuse_other_ids(base: Path, adapter: Path) -> None:
    """Refuse a tokenizer that gives the base's tokens other ids: its embeddings would be read by the wrong rows.

    Args:
        adapter: PEFT's folder. It contains no embeddings of its own.

    Raises:
        BadModel: a token has another id; the message names the first one.
    """
    if not (base / VOCABULARY).exists() or not (adapter / VOCABULARY).exists():
        return
    of_base, of_adapter = (read_tokenizer(folder).get_vocab(with_added_tokens=True) for folder in (base, adapter))
    different = sorted((index, token) for token, index in of_base.items() if of_adapter.get(token, index) != index)
    if different:
        index, token = different[0]
        raise BadModel(
            "The adapter's tokenizer gives tokens other ids than the base's tokenizer.",
            where=str(adapter / VOCABULARY),
            expected=f"{token!r} is {index}, as in the base",
            got=f"{of_adapter[token]}, and {len(different) - 1} more" if len(different) > 1 else str(of_adapter[token]),
            next_step="name the base that it was trained on",
        )


class _Origin(StoredModel):
    base: str | None = None
    chat_template_sha256: str | None = None


def chat_template(folder: Path) -> str | None:
    """Return a model's chat template, or None if it has none."""
    return find_template(folder) if (folder / FILE).exists() else None


def template_hash(folder: Path) -> str | None:
    """Return the sha256 of a model's chat template, or None if it has none."""
    template = chat_template(folder)
    return None if template is None else hashlib.sha256(template.encode()).hexdigest()


def write_origin(folder: Path, base: Path, base_digest: str | None) -> None:
    """Record in `folder` the base's digest and the hash of its chat template."""
    values = {"base": base_digest, "chat_template_sha256": template_hash(base)}
    (folder / ORIGIN).write_text(json.dumps(values, indent=1, sort_keys=True) + "\n", encoding="utf-8")


def check_origin(adapter: Path, base: Path, base_digest: str | None) -> None:
    """Compare what an adapter was trained with to this base. An adapter without a record passes.

    Raises:
        BadModel: another base, or another chat template: prompts would not have the form that was trained.
    """
    if not (adapter / ORIGIN).exists():
        return
    trained = _Origin.model_validate_json((adapter / ORIGIN).read_bytes())
    own = own_template(adapter)  # takes precedence over the base's
    used = template_hash(base) if own is None else hashlib.sha256(own.encode()).hexdigest()
    for what, used_here, recorded in (
        ("base", base_digest, trained.base),
        ("chat template", used, trained.chat_template_sha256),
    ):
        if used_here and recorded and used_here != recorded:
            raise BadModel(
                f"The adapter was trained with another {what}.",
                where=str(adapter / ORIGIN),
                expected=recorded,
                got=used_here,
                next_step="merge it into the base that it was trained on, with that base's tokenizer and template",
            )
