"""Batch prediction: a file of chats in, the same rows with the model's answers out.

The finished answers are in `OUT.partial/` until the file is complete. A run that was killed resumes from them, provided
that input, model and settings are unchanged. OUT is written once all rows are answered.
"""

from __future__ import annotations

import hashlib
import logging
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias, TypedDict

from pydantic import BaseModel, ConfigDict, JsonValue

from loraflow import identity
from loraflow.data.files.readers import readable_files
from loraflow.data.formats.call_parser import parse_calls
from loraflow.data.formats.tools import dataset_tools
from loraflow.data.templates.rendered_calls import call_text, tools_text
from loraflow.evaluation.answers_file import read_answers
from loraflow.failures import BadConfig, BadData, BadModel, OutOfMemory, from_os_error
from loraflow.serving.chat import Sampling
from loraflow.serving.models import Loaded, Model, load
from loraflow.serving.tables import (
    NO_ANSWER,
    OUT_SUFFIXES,
    Prediction,
    Question,
    added_columns,
    read_questions,
    write_answers,
)
from loraflow.serving.written_calls import reads_calls_of, written_calls
from loraflow.store.checksum import check_document, with_checksum
from loraflow.store.files import HashMemo, hash_file, write_atomic
from loraflow.store.lock import LockHeld, flock

if TYPE_CHECKING:
    import torch
    from peft import PeftModelForCausalLM
    from transformers import Cache, PreTrainedModel
    from transformers.utils.generic import ModelOutput

    GenerateArgument: TypeAlias = torch.Tensor | Cache | list[int] | float | bool | None

log = logging.getLogger("loraflow")
ANSWERS = "answers.jsonl"  # finished answers, in the folder of the unfinished output
OnBatch = Callable[[int, int], None]  # rows done, rows in all


class PredictionReport(TypedDict):
    """The outcome of a batch prediction."""

    rows: int
    errors: int  # rows without an answer; their column `error` says why
    resumed: int  # rows that an earlier attempt answered
    out: str


class _RequestIdentity(BaseModel):
    """What a prediction was asked for: `begun.json`. Unfinished answers are resumed only if it is unchanged."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    input: str  # sha256
    model: str  # digest
    settings: dict[str, JsonValue]

    @property
    def owner(self) -> str:
        """The owner of the finished answers."""
        return identity.fingerprint(self.model_dump())


class PredictOptions(BaseModel):
    """How the rows of a file are read and answered.

    Attributes:
        format_name: the chat format of the rows; auto looks at their keys.
        column: the column that holds the question, instead of a chat format.
        system: a message to put before chats that have none.
        dtype: float32, as in evaluation, makes answers independent of the batch.
        batch_size: rows in memory at a time; halved when a GPU runs out of memory.
        tools: the tools of rows that have none of their own, as in `data.tools`.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    sampling: Sampling
    format_name: str = "auto"
    column: str | None = None
    system: str | None = None
    dtype: str = "float32"
    device: str = "auto"
    batch_size: int = 16
    tools: list[JsonValue] | None = None

    @property
    def recorded(self) -> dict[str, JsonValue]:
        """The options that decide the answers. Unfinished answers are only resumed with the same."""
        return {
            **self.sampling.model_dump(),
            "format": self.format_name,
            "column": self.column,
            "system": self.system,
            "dtype": self.dtype,
            # Sampled rows of a batch share random numbers.
            "batch_size": self.batch_size if self.sampling.temperature else None,
        } | ({"tools": self.tools} if self.tools is not None else {})


def predict(
    model: Model,
    source: Path,
    target: Path,
    options: PredictOptions,
    *,
    memo: HashMemo | None = None,
    on_batch: OnBatch | None = None,
) -> PredictionReport:
    """Answer the rows of a file and write them, in their order, to another file.

    Args:
        source: JSONL, JSON, CSV, TSV or Parquet.
        target: JSONL, CSV, TSV or Parquet; it must not exist.

    Raises:
        BadConfig: the target exists, or unfinished answers belong to another input, model or setting.
        BadData: the input cannot be read, or changed during the work.
        OutOfMemory: a single row does not fit into the device's memory.
    """
    _check_paths(source, target)
    work = target.with_name(target.name + ".partial")
    request = _RequestIdentity(
        input=hash_file(source), model=model.digest(memo or HashMemo(None)), settings=options.recorded
    )
    with _unfinished(work, target):
        _require_new(target)  # another process may have written it while this one hashed the model
        resumed = _resume(work, request)
        tools = dataset_tools(options.tools, "tools")
        questions = read_questions(source, options.format_name, options.column, options.system, tools)
        if resumed:
            log.info("resuming: %d of %d rows are answered", resumed, len(questions))
        _try_to_write(work / f"probe{target.suffix}", questions, source)
        loaded = load(model, options.dtype, options.device)
        answers = _answer(loaded, questions, options, work / ANSWERS, request.owner, on_batch)
        if hash_file(source) != request.input:
            raise BadData(
                "The input changed during the prediction.", where=str(source), next_step="run the command again"
            )
        write_answers(target, questions, answers, source)
    errors = sum(answer.error is not None for answer in answers)
    return {"rows": len(answers), "errors": errors, "resumed": resumed, "out": str(target)}


def _check_paths(source: Path, target: Path) -> None:
    if source.is_dir():
        names = readable_files(source)
        more = f" and {len(names) - 10} more" if len(names) > 10 else ""
        raise BadConfig(
            "The input is a folder.",
            where=str(source),
            expected="one file of chats",
            got=", ".join(names[:10]) + more or "no file of chats in it",
            next_step=f"predict each file by itself, such as {source / names[0]}" if names else "name a file",
        )
    if not source.is_file():
        raise BadConfig(
            "There is no such file.", where=str(source), expected="one file of chats", next_step="correct the path"
        )
    if target.suffix.lower() not in OUT_SUFFIXES:
        raise BadConfig(
            "This file format is not supported for output.",
            where=str(target),
            expected=", ".join(OUT_SUFFIXES),
            got=target.suffix or "no suffix",
            next_step="give the output one of these suffixes",
        )
    if not target.parent.is_dir():
        raise BadConfig("There is no such folder.", where=str(target.parent), next_step="create the folder")
    _require_new(target)


def _require_new(target: Path) -> None:
    if target.exists():
        raise BadConfig(
            "The output file already exists.", where=str(target), next_step="remove it, or name another file"
        )


@contextmanager
def _unfinished(work: Path, target: Path) -> Iterator[None]:
    """Lock the folder of unfinished answers. Remove it at the end, unless it has answers to resume from."""
    try:
        work.mkdir(exist_ok=True)
        with flock(work / "lock", wait=False):
            try:
                yield
            finally:
                if target.exists() or not _has_answers(work):
                    shutil.rmtree(work, ignore_errors=True)  # another process may wait for its lock
    except LockHeld:
        raise BadConfig(
            "Another process is writing this file.", where=str(target), next_step="wait for it, or name another file"
        ) from None
    except OSError as error:
        raise from_os_error(error, str(target.parent)) or error from error


def _resume(work: Path, request: _RequestIdentity) -> int:
    """Return the number of rows that an earlier attempt at the same work answered."""
    file = work / "begun.json"
    if not _has_answers(work) or not file.exists():
        write_atomic(file, with_checksum(file.name, request.model_dump()))
    before = _read_request(file)
    if before != request:
        changed = ["input"] if before.input != request.input else []
        changed += ["model"] if before.model != request.model else []
        changed += identity.explain(before.settings, request.settings)
        raise BadConfig(
            "The unfinished output has answers for another input, model or setting, so it cannot be resumed.",
            where=str(work),
            got=f"changed: {', '.join(changed)}",
            next_step=f"repeat the earlier command to finish it, or start over: rm -r {work}",
        )
    return len(read_answers(work / ANSWERS, request.owner))


def _read_request(file: Path) -> _RequestIdentity:
    try:
        return _RequestIdentity.model_validate_json(check_document(file.name, file.read_bytes()))
    except ValueError as error:  # ValidationError is a subclass
        raise BadConfig(
            "The settings of the unfinished output are unknown.",
            where=str(file),
            got=str(error).splitlines()[0],
            next_step=f"start over: rm -r {file.parent}",
        ) from error


def _has_answers(work: Path) -> bool:
    file = work / ANSWERS
    return file.exists() and b"\n" in file.read_bytes()


def _try_to_write(probe: Path, questions: list[Question], source: Path) -> None:
    """Write the rows without answers, so that values that the format cannot store are found before the work."""
    write_answers(probe, questions, [NO_ANSWER] * len(questions), source)
    probe.unlink()


def _answer(
    loaded: Loaded,
    questions: list[Question],
    options: PredictOptions,
    done_file: Path,
    owner: str,
    on_batch: OnBatch | None,
) -> list[Prediction]:
    """Answer the rows that have a prompt; the other rows get the reason as their error."""
    from loraflow.evaluation.generation import generate_answers

    sampling, batch_size = options.sampling, options.batch_size
    prompts, errors = _prompts(loaded, questions, sampling.max_new_tokens)
    asked = [i for i, error in enumerate(errors) if error is None]
    model = _Sampler(loaded.model, sampling) if sampling.temperature else loaded.model
    while True:
        try:
            found = generate_answers(
                model,  # type: ignore[arg-type]  # a sampler, which has the model's interface
                loaded.tokenizer,
                [prompts[i] for i in asked],
                stop_ids=loaded.stops,
                inserted=loaded.template.inserted_text(),
                max_new_tokens=sampling.max_new_tokens,
                batch_size=batch_size,
                done_file=done_file,
                owner=owner,
                on_batch=lambda done: on_batch(done, len(asked)) if on_batch else None,
            )
            break
        except RuntimeError as error:
            if type(error).__name__ != "OutOfMemoryError":
                raise
            if batch_size == 1:
                raise OutOfMemory("A single row does not fit into memory.", next_step="--dtype bfloat16") from error
            batch_size //= 2
            log.warning("out of memory: continuing with %d rows at a time", batch_size)
    answers = [Prediction(error=error) for error in errors]
    for i, answer in zip(asked, found, strict=True):
        answers[i] = Prediction(answer["text"], answer["tokens"], answer["finish"])
    return _with_calls(answers, questions, loaded)


def _with_calls(answers: list[Prediction], questions: list[Question], loaded: Loaded) -> list[Prediction]:
    if "tool_calls" not in added_columns(questions):
        return answers
    if not reads_calls_of(loaded.template):
        log.warning("tool_calls is empty: this chat template's format of calls is unknown; prediction has their text")
        return answers
    out, unreadable = list[Prediction](), 0
    for answer, question in zip(answers, questions, strict=True):
        chat, text = question.messages, answer.prediction
        if chat is not None and text is not None and "tools" in chat[0]:
            unreadable += parse_calls(text) is None
            answer = replace(answer, tool_calls=written_calls(text, chat))
        out.append(answer)
    if unreadable:
        log.warning("%d answers begin a tool call that cannot be read; their tool_calls is empty", unreadable)
    return out


def _prompts(
    loaded: Loaded, questions: list[Question], max_new_tokens: int
) -> tuple[list[list[int]], list[str | None]]:
    """Return each row's prompt ids, or why it has none: one malformed row must not stop the others."""
    prompts: list[list[int]] = [[] for _ in questions]
    errors = [question.error for question in questions]
    for i, question in enumerate(questions):
        if question.messages is None:
            continue
        tokens = [
            loaded.control_token_in(message["content"] + call_text(message) + tools_text(message))
            for message in question.messages
        ]
        if found := next(filter(None, tokens), None):
            errors[i] = f"the text contains {found}, which the model reads as a control token"
            continue
        try:
            (prompts[i],) = loaded.template.prompt_ids([question.messages])
        except BadModel as refusal:
            errors[i] = f"{refusal.what} {refusal.got}"
            continue
        if loaded.positions is not None and len(prompts[i]) + max_new_tokens > loaded.positions:
            errors[i] = (
                f"{len(prompts[i])} tokens, plus {max_new_tokens} for the answer: "
                f"the model reads and writes at most {loaded.positions}"
            )
    return prompts, errors


class _Sampler:
    """A stand-in for a model whose `generate` samples.

    `generate_answers` asks a model for greedy answers. This class overrides only `generate` and `forward`. The random
    numbers of a batch are seeded by the seed and the batch's prompts: a resumed run draws the same ones.
    """

    def __init__(self, model: PreTrainedModel | PeftModelForCausalLM, sampling: Sampling):
        self._model, self._sampling = model, sampling

    def __getattr__(self, name: str) -> Any:
        return getattr(self._model, name)

    def get_base_model(self) -> PreTrainedModel:
        """Return transformers' model, without peft's wrapper."""
        from loraflow.evaluation.prefix_cache import innermost

        return innermost(self._model)

    def forward(self, **inputs: torch.Tensor) -> ModelOutput:
        """Run the model. Without `logits_to_keep` in the signature, evaluation does not use its own greedy decoding."""
        output: ModelOutput = self._model(**inputs)
        return output

    def generate(self, *, input_ids: torch.Tensor, **arguments: GenerateArgument) -> torch.Tensor:
        """Return sampled continuations [rows, tokens], even if the arguments ask for greedy ones."""
        import torch

        if self._sampling.seed is not None:
            prompts = input_ids.cpu().numpy().tobytes()
            seed = hashlib.sha256(self._sampling.seed.to_bytes(16, signed=True) + prompts).digest()
            torch.manual_seed(int.from_bytes(seed[:8]) >> 1)
        options = {**arguments, **self._sampling.arguments()}
        ids: torch.Tensor = self._model.generate(input_ids=input_ids, **options)  # type: ignore[operator]  # see chat
        return ids
