"""Read tokenizer_config.json: the chat template, and the special tokens that it may write."""

from __future__ import annotations

from pathlib import Path

from pydantic import BaseModel, ValidationError

from loraflow.failures import BadModel

FILE = "tokenizer_config.json"
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
    """The keys of the file that are read."""

    chat_template: str | list[_NamedTemplate] | None = None
    bos_token: str | _SpecialToken | None = None
    eos_token: str | _SpecialToken | None = None
    unk_token: str | _SpecialToken | None = None
    pad_token: str | _SpecialToken | None = None

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
        """Return the special tokens by the names that a template has for them."""
        tokens = {
            "bos_token": self.bos_token,
            "eos_token": self.eos_token,
            "unk_token": self.unk_token,
            "pad_token": self.pad_token,
        }
        return {key: token if isinstance(token, str) else token.content for key, token in tokens.items() if token}


def find_template(folder: Path) -> str | None:
    """Return a model's chat template, from chat_template.jinja or from tokenizer_config.json; None if it has none.

    Raises:
        BadModel: the file is damaged, or the template is longer than any template is.
    """
    file = folder / "chat_template.jinja"
    template: str | None
    if file.exists():
        try:
            with file.open(encoding="utf-8") as opened:
                template = opened.read(MAX_TEMPLATE + 1)
        except (OSError, UnicodeDecodeError) as error:
            raise BadModel("The chat template cannot be read.", where=str(file), got=str(error)) from error
    else:
        found = TokenizerConfig.read(folder).chat_template
        if isinstance(found, list):
            found = next((item.template for item in found if item.name == "default"), None)
        template = found
    if template is not None and len(template) > MAX_TEMPLATE:
        raise BadModel(
            "The chat template is too long.", where=str(folder), expected=f"at most {MAX_TEMPLATE:,} characters"
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
            next_step="choose an instruct model, or put a chat_template.jinja next to the tokenizer",
        )
    return template
