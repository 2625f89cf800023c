"""Find the answers of a chat in its rendered text: what is learned, and where it ends.

An answer starts where the prompt ends that a server sends for it (add_generation_prompt). Text that the template puts
between the two, such as a space or an empty think block, is a part of the answer: the model has to write it. The
answer's own text must be rendered completely, and a control token must close it.
"""

import json
import os
import re
from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass
from typing import Literal

from loraflow.data.chats import Chat, Message
from loraflow.data.templates.alignment import Span
from loraflow.data.templates.rendered_calls import (
    CALL_ENDS,
    AnswerTurn,
    CutAnswer,
    call_end,
    refuse_cut,
    refuse_ignored_prompt,
    refuse_missing_call,
    refuse_open,
    refuse_prompt,
    refuse_unmarked,
)
from loraflow.data.templates.template import MARKERS
from loraflow.data.templates.template_process import TemplateProcess
from loraflow.failures import BadModel

# Rendered in place of an answer to see what the template writes around it. No chat contains these characters.
_PROBE = "\ue0a1answer\ue0a1"
_TAGS = re.compile(r"\s*(</?think>|\[/?THINK\])\s*")
_SHORT = 24  # characters of reasoning that an answer may contain without having rendered it

LossOn = Literal["assistant", "last_assistant", "all"]
IfCut = Literal["error", "context"]


@dataclass(frozen=True)
class Answer:
    """An answer in the rendered text of its chat."""

    spans: tuple[Span, ...]  # the characters that are learned; none if it is only context
    inserted: str  # what the template writes before the answer and a server does not send
    closing: str  # the learned text behind the answer's own text: control tokens, perhaps with white space
    is_learned: bool = True  # False: only the context of later answers


NOT_LEARNED = Answer((), "", "", is_learned=False)


class AnswerFinder:
    """Finds answers in rendered chats.

    Args:
        renderer: renders the template that a server uses.
        special: the tokenizer's control tokens, longest first.
        marking: renders the same text with `{% generation %}` blocks, if another template than the server's does so.
        ends: the control tokens at which the model's own configuration ends an answer.
    """

    def __init__(
        self,
        renderer: TemplateProcess,
        source: str,
        special: Sequence[str],
        marking: TemplateProcess | None = None,
        ends: Collection[str] = (),
    ):
        self._ends = ends
        self._renderer = renderer
        self._marking = marking or (renderer if MARKERS.search(source) else None)
        self._asks_for_answers = "add_generation_prompt" in source
        self._special = tuple(special)
        tokens = "|".join(map(re.escape, special))
        self._stop = re.compile(rf"\s*({tokens})") if special else None
        self._control = re.compile(tokens) if special else None
        self.appended = ""  # what the caller adds to a rendered chat that ends with an answer
        self._insertions = [""]  # texts that were found between prompts and answers
        self._call_ends: list[str] | None = None  # tokens that end an answer with calls
        self._tail: str | None = None  # what follows the last answer of a chat
        self._opens_answers = False  # whether the start of another answer follows it

    def find(
        self,
        chats: Sequence[Chat],
        texts: Sequence[str],
        loss_on: LossOn,
        if_cut: IfCut = "error",
        learned: Sequence[Sequence[int] | None] | None = None,
    ) -> list[list[Answer]]:
        """Return the answers of each chat.

        Args:
            loss_on: answers that are not learned are not checked.
            if_cut: what to do with an answer that the template does not render completely: refuse the chat, or use the
                answer as context of later answers only.
            learned: of each chat, the numbers of the messages that are learned; None: all answers. The others may be cut.

        Raises:
            BadModel: the template changes an answer, does not render it behind its prompt, or does not close it. The
                failure's details have the number of the chat.
        """
        turns: list[AnswerTurn] = []
        found: list[list[Answer]] = []
        for n, chat in enumerate(chats):
            at = [i for i, message in enumerate(chat) if message["role"] == "assistant"]
            found.append([NOT_LEARNED] * len(at))
            of_chat = [AnswerTurn(n, i, k, len(at), is_last=i == at[-1]) for k, i in enumerate(at, 1)]
            turns += of_chat[-1:] if loss_on == "last_assistant" else of_chat
        heads = self._heads(chats, turns)
        marks = None if self._marking is None else self._marking.marked(chats)
        for number, (turn, head) in enumerate(zip(turns, heads, strict=True)):
            chat, text = chats[turn.chat], texts[turn.chat]
            try:
                if marks is None and "tool_calls" in chat[turn.message]:
                    answer = self._with_calls(chat, text, head, turn)
                elif marks is None and "reasoning_content" in chat[turn.message]:
                    answer = self._with_reasoning(chat, text, head, turn)
                elif marks is None:
                    answer = self._unmarked(chat, text, head, turn)
                else:
                    end = len(text) if turn.is_last else len(heads[number + 1])
                    answer = self._marked(chat, text, head, turn, end, marks[turn.chat])
                if "reasoning_content" in chat[turn.message]:
                    self._require_reasoning(chat, text, answer, turn)
            except CutAnswer as cut:
                wanted = learned[turn.chat] if learned is not None else None
                if if_cut == "context" or (wanted is not None and turn.message not in wanted):
                    continue
                refuse_cut(cut, turn)
            found[turn.chat][turn.number - 1] = answer
        return found

    def _heads(self, chats: Sequence[Chat], turns: Sequence[AnswerTurn]) -> list[str]:
        """Return the prompt that a server sends for each answer."""
        try:
            return self._renderer.render([chats[turn.chat][: turn.message] for turn in turns], prompt=True)
        except BadModel as failure:
            if isinstance(number := failure.details.get("chat"), int) and number < len(turns):
                failure.details["chat"] = turns[number].chat
            raise

    # -- templates without {% generation %} blocks ------------------------------------------------------------------

    def _unmarked(self, chat: Chat, text: str, head: str, turn: AnswerTurn) -> Answer:
        start, content = len(head), chat[turn.message]["content"]
        # The end of an empty answer may also be what is inserted before it.
        if text.startswith(head) and content.strip():
            for inserted in self._insertions:
                if _thinks_twice(inserted, content):
                    continue
                for own in (content, content.strip()):
                    if text.startswith(inserted + own, start):
                        end = start + len(inserted) + len(own)
                        if self._stop is not None and self._stop.match(text, end):
                            return self._closed(text, start, end, inserted, turn)
        inserted, end = self._probed(chat, text, head, turn)
        return self._closed(text, start, end, inserted, turn)

    def _probed(self, chat: Chat, text: str, head: str, turn: AnswerTurn) -> tuple[str, int]:
        """Return what the template inserts before an answer, and where the answer's own text ends.

        Both are found by rendering the chat with another answer: what is equal in the two texts is the template's.
        """
        content = chat[turn.message]["content"]
        self._tail_of_chats()
        before, found, after = self._around_probe(chat, turn, text)
        if not found:
            raise CutAnswer(content, "")
        if not text.startswith(head):
            refuse_prompt(text, head, turn)
        inserted = before[len(head) :] if before.startswith(head) else ""
        end = len(text) - len(after)
        rendered = text[len(head) : end]
        if not text.endswith(after) or end < len(head) or not _is_whole(rendered, content, head, inserted):
            raise CutAnswer(content, rendered)
        if inserted.strip() and not self._asks_for_answers and not self._opens_answers:
            refuse_ignored_prompt(inserted, turn)
        if inserted not in self._insertions and rendered.startswith(inserted):
            self._insertions.append(inserted)
        return (inserted if rendered.startswith(inserted) else ""), len(head) + len(rendered.rstrip())

    def _with_reasoning(self, chat: Chat, text: str, head: str, turn: AnswerTurn) -> Answer:
        """Return an answer whose reasoning stands beside its content: what the template writes around both is learned.

        It begins behind its prompt, and its content ends where the text behind another content begins.
        """
        content = chat[turn.message]["content"]
        _, found, after = self._around_probe(chat, turn, text)
        if not text.startswith(head):
            refuse_prompt(text, head, turn)
        start, end = len(head), len(text) - len(after)
        rendered = text[start:end]
        if not found or not text.endswith(after) or not _trimmed(rendered).endswith(_trimmed(content)):
            raise CutAnswer(content, rendered)
        return self._closed(text, start, start + len(rendered.rstrip()), "", turn)

    def _require_reasoning(self, chat: Chat, text: str, answer: Answer, turn: AnswerTurn) -> None:
        """Require that the reasoning beside an answer's content is learned with it."""
        message = chat[turn.message]
        reasoning = message.get("reasoning_content", "")
        learned = "".join(text[first:last] for first, last in answer.spans)
        wanted, others = reasoning.strip(), message["content"] + json.dumps(message.get("tool_calls", []))
        is_there = wanted in learned
        if is_there and (len(wanted) < _SHORT or wanted in others):  # it may be there by chance
            is_there = _PROBE in self._probe(chat, turn.message, "reasoning_content")
        if not is_there:
            raise CutAnswer(reasoning, learned, is_reasoning=True)

    def _probe(self, chat: Chat, number: int, key: Literal["content", "reasoning_content"] = "content") -> str:
        """Render a chat with another text in one of its messages."""
        probe: Message = chat[number].copy()
        probe[key] = _PROBE
        return self._renderer.render([[*chat[:number], probe, *chat[number + 1 :]]], prompt=False)[0]

    def _around_probe(self, chat: Chat, turn: AnswerTurn, text: str) -> tuple[str, str, str]:
        """Return the rendered text before and after another answer in the place of this one, as it is in `text`."""
        before, found, after = self._probe(chat, turn.message).partition(_PROBE)
        if self.appended and text.endswith(self.appended) and not after.endswith(self.appended):
            after += self.appended
        return before, found, after

    def _is_of_the_template(self, inserted: str, chat: Chat, text: str, turn: AnswerTurn) -> bool:
        """Tell whether the template writes a text before every answer: it may also be a part of this one."""
        if inserted in self._insertions:
            return True
        before, found, _ = self._around_probe(chat, turn, text)
        if not found or not before.endswith(inserted) or not text.startswith(before):
            return False
        self._insertions.append(inserted)
        return True

    def _closed(self, text: str, start: int, end: int, inserted: str, turn: AnswerTurn) -> Answer:
        """Return the answer with the control tokens that close it."""
        tail = self._tail_of_chats()
        if tail and text.startswith(tail, end):
            return Answer(((start, end + len(tail)),), inserted, tail)
        stop = self._stop.match(text, end) if self._stop else None
        if stop is None or (self._opens_answers and not tail):
            refuse_open(text[end : end + 40], turn)
        closed = stop.end()
        # The template refused the chat of `_tail_of_chats`: all tokens behind a whole chat are learned.
        if turn.is_last:
            while self._stop and (more := self._stop.match(text, closed)):
                closed = more.end()
        return Answer(((start, closed),), inserted, text[end:closed])

    def _tail_of_chats(self) -> str:
        """Return what the template writes behind the last answer of a chat: a control token, or a text between two of them.

        It is empty if no control token follows. The start of a further answer, which some templates write whatever
        add_generation_prompt says, is not a part of it. Phi-3's <|endoftext|> behind <|end|> is, unless only <|end|> is one
        of the model's own stop tokens.
        """
        if self._tail is None:
            chat: Chat = [{"role": "user", "content": "a"}, {"role": "assistant", "content": _PROBE}]
            text, head, longer = (
                self._rendered(chat),
                self._rendered(chat[:1], prompt=True),
                self._rendered([*chat, *chat]),
            )
            tail = text.partition(_PROBE)[2] if head else ""
            tokens = (
                list(self._control.finditer(tail)) if self._control and self._stop and self._stop.match(tail) else []
            )
            shared = len(os.path.commonprefix([tail, longer.partition(_PROBE)[2]]))  # noqa: RUF071 (letters, not folders)
            # GLM-Edge writes nothing but that start.
            known = [t for t in tokens[:1] if t.end() <= shared or t.group() in self._ends]
            openings = [t.start() for t in tokens[len(known) :] if head.endswith(tail[t.start() :])]
            opening = min(openings, default=len(tail))
            self._tail = tail[: _end_of_closing(tail[:opening], tokens, shared, self._ends)]
            self._opens_answers = head.endswith(tail[len(self._tail) :]) and self._tail != tail.rstrip()
        return self._tail

    def _rendered(self, chat: Chat, *, prompt: bool = False) -> str:
        """Return a chat's text; an empty one if the template refuses it."""
        try:
            return self._renderer.render([chat], prompt=prompt)[0]
        except BadModel:
            return ""

    def stop_tokens(self, answer: Answer) -> list[str]:
        """Return the control tokens that close an answer and are not a part of it: generation stops at the first one."""
        last = self._before_closing(answer.closing)
        inner = answer.inserted + answer.closing[:last]
        found = self._control.findall(answer.closing[last:]) if self._control else []
        return [token for token in found if token not in inner]

    def _with_calls(self, chat: Chat, text: str, head: str, turn: AnswerTurn) -> Answer:
        """Return an answer with tool calls: from its prompt to the first token that ends an answer."""
        if not text.startswith(head):
            refuse_prompt(text, head, turn)
        start, ends = len(head), self._ends_of_calls()
        end = call_end(text, start, ends)
        if end is None:
            refuse_open(text[-40:], turn)
        self._refuse_result(chat, text, end, turn)
        refuse_missing_call(text[start:end], chat[turn.message], turn)
        return Answer(((start, end),), "", next(token for token in ends if text[:end].endswith(token)))

    def _refuse_result(self, chat: Chat, text: str, end: int, turn: AnswerTurn) -> None:
        """Refuse an answer whose end comes behind the start of the tool's result: the model would learn the result.

        The result starts where the text changes with it.
        """
        at = turn.message + 1
        if at == len(chat) or chat[at]["role"] != "tool":
            return
        if end > len(os.path.commonprefix([text, self._probe(chat, at)])):  # noqa: RUF071 (letters, not folders)
            refuse_open(text[end - 40 : end], turn)

    def _ends_of_calls(self) -> list[str]:
        """Return the tokens that end answers, of which one also ends an answer with calls."""
        if self._call_ends is None:
            chat: Chat = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
            self._call_ends = [token for token in CALL_ENDS if token in self._special]
            try:
                (text,) = self._renderer.render([chat], prompt=False)
                ((answer,),) = self.find([chat], [text + self.appended], "assistant")
            except BadModel:  # a template that refuses this chat; the rows decide
                return self._call_ends
            self._call_ends += list(dict.fromkeys(self.stop_tokens(answer)))
        return self._call_ends

    # -- templates with {% generation %} blocks ---------------------------------------------------------------------

    def _marked(self, chat: Chat, text: str, head: str, turn: AnswerTurn, end: int, marks: Sequence[Span]) -> Answer:
        """Return an answer up to the end of its last mark. What a server sends as its prompt is not a part of it.

        What the template leaves unmarked in front of the marks or between them is learned too: the model has to write it.
        `end` is where the next answer's prompt ends. A mark belongs to the answer in which it ends.
        """
        if not text.startswith(head):
            refuse_prompt(text, head, turn)
        start, content = len(head), chat[turn.message]["content"]
        ends = [last for first, last in marks if start < last <= end and first < last]
        if not ends:
            refuse_unmarked(turn)
        span = (start, max(ends))
        rendered = text[start : span[1]]
        body = rendered[: self._before_closing(rendered)]
        has_calls = "tool_calls" in chat[turn.message]
        if has_calls or "reasoning_content" in chat[turn.message]:
            if has_calls:
                self._refuse_result(chat, text, span[1], turn)
                refuse_missing_call(rendered, chat[turn.message], turn)
            elif not _trimmed(body).endswith(_trimmed(content)):
                raise CutAnswer(content, rendered)
            if body == rendered:
                refuse_open(text[span[1] :][:40], turn)
            return Answer((span,), "", rendered[len(body) :])
        own_first = [
            (body[: len(body) - len(own)], rendered[len(body) :])
            for own in (content, content.strip())
            if body.endswith(own)
        ]
        # The answer may end with control tokens of its own.
        anywhere = [
            cut(own)[::2]
            for own in (content, content.strip())
            if own and own in rendered
            for cut in (rendered.partition, rendered.rpartition)
        ]
        for inserted, closing in (*own_first, *anywhere):
            if closing[: self._before_closing(closing)].strip():
                continue  # another text than control tokens follows
            if not _thinks_twice(inserted, content) and self._is_of_the_template(inserted, chat, text, turn):
                return Answer((span,), inserted, closing)
        if not _is_whole(body, content, head):
            raise CutAnswer(content, rendered)
        return Answer((span,), "", rendered[len(body) :])

    def _before_closing(self, text: str) -> int:
        """Return where the control tokens begin with which a text ends; its length if it ends with another text."""
        at = len(text)
        while True:
            body = text[:at].rstrip()
            if not body.endswith(self._special):
                return at
            at = len(body) - len(next(token for token in self._special if body.endswith(token)))


def _end_of_closing(tail: str, tokens: Iterable[re.Match[str]], shared: int, ends: Collection[str]) -> int:
    """Return where the end of an answer ends in what the template writes behind the last answer of a chat.

    It is the model's own first stop token with those directly behind it; without one, all control tokens. A text, such as
    the footer of a chat, is a part of it only between tokens that are none of the model's, if earlier answers have it too.
    """
    end, is_known = 0, False
    for token in tokens:
        has_text = bool(tail[end : token.start()].strip())
        if token.end() > len(tail) or (has_text and token.end() > shared):
            break
        if is_known and (has_text or token.group() not in ends):
            break
        end, is_known = token.end(), is_known or token.group() in ends
    return end


def _is_whole(rendered: str, content: str, head: str, inserted: str = "") -> bool:
    """Tell whether a text contains a complete answer. A template may move the white space around it and its reasoning.

    A prompt may end with the tag that opens the reasoning: then the model does not write it.
    """
    found, wanted = _trimmed(rendered), _trimmed(content)
    opening = next(
        (tag for tag in ("<think>", "[THINK]") if head.rstrip().endswith(tag) and wanted.startswith(tag)), ""
    )
    if found == wanted or (opening and found == wanted.removeprefix(opening)):
        return True
    before = _trimmed(inserted)
    if not found.startswith(before) or _thinks_twice(inserted, content):
        return False
    return found.removeprefix(before).lstrip() == wanted


def _thinks_twice(inserted: str, content: str) -> bool:
    """Tell whether a template puts a think block before an answer that has one: it does not read reasoning there."""
    return "</think>" in inserted and "</think>" in content


def _trimmed(text: str) -> str:
    """Return a text without the white space that templates change: at both ends, and around the tags of reasoning."""
    return _TAGS.sub(r"\1", text).strip()
