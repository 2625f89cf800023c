"""Chats to token ids and a loss mask, both from one tokenization of one rendered text.

Where an answer begins and ends is found in the text, by rendering what stands before it, and carried to ids by the
tokenizer's own alignment: special tokens swallow white space, so that lengths of texts are not lengths of ids, and
a mask from special ids alone is wrong as soon as a message talks about them.
"""

from __future__ import annotations

import json
import re
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from loraflow.failures import BadModel

IGNORED = -100  # torch's ignore_index: a label that is not learned
_MARKERS = re.compile(r"\{%-?\s*generation\s*-?%\}")


@dataclass(frozen=True)
class Encoded:
    """One chat: token ids, and labels that are -100 where nothing is learned."""

    ids: np.ndarray  # int32
    labels: np.ndarray  # int32
    prompt: int  # ids before the last answer
    special_in_text: str | None = None  # a control token that stands in a message's text


class ChatTemplate:
    """A model's tokenizer and chat template, read from its folder without transformers' model code."""

    def __init__(self, folder: Path):
        from tokenizers import Tokenizer

        self.tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
        self.tokenizer.no_truncation()
        self.tokenizer.no_padding()
        config = json.loads((folder / "tokenizer_config.json").read_text(encoding="utf-8"))
        self.template = read_template(folder, config)
        self.variables: dict[str, Any] = {
            key: token if isinstance(token, str) else token["content"]
            for key in ("bos_token", "eos_token", "unk_token", "pad_token")
            if (token := config.get(key))
        }
        # Some templates write today's date into each prompt: equal runs would differ from day to day.
        self.variables["strftime_now"] = lambda form: time.strftime(form, time.gmtime(1_721_952_000))
        self.special = sorted(
            (token.content for token in self.tokenizer.get_added_tokens_decoder().values() if token.special),
            key=len,
            reverse=True,
        )
        self._any_special = re.compile("|".join(map(re.escape, self.special))) if self.special else None
        self._stop = re.compile(r"\s*(?:" + "|".join(map(re.escape, self.special)) + ")") if self.special else None

    def render(self, chats: Sequence[list[dict[str, str]]], *, prompt: bool = False) -> list[str]:
        """Return chats as the model reads them; `prompt` ends each with the head of an answer."""
        from jinja2.exceptions import TemplateError
        from transformers.utils.chat_template_utils import render_jinja_template

        try:
            texts, _ = render_jinja_template(
                list(chats), chat_template=self.template, add_generation_prompt=prompt, **self.variables
            )
        except (TemplateError, TypeError, ValueError) as error:
            raise BadModel(
                "The chat template refuses a chat.",
                where="chat_template",
                got=str(error)[:300],
                next_step="mend the rows (a template may know no system message), or choose another base",
            ) from error
        return texts

    def encode(self, chats: Sequence[list[dict[str, str]]], loss_on: str) -> list[Encoded]:
        """Encode chats. `loss_on` is assistant (every answer), last_assistant or all.

        Raises:
            BadModel: the template does not show where an answer begins, or ends it with no stop token.
        """
        texts = self.render(chats)
        for chat, text in zip(chats, texts, strict=True):
            for message in chat:
                if message["role"] in ("system", "tool") and message["content"].strip() not in text:
                    raise BadModel(
                        f"The chat template leaves {message['role']} messages out.",
                        where="chat_template",
                        got=message["content"][:80],
                        next_step=f"remove {message['role']} messages from the dataset, or mend the template",
                    )
        spans = self._marked_spans(chats) if _MARKERS.search(self.template) else self._prefix_spans(chats, texts)
        encodings = self.tokenizer.encode_batch(texts, add_special_tokens=False)
        return [
            self._masked(chat, encoding, found, loss_on)
            for chat, encoding, found in zip(chats, encodings, spans, strict=True)
        ]

    def prompt_ids(self, chats: Sequence[list[dict[str, str]]]) -> list[list[int]]:
        """Return the ids that generation starts from: the chats without their last answer."""
        prompts = self.render([chat[:-1] if chat[-1]["role"] == "assistant" else chat for chat in chats], prompt=True)
        return [encoding.ids for encoding in self.tokenizer.encode_batch(prompts, add_special_tokens=False)]

    def stop_ids(self) -> set[int]:
        """Return the ids of the control tokens that may end an answer, as the template itself writes it."""
        probe = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
        (encoded,) = self.encode([probe], "assistant")
        learned = encoded.ids[encoded.labels != IGNORED].tolist()
        control = {i for i, t in self.tokenizer.get_added_tokens_decoder().items() if t.special}
        found = {i for i in learned if i in control}
        if not found:
            raise BadModel(
                "What the chat template marks as an answer holds no stop token, so a model could not learn to stop.",
                where="chat_template",
                next_step="move {% endgeneration %} behind the token that ends an answer",
            )
        return found

    def _masked(self, chat: list[dict[str, str]], encoding: Any, spans: list[tuple[int, int]], loss_on: str) -> Encoded:
        ids = np.fromiter(encoding.ids, np.int32, len(encoding.ids))
        labels = np.full(len(ids), IGNORED, np.int32)
        if not spans:
            raise BadModel("The chat template marks no answer in a chat that has one.", where="chat_template")
        tokens = [_token_span(encoding, start, end) for start, end in spans]
        if loss_on == "all":
            labels[:] = ids
        else:
            for first, last in tokens[-1:] if loss_on == "last_assistant" else tokens:
                labels[first:last] = ids[first:last]
        found = None
        if self._any_special is not None:
            for message in chat:
                if hit := self._any_special.search(message["content"]):
                    found = hit.group()
                    break
        return Encoded(ids, labels, tokens[-1][0], found)

    def _prefix_spans(self, chats: Sequence[list[dict[str, str]]], texts: list[str]) -> list[list[tuple[int, int]]]:
        """Find answers by rendering what stands before each: what follows is the answer and its stop token."""
        turns = [(n, i) for n, chat in enumerate(chats) for i, m in enumerate(chat) if m["role"] == "assistant"]
        heads = self.render([chats[n][:i] for n, i in turns], prompt=True)
        spans: list[list[tuple[int, int]]] = [[] for _ in chats]
        for (n, i), head in zip(turns, heads, strict=True):
            text, content = texts[n], chats[n][i]["content"]
            last = i == len(chats[n]) - 1
            spans[n].append(self._answer(text, head, content, last))
        return spans

    def _answer(self, text: str, head: str, content: str, last: bool) -> tuple[int, int]:
        start = len(head)
        said = next((c for c in (content, content.strip()) if text.startswith(c, start)), None)
        if not text.startswith(head) or said is None:
            raise BadModel(
                "The chat template does not render an answer right after the prompt that asks for it.",
                where="chat_template",
                expected="a rendered chat that begins with its own prompt, or {% generation %} marks in the template",
                got=repr(text[max(0, start - 30) : start + 60]),
                next_step="put {% generation %} … {% endgeneration %} around the answer in chat_template.jinja",
            )
        stop = self._stop.match(text, start + len(said)) if self._stop else None
        if stop is None:
            raise BadModel(
                "The chat template ends an answer with no control token, so a model could not learn to stop.",
                where="chat_template",
                got=repr(text[start + len(said) : start + len(said) + 40]),
                next_step="choose an instruct model, or mend its chat template",
            )
        end = stop.end()
        if last:  # Phi-3's template closes a whole chat with a second stop token; it is learned too
            while self._stop and (more := self._stop.match(text, end)):
                end = more.end()
        return start, end

    def _marked_spans(self, chats: Sequence[list[dict[str, str]]]) -> list[list[tuple[int, int]]]:
        """Take answers from the template's own {% generation %} marks."""
        from transformers.utils.chat_template_utils import render_jinja_template

        _, spans = render_jinja_template(
            list(chats), chat_template=self.template, return_assistant_tokens_mask=True, **self.variables
        )
        return [[(start, end) for start, end in found] for found in spans]


def read_template(folder: Path, tokenizer_config: dict[str, Any]) -> str:
    """Return a model's chat template, from its own file or from the tokenizer's configuration.

    Raises:
        BadModel: it has none: a base that was never tuned for chats.
    """
    file = folder / "chat_template.jinja"
    if file.exists():
        return file.read_text(encoding="utf-8")
    template = tokenizer_config.get("chat_template")
    if isinstance(template, list):
        template = next((one["template"] for one in template if one.get("name") == "default"), None)
    if not template:
        raise BadModel(
            "The base model has no chat template.",
            where=str(folder),
            expected="chat_template.jinja, or chat_template in tokenizer_config.json",
            next_step="choose an instruct model, or put a chat_template.jinja beside the tokenizer",
        )
    return template


def _token_span(encoding: Any, start: int, end: int) -> tuple[int, int]:
    """Carry a span of characters to tokens: those that begin inside it."""
    first = next((t for c in range(start, end) if (t := encoding.char_to_token(c)) is not None), None)
    last = next((t for c in range(end - 1, start - 1, -1) if (t := encoding.char_to_token(c)) is not None), None)
    if first is None or last is None:
        return len(encoding.ids), len(encoding.ids)
    # "<|assistant|>" swallows the white space behind it, the answer's own included: that token is the prompt's.
    while first <= last and encoding.token_to_chars(first)[0] < start:
        first += 1
    # One character can be several tokens (an emoji in bytes): all of them stand at its place.
    while last + 1 < len(encoding.ids) and encoding.token_to_chars(last + 1) == encoding.token_to_chars(last):
        last += 1
    return first, last + 1
