"""`loraflow.json`: which base and which chat template an adapter was trained with, or a merged model was made from."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

from loraflow.adapters.tokenizer_files import own_template
from loraflow.failures import BadModel
from loraflow.frozen import StoredModel

ORIGIN = "loraflow.json"  # beside the files of an adapter or a merged model


class _Origin(StoredModel):
    base: str | None = None
    chat_template_sha256: str | None = None


def chat_template(folder: Path) -> str | None:
    """Return a model's chat template, or None if it has none."""
    from loraflow.data.templates.tokenizer_config import FILE, find_template

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
