"""Stage score_general: a model's loss on general chats, and its answers to general multiple-choice questions.

`loss.parquet` has a row per chat, `choices.parquet` one per question. The gate compares them row by row with those of the
base and the champion (`gate.forgetting`).

Questions are scored as in lm-eval (Gao et al.): a choice follows its question after a space, as plain text without a chat
template, and the tokenizer's own BOS is in front. A question that ends in white space gets no further space (lm-eval adds
one).
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from loraflow.config.data import GENERAL_SETS
from loraflow.config.stage_configs import ScoreGeneralConfig
from loraflow.data.chats import GENERAL_FILE, GeneralRow, read_general
from loraflow.data.tokens.loss_mask import Encoded
from loraflow.data.tokens.token_labels import IGNORED
from loraflow.evaluation.evidence import mean_interval
from loraflow.evaluation.intervals import group_labels
from loraflow.evaluation.values import MetricValue, SetScores, scores_to_dict, write_metrics
from loraflow.failures import BadData
from loraflow.hardware.device import pick_device
from loraflow.hardware.process_group import ProcessGroup, join
from loraflow.job import Inputs, Job, Progress
from loraflow.store import Summary

if TYPE_CHECKING:
    import pandas as pd
    from transformers import PreTrainedTokenizerBase


CHATS, CHOICES = GENERAL_SETS
TABLES = {CHATS: "loss.parquet", CHOICES: "choices.parquet"}
Losses = list[tuple[float, int]]  # (sum of -log p in nats, number of tokens) of each row


def run(job: Job[ScoreGeneralConfig], inputs: Inputs, out: Path, progress: Progress) -> Summary:
    """Write the scores of each row.

    Raises:
        BadData: a choice has no token of its own.
        BadModel: the chat template cannot render a chat.
    """
    config, group = job.config, join(pick_device(job.runtime))
    rows = read_general(inputs["general"] / GENERAL_FILE)
    chats = [row for row in rows if row["kind"] == "chat"]
    questions = [row for row in rows if row["kind"] == "choice"]
    of_chats, of_choices = _losses(job, inputs["model"], chats, questions, group)
    if not group.is_main:
        return Summary()
    progress(done=len(rows))
    scores: dict[str, SetScores] = {}
    if chats:
        table = _chat_table(chats, of_chats)
        table.to_parquet(out / TABLES[CHATS], index=False)
        scores[CHATS] = {"loss": _value(table, "token_loss", config, table["reference_tokens"].to_numpy(dtype=float))}
    if questions:
        table = _question_table(questions, of_choices)
        table.to_parquet(out / TABLES[CHOICES], index=False)
        scores[CHOICES] = {name: _value(table, name, config) for name in ("accuracy", "accuracy_norm")}
    return Summary(figures=write_metrics(scores, out), report={"metrics": scores_to_dict(scores)})


def _losses(
    job: Job[ScoreGeneralConfig],
    folder: Path,
    chats: list[GeneralRow],
    questions: list[GeneralRow],
    group: ProcessGroup,
) -> tuple[Losses, Losses]:
    from loraflow.base.load import load_model, load_tokenizer
    from loraflow.data.tokens.loss_mask import ChatTemplate, name_row
    from loraflow.data.tokens.positions import Positions
    from loraflow.evaluation.likelihood import answer_losses

    tokenizer = load_tokenizer(folder)
    with name_row([f"{row['place']} (evaluation.general)" for row in chats]):
        encoded = ChatTemplate(folder).encode([row["messages"] for row in chats], "last_assistant") if chats else []
    choices: list[Encoded] = []
    for row in questions:
        for choice in row["choices"]:
            try:
                choices.append(encode_choice(tokenizer, row["context"], choice))
            except ValueError:
                raise BadData(
                    "The model's tokenizer gives a choice, or its question, no token of its own.",
                    where=f"{row['place']} (evaluation.general)",
                    got=choice[:100],
                    next_step="change or remove the row",
                ) from None
    lengths = [len(row.ids) for row in (*encoded, *choices)]
    places = [row["place"] for row in chats] + [row["place"] for row in questions for _ in row["choices"]]
    Positions(Positions.of_folder(folder).limit).check(lengths, "general rows", places)
    model = load_model(folder, job.config.dtype, job.runtime, trust=job.config.trust_remote_code)
    pad, size = tokenizer.pad_token_id, job.runtime.eval_batch_size
    return (
        answer_losses(model, encoded, pad, size, group) if encoded else [],
        answer_losses(model, choices, pad, size, group) if choices else [],
    )


def _chat_table(chats: list[GeneralRow], losses: Losses) -> pd.DataFrame:
    import pandas as pd

    for row, (loss, _) in zip(chats, losses, strict=True):
        _require_finite([loss], f"{row['place']} (evaluation.general)", "-log p of its answer")
    return pd.DataFrame(
        {
            "id": [row["id"] for row in chats],
            "prompt": [json.dumps(row["messages"][:-1], ensure_ascii=False) for row in chats],
            "token_loss": [loss / tokens for loss, tokens in losses],
            "reference_tokens": [tokens for _, tokens in losses],
        }
    )


def _question_table(questions: list[GeneralRow], losses: Losses) -> pd.DataFrame:
    import pandas as pd

    of_choice = iter(loss for loss, _ in losses)
    nll = [[next(of_choice) for _ in row["choices"]] for row in questions]
    for row, sums in zip(questions, nll, strict=True):
        _require_finite(sums, f"{row['place']} (evaluation.general)", "-log p of its choices")
    right = [is_right(of_row, row["choices"], row["answer"]) for of_row, row in zip(nll, questions, strict=True)]
    return pd.DataFrame(
        {
            "id": [row["id"] for row in questions],
            "prompt": [row["context"] for row in questions],
            "nll": nll,
            "accuracy": [by_sum for by_sum, _ in right],
            "accuracy_norm": [by_length for _, by_length in right],
        }
    )


def _require_finite(sums: Sequence[float], where: str, what: str) -> None:
    """Refuse scores that are no numbers: of these, the largest would be an answer like any other."""
    if not np.isfinite(sums).all():
        raise BadData(
            "A model gave a score that is not a finite number.",
            where=where,
            expected=f"finite numbers: {what}",
            got=", ".join(f"{value:g}" for value in sums),
            next_step="check the model: weights or activations overflow; evaluation.dtype: float32 has the largest range",
        )


def _value(
    table: pd.DataFrame, name: str, config: ScoreGeneralConfig, weights: np.ndarray | None = None
) -> MetricValue:
    scores = table[name].to_numpy(dtype=float)
    interval = mean_interval(scores, config.confidence, weights, group_labels(table))
    return MetricValue(**interval._asdict(), n=len(table))


def encode_choice(tokenizer: PreTrainedTokenizerBase, context: str, choice: str) -> Encoded:
    """Return question and choice as token ids, where the tokens of the choice are learned.

    White space at the end of the question goes to the choice, in place of the space: most tokenizers join it with the next
    word. Of the special tokens that the tokenizer writes around a text, only those before it are there: an EOS after the
    question would end it, and one after the choice would be scored.

    Raises:
        ValueError: the question or the choice has no token.
    """
    bare = context.rstrip()
    asked = _ids(tokenizer, bare)
    whole = _ids(tokenizer, f"{context} {choice}" if bare == context else f"{context}{choice}")
    before, after = _tokens_before(tokenizer, bare, asked) + asked, whole[len(asked) :]
    if not before or not after:
        raise ValueError("no token")
    labels = [IGNORED] * len(before) + after
    return Encoded(np.array(before + after, dtype=np.int32), np.array(labels, dtype=np.int32), prompt=len(before))


def _ids(tokenizer: PreTrainedTokenizerBase, text: str) -> list[int]:
    found: list[int] = tokenizer(text, add_special_tokens=False)["input_ids"]
    return found


def _tokens_before(tokenizer: PreTrainedTokenizerBase, text: str, ids: list[int]) -> list[int]:
    """Return the tokens that the tokenizer writes before a text with these ids, such as a BOS; none that it begins with."""
    around: list[int] = tokenizer(text)["input_ids"]
    extra = len(around) - len(ids)
    before = next((around[:start] for start in range(extra + 1) if around[start : start + len(ids)] == ids), [])
    return [] if ids[: len(before)] == before else before


def is_right(losses: Sequence[float], choices: Sequence[str], answer: int) -> tuple[float, float]:
    """Return accuracy and accuracy_norm of a question, 0 or 1. Of equal choices the first is taken.

    The choices are compared by the sums of the log likelihoods of their tokens (lm-eval's acc), and by these sums divided by
    the number of the choices' characters (acc_norm).

    Args:
        losses: the sum of -log p of each choice's tokens, in nats.
    """
    sums = -np.asarray(losses)
    by_length = sums / np.array([len(choice) for choice in choices])
    return float(sums.argmax() == answer), float(by_length.argmax() == answer)
