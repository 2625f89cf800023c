"""Batch prediction: a file of chats in, the same rows with the model's answers out.

`OUT.partial/` keeps the answers that are done while the work goes on: a run that was killed goes on behind them,
if input, model and settings are what they were. OUT appears when it is whole.
"""

from __future__ import annotations

import hashlib
import json
import logging
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

from loraflow import identity
from loraflow.failures import BadConfig, BadData, BadModel, OutOfMemory, from_os_error
from loraflow.serving.chat import Sampling
from loraflow.serving.models import Loaded, Model, load
from loraflow.serving.tables import ADDED, OUT_SUFFIXES, Question, read_questions, write_answers
from loraflow.store.files import HashMemo, hash_file, write_json
from loraflow.store.lock import Held, flock

log = logging.getLogger("loraflow")
OnBatch = Callable[[int, int], Any]  # rows done, rows in all


def predict(
    model: Model,
    source: Path,
    target: Path,
    *,
    sampling: Sampling,
    form: str = "auto",
    column: str | None = None,
    system: str | None = None,
    dtype: str = "float32",
    device: str = "auto",
    batch_size: int = 16,
    memo: HashMemo | None = None,
    on_batch: OnBatch | None = None,
) -> dict[str, Any]:
    """Answer the rows of a file and write them, in their order, to another.

    Args:
        model: who answers.
        source: JSONL, JSON, CSV, TSV or Parquet.
        target: JSONL, CSV, TSV or Parquet; it must not exist.
        sampling: how tokens are chosen.
        form: how a row says who said what; auto looks at its keys.
        column: the column that holds the question, in place of a form.
        system: a message put before chats that have none.
        dtype: float32 is evaluation's: batches do not change answers.
        device: auto, cpu or cuda.
        batch_size: rows in memory at a time; halved when a GPU's memory does not suffice.
        memo: remembered hashes of the model's files.
        on_batch: is told of progress.

    Returns:
        `rows`, `errors` (rows without an answer; their column `error` says why), `resumed` (rows done before).

    Raises:
        BadConfig: the target exists, or was begun with another input, model or setting.
        BadData: the input cannot be read.
    """
    _refuse(source, target)
    work = target.with_name(target.name + ".partial")
    begun = {
        "input": hash_file(source),
        "model": model.digest(memo or HashMemo(None)),
        "settings": {
            **sampling.model_dump(),
            "format": form,
            "column": column,
            "system": system,
            "dtype": dtype,
            "batch_size": batch_size if sampling.temperature else None,  # sampled rows of a batch share their dice
        },
    }
    try:
        work.mkdir(exist_ok=True)
        with flock(work / "lock", wait=False):
            try:
                resumed = _resume(work, begun)
                questions = read_questions(source, form, column, system)
                if resumed:
                    log.info("%d of %d rows were answered before", resumed, len(questions))
                _try_to_write(work / f"probe{target.suffix}", questions, source)
                loaded = load(model, dtype, device)
                answers = _answer(loaded, questions, sampling, batch_size, work / "answers.jsonl", on_batch)
                if hash_file(source) != begun["input"]:
                    raise BadData("The input changed meanwhile.", where=str(source), next_step="run it again")
                write_answers(target, questions, answers, source)
            finally:
                if target.exists() or not _done(work):  # done, or nothing to go on from
                    shutil.rmtree(work)
    except Held:
        raise BadConfig(
            "Another process is writing this file.", where=str(target), next_step="wait for it, or name another file"
        ) from None
    except OSError as error:
        raise from_os_error(error, str(target.parent)) or error from error
    errors = sum(answer["error"] is not None for answer in answers)
    return {"rows": len(answers), "errors": errors, "resumed": resumed, "out": str(target)}


def _refuse(source: Path, target: Path) -> None:
    if not source.is_file():
        raise BadConfig("There is no such file.", where=str(source), expected="a file of chats")
    if target.suffix.lower() not in OUT_SUFFIXES:
        raise BadConfig(
            "This kind of file is not written.",
            where=str(target),
            expected=", ".join(OUT_SUFFIXES),
            got=target.suffix or "no suffix",
        )
    if not target.parent.is_dir():
        raise BadConfig("There is no such folder.", where=str(target.parent), next_step="make it")
    if target.exists():
        raise BadConfig("The target exists already.", where=str(target), next_step="remove it, or name another file")


def _resume(work: Path, begun: dict[str, Any]) -> int:
    """Return how many rows are done; what is there belongs to the same work, or is refused.

    Raises:
        BadConfig: it was begun with something else.
    """
    file = work / "begun.json"
    if not _done(work) or not file.exists():
        write_json(file, begun)
        return 0
    before = json.loads(file.read_text(encoding="utf-8"))
    if before != begun:
        changed = [name for name in ("input", "model") if before[name] != begun[name]]
        changed += identity.explain(before["settings"], begun["settings"])
        raise BadConfig(
            "This file was begun with something else, and rows of both would be mixed.",
            where=str(work),
            got=f"another {', '.join(changed)}",
            next_step=f"finish it as it was begun, or begin anew: rm -r {work}",
        )
    return _done(work)


def _done(work: Path) -> int:
    """Return how many rows have their answers."""
    file = work / "answers.jsonl"
    return file.read_bytes().count(b"\n") if file.exists() else 0


def _try_to_write(probe: Path, questions: list[Question], source: Path) -> None:
    """Write the rows without answers: what the format cannot hold should show before hours of work, not after."""
    write_answers(probe, questions, [dict.fromkeys(ADDED)] * len(questions), source)
    probe.unlink()


def _answer(
    loaded: Loaded,
    questions: list[Question],
    sampling: Sampling,
    batch_size: int,
    done_file: Path,
    on_batch: OnBatch | None,
) -> list[dict[str, Any]]:
    """Return the added columns of each row."""
    from loraflow.evaluation.generation import answer_all

    prompts, errors = _prompts(loaded, questions, sampling.max_new_tokens)
    asked = [i for i, error in enumerate(errors) if error is None]
    model = _Sampler(loaded.model, sampling) if sampling.temperature else loaded.model
    while True:
        try:
            found = answer_all(
                model,
                loaded.tokenizer,
                [prompts[i] for i in asked],
                stop_ids=loaded.stops,
                max_new_tokens=sampling.max_new_tokens,
                batch_size=batch_size,
                done_file=done_file,
                on_batch=lambda done: on_batch(done, len(asked)) if on_batch else None,
            )
            break
        except RuntimeError as error:
            if type(error).__name__ != "OutOfMemoryError":
                raise
            if batch_size == 1:
                raise OutOfMemory("Memory does not suffice for one row.", next_step="--dtype bfloat16") from error
            batch_size //= 2
            log.warning("out of memory: %d rows at a time from now on", batch_size)
    answers: list[dict[str, Any]] = [
        {"prediction": None, "tokens": None, "finish": None, "error": error} for error in errors
    ]
    for i, one in zip(asked, found, strict=True):
        answers[i] |= {"prediction": one["text"], "tokens": one["tokens"], "finish": one["finish"]}
    return answers


def _prompts(
    loaded: Loaded, questions: list[Question], max_new_tokens: int
) -> tuple[list[list[int]], list[str | None]]:
    """Return each row's prompt, and why it has none: a row that cannot be asked must not end the others."""
    prompts: list[list[int]] = [[] for _ in questions]
    errors = [one.error for one in questions]
    for i, question in enumerate(questions):
        if question.messages is None:
            continue
        tokens = [loaded.control_token_in(message["content"]) for message in question.messages]
        if found := next(filter(None, tokens), None):
            errors[i] = f"the text holds {found}, which the model reads as a control token"
            continue
        try:
            (prompts[i],) = loaded.template.prompt_ids([question.messages])
        except BadModel as refusal:
            errors[i] = f"{refusal.what} {refusal.got}"
            continue
        if loaded.positions is not None and len(prompts[i]) + max_new_tokens > loaded.positions:
            errors[i] = (
                f"{len(prompts[i])} tokens, and {max_new_tokens} for the answer: "
                f"the model reads and writes at most {loaded.positions}"
            )
    return prompts, errors


class _Sampler:
    """A model whose `generate` samples. The dice of a batch follow from seed and prompts: a resumed run throws the same."""

    def __init__(self, model: Any, sampling: Sampling):
        self._model, self._sampling = model, sampling

    def __getattr__(self, name: str) -> Any:
        return getattr(self._model, name)

    def __call__(self, *arguments: Any, **named: Any) -> Any:
        return self._model(*arguments, **named)

    def generate(self, **arguments: Any) -> Any:
        """Sample, whatever is asked for."""
        import torch

        if self._sampling.seed is not None:
            prompts = arguments["input_ids"].cpu().numpy().tobytes()
            dice = hashlib.sha256(self._sampling.seed.to_bytes(16, signed=True) + prompts).digest()
            torch.manual_seed(int.from_bytes(dice[:8]) >> 1)
        return self._model.generate(**{**arguments, **self._sampling.arguments()})
