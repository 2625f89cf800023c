"""Convert chats to token ids and a loss mask, both from one tokenization of one rendered text.

The span of an answer is found in the text (`answer_spans`), and is then mapped to token ids (`token_labels`).
Counting tokens would be wrong, because control tokens swallow white space. Searching for control tokens would be wrong as
soon as a message contains one. The mapping uses the tokenizer's offsets, or the faster `alignment` for rows where that is
verified to be exact.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import lru_cache, partial
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from loraflow.data.chats import Chat, without_reasoning
from loraflow.data.templates.alignment import ByteAlignment, Span
from loraflow.data.templates.answer_spans import Answer, AnswerFinder, IfCut, LossOn
from loraflow.data.templates.rendered_calls import (
    CALL_ENDS,
    call_text,
    refuse_cut_questions,
    refuse_ignored_tools,
    refuse_left_out,
    refuse_other_text,
)
from loraflow.data.templates.template_process import TemplateProcess, template_process
from loraflow.data.templates.tokenizer_config import (
    TRAINING_TEMPLATE,
    marked_special,
    read_template,
    read_tokenizer,
    special_tokens,
)
from loraflow.data.tokens.token_labels import (
    IGNORED,
    labels_of_spans,
    mask_others,
    spans_by_message,
    token_span,
    token_weights,
)
from loraflow.failures import BadModel

if TYPE_CHECKING:
    from tokenizers import Encoding

# Templates for reasoning may refuse or change an answer without any.
_PROBES: tuple[Chat, ...] = (
    [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}],
    [{"role": "user", "content": "a"}, {"role": "assistant", "content": "<think>\nc\n</think>\n\nb"}],
)
_CALL: Chat = [
    {"role": "user", "content": "a"},
    {
        "role": "assistant",
        "content": "",
        "tool_calls": [{"type": "function", "id": "call00001", "function": {"name": "b", "arguments": {"c": "d"}}}],
    },
]


@dataclass(frozen=True)
class Encoded:
    """A chat as token ids and labels."""

    ids: np.ndarray  # int32
    labels: np.ndarray  # int32; IGNORED where nothing is learned
    prompt: int  # number of ids before the last answer
    special_in_text: str | None = None  # the first control token in a message's text
    not_learned: int = 0  # answers that the template cuts, and that are only context (data.thinking: keep)
    weights: np.ndarray | None = None  # float32, of each token in the loss, 0 where IGNORED; None: 1 for all labels


class ChatTemplate:
    """A model's tokenizer and chat template, read from its folder without transformers' model code.

    Args:
        eos: the ids at which the model ends an answer; None reads them from its configuration.
    """

    def __init__(self, folder: Path, eos: set[int] | None = None):
        self.tokenizer = read_tokenizer(folder)
        self.tokenizer.no_truncation()
        self.tokenizer.no_padding()
        self.template, named = read_template(folder), special_tokens(folder)
        special = {*named.values(), *marked_special(folder)}
        for added in self.tokenizer.get_added_tokens_decoder().values():
            if added.content in special and not added.special:  # as transformers does it
                added.special = True
                self.tokenizer.add_special_tokens([added])
        self._renderer = template_process(self.template, named)
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
        self._marking: TemplateProcess | None = None  # another template that marks the answers
        if (folder / TRAINING_TEMPLATE).exists():
            marking = (folder / TRAINING_TEMPLATE).read_text(encoding="utf-8")
            self._marking = template_process(marking, named)
        self._eos = eos_ids(folder) if eos is None else eos
        ends = {token for i in self._eos if (token := self.tokenizer.id_to_token(i)) is not None}
        self._answers = AnswerFinder(self._renderer, self.template, self.special, self._marking, ends)
        self._ends: set[str] | None = None  # tokens at which generation stops
        self._probed: Answer | None = None  # how an answer is rendered
        self._separators = {  # the texts between them are normalized and tokenized one by one
            i: token.content
            for i, token in self.tokenizer.get_added_tokens_decoder().items()
            if token.special and not token.normalized and not token.single_word
        }
        self._ids = lru_cache(lambda text: self.tokenizer.encode(text, add_special_tokens=False).ids)
        self._openings: dict[str, str] = {}  # by the role of a message: the token that ends the answer before it

    def render(self, chats: Sequence[Chat], *, prompt: bool = False) -> list[str]:
        """Render chats as the model reads them. `prompt` adds the start of an answer (add_generation_prompt).

        Raises:
            BadModel: the template raises an error for a chat, or exceeds a limit of time or memory.
        """
        return self._renderer.render(chats, prompt=prompt)

    def encode(
        self,
        chats: Sequence[Chat],
        loss_on: LossOn,
        if_cut: IfCut = "error",
        learned: Sequence[Sequence[int] | None] | None = None,
        weights: Sequence[Sequence[float] | None] | None = None,
    ) -> list[Encoded]:
        """Encode chats.

        Args:
            loss_on: the trained tokens: every answer, the last answer, or all tokens.
            if_cut: for answers that the template does not render completely: the chat is refused, or they are only context.
            learned: of each chat, the numbers of the messages that are learned; None: all answers. The other answers are
                left out of what `loss_on` selects.
            weights: of each chat, the weights in the loss of the answers in `learned`; None: 1. Other tokens that are
                learned have the weight 1.

        Raises:
            BadModel: the template leaves out a part of a chat, an answer cannot be found in the rendered text, or no stop
                token ends it. The failure's details have the number of the chat.
        """
        texts = self.render(chats)
        if self._marking is not None:
            refuse_other_text(texts, self._marking.render(chats, prompt=False))
        texts = self._closed(chats, texts)
        refuse_left_out(chats, texts)
        refuse_ignored_tools(chats, texts, self.render)
        numbers = learned or [None] * len(chats)
        found = self._answers.find(chats, texts, loss_on, if_cut, numbers)
        refuse_cut_questions(chats, texts)
        if loss_on != "all":
            self._refuse_other_ends(chats, found)
        spans = [[span for answer in answers for span in answer.spans] for answers in found]
        starts: list[set[int]] = [set() for _ in chats]  # of the answers that follow a served prompt
        for at, chosen in enumerate(numbers if loss_on != "all" else ()):
            for number, parts in spans_by_message(chats[at], found[at], spans[at]).items():
                starts[at] |= {start for start, _ in parts if chosen is None or number in chosen}
        out = []
        aligned = self._aligned(texts, spans, starts)
        of_chats = weights or [None] * len(chats)
        for chat, answers, chosen, factors, (ids, tokens) in zip(chats, found, numbers, of_chats, aligned, strict=True):
            labels = ids.copy() if loss_on == "all" else labels_of_spans(ids, tokens)
            of_tokens = None
            if chosen is not None:
                spans_of = spans_by_message(chat, answers, tokens)
                mask_others(labels, spans_of, chosen)
                of_tokens = None if factors is None else token_weights(labels, spans_of, chosen, factors)
            # A span of the last answer, or of the last one that is learned.
            first = len(tokens) - len(next((a.spans for a in reversed(answers) if a.spans), ()))
            prompt = tokens[first][0] if tokens else len(ids)
            cut = 0 if loss_on == "last_assistant" else sum(not answer.is_learned for answer in answers)
            out.append(Encoded(ids, labels, prompt, self._special_in(chat), cut, of_tokens))
        return out

    def prompt_ids(self, chats: Sequence[Chat]) -> list[list[int]]:
        """Return the ids that generation starts from: the chats without their last answer."""
        asked = [chat[:-1] if chat[-1]["role"] == "assistant" else chat for chat in chats]
        prompts = self.render(asked, prompt=True)
        refuse_ignored_tools(asked, prompts, partial(self.render, prompt=True))
        return [encoding.ids for encoding in self.tokenizer.encode_batch(prompts, add_special_tokens=False)]

    def answer_texts(self, chats: Sequence[Chat]) -> list[str]:
        """Return the text of each chat's last answer, as generation returns it: tool calls, and reasoning
        beside the content, as the template writes them.

        Raises:
            BadModel: the template leaves out a call or reasoning. The failure's details have the number of the chat.
        """
        texts = [chat[-1]["content"] for chat in chats]
        numbers = [n for n, chat in enumerate(chats) if chat[-1].keys() & {"tool_calls", "reasoning_content"}]
        if not numbers:
            return texts
        try:
            encoded = self.encode([chats[number] for number in numbers], "last_assistant")
        except BadModel as failure:
            if isinstance(at := failure.details.get("chat"), int):
                failure.details["chat"] = numbers[at]
            raise
        inserted = self.inserted_text()
        for number, row in zip(numbers, encoded, strict=True):
            text = self.tokenizer.decode(row.ids[row.labels != IGNORED].tolist(), skip_special_tokens=True)
            texts[number] = text.removeprefix(inserted).strip()
        return texts

    def special_ids(self) -> set[int]:
        """Return the ids of the tokenizer's control tokens."""
        return {i for token in self.special if (i := self.tokenizer.token_to_id(token)) is not None}

    def inserted(self) -> str:
        """Return the text that the template writes between a served prompt and an answer, such as an empty think block.

        The model learns to write it; it is not a part of the answer's own text.
        """
        return self._probe().inserted

    def inserted_text(self) -> str:
        """Return what remains of `inserted` in a decoded answer, without control tokens: it is removed from answers."""
        ids = self.tokenizer.encode(self.inserted(), add_special_tokens=False).ids
        return self.tokenizer.decode(ids, skip_special_tokens=True)

    def stop_ids(self) -> set[int]:
        """Return the ids of the control tokens with which the template closes an answer.

        Control tokens inside an answer, such as those of a channel or of reasoning, are not among them.

        Raises:
            BadModel: there is no such token.
        """
        answer = self._probe()
        tokens = self._answers.stop_tokens(answer)
        found = {i for token in tokens if (i := self.tokenizer.token_to_id(token)) is not None}
        if not found and (control := self._control(answer.closing)):
            raise BadModel(
                "The token that ends an answer also begins it: a server would stop before the answer.",
                where="chat_template",
                expected="another token, or one that add_generation_prompt writes too",
                got=repr(f"{answer.inserted}…{answer.closing}"),
                next_step=f"write the first {control[0]} for add_generation_prompt too, or name another base.chat_template",
            )
        if not found:
            raise BadModel(
                "The chat template's {% generation %} block contains no stop token: the model would not learn to stop.",
                where="chat_template",
                next_step="move {% endgeneration %} behind the token that ends an answer",
            )
        return found

    def _probe(self) -> Answer:
        """Return how the template renders an answer."""
        if self._probed is not None:
            return self._probed
        failure: BadModel | None = None
        for chat in _PROBES:
            try:
                ((self._probed,),) = self._answers.find([chat], self._closed([chat], self.render([chat])), "assistant")
            except BadModel as error:
                failure = failure or error
            else:
                return self._probed
        assert failure is not None
        failure.details.pop("chat", None)
        raise failure

    def _closed(self, chats: Sequence[Chat], texts: list[str]) -> list[str]:
        """Add the token that ends the last answer, if the template writes it only before the next message, as GLM's does.

        It is the control token that opens the next message, of a user or with a call's result, and one of the model's own
        stop tokens.
        """
        self._answers.appended = self._end_before("user")
        if not self._answers.appended:
            return texts
        return [text + self._end_of(chat, text) for chat, text in zip(chats, texts, strict=True)]

    def _end_of(self, chat: Chat, text: str) -> str:
        """Return the token to add to a rendered chat; nothing if it does not end with an open answer."""
        if chat[-1]["role"] != "assistant":
            return ""
        if "tool_calls" in chat[-1] and not text.endswith(CALL_ENDS):
            return self._end_before("tool") or self._end_before("user")
        (answer,) = without_reasoning(chat[-1:])
        is_open = text.endswith(answer["content"].strip()) and not text.endswith(CALL_ENDS)
        return self._end_before("user") if is_open else ""

    def _end_before(self, role: str) -> str:
        """Return the control token with which a message ends the answer before it; "" if answers end themselves."""
        if role not in self._openings:
            self._openings[role] = self._rendered_end_before(role)
        return self._openings[role]

    def _rendered_end_before(self, role: str) -> str:
        chat = _PROBES[0] if role == "user" else _CALL
        try:
            ended, continued = self.render([chat, [*chat, {"role": role, "content": "a"}]])
        except BadModel:  # the template refuses these probes; the rows decide
            return ""
        if not ended.endswith(chat[-1]["content"]) or not continued.startswith(ended) or self._any_special is None:
            return ""
        token = self._any_special.match(continued, len(ended))
        known = token is not None and self.tokenizer.token_to_id(token.group()) in self._eos
        return token.group() if token is not None and known else ""

    def _control(self, text: str) -> list[str]:
        return self._any_special.findall(text) if self._any_special else []

    def _refuse_other_ends(self, chats: Sequence[Chat], found: Sequence[Sequence[Answer]]) -> None:
        """Refuse answers that are learned with an end at which generation would not stop, as gpt-oss renders earlier ones.

        Last answers define these ends, unless they are tool calls.
        """
        if self._ends is None:
            try:
                stops = self.stop_ids() | self._eos
            except BadModel:  # a template that no model can be merged with; rows are still encoded
                stops = set()
            self._ends = {token for i in stops if (token := self.tokenizer.id_to_token(i)) is not None}
        if not self._ends:
            return
        for number, (chat, answers) in enumerate(zip(chats, found, strict=True)):
            for answer in answers if "tool_calls" in chat[-1] else answers[:-1]:
                closing = answer.closing
                if closing and not any(end in closing for end in self._ends) and (control := self._control(closing)):
                    raise BadModel(
                        "The chat template closes earlier answers or calls with a token at which generation does not stop.",
                        where="chat_template",
                        expected=f"one of {', '.join(sorted(self._ends))}",
                        got=control[0],
                        next_step="data.loss_on: last_assistant learns the last answer only",
                        chat=number,
                    )

    def _aligned(
        self, texts: Sequence[str], spans: Sequence[Sequence[Span]], starts: Sequence[set[int]]
    ) -> list[tuple[np.ndarray, list[Span]]]:
        """Return each text's ids, and its spans as spans of tokens. Those at `starts` begin where a served prompt ends."""
        if self.alignment is None:
            return self._aligned_by_tokenizer(texts, spans, starts)
        lists = [encoding.ids for encoding in self.tokenizer.encode_batch_fast(texts, add_special_tokens=False)]
        lengths = np.fromiter(map(len, lists), np.int64, len(lists))
        ids = np.fromiter(chain.from_iterable(lists), np.int32, int(lengths.sum()))
        found = self.alignment.spans(texts, ids, lengths, spans)
        rows = np.split(ids, np.cumsum(lengths)[:-1])
        for n, tokens in enumerate(found):
            for (start, _), (first, _) in zip(spans[n], tokens or (), strict=False):
                if start in starts[n] and not self._is_served(texts[n], rows[n], start, first):
                    found[n] = None
        unverified = [n for n, tokens in enumerate(found) if tokens is None]
        again = [texts[n] for n in unverified], [spans[n] for n in unverified], [starts[n] for n in unverified]
        slow = self._aligned_by_tokenizer(*again)
        out = dict(zip(unverified, slow, strict=True))
        return [out[n] if tokens is None else (rows[n], tokens) for n, tokens in enumerate(found)]

    def _is_served(self, text: str, ids: Sequence[int] | np.ndarray, start: int, first: int) -> bool:
        """Tell whether an answer stands behind one space, or the ids of several are those at the end of a prompt.

        GPT-2's tokenizer makes two tokens of two line ends before a word, and one at the end of a text.
        """
        spaces = text[len(text[:start].rstrip()) : start]
        expected = self._ids(spaces) if len(spaces) > 1 else []
        return list(ids[max(first - len(expected), 0) : first]) == expected

    def _aligned_by_tokenizer(
        self, texts: Sequence[str], spans: Sequence[Sequence[Span]], starts: Sequence[set[int]]
    ) -> list[tuple[np.ndarray, list[Span]]]:
        encodings = self.tokenizer.encode_batch(texts, add_special_tokens=False)
        return [self._as_served(*row) for row in zip(texts, encodings, spans, starts, strict=True)]

    def _as_served(
        self, text: str, encoding: Encoding, spans: Sequence[Span], starts: set[int]
    ) -> tuple[np.ndarray, list[Span]]:
        """Return a text's ids, and its spans as spans of tokens. Those at `starts` begin where the served prompt ends.

        A token with the end of a prompt and the start of its answer becomes two.
        """
        ids, places, token_of, found = encoding.ids, encoding.offsets, self.tokenizer.id_to_token, list[Span]()
        for start, end in reversed(spans):
            first, last = token_span(encoding, start, end)
            follows_prompt = start in starts and 0 < first < last
            if follows_prompt and (places[first - 1][1] != start or not self._is_served(text, ids, start, first)):
                # The ids before the prompt's last separator are the same.
                at = first - 1
                while at > 0 and self._separators.get(ids[at]) != text[slice(*places[at])].strip():
                    at -= 1
                prompt = self._ids(text[at and places[at][0] : start])
                at += len(same := os.path.commonprefix([ids[at:first], prompt]))  # noqa: RUF071 (ids, not folders)
                prompt = prompt[len(same) :]
                whole, served = ("".join(map(str, map(token_of, part))) for part in (ids[at:first], prompt))
                if whole.startswith(served):
                    # Tokens have the letters that the model reads. As a text, they would be normalized again.
                    rest = [token.id for token in self.tokenizer.model.tokenize(whole[len(served) :])]
                else:  # a normalizer joined letters
                    rest = self._ids(text[start : places[first][0]])
                ids[at:first] = prompt + rest
                last, first = last + at + len(prompt) + len(rest) - first, at + len(prompt)
            found.insert(0, (first - len(ids), last - len(ids)))  # from the end: earlier spans may add tokens
        return np.array(ids, np.int32), [(first + len(ids), last + len(ids)) for first, last in found]

    def _special_in(self, chat: Chat) -> str | None:
        """Return the first control token in a chat's messages."""
        if self._any_special is None:
            return None
        tools = [json.dumps(chat[0]["tools"], ensure_ascii=False)] if "tools" in chat[0] else []
        for content in (*tools, *(message["content"] + call_text(message) for message in chat)):
            if self._special_start in content and (hit := self._any_special.search(content)):
                return hit.group()
        return None


@contextmanager
def name_row(places: Sequence[str]) -> Iterator[None]:
    """Add a row's place in its file to the failure of a template that cannot render it."""
    try:
        yield
    except BadModel as failure:
        if isinstance(number := failure.details.get("chat"), int) and number < len(places):
            failure.where = f"{failure.where}, {places[number]}"
        raise


def eos_ids(folder: Path) -> set[int]:
    """Return the ids at which a model's own configuration ends an answer.

    Negative ids, as old configurations have them, mean that there is none.

    Raises:
        BadModel: a configuration is not a JSON object, or does not name ids.
    """
    found: set[int] = set()
    for file in (folder / "generation_config.json", folder / "config.json"):
        if not file.exists():
            continue
        try:
            eos = json.loads(file.read_text(encoding="utf-8")).get("eos_token_id")
        except (ValueError, AttributeError) as error:
            raise BadModel(
                "The file is not a JSON object.",
                where=str(file),
                got=str(error)[:200],
                next_step="fetch the base again",
            ) from error
        ids = eos if isinstance(eos, list) else [] if eos is None else [eos]
        for token_id in ids:
            if isinstance(token_id, bool) or not isinstance(token_id, int):
                raise BadModel(
                    "A stop token is not named by its id.",
                    where=f"{file}: eos_token_id",
                    expected="an id, or a list of ids",
                    got=json.dumps(eos)[:200],
                    next_step="write the token's id, which tokenizer.json has",
                )
        found |= {token_id for token_id in ids if token_id >= 0}
    return found


def vocabulary_of(base: Path) -> int | None:
    """Return the number of rows of a base's embeddings, from its config.json; None if it does not say."""
    file = base / "config.json"
    config = json.loads(file.read_text(encoding="utf-8")) if file.exists() else {}
    size = config.get("vocab_size") or (config.get("text_config") or {}).get("vocab_size")
    return None if size is None else int(size)
