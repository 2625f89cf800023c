"""Read tokenizer_config.json: the chat template, and the special tokens that it may write."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from pydantic import BaseModel, ConfigDict, JsonValue, ValidationError

from loraflow.failures import BadModel

if TYPE_CHECKING:
    from tokenizers import Tokenizer

FILE = "tokenizer_config.json"
TEMPLATE = "chat_template.jinja"
DEFAULT_TEMPLATE = "additional_chat_templates/default.jinja"  # transformers prefers it to TEMPLATE
# For chats with tools, if the other chats have another template.
TOOL_TEMPLATE = "additional_chat_templates/tool_use.jinja"
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

    chat_template: str | dict[str, str] | list[_NamedTemplate] | None = None
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

    def named_template(self, name: str) -> str | None:
        """Return the template with a name, such as default or tool_use; None if the file has none of this name."""
        if isinstance(self.chat_template, str | None):
            return self.chat_template if name == "default" else None
        if isinstance(self.chat_template, dict):
            return self.chat_template.get(name)
        return next((item.template for item in self.chat_template if item.name == name), None)

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


def read_tokenizer(folder: Path) -> Tokenizer:
    """Read tokenizer.json in a folder.

    Raises:
        BadModel: it is missing or damaged.
    """
    from tokenizers import Tokenizer

    file = str(folder / "tokenizer.json")
    try:
        return Tokenizer.from_file(file)
    except Exception as error:  # the library raises no type of its own
        raise BadModel(
            "The tokenizer cannot be read.",
            where=file,
            got=str(error)[:300],
            next_step="fetch it again, or save it with AutoTokenizer's save_pretrained",
        ) from error


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


def marked_special(folder: Path) -> set[str]:
    """Return the tokens that added_tokens_decoder of tokenizer_config.json calls special, and transformers with it."""
    if not (folder / FILE).exists():
        return set()
    entries = (TokenizerConfig.read(folder).added_tokens_decoder or {}).values()
    return {str(entry.get("content")) for entry in entries if isinstance(entry, dict) and entry.get("special") is True}


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


def further_templates(folder: Path) -> list[str]:
    """Return the names of a folder's templates beside TEMPLATE that transformers reads, in a folder of their own."""
    return [name for name in (DEFAULT_TEMPLATE, TOOL_TEMPLATE) if (folder / name).is_file()]


def find_template(folder: Path) -> str | None:
    """Return a model's chat template, from the file that transformers prefers; None if it has none.

    Raises:
        BadModel: the file is damaged, or the template is longer than any template is.
    """
    for name in (DEFAULT_TEMPLATE, TEMPLATE):
        if (folder / name).exists():
            return _text_of(folder / name)
    return _checked(TokenizerConfig.read(folder).named_template("default"), folder)


def find_tool_template(folder: Path) -> str | None:
    """Return the template that transformers uses for chats with tools, if it is another one.

    Raises:
        BadModel: the file is damaged, or the template is longer than any template is.
    """
    if (folder / TOOL_TEMPLATE).exists():
        return _text_of(folder / TOOL_TEMPLATE)
    if (folder / DEFAULT_TEMPLATE).exists() or (folder / TEMPLATE).exists():
        return None
    return _checked(TokenizerConfig.read(folder).named_template("tool_use"), folder)


def _text_of(file: Path) -> str | None:
    try:
        with file.open(encoding="utf-8") as opened:
            return _checked(opened.read(MAX_TEMPLATE + 1), file)
    except (OSError, UnicodeDecodeError) as error:
        raise BadModel(
            "The chat template cannot be read.", where=str(file), got=str(error), next_step="fetch the base again"
        ) from error


def _checked(template: str | None, where: Path) -> str | None:
    """Return a template, None for an empty one."""
    if template is not None and len(template) > MAX_TEMPLATE:
        raise BadModel(
            "The chat template is too long.",
            where=str(where),
            expected=f"at most {MAX_TEMPLATE:,} characters",
            next_step="choose another base, or shorten the template",
        )
    return template or None


def joined(with_tools: str, without: str) -> str:
    """Return one template that renders chats with tools by one source and others by another, as transformers chooses.

    The merged model has one template then, and all servers choose alike.
    """
    first, second = (source.removesuffix("\n") for source in (with_tools, without))
    return f"{{% if tools is defined and tools is not none +%}}{first}{{%+ else +%}}{second}{{%+ endif %}}"


def read_template(folder: Path) -> str:
    """Return a model's chat template; if chats with tools have another one, one template of both.

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
    with_tools = find_tool_template(folder)
    return template if with_tools is None else joined(with_tools, template)
