"""Compare rendering, tokenization and mask of training with transformers' own, which serves the model.

Training reads a tokenizer's files without transformers. Here both are run on the same conversations, once for each base.
"""

from __future__ import annotations

import json
import logging
import time
from collections.abc import Mapping, Sequence
from difflib import SequenceMatcher
from pathlib import Path
from typing import TYPE_CHECKING, cast

import numpy as np
from jinja2.exceptions import TemplateError

from loraflow.base.load import choose_pad_token
from loraflow.base.model_files import SAMPLES, open_tokenizer, save_tokenizer
from loraflow.data.chats import Chat, Message
from loraflow.data.templates.rendered_calls import without_tools
from loraflow.data.templates.template import MARKERS, TODAY, aliased, in_parts
from loraflow.data.templates.tokenizer_config import FILE, RECORD, TRAINING_TEMPLATE, special_tokens
from loraflow.data.tokens.loss_mask import ChatTemplate, eos_ids
from loraflow.data.tokens.token_labels import IGNORED
from loraflow.failures import BadModel

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


log = logging.getLogger(__name__)


_WITH_TOOLS: Chat = [
    {
        "role": "user",
        "content": "Will it rain in Köln?",
        "tools": [
            {
                "type": "function",
                "function": {
                    "name": "get_weather",
                    "description": "Get the forecast.",
                    "parameters": {
                        "type": "object",
                        "properties": {
                            "city": {"type": "string", "description": "The city."},
                            "days": {"type": "integer", "description": "How many days."},
                        },
                        "required": ["city"],
                    },
                },
            }
        ],
    },
    {
        "role": "assistant",
        "content": "",
        "tool_calls": [
            {
                "type": "function",
                "id": "call00001",
                "function": {"name": "get_weather", "arguments": {"city": 'Köln "Mitte"', "days": 2}},
            }
        ],
    },
    {"role": "tool", "content": '{"rain": 3}', "tool_call_id": "call00001", "name": "get_weather"},
    {"role": "assistant", "content": "Yes, a little."},
]

_WITH_REASONING: Chat = [
    {"role": "user", "content": "Is 7 prime?"},
    {"role": "assistant", "reasoning_content": "No number divides it.", "content": "Yes."},
]


def _conversation(turns: int, *, system: bool = False) -> Chat:
    chat: list[Message] = [{"role": "system", "content": "Be brief."}] if system else []
    for number in range(turns):
        chat += [
            {"role": "user", "content": f"What is question {number}?\n  It's the\tlast one."},
            {"role": "assistant", "content": SAMPLES[number]},
        ]
    return chat


def conversations() -> list[Chat]:
    """Return the conversations that are compared: of one, two and five turns, with and without a system message; and with
    tools and reasoning, which a template may refuse or leave out.
    """
    plain = [_conversation(turns, system=system) for system in (False, True) for turns in (1, 2, 5)]
    return [*plain, _WITH_TOOLS, _WITH_TOOLS[:2], _WITH_REASONING]


def renders(template: ChatTemplate, chat: Chat) -> bool:
    """Tell whether a template renders a chat, and raises no error for it."""
    try:
        template.render([chat])
    except BadModel:
        return False
    return True


def refused_parts(template: ChatTemplate) -> list[str]:
    """Return the parts of chats that a template raises an error for."""
    chats = {"a system message": _conversation(1, system=True), "tools": _WITH_TOOLS}
    return [part for part, chat in chats.items() if not renders(template, chat)]


def check_template(folder: Path, *, trust: bool = False) -> None:
    """Compare a base's rendered chats, ids and special tokens with transformers'.

    Special tokens that do not follow from the tokenizer's files are recorded beside them (RECORD). If transformers
    tokenizes differently from tokenizer.json, or has other special tokens, its own tokenizer is saved instead.

    Raises:
        BadModel: transformers cannot open the tokenizer, or the two differ; or the template has no chat that can be learned.
    """
    tokenizer = open_tokenizer(folder, trust=trust)
    expected = {name: str(token) for name, token in tokenizer.special_tokens_map.items() if isinstance(token, str)}
    if special_tokens(folder) != expected:
        (folder / RECORD).write_text(
            json.dumps(expected, indent=1, sort_keys=True, ensure_ascii=False) + "\n", encoding="utf-8"
        )
    choose_pad_token(open_tokenizer(folder, trust=trust), folder)  # refuses a tokenizer without one
    if getattr(tokenizer, "split_special_tokens", False):
        raise BadModel(
            "The tokenizer splits special tokens, so no token would end an answer.",
            where=str(folder / FILE),
            got="split_special_tokens: true",
            next_step=f"remove split_special_tokens from {FILE}",
        )
    template = ChatTemplate(folder)
    chats = _accepted(template, tokenizer)
    # A token that is special only in tokenizer_config.json is one for transformers; the opposite decodes the same.
    not_special = [i for i, token in template.tokenizer.get_added_tokens_decoder().items() if not token.special]
    texts = {tokenizer.decode(not_special, skip_special_tokens=skips) for skips in (False, True)}
    if len(texts) > 1 or _first_difference(template, tokenizer, chats) is not None:
        log.warning("transformers changes tokenizer.json: the tokenizer is saved as transformers uses it.")
        save_tokenizer(tokenizer, folder, trust=trust)
        template, tokenizer = ChatTemplate(folder), open_tokenizer(folder, trust=trust)
        if (difference := _first_difference(template, tokenizer, chats)) is not None:
            raise difference
    check_mask(folder, template, tokenizer, [chat for chat, prompt in chats if not prompt and "tools" not in chat[0]])


def follows_stop_ids(folder: Path) -> bool:
    """Tell whether the tokens of chats, or whether chats are refused, depend on the stop ids of the model's configuration.

    They do if the template ends an answer only by the next message, as GLM's, closes earlier answers by other tokens than
    the last one, as gpt-oss's, or writes more behind a chat than the token that ends its last answer, as Command A's.
    """
    special = ChatTemplate(folder).special_ids()
    none, every, own = (_outcomes(ChatTemplate(folder, eos)) for eos in (set[int](), special, None))
    return not none == every == own


def _outcomes(template: ChatTemplate) -> list[tuple[list[int], list[int]] | None]:
    """Return ids and labels of each conversation; None if it is refused."""
    found: list[tuple[list[int], list[int]] | None] = []
    for chat in conversations():
        try:
            (encoded,) = template.encode([chat], "assistant")
        except BadModel:
            found.append(None)
        else:
            found.append((encoded.ids.tolist(), encoded.labels.tolist()))
    return found


def _rendered_by_transformers(
    tokenizer: PreTrainedTokenizerBase, chat: Chat, *, prompt: bool, parts: bool = False
) -> str | None:
    from jinja2.exceptions import TemplateError

    tools = chat[0].get("tools")
    messages = [aliased(message) for message in without_tools(chat)]  # transformers 5.17 adds no second name itself
    try:
        text = tokenizer.apply_chat_template(
            cast("list[dict[str, str]]", list(map(in_parts, messages)) if parts else messages),
            tools=None if tools is None else [dict(tool) for tool in tools],
            tokenize=False,
            add_generation_prompt=prompt,
            strftime_now=lambda form: time.strftime(form, TODAY),  # a template may write today's date
        )
    except (TemplateError, TypeError, ValueError):
        return None
    return text if isinstance(text, str) else None


def _accepted(template: ChatTemplate, tokenizer: PreTrainedTokenizerBase) -> list[tuple[Chat, bool]]:
    """Return the conversations, with and without a generation prompt, that the template renders."""
    found: list[tuple[Chat, bool]] = []
    for chat in conversations():
        for prompt in (False, True):
            rows = [chat[:-1] if prompt else chat]
            try:
                (text,) = template.render(rows, prompt=prompt)
            except BadModel:
                continue  # some templates refuse system messages
            expected = _rendered_by_transformers(tokenizer, rows[0], prompt=prompt)
            # Servers find out whether a template reads lists of parts.
            if expected != text and _rendered_by_transformers(tokenizer, rows[0], prompt=prompt, parts=True) != text:
                raise _difference("renders a chat", text, expected or "(refused)")
            found.append((rows[0], prompt))
    return found


def _first_difference(
    template: ChatTemplate, tokenizer: PreTrainedTokenizerBase, chats: Sequence[tuple[Chat, bool]]
) -> BadModel | None:
    """Return how the ids of training differ from those of transformers; None if they are equal."""
    for chat, prompt in chats:
        (text,) = template.render([chat], prompt=prompt)
        found = template.tokenizer.encode(text, add_special_tokens=False).ids
        expected = list(tokenizer(text, add_special_tokens=False)["input_ids"])
        if found != expected:
            return _difference("tokenizes a chat", found, expected)
    return None


def _difference(does: str, found: str | list[int], expected: str | list[int]) -> BadModel:
    at = next(
        (i for i, (a, b) in enumerate(zip(found, expected, strict=False)) if a != b), min(len(found), len(expected))
    )
    first = max(0, at - 20)
    return BadModel(
        f"Training {does} differently from transformers, which serves the model.",
        where="base.model",
        expected=f"as transformers: {expected[first : at + 40]!r}",
        got=f"{found[first : at + 40]!r}",
        next_step="open the base with transformers, save it (save_pretrained), and train on the saved folder",
    )


def check_mask(folder: Path, template: ChatTemplate, tokenizer: PreTrainedTokenizerBase, chats: Sequence[Chat]) -> None:
    """Check that each learned answer ends with a stop token, and with the last token that transformers marks.

    The start may differ: what the template leaves unmarked behind the prompt is learned, and a marked prompt is not.

    Args:
        template: the tokenizer of `folder`, as training reads it.

    Raises:
        BadModel: an answer ends elsewhere, or cannot be found.
    """
    training = folder / TRAINING_TEMPLATE
    marking = training.read_text(encoding="utf-8") if training.exists() else template.template
    stops = template.stop_ids() | eos_ids(folder)
    for chat in chats:
        try:
            (encoded,) = template.encode([chat], "assistant")
        except BadModel:
            continue  # rows of this kind are refused with a reason of their own
        expected = _marked(tokenizer, marking, chat, encoded.ids.tolist()) if MARKERS.search(marking) else []
        for last in _ends(encoded.labels != IGNORED):
            end = encoded.ids[: last + 1].tolist()
            while end and end[-1] not in stops and not template.tokenizer.decode(end[-1:], False).strip():
                end.pop()  # white space may stand behind the stop token
            if stops.isdisjoint(end := end[-4:]):
                raise BadModel(
                    "The tokenizer does not recognize the token that ends an answer, so the model would not learn to stop.",
                    where=str(folder / "tokenizer.json"),
                    got=str(list(map(template.tokenizer.id_to_token, end))),
                    next_step="set normalized and single_word of this token to false, in added_tokens of tokenizer.json",
                )
            if last < len(expected) and (not expected[last] or any(expected[last + 1 : last + 2])):
                nearest = min(_ends(expected), key=lambda at: abs(at - last), default=-1)
                raise BadModel(
                    "A learned answer ends at another token than the answer that transformers marks.",
                    where="chat_template",
                    expected=f"the last marked token at {nearest}",
                    got=f"at {last}: {template.tokenizer.decode(encoded.ids[: last + 1].tolist(), False)[-60:]!r}",
                    next_step="put {% generation %} … {% endgeneration %} around every answer and the token that ends it",
                )


def _marked(tokenizer: PreTrainedTokenizerBase, marking: str, chat: Chat, ids: list[int]) -> list[bool]:
    """Return which tokens of a chat transformers marks; none if it renders the chat neither with texts nor with parts."""
    for messages in (list(chat), list(map(in_parts, chat))):
        try:
            found = tokenizer.apply_chat_template(
                cast("list[dict[str, str]]", messages),
                chat_template=marking,
                return_dict=True,
                return_assistant_tokens_mask=True,
                tokenizer_kwargs={"return_offsets_mapping": True},
            )
        except (TemplateError, TypeError, ValueError, NotImplementedError):
            continue
        if not isinstance(found, Mapping):  # a text, if nothing is tokenized
            continue
        rendered_ids = list(found["input_ids"])
        if str(tokenizer.decode(ids)).startswith(str(tokenizer.decode(rendered_ids))):
            marked, places = [bool(mark) for mark in found["assistant_masks"]], found["offset_mapping"]
            for n in range(1, len(marked)):  # of one character's tokens, transformers marks the first
                marked[n] |= marked[n - 1] and places[n] == places[n - 1]
            of_ids: list[bool] = []
            # Only starts of answers differ, and an end that training adds.
            for at, first, size in SequenceMatcher(None, rendered_ids, ids, autojunk=False).get_matching_blocks()[:-1]:
                of_ids += [False] * (first - len(of_ids)) + marked[at : at + size]
            return of_ids
    return []


def _ends(marked: Sequence[bool] | np.ndarray) -> list[int]:
    """Return the positions of the last token of each marked span."""
    padded = np.append(marked, False)
    return [int(at) for at in np.flatnonzero(padded[:-1] & ~padded[1:])]
