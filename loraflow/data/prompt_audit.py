"""Check that training and generation use the same prompt tokens, and show what is learned, on the first rows."""

from __future__ import annotations

import json
import logging
from dataclasses import asdict, dataclass
from itertools import islice
from pathlib import Path

from pydantic import JsonValue

from loraflow.config.stage_configs import TokenizeConfig
from loraflow.data.answer_spans import IfCut
from loraflow.data.chats import ChatRecord
from loraflow.data.loss_mask import ChatTemplate, name_row
from loraflow.data.token_labels import IGNORED
from loraflow.failures import BadModel

log = logging.getLogger(__name__)
AUDITED_ROWS = 20


@dataclass(frozen=True)
class AuditedRow:
    """What is learned in a row, for people who read the report."""

    place: str
    learned: str  # the text of the learned tokens, at most 500 characters
    tokens: int
    learned_tokens: int
    prompt_is_what_serving_sends: bool

    def as_json(self) -> dict[str, JsonValue]:
        """Return the row as JSON values."""
        return asdict(self)


def audit(source: Path, template: ChatTemplate, config: TokenizeConfig) -> list[AuditedRow]:
    """Audit the first rows of a file of chats."""
    with source.open(encoding="utf-8") as file:
        records: list[ChatRecord] = [json.loads(line) for line in islice(file, AUDITED_ROWS)]
    chats = [record["messages"] for record in records]
    audited: list[AuditedRow] = []
    if_cut: IfCut = "context" if config.thinking == "keep" else "error"
    marked = [record.get("learned") for record in records]
    with name_row([record["place"] for record in records]):
        encoded_chats, prompts = template.encode(chats, config.loss_on, if_cut, marked), template.prompt_ids(chats)
    for record, encoded, prompt in zip(records, encoded_chats, prompts, strict=True):
        learned = encoded.ids[encoded.labels != IGNORED]
        audited.append(
            AuditedRow(
                place=record["place"],
                learned=template.tokenizer.decode(learned.tolist(), skip_special_tokens=False)[:500],
                tokens=len(encoded.ids),
                learned_tokens=len(learned),
                prompt_is_what_serving_sends=encoded.ids[: encoded.prompt].tolist() == prompt,
            )
        )
    return audited


def check_prompts(rows: list[AuditedRow]) -> None:
    """Check that the prompts in training rows equal the prompts that generation uses.

    A single row may differ: an answer that starts with a new line can share a token with the new line before it. If all
    rows differ, the template is wrong.

    Raises:
        BadModel: every row's prompt differs.
    """
    differing = [row.place for row in rows if not row.prompt_is_what_serving_sends]
    if differing and len(differing) == len(rows):
        raise BadModel(
            "The chat template renders prompts differently in training and in generation, so the model would see prompts "
            "that it was not trained on.",
            where="chat_template",
            expected="the same token ids before the answer, with and without add_generation_prompt",
            got=f"{len(differing)} of the first {len(rows)} rows differ, such as {differing[0]}",
            next_step="make add_generation_prompt add exactly the text before an answer, and put {% generation %} after it",
        )
    if differing:
        log.warning(
            "%d of the first %d rows have other prompt tokens in training than in generation, such as %s.",
            len(differing),
            len(rows),
            differing[0],
        )
