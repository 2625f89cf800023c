"""Stage evaluate: a model's answers and likelihoods on held-out rows, scored row by row.

`scores.parquet` has a row per example and opens with pandas; `metrics.json` has each set's values with intervals.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np

from loraflow.config.stage_configs import EvaluateConfig
from loraflow.failures import BadData
from loraflow.hardware.device import pick_device
from loraflow.hardware.process_group import join
from loraflow.job import Inputs, Job, Progress
from loraflow.store import Summary


def run(job: Job[EvaluateConfig], inputs: Inputs, out: Path, progress: Progress) -> Summary:
    """Answer, score, write. The same rows, template and settings for whatever model it is."""
    import pandas as pd

    from loraflow.base.load import load_model, load_tokenizer, stop_ids
    from loraflow.data.loss_mask import ChatTemplate
    from loraflow.evaluation.generation import answer_all, answer_losses

    config, folder, group = job.config, inputs["model"], join(pick_device(job.runtime))
    rows = _rows(inputs["rows"] / "heldout.jsonl", config.max_rows)
    chats = [row["messages"] for row in rows]
    template, tokenizer = ChatTemplate(folder), load_tokenizer(folder)
    model = load_model(folder, config.dtype, job.runtime, trust=config.trust_remote_code)
    losses = [(0.0, 0)] * len(rows)
    if "token_loss" in config.metrics:  # a forward pass of its own over all rows
        encoded = template.encode(chats, "last_assistant")
        losses = answer_losses(model, encoded, tokenizer.pad_token_id, job.runtime.eval_batch_size, group)
    if group.is_main:
        progress(done=0, total=len(rows))
    answers = answer_all(
        model,
        tokenizer,
        template.prompt_ids(chats),
        stop_ids=stop_ids(folder),
        max_new_tokens=config.max_new_tokens,
        batch_size=job.runtime.eval_batch_size,
        done_file=progress.work / "answers.jsonl" if progress.work else None,
        on_batch=(lambda done: progress(done=done, total=len(rows))) if group.is_main else None,
        group=group,
    )
    if not group.is_main:  # of several devices, the first one scores and writes
        return Summary()
    table = pd.DataFrame(
        {
            "id": [row["id"] for row in rows],
            "set": [row["set"] for row in rows],
            "prompt": [json.dumps(chat[:-1], ensure_ascii=False) for chat in chats],
            "reference": [chat[-1]["content"] for chat in chats],
            "answer": [answer["text"] for answer in answers],
            "answer_tokens": [answer["tokens"] for answer in answers],
            "finish": [answer["finish"] for answer in answers],
            "nll": [loss for loss, _ in losses],
            "reference_tokens": [tokens for _, tokens in losses],
        }
    )
    table = table.assign(**_score(table, config.metrics))
    _refuse_holes(table)
    table.to_parquet(out / "scores.parquet", index=False)
    metrics = {name: summarise(part, config.confidence, config.seed) for name, part in table.groupby("set")}
    (out / "metrics.json").write_text(json.dumps(metrics, indent=1, sort_keys=True) + "\n", encoding="utf-8")
    return Summary(figures=_figures(metrics), report={"metrics": metrics, "samples": _samples(table, 20)})


def _rows(file: Path, max_rows: int | None) -> list[dict[str, Any]]:
    """Return the held-out rows, at most `max_rows` of each set."""
    taken: dict[str, int] = {}
    rows = []
    with file.open(encoding="utf-8") as lines:
        for line in lines:
            row = json.loads(line)
            taken[row["set"]] = taken.get(row["set"], 0) + 1
            if max_rows is None or taken[row["set"]] <= max_rows:
                rows.append(row)
    if not rows:
        raise BadData("There are no held-out rows.", where="evaluate", next_step="see data.heldout")
    return rows


def _score(table: Any, names: list[str]) -> dict[str, list[float]]:
    from loraflow.evaluation.metric_modules import compute

    columns: dict[str, list[float]] = {}
    for name in names:
        if name == "token_loss":
            _, rows = compute(name, table["nll"].tolist(), table["reference_tokens"].tolist())
        else:
            _, rows = compute(name, table["answer"].tolist(), table["reference"].tolist())
        columns |= rows
    return columns


def _refuse_holes(table: Any) -> None:
    numbers = table.select_dtypes("number")
    bad = [name for name in numbers if not np.isfinite(numbers[name].to_numpy(dtype=float)).all()]
    if bad:
        raise BadData("A score is no number.", where="evaluate", got=", ".join(bad), next_step="mend the metric")


def score_columns(table: Any) -> list[str]:
    """Return the names of a score table's metrics."""
    fixed = {"id", "set", "prompt", "reference", "answer", "answer_tokens", "finish", "nll", "reference_tokens"}
    return [name for name in table.columns if name not in fixed]


def summarise(table: Any, confidence: float, seed: int) -> dict[str, dict[str, float]]:
    """Return {metric: {value, low, high, n}} of one set's rows."""
    from loraflow.evaluation.intervals import mean_interval

    out = {}
    for name in score_columns(table):
        weights = table["reference_tokens"].to_numpy(dtype=float) if name == "token_loss" else None
        value, low, high = mean_interval(table[name].to_numpy(dtype=float), confidence, seed, weights)
        out[name] = {"value": value, "low": low, "high": high, "n": len(table)}
        if name == "token_loss":
            out["perplexity"] = {"value": float(np.exp(value)), "low": float(np.exp(low)), "high": float(np.exp(high)),
                                 "n": len(table)}  # fmt: skip
    stops = (table["finish"] == "stop").to_numpy(dtype=float)
    value, low, high = mean_interval(stops, confidence, seed)
    out["stops"] = {"value": value, "low": low, "high": high, "n": len(table)}
    return out


def _figures(metrics: dict[str, Any]) -> dict[str, Any]:
    return {f"{name}.{key}": round(one["value"], 6) for name, part in metrics.items() for key, one in part.items()}


def _samples(table: Any, count: int) -> list[dict[str, str]]:
    """Return the first answers of the gate's set, for the run's report."""
    return [
        {
            "id": row.id,
            "prompt": json.loads(row.prompt)[-1]["content"],
            "reference": row.reference,
            "answer": row.answer,
        }
        for row in table[table["set"] == "heldout"].head(count).itertuples()
    ]
