"""Stage evaluate: a model's answers and likelihoods on held-out rows, scored row by row.

`scores.parquet` has a row per example and opens with pandas; `metrics.json` has each set's values with intervals.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from loraflow.config.evaluation import LOWER_IS_BETTER, OF_ALL_ROWS, RANGES, ROW_COLUMNS
from loraflow.config.stage_configs import EvaluateConfig
from loraflow.data.chats import GATE_SET, Message
from loraflow.data.checks.split import prompt_key, spread_sample, spread_values
from loraflow.evaluation.evidence import mean_interval
from loraflow.evaluation.intervals import Interval, group_labels
from loraflow.evaluation.label_scores import confusions, macro_f1
from loraflow.evaluation.values import (
    LARGEST_SCORE,
    EvaluationReport,
    MetricValue,
    Sample,
    SetScores,
    write_metrics,
)
from loraflow.failures import BadConfig, BadData, BadModel
from loraflow.hardware.device import pick_device
from loraflow.hardware.process_group import ProcessGroup, join
from loraflow.job import Inputs, Job, Progress
from loraflow.store import Summary

if TYPE_CHECKING:
    import pandas as pd
    from transformers import PreTrainedModel

    from loraflow.evaluation.generation import GeneratedAnswer

SAMPLES = 20  # answers in the report


@dataclass(frozen=True)
class HeldoutRow:
    """A held-out chat: its last message is the reference answer."""

    id: str
    set: str
    messages: list[Message]
    place: str = ""  # where the row was read: file:line
    group: str | None = None  # rows of a group are not independent


@dataclass(frozen=True)
class _Computed:
    """What the model computed for each row."""

    answers: list[GeneratedAnswer]
    losses: list[tuple[float, int]]  # sum of -log p of the reference in nats, its number of tokens
    control_tokens: int  # rows with a control token in a message's text; 0 without the metric token_loss
    longest: int  # tokens of the longest row, with its reference; 0 without the metric token_loss
    references: list[str]  # the text of each reference; of tool calls, as the template renders them


def run(job: Job[EvaluateConfig], inputs: Inputs, out: Path, progress: Progress) -> Summary:
    """Generate answers, score them, and write the scores. Every model gets the same rows, template and settings."""
    config, group = job.config, join(pick_device(job.runtime))
    rows, available = read_rows(inputs["rows"] / "heldout.jsonl", config.max_rows, config.seed)
    computed = _ask_model(job, inputs["model"], rows, progress, group)
    if not group.is_main:  # with several devices, only the first one scores and writes
        return Summary()
    table = _table(rows, computed)
    table = table.assign(**_row_scores(table, config))
    _require_finite(table)
    table.to_parquet(out / "scores.parquet", index=False)
    scores = {
        str(name): summarise(part, config.confidence, with_labels="labels" in config.metrics)
        for name, part in table.groupby("set")
    }
    report = EvaluationReport(
        metrics=scores,
        samples=_samples(table),
        available=available,
        control_tokens=computed.control_tokens,
        longest=computed.longest,
        confusions={
            str(name): confusions(part["answer"].tolist(), part["reference"].tolist())
            for name, part in table.groupby("set")
        }
        if "labels" in config.metrics
        else {},
    )
    return Summary(figures=write_metrics(scores, out), report=report.to_dict())


def read_rows(file: Path, max_rows: int | None, seed: int) -> tuple[list[HeldoutRow], dict[str, int]]:
    """Return the held-out rows in the file's order, and how many there are of each set.

    At most `max_rows` of a set are returned: a seeded sample, in which each group, or each label, has its share.

    Raises:
        BadData: there are none.
    """
    with file.open(encoding="utf-8") as lines:
        rows, available = sampled_rows(lines, max_rows, seed)
    if not rows:
        raise BadData(
            "There are no held-out rows.", where="evaluate", next_step="set data.heldout or data.heldout_fraction"
        )
    return rows, available


def sampled_rows(lines: Iterable[str], max_rows: int | None, seed: int) -> tuple[list[HeldoutRow], dict[str, int]]:
    """Return the rows of heldout.jsonl that are scored, and how many there are of each set; see `read_rows`."""
    values = [json.loads(line) for line in lines]
    rows = [
        HeldoutRow(row["id"], row["set"], row["messages"], row.get("place", ""), row.get("group")) for row in values
    ]
    sets: dict[str, list[int]] = {}
    for number, row in enumerate(rows):
        sets.setdefault(row.set, []).append(number)
    available = {name: len(numbers) for name, numbers in sets.items()}
    if max_rows is None:
        return rows, available
    taken = (numbers[n] for numbers in sets.values() for n in _sample([rows[n] for n in numbers], max_rows, seed))
    return [rows[number] for number in sorted(taken)], available


def _sample(rows: list[HeldoutRow], size: int, seed: int) -> list[int]:
    values = spread_values([row.group for row in rows], [row.messages[-1]["content"] or "" for row in rows])
    return spread_sample([prompt_key(row.messages) for row in rows], values, size, seed, "max_rows")


def _ask_model(
    job: Job[EvaluateConfig], folder: Path, rows: list[HeldoutRow], progress: Progress, group: ProcessGroup
) -> _Computed:
    """Compute the model's answers, and its likelihoods of the references if a metric needs them."""
    from loraflow.base.load import load_model, load_tokenizer, stop_ids
    from loraflow.data.tokens.loss_mask import ChatTemplate, name_row
    from loraflow.data.tokens.positions import Positions
    from loraflow.evaluation.generation import generate_answers
    from loraflow.evaluation.likelihood import answer_losses

    config, batch_size = job.config, job.runtime.eval_batch_size
    chats = [row.messages for row in rows]
    template, tokenizer = ChatTemplate(folder), load_tokenizer(folder)
    places = [f"{row.place} ({row.set})" for row in rows]
    with name_row(places):  # before the model is loaded
        prompts = template.prompt_ids(chats)
        encoded = template.encode(chats, "last_assistant") if "token_loss" in config.metrics else []
    Positions(Positions.of_folder(folder).limit).check([len(row.ids) for row in encoded], "held-out rows", places)
    model = load_model(folder, config.dtype, job.runtime, trust=config.trust_remote_code)
    losses = [(0.0, 0)] * len(rows)
    if encoded:  # a forward pass of its own over all rows
        losses = answer_losses(model, encoded, tokenizer.pad_token_id, batch_size, group)
    if group.is_main:
        _expect_memory(job, folder, prompts, _shared_tokens(model, prompts, config.max_new_tokens), progress)
        progress(done=0, total=len(rows))
    answers = generate_answers(
        model,
        tokenizer,
        prompts,
        stop_ids=stop_ids(folder),
        inserted=template.inserted_text(),
        max_new_tokens=config.max_new_tokens,
        batch_size=batch_size,
        done_file=progress.work / "answers.jsonl" if progress.work else None,
        owner=job.fingerprint,
        on_batch=(lambda done: progress(done=done, total=len(rows))) if group.is_main else None,
        group=group,
    )
    return _Computed(
        answers,
        losses,
        control_tokens=sum(row.special_in_text is not None for row in encoded),
        longest=max((len(row.ids) for row in encoded), default=0),
        references=template.answer_texts(chats),
    )


def _shared_tokens(model: PreTrainedModel, prompts: Sequence[list[int]], max_new_tokens: int) -> int:
    """Return how many tokens of the prompts are computed once for all of them."""
    from loraflow.data.tokens.packing import common_prefix_length
    from loraflow.evaluation.prefix_cache import MIN_ROWS, MIN_TOKENS, has_plain_cache

    lengths = [len(prompt) for prompt in prompts]
    if len(prompts) < MIN_ROWS or not has_plain_cache(model, max(lengths) + max_new_tokens):
        return 0
    shared = common_prefix_length(prompts, min(lengths) - 1)
    return shared if shared >= MIN_TOKENS else 0


def _expect_memory(
    job: Job[EvaluateConfig], folder: Path, prompts: Sequence[list[int]], shared: int, progress: Progress
) -> None:
    """Estimate this process's memory, for the manifest. The first `shared` tokens of all prompts are computed once."""
    from loraflow.training.memory import generation_parts, shape_of

    shape = shape_of(json.loads((folder / "config.json").read_text(encoding="utf-8")))
    if shape is not None:
        config, width = job.config, 4 if job.config.dtype == "float32" else 2
        device = pick_device(job.runtime)
        rows, longest = min(len(prompts), job.runtime.eval_batch_size), max(map(len, prompts))
        parts = generation_parts(
            shape, device, config.dtype, rows, longest, config.max_new_tokens, width=width, shared=shared
        )
        progress.expect_memory(parts.as_bytes())


def _table(rows: Sequence[HeldoutRow], computed: _Computed) -> pd.DataFrame:
    """Return the columns of scores.parquet that are not metrics."""
    import pandas as pd

    groups = [row.group for row in rows]
    return pd.DataFrame(
        {
            "id": [row.id for row in rows],
            "set": [row.set for row in rows],
            **({} if groups == [None] * len(rows) else {"group": groups}),
            "prompt": [json.dumps(row.messages[:-1], ensure_ascii=False) for row in rows],
            "reference": computed.references,
            **_calls_column(rows),
            "answer": [answer["text"] for answer in computed.answers],
            "answer_tokens": [answer["tokens"] for answer in computed.answers],
            "finish": [answer["finish"] for answer in computed.answers],
            "nll": [loss for loss, _ in computed.losses],
            "reference_tokens": [tokens for _, tokens in computed.losses],
        }
    )


def _calls_column(rows: Sequence[HeldoutRow]) -> dict[str, list[str]]:
    """Return the calls of the references, and the tools, as JSON, if a row has tools."""
    if not any("tools" in row.messages[0] or "tool_calls" in row.messages[-1] for row in rows):
        return {}
    calls = [
        {
            "calls": [call["function"] for call in row.messages[-1].get("tool_calls", [])],
            "tools": row.messages[0].get("tools"),
        }
        for row in rows
    ]
    return {"reference_calls": [json.dumps(value, ensure_ascii=False) for value in calls]}


def _row_scores(table: pd.DataFrame, config: EvaluateConfig) -> dict[str, list[float]]:
    """Return the scores of each row, by the names that the metrics' modules give them."""
    from loraflow.evaluation.metric_modules import compute, require_unchanged

    columns: dict[str, list[float]] = {}
    for name in config.metrics:
        prediction, reference = ("nll", "reference_tokens") if name == "token_loss" else ("answer", "reference")
        if name == "tool_calls":
            reference = "reference_calls"
            _require_calls(table)
        found = compute(name, table[prediction].tolist(), table[reference].tolist()).rows
        built_in = {*RANGES, *LOWER_IS_BETTER} if "/" in name else set()  # whose ranges and directions would be used
        _require_own_names(name, found, {*columns, *built_in}, len(table))
        columns |= found
    for name, sha256 in config.modules.items():  # after they were imported, so that an edit before that is seen too
        require_unchanged(name, sha256)
    return columns


def _require_own_names(metric: str, found: Mapping[str, Sequence[float]], known: Iterable[str], rows: int) -> None:
    """Refuse a metric whose scores have the name of another score or column, or no value for some rows."""
    taken = sorted(found.keys() & (ROW_COLUMNS | OF_ALL_ROWS | set(known)))
    if taken:
        raise BadConfig(
            "A metric's score has the name of another metric's score, or of another column of the score table.",
            where=f"evaluation.metrics: {metric}",
            expected="a name that no other score and no column of the table has",
            got=", ".join(taken),
            next_step="rename the score in the metric's module, or remove one of the two metrics",
        )
    for name, values in found.items():
        if len(values) != rows:
            raise BadConfig(
                "A metric does not give a score for each row.",
                where=f"evaluation.metrics: {metric}",
                expected=f"{rows} values in {name}_scores",
                got=str(len(values)),
                next_step="correct the metric's module",
            )


def _require_calls(table: pd.DataFrame) -> None:
    """Refuse the metric tool_calls without tools, and for a format of calls that it cannot parse."""
    from loraflow.data.formats.call_parser import parse_calls

    if "reference_calls" not in table:
        raise BadData(
            "No held-out row has tools, so tool calls cannot be scored.",
            where="evaluation.metrics: tool_calls",
            next_step="remove tool_calls from evaluation.metrics, or hold out rows with tools",
        )
    for row in table.itertuples():
        if parse_calls(row.reference) != json.loads(row.reference_calls)["calls"]:
            raise BadModel(
                "The metric tool_calls does not know how this chat template writes tool calls.",
                where="evaluation.metrics",
                expected="<tool_call>{JSON}</tool_call>, [TOOL_CALLS] [JSON], or JSON with name and arguments",
                got=row.reference[:100],
                next_step="remove the metric tool_calls; exact_match compares the rendered calls",
            )


def _require_finite(table: pd.DataFrame) -> None:
    numbers = table.select_dtypes("number")
    bad = [str(name) for name in numbers if not (numbers[name].abs() <= LARGEST_SCORE).all()]
    if bad:
        raise BadData(
            "A score is not a finite number, or too large to compute with.",
            where="evaluate",
            expected=f"scores of at most {LARGEST_SCORE:g}",
            got=", ".join(bad),
            next_step="fix the metric, or limit the score in its module",
        )


def score_columns(table: pd.DataFrame) -> list[str]:
    """Return the names of a score table's metrics."""
    return [name for name in table.columns if name not in ROW_COLUMNS]


def summarise(table: pd.DataFrame, confidence: float, *, with_labels: bool = False) -> SetScores:
    """Return the value of each metric on one set's rows."""
    scores, groups = {}, group_labels(table)
    for name in score_columns(table):
        weights = table["reference_tokens"].to_numpy(dtype=float) if name == "token_loss" else None
        interval = mean_interval(table[name].to_numpy(dtype=float), confidence, weights, groups, RANGES.get(name))
        scores[name] = _metric_value(interval, table)
        if name == "token_loss":
            with np.errstate(over="ignore"):  # an enormous loss
                value, low, high = map(float, np.exp(interval))
            scores["perplexity"] = _metric_value(Interval(value, low or -np.inf, high), table)
    if with_labels:
        answers, references = table["answer"].tolist(), table["reference"].tolist()
        scores["macro_f1"] = _metric_value(macro_f1(answers, references, groups, confidence), table)
    stops = (table["finish"] == "stop").to_numpy(dtype=float)
    scores["stops"] = _metric_value(mean_interval(stops, confidence, groups=groups), table)
    return scores


def _metric_value(interval: Interval, table: pd.DataFrame) -> MetricValue:
    return MetricValue(**interval._asdict(), n=len(table))


def _samples(table: pd.DataFrame) -> tuple[Sample, ...]:
    """Return answers of the gate's set for the run's report. Ids are hashes, so the first ones are a random sample."""
    return tuple(
        Sample(id=row.id, prompt=json.loads(row.prompt)[-1]["content"], reference=row.reference, answer=row.answer)
        for row in table[table["set"] == GATE_SET].sort_values("id").head(SAMPLES).itertuples()
    )
