"""Convert chats to token ids and a loss mask, both from one tokenization of one rendered text.

The span of an answer is found in the text, by rendering what precedes the answer, and is then mapped to token ids.
Counting tokens would be wrong, because control tokens swallow white space. Searching for control tokens would be wrong as
soon as a message contains one. The mapping uses the tokenizer's offsets, or the faster `alignment` for rows where that is
verified to be exact.
"""

from __future__ import annotations

import os
import re
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import numpy as np

from loraflow.data.alignment import ByteAlignment, Span
from loraflow.data.chats import Chat
from loraflow.data.template_process import template_process
from loraflow.data.tokenizer_config import TokenizerConfig, read_template
from loraflow.failures import BadModel

if TYPE_CHECKING:
    from tokenizers import Encoding

IGNORED = -100  # the label of a token that is not learned: torch's ignore_index
_MARKERS = re.compile(r"\{%-?\s*generation\s*-?%\}")


LossOn = Literal["assistant", "last_assistant", "all"]


@dataclass(frozen=True)
class Encoded:
    """A chat as token ids and labels."""

    ids: np.ndarray  # int32
    labels: np.ndarray  # int32; IGNORED where nothing is learned
    prompt: int  # number of ids before the last answer
    special_in_text: str | None = None  # the first control token in a message's text


class ChatTemplate:
    """A model's tokenizer and chat template, read from its folder without transformers' model code."""

    def __init__(self, folder: Path):
        from tokenizers import Tokenizer

        try:
            self.tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
        except Exception as error:  # the library raises no type of its own
            raise BadModel(
                "The tokenizer cannot be read.",
                where=str(folder / "tokenizer.json"),
                got=str(error)[:300],
                next_step="download the base model again",
            ) from error
        self.tokenizer.no_truncation()
        self.tokenizer.no_padding()
        self.template = read_template(folder)
        variables = TokenizerConfig.read(folder).variables()
        self._renderer = template_process(self.template, variables)
        self._renderer.compile()  # refuses a template that is not valid
        self.alignment: ByteAlignment | None  # None: use the tokenizer's own for every row
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
        # Searching for their common prefix first is far faster than the regular expression.
        self._special_start = os.path.commonprefix(self.special)  # noqa: RUF071 (letters, not folders)
        self._stop = re.compile(r"\s*(?:" + "|".join(map(re.escape, self.special)) + ")") if self.special else None

    def render(self, chats: Sequence[Chat], *, prompt: bool = False) -> list[str]:
        """Render chats as the model reads them. `prompt` adds the start of an answer (add_generation_prompt).

        Raises:
            BadModel: the template raises an error for a chat, or exceeds a limit of time or memory.
        """
        return self._renderer.render(chats, prompt=prompt)

    def encode(
        self, chats: Sequence[Chat], loss_on: LossOn, learned: Sequence[Sequence[int] | None] | None = None
    ) -> list[Encoded]:
        """Encode chats. `loss_on` selects the trained tokens: every answer, the last answer, or all tokens.

        Args:
            chats: the chats.
            loss_on: the trained tokens.
            learned: of each chat, the numbers of the messages that are learned; None: all answers. The other answers are
                left out of what `loss_on` selects.

        Raises:
            BadModel: an answer cannot be found in the rendered text, or no stop token ends it.
        """
        texts = self.render(chats)
        for chat, text in zip(chats, texts, strict=True):
            for message in chat:
                if message["role"] in ("system", "tool") and message["content"].strip() not in text:
                    raise BadModel(
                        f"The chat template leaves out {message['role']} messages.",
                        where="chat_template",
                        got=message["content"][:80],
                        next_step=f"remove {message['role']} messages from the dataset, or correct the template",
                    )
        spans = self._marked_spans(chats) if _MARKERS.search(self.template) else self._prefix_spans(chats, texts)
        if not all(spans):
            raise BadModel(
                "The chat template does not mark the answer of a chat.",
                where="chat_template",
                next_step="put {% generation %} … {% endgeneration %} around every answer in chat_template.jinja",
            )
        aligned = self._aligned(texts, spans)
        encoded = [
            Encoded(ids, _labels(ids, tokens, loss_on), tokens[-1][0], self._special_in(chat))
            for chat, (ids, tokens) in zip(chats, aligned, strict=True)
        ]
        for chat, row, (_, tokens), numbers in zip(
            chats, encoded, aligned, learned or [None] * len(chats), strict=True
        ):
            if numbers is not None:
                _mask_others(row.labels, chat, tokens, numbers)
        return encoded

    def prompt_ids(self, chats: Sequence[Chat]) -> list[list[int]]:
        """Return the ids that generation starts from: the chats without their last answer."""
        prompts = self.render([chat[:-1] if chat[-1]["role"] == "assistant" else chat for chat in chats], prompt=True)
        return [encoding.ids for encoding in self.tokenizer.encode_batch(prompts, add_special_tokens=False)]

    def stop_ids(self) -> set[int]:
        """Return the ids of the control tokens with which the template ends an answer.

        Raises:
            BadModel: there is no such token.
        """
        probe: Chat = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
        (encoded,) = self.encode([probe], "assistant")
        learned = encoded.ids[encoded.labels != IGNORED].tolist()
        control = {i for i, t in self.tokenizer.get_added_tokens_decoder().items() if t.special}
        found = {i for i in learned if i in control}
        if not found:
            raise BadModel(
                "The chat template's {% generation %} block contains no stop token: the model would not learn to stop.",
                where="chat_template",
                next_step="move {% endgeneration %} behind the token that ends an answer",
            )
        return found

    def _aligned(self, texts: Sequence[str], spans: Sequence[Sequence[Span]]) -> list[tuple[np.ndarray, list[Span]]]:
        """Return each text's ids, and its spans as spans of tokens."""
        if self.alignment is None:
            return self._aligned_by_tokenizer(texts, spans)
        lists = [encoding.ids for encoding in self.tokenizer.encode_batch_fast(texts, add_special_tokens=False)]
        lengths = np.fromiter(map(len, lists), np.int64, len(lists))
        ids = np.fromiter(chain.from_iterable(lists), np.int32, int(lengths.sum()))
        found = self.alignment.spans(texts, ids, lengths, spans)
        rows = np.split(ids, np.cumsum(lengths)[:-1])
        unverified = [n for n, tokens in enumerate(found) if tokens is None]
        slow = self._aligned_by_tokenizer([texts[n] for n in unverified], [spans[n] for n in unverified])
        out = dict(zip(unverified, slow, strict=True))
        return [out[n] if tokens is None else (rows[n], tokens) for n, tokens in enumerate(found)]

    def _aligned_by_tokenizer(
        self, texts: Sequence[str], spans: Sequence[Sequence[Span]]
    ) -> list[tuple[np.ndarray, list[Span]]]:
        return [
            (np.array(encoding.ids, np.int32), [_token_span(encoding, start, end) for start, end in found])
            for encoding, found in zip(self.tokenizer.encode_batch(texts, add_special_tokens=False), spans, strict=True)
        ]

    def _special_in(self, chat: Chat) -> str | None:
        """Return the first control token in a chat's messages."""
        if self._any_special is None:
            return None
        for message in chat:
            content = message["content"]
            if self._special_start in content and (hit := self._any_special.search(content)):
                return hit.group()
        return None

    def _prefix_spans(self, chats: Sequence[Chat], texts: list[str]) -> list[list[Span]]:
        """Find answers by rendering what precedes them: the answer and its stop token follow."""
        turns = [(n, i) for n, chat in enumerate(chats) for i, m in enumerate(chat) if m["role"] == "assistant"]
        try:
            heads = self.render([chats[n][:i] for n, i in turns], prompt=True)
        except BadModel as failure:
            if isinstance(turn := failure.details.get("chat"), int):
                failure.details["chat"] = turns[turn][0]
            raise
        spans: list[list[Span]] = [[] for _ in chats]
        for (n, i), head in zip(turns, heads, strict=True):
            text, content = texts[n], chats[n][i]["content"]
            last = i == len(chats[n]) - 1
            spans[n].append(self._answer(text, head, content, last))
        return spans

    def _answer(self, text: str, head: str, content: str, last: bool) -> Span:
        """Return the span of an answer, `content`, after the rendered prompt, `head`."""
        start = len(head)
        answer = next((c for c in (content, content.strip()) if text.startswith(c, start)), None)
        if not text.startswith(head) or answer is None:
            raise BadModel(
                "The answer cannot be located in the rendered chat: it does not start right after the rendered prompt.",
                where="chat_template",
                expected="a chat that starts with its rendered prompt (add_generation_prompt), or {% generation %} blocks",
                got=repr(text[max(0, start - 30) : start + 60]),
                next_step="put {% generation %} … {% endgeneration %} around the answer in chat_template.jinja",
            )
        stop = self._stop.match(text, start + len(answer)) if self._stop else None
        if stop is None:
            raise BadModel(
                "The chat template does not end an answer with a control token, so the model would not learn to stop.",
                where="chat_template",
                got=repr(text[start + len(answer) : start + len(answer) + 40]),
                next_step="choose an instruct model, or add the stop token to its chat template",
            )
        end = stop.end()
        if last:  # Phi-3's template ends a whole chat with a second stop token, which is learned too
            while self._stop and (more := self._stop.match(text, end)):
                end = more.end()
        return start, end

    def _marked_spans(self, chats: Sequence[Chat]) -> list[list[Span]]:
        """Find answers by the template's own {% generation %} blocks."""
        return self._renderer.marked(chats)


def _labels(ids: np.ndarray, tokens: list[Span], loss_on: LossOn) -> np.ndarray:
    if loss_on == "all":
        return ids.copy()
    labels = np.full(len(ids), IGNORED, np.int32)
    for first, last in tokens[-1:] if loss_on == "last_assistant" else tokens:
        labels[first:last] = ids[first:last]
    return labels


def _mask_others(labels: np.ndarray, chat: Chat, tokens: list[Span], learned: Sequence[int]) -> None:
    """Take the answers that are not learned out of the labels, in place.

    Raises:
        BadModel: the template marks more or fewer answers than the chat has, so which is which is unknown.
    """
    answers = [number for number, message in enumerate(chat) if message["role"] == "assistant"]
    if len(answers) != len(tokens):
        raise BadModel(
            "The chat template does not mark each answer of a chat on its own, but some are marked as not to be learned.",
            where="chat_template",
            expected=f"{len(answers)} answers",
            got=f"{len(tokens)} {{% generation %}} blocks",
            next_step="put {% generation %} … {% endgeneration %} around every answer in chat_template.jinja",
        )
    for number, (first, last) in zip(answers, tokens, strict=True):
        if number not in learned:
            labels[first:last] = IGNORED


def _token_span(encoding: Encoding, start: int, end: int) -> Span:
    """Map a span of characters to the tokens that begin inside it."""
    first = next((t for c in range(start, end) if (t := encoding.char_to_token(c)) is not None), None)
    last = next((t for c in range(end - 1, start - 1, -1) if (t := encoding.char_to_token(c)) is not None), None)
    if first is None or last is None:
        return len(encoding.ids), len(encoding.ids)
    # "<|assistant|>" swallows the white space after it, even white space of the answer. That token belongs to the prompt.
    while first <= last and (chars := encoding.token_to_chars(first)) is not None and chars[0] < start:
        first += 1
    # One character can be several tokens (the bytes of an emoji), which all have its offsets.
    while last + 1 < len(encoding.ids) and encoding.token_to_chars(last + 1) == encoding.token_to_chars(last):
        last += 1
    return first, last + 1
