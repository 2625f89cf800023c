"""Chats to token ids and a loss mask, both from one tokenization of one rendered text.

Where an answer begins and ends is found in the text, by rendering what stands before it, and carried to ids by an
alignment of both: special tokens swallow white space, so that lengths of texts are not lengths of ids, and a mask from
special ids alone is wrong as soon as a message talks about them. The alignment is the tokenizer's own, or, where it
is proved to be the same, the one that `alignment` reads off the ids.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
from jinja2.exceptions import TemplateError

from loraflow.data.alignment import ByteAlignment, Span
from loraflow.data.template import CompiledTemplate
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
        variables = {
            key: token if isinstance(token, str) else token["content"]
            for key in ("bos_token", "eos_token", "unk_token", "pad_token")
            if (token := config.get(key))
        }
        try:
            self._compiled = CompiledTemplate(self.template, variables)
        except TemplateError as error:
            raise BadModel("The chat template is no template.", where="chat_template", got=str(error)[:300]) from error
        self.alignment: ByteAlignment | None  # None: the tokenizer's own, for every row
        try:
            self.alignment = ByteAlignment(self.tokenizer)
        except ValueError:
            self.alignment = None
        self.special = sorted(
            (token.content for token in self.tokenizer.get_added_tokens_decoder().values() if token.special),
            key=len,
            reverse=True,
        )
        self._any_special = re.compile("|".join(map(re.escape, self.special))) if self.special else None
        # A search for what they all begin with is far faster than the pattern's.
        self._special_start = os.path.commonprefix(self.special)  # noqa: RUF071 (letters, not folders)
        self._stop = re.compile(r"\s*(?:" + "|".join(map(re.escape, self.special)) + ")") if self.special else None

    def render(self, chats: Sequence[list[dict[str, str]]], *, prompt: bool = False) -> list[str]:
        """Return chats as the model reads them; `prompt` ends each with the head of an answer."""
        try:
            return [self._compiled.render(chat, prompt=prompt) for chat in chats]
        except (TemplateError, TypeError, ValueError) as error:
            raise BadModel(
                "The chat template refuses a chat.",
                where="chat_template",
                got=str(error)[:300],
                next_step="mend the rows (a template may know no system message), or choose another base",
            ) from error

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
        if not all(spans):
            raise BadModel("The chat template marks no answer in a chat that has one.", where="chat_template")
        return [
            Encoded(ids, _labels(ids, tokens, loss_on), tokens[-1][0], self._special_in(chat))
            for chat, (ids, tokens) in zip(chats, self._aligned(texts, spans), strict=True)
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

    def _aligned(self, texts: Sequence[str], spans: Sequence[Sequence[Span]]) -> list[tuple[np.ndarray, list[Span]]]:
        """Return each text's ids, and its spans of characters as spans of tokens."""
        if self.alignment is None:
            return self._aligned_by_tokenizer(texts, spans)
        lists = [encoding.ids for encoding in self.tokenizer.encode_batch_fast(texts, add_special_tokens=False)]
        lengths = np.fromiter(map(len, lists), np.int64, len(lists))
        ids = np.fromiter(chain.from_iterable(lists), np.int32, int(lengths.sum()))
        found = self.alignment.spans(texts, ids, lengths, spans)
        rows = np.split(ids, np.cumsum(lengths)[:-1])
        unproved = [n for n, tokens in enumerate(found) if tokens is None]
        slow = self._aligned_by_tokenizer([texts[n] for n in unproved], [spans[n] for n in unproved])
        out = dict(zip(unproved, slow, strict=True))
        return [out[n] if tokens is None else (rows[n], tokens) for n, tokens in enumerate(found)]

    def _aligned_by_tokenizer(
        self, texts: Sequence[str], spans: Sequence[Sequence[Span]]
    ) -> list[tuple[np.ndarray, list[Span]]]:
        return [
            (np.array(encoding.ids, np.int32), [_token_span(encoding, start, end) for start, end in found])
            for encoding, found in zip(self.tokenizer.encode_batch(texts, add_special_tokens=False), spans, strict=True)
        ]

    def _special_in(self, chat: list[dict[str, str]]) -> str | None:
        """Return the first control token in a chat's messages."""
        if self._any_special is None:
            return None
        for message in chat:
            content = message["content"]
            if self._special_start in content and (hit := self._any_special.search(content)):
                return hit.group()
        return None

    def _prefix_spans(self, chats: Sequence[list[dict[str, str]]], texts: list[str]) -> list[list[Span]]:
        """Find answers by rendering what stands before each: what follows is the answer and its stop token."""
        turns = [(n, i) for n, chat in enumerate(chats) for i, m in enumerate(chat) if m["role"] == "assistant"]
        heads = self.render([chats[n][:i] for n, i in turns], prompt=True)
        spans: list[list[Span]] = [[] for _ in chats]
        for (n, i), head in zip(turns, heads, strict=True):
            text, content = texts[n], chats[n][i]["content"]
            last = i == len(chats[n]) - 1
            spans[n].append(self._answer(text, head, content, last))
        return spans

    def _answer(self, text: str, head: str, content: str, last: bool) -> Span:
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

    def _marked_spans(self, chats: Sequence[list[dict[str, str]]]) -> list[list[Span]]:
        """Take answers from the template's own {% generation %} marks."""
        return [self._compiled.marked(chat) for chat in chats]


def _labels(ids: np.ndarray, tokens: list[Span], loss_on: str) -> np.ndarray:
    if loss_on == "all":
        return ids.copy()
    labels = np.full(len(ids), IGNORED, np.int32)
    for first, last in tokens[-1:] if loss_on == "last_assistant" else tokens:
        labels[first:last] = ids[first:last]
    return labels


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


def _token_span(encoding: Any, start: int, end: int) -> Span:
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
