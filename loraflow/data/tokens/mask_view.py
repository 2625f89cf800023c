"""Show which parts of a training row are learned, as the model reads it, and whether generation has the same prompts."""

import itertools
import json
import logging
import random
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

import numpy as np

from loraflow.config.stage_configs import TokenizeConfig
from loraflow.data.chats import ChatRecord
from loraflow.data.templates.answer_spans import IfCut
from loraflow.data.tokens.loss_mask import ChatTemplate, name_row
from loraflow.data.tokens.token_labels import IGNORED, all_weights
from loraflow.data.tokens.token_report import SampleRow
from loraflow.failures import BadConfig

SAMPLES = 3  # rows that a report shows
SAMPLE_PARTS = 20  # of each
SAMPLE_CHARACTERS = 600  # of each part


@dataclass(frozen=True)
class MaskedRow:
    """A row as tokens, and the text of its parts."""

    place: str
    tokens: int
    learned_tokens: int
    parts: tuple[tuple[str, float], ...]  # text and its weight in the loss; together they are the decoded tokens
    control_token: str | None  # the first in a message's text
    left_out: str | None  # why tokenize leaves the row out, or cuts it


def masked_row(rows: Path, number: int, template: ChatTemplate, config: TokenizeConfig) -> MaskedRow:
    """Return a row of a file of checked chats with its mask.

    Args:
        number: the row, from 1.

    Raises:
        BadConfig: the file has fewer rows.
        BadModel: the template cannot render the row.
    """
    with rows.open(encoding="utf-8") as file:
        line = next(itertools.islice(file, number - 1, None), None)
    if line is None:
        raise BadConfig("There is no such training row.", where=f"--row {number}", next_step="choose a smaller number")
    return _masked(line, template, config)


def _masked(line: str | bytes, template: ChatTemplate, config: TokenizeConfig) -> MaskedRow:
    record: ChatRecord = json.loads(line)
    with name_row([record["place"]]):
        if_cut: IfCut = "context" if config.thinking == "keep" else "error"
        (encoded,) = template.encode(
            [record["messages"]], config.loss_on, if_cut, [record.get("learned")], [record.get("weights")]
        )
    ids: list[int] = encoded.ids.tolist()
    learned: list[bool] = (encoded.labels != IGNORED).tolist()
    found = all_weights(encoded.labels, encoded.weights)
    weights = [float(np.format_float_positional(weight)) for weight in found]  # 0.1, as it was written
    starts = [n for n in range(len(ids)) if n == 0 or weights[n] != weights[n - 1]]
    parts: list[tuple[str, float]] = []
    before = ""
    for start, end in zip(starts, [*starts[1:], len(ids)], strict=True):
        text = template.tokenizer.decode(
            ids[:end], skip_special_tokens=False
        )  # of all: a token's text depends on the others
        parts.append((text[len(before) :], weights[start]))
        before = text
    return MaskedRow(
        place=record["place"],
        tokens=len(ids),
        learned_tokens=sum(learned),
        parts=tuple(parts),
        control_token=encoded.special_in_text,
        left_out=_left_out(len(ids), learned, encoded.special_in_text, config),
    )


def _left_out(tokens: int, learned: list[bool], control_token: str | None, config: TokenizeConfig) -> str | None:
    if control_token and config.special_tokens != "allow":
        return f"left out or refused (data.special_tokens: {config.special_tokens}): {control_token} is in its text"
    if tokens > config.max_length:
        return f"longer than max_length, {config.max_length} tokens (data.too_long: {config.too_long})"
    return None if any(learned[1:]) else "left out: it has no token to learn"


def sample_rows(rows: Path, template: ChatTemplate, config: TokenizeConfig) -> list[SampleRow]:
    """Return a few rows of a file of checked chats for a report, in the order of the file.

    A fixed seed draws them.

    Raises:
        BadModel: the template cannot render a row.
    """
    with rows.open("rb") as file:
        total = sum(1 for _ in file)
        drawn = set(random.Random(0).sample(range(total), min(SAMPLES, total)))
        file.seek(0)
        shown = [_masked(line, template, config) for number, line in enumerate(file) if number in drawn]
    return [
        SampleRow(
            place=row.place,
            tokens=row.tokens,
            learned_tokens=row.learned_tokens,
            parts=[(_shortened(text), weight) for text, weight in row.parts[:SAMPLE_PARTS]],
            more_parts=max(0, len(row.parts) - SAMPLE_PARTS),
            left_out=row.left_out,
        )
        for row in shown
    ]


def _shortened(text: str) -> str:
    """Return a part's beginning and end: what stands beside the next part is what a person checks."""
    half = SAMPLE_CHARACTERS // 2
    return text if len(text) <= SAMPLE_CHARACTERS else f"{text[:half]} […] {text[-half:]}"


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


def warn_of_other_prompts(rows: list[AuditedRow]) -> None:
    """Log a warning if earlier answers have other tokens than in later prompts, which join an answer to its own prompt."""
    if differing := [row.place for row in rows if not row.prompt_is_what_serving_sends]:
        log.warning(
            "%d of the first %d rows have other tokens in earlier answers or before one than generation, such as %s. "
            "With data.loss_on: last_assistant, they are the same.",
            len(differing),
            len(rows),
            differing[0],
        )
