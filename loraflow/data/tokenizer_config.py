"""Read tokenizer_config.json: the chat template, and the special tokens that it may write."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path

from pydantic import BaseModel, ConfigDict, JsonValue, ValidationError

from loraflow.failures import BadModel

FILE = "tokenizer_config.json"
TEMPLATE = "chat_template.jinja"
TOOL_TEMPLATE = (
    "additional_chat_templates/tool_use.jinja"  # for chats with tools, if there is a TEMPLATE for the others
)
TRAINING_TEMPLATE = "chat_template_training.jinja"  # renders the same text, and marks the answers
SPECIAL_TOKENS = "special_tokens_map.json"  # of older models; newer ones have everything in FILE
# What transformers gives to the template, where that does not follow from the files. resolve_base writes it.
RECORD = "tokenizer_special_tokens.json"
MAX_BYTES = 64 * 2**20  # with added_tokens_decoder, the largest are a few MB
MAX_TEMPLATE = 2**20  # characters; the longest templates have about 30,000


class _SpecialToken(BaseModel):
    """A special token as the file may have it, instead of its text alone."""

    content: str


class _NamedTemplate(BaseModel):
    """An item of the file's chat_template, if that is a list."""

    name: str | None = None
    template: str | None = None


class TokenizerConfig(BaseModel):
    """The keys of the file that are read. Special tokens are any keys whose names end with `_token`."""

    model_config = ConfigDict(extra="allow")

    chat_template: str | list[_NamedTemplate] | None = None
    bos_token: str | _SpecialToken | None = None
    eos_token: str | _SpecialToken | None = None
    unk_token: str | _SpecialToken | None = None
    pad_token: str | _SpecialToken | None = None
    added_tokens_decoder: dict[str, JsonValue] | None = None
    extra_special_tokens: JsonValue = None

    @classmethod
    def read(cls, folder: Path) -> TokenizerConfig:
        """Read the file in a model's folder.

        Raises:
            BadModel: it is missing or damaged.
        """
        file = folder / FILE
        try:
            with file.open("rb") as opened:
                return cls.model_validate_json(opened.read(MAX_BYTES))
        except (OSError, ValidationError) as error:
            first = error.errors()[0] if isinstance(error, ValidationError) else None
            got = f"{'.'.join(map(str, first['loc'])) or 'the document'}: {first['msg']}" if first else str(error)
            raise BadModel(
                "The tokenizer's configuration cannot be read.",
                where=str(file),
                got=got[:300],
                next_step="download the base model again",
            ) from error

    def variables(self) -> dict[str, str]:
        """Return the special tokens of this file by the names that a template has for them."""
        named: dict[str, JsonValue | _SpecialToken] = {
            "bos_token": self.bos_token,
            "eos_token": self.eos_token,
            "unk_token": self.unk_token,
            "pad_token": self.pad_token,
            **{key: value for key, value in (self.model_extra or {}).items() if key.endswith("_token")},
        }
        return _texts(named) | _named_extra(self.extra_special_tokens)


def special_tokens(folder: Path) -> dict[str, str]:
    """Return the special tokens that transformers gives to a model's chat template, by name.

    They are in tokenizer_config.json. If that file has no added_tokens_decoder, special_tokens_map.json takes precedence.
    A tokenizer class may add defaults of its own: those are in RECORD.

    Raises:
        BadModel: a file is missing or damaged.
    """
    if (folder / RECORD).exists():
        return _texts(_object(folder / RECORD))
    config = TokenizerConfig.read(folder)
    found = config.variables()
    if config.added_tokens_decoder is None and (folder / SPECIAL_TOKENS).exists():
        values = _object(folder / SPECIAL_TOKENS)
        named = _texts({key: value for key, value in values.items() if key.endswith("_token")})
        emptied = {key for key, value in values.items() if value is None}
        found = {key: token for key, token in found.items() if key not in emptied} | named
        found |= _named_extra(values.get("extra_special_tokens"))
    return found


def _object(file: Path) -> dict[str, JsonValue]:
    try:
        with file.open("rb") as opened:
            values: JsonValue = json.loads(opened.read(MAX_BYTES))
        if not isinstance(values, dict):
            raise ValueError("not a JSON object")
    except (OSError, ValueError, RecursionError) as error:
        raise BadModel(
            "The tokenizer's special tokens cannot be read.",
            where=str(file),
            got=str(error)[:300],
            next_step="download the base model again",
        ) from error
    return values


def _texts(values: Mapping[str, JsonValue | _SpecialToken]) -> dict[str, str]:
    """Return the tokens' texts. A file has a text, or an object with its text and how it is matched."""
    out: dict[str, str] = {}
    for key, value in values.items():
        content = value.content if isinstance(value, _SpecialToken) else value
        if isinstance(content, dict):
            content = content.get("content")
        if isinstance(content, str) and content:
            out[key] = content
    return out


def _named_extra(value: JsonValue) -> dict[str, str]:
    return _texts(value) if isinstance(value, dict) else {}


def find_template(folder: Path) -> str | None:
    """Return a model's chat template, from chat_template.jinja or from tokenizer_config.json; None if it has none.

    Raises:
        BadModel: the file is damaged, or the template is longer than any template is.
    """
    file = folder / TEMPLATE
    template: str | None
    if file.exists():
        try:
            with file.open(encoding="utf-8") as opened:
                template = opened.read(MAX_TEMPLATE + 1)
        except (OSError, UnicodeDecodeError) as error:
            raise BadModel(
                "The chat template cannot be read.", where=str(file), got=str(error), next_step="fetch the base again"
            ) from error
    else:
        found = TokenizerConfig.read(folder).chat_template
        if isinstance(found, list):
            found = next((item.template for item in found if item.name == "default"), None)
        template = found
    if template is not None and len(template) > MAX_TEMPLATE:
        raise BadModel(
            "The chat template is too long.",
            where=str(folder),
            expected=f"at most {MAX_TEMPLATE:,} characters",
            next_step="choose another base, or shorten the template",
        )
    return template or None


def find_tool_template(folder: Path) -> str | None:
    """Return the template that transformers uses for chats with tools, if it is another one.

    Raises:
        BadModel: the file is damaged, or the template is longer than any template is.
    """
    template: str | None = None
    if (folder / TOOL_TEMPLATE).exists():
        try:
            with (folder / TOOL_TEMPLATE).open(encoding="utf-8") as opened:
                template = opened.read(MAX_TEMPLATE + 1)
        except (OSError, UnicodeDecodeError) as error:
            raise BadModel(
                "The chat template cannot be read.",
                where=TOOL_TEMPLATE,
                got=str(error),
                next_step="fetch the base again",
            ) from error
    elif not (folder / TEMPLATE).exists():
        found = TokenizerConfig.read(folder).chat_template
        items = found if isinstance(found, list) else []
        template = next((item.template for item in items if item.name == "tool_use"), None)
    if template is not None and len(template) > MAX_TEMPLATE:
        raise BadModel(
            "The chat template is too long.",
            where=str(folder),
            expected=f"at most {MAX_TEMPLATE:,} characters",
            next_step="choose another base, or shorten the template",
        )
    return template or None


def read_template(folder: Path) -> str:
    """Return a model's chat template.

    Raises:
        BadModel: the model has no chat template; it may be a base model that was never tuned for chats.
    """
    template = find_template(folder)
    if template is None:
        raise BadModel(
            "The base model has no chat template.",
            where=str(folder),
            expected="chat_template.jinja, or chat_template in tokenizer_config.json",
            next_step="choose an instruct model, or name a template: base.chat_template",
        )
    return template
