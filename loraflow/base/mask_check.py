"""Compare where learned answers end with the mask that transformers computes from a template's {% generation %} blocks."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, cast

import numpy as np
from jinja2.exceptions import TemplateError

from loraflow.data.chats import Chat
from loraflow.data.loss_mask import ChatTemplate
from loraflow.data.template import MARKERS
from loraflow.data.token_labels import IGNORED
from loraflow.data.tokenizer_config import TRAINING_TEMPLATE
from loraflow.failures import BadModel

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


def check_mask(folder: Path, template: ChatTemplate, tokenizer: PreTrainedTokenizerBase, chats: Sequence[Chat]) -> None:
    """Check that each learned answer ends with the last token that transformers marks.

    The start may differ: what the template leaves unmarked behind the prompt is learned, and a marked prompt is not.

    Args:
        folder: the base's tokenizer.
        template: the same, as training reads it.
        tokenizer: the same, as transformers reads it.
        chats: chats of text that both render alike.

    Raises:
        BadModel: an answer ends elsewhere.
    """
    training = folder / TRAINING_TEMPLATE
    marking = training.read_text(encoding="utf-8") if training.exists() else template.template
    if not MARKERS.search(marking):
        return
    for chat in chats:
        try:
            (encoded,) = template.encode([chat], "assistant")
        except BadModel:
            continue  # rows of this kind are refused with a reason of their own
        theirs = _marked(tokenizer, marking, chat, encoded.ids)
        for last in _ends(encoded.labels):
            if last < len(theirs) and (not theirs[last] or any(theirs[last + 1 : last + 2])):
                raise BadModel(
                    "A learned answer ends at another token than the answer that transformers marks.",
                    where="chat_template",
                    expected=f"the last marked token at {_last(theirs, last)}",
                    got=f"at {last}: {template.tokenizer.decode(encoded.ids[: last + 1].tolist(), False)[-60:]!r}",
                    next_step="put {% generation %} … {% endgeneration %} around every answer and the token that ends it",
                )


def _marked(tokenizer: PreTrainedTokenizerBase, marking: str, chat: Chat, ids: np.ndarray) -> list[bool]:
    """Return which tokens of a chat transformers marks; none if it renders the chat neither with texts nor with parts."""
    in_parts = [{**message, "content": [{"type": "text", "text": message["content"]}]} for message in chat]
    for messages in (list(chat), in_parts):
        try:
            found = tokenizer.apply_chat_template(
                cast("list[dict[str, str]]", messages),
                chat_template=marking,
                return_dict=True,
                return_assistant_tokens_mask=True,
            )
        except (TemplateError, TypeError, ValueError):
            continue
        if not isinstance(found, Mapping):  # a text, if nothing is tokenized
            continue
        theirs = list(found["input_ids"])
        if theirs == ids[: len(theirs)].tolist():
            return [bool(marked) for marked in found["assistant_masks"]]
    return []


def _ends(labels: np.ndarray) -> list[int]:
    """Return the positions of the last token of each learned span."""
    learned = np.append(labels != IGNORED, False)
    return [int(at) for at in np.flatnonzero(learned[:-1] & ~learned[1:])]


def _last(marked: Sequence[bool], near: int) -> int:
    """Return the position of the last token of the marked span that is nearest."""
    ends = [at for at, one in enumerate(marked) if one and not any(marked[at + 1 : at + 2])]
    return min(ends, key=lambda at: abs(at - near), default=-1)
