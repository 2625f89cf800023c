"""Tables of batch prediction: JSONL, CSV, TSV and Parquet, by the file's suffix. Order and columns are kept."""

from __future__ import annotations

import json
import math
import os
import secrets
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import date, time, timedelta
from decimal import Decimal
from pathlib import Path
from typing import TYPE_CHECKING

from pydantic import JsonValue

from loraflow.data.chats import BadRow, Message, Tool, with_system
from loraflow.data.files.readers import read_values
from loraflow.data.formats.chat_formats import to_prompt
from loraflow.failures import BadConfig, BadData
from loraflow.serving.written_calls import WrittenCall, calls_type
from loraflow.store.files import fsync_path

if TYPE_CHECKING:
    import pyarrow as pa

Cell = JsonValue | date | time | timedelta | Decimal | bytes  # a value in a JSON file or a Parquet column


@dataclass(frozen=True)
class Question:
    """A row of the input: its columns, and its prompt or the reason why it has none."""

    columns: dict[str, Cell]
    messages: list[Message] | None
    error: str | None = None


@dataclass(frozen=True)
class Prediction:
    """The columns that are added to a row: an answer, or the reason why there is none."""

    prediction: str | None = None
    tokens: int | None = None
    finish: str | None = None  # stop or length
    error: str | None = None
    tool_calls: list[WrittenCall] | None = None  # the calls in the answer; a column only if a row has tools


NO_ANSWER = Prediction()
ADDED = ("prediction", "tokens", "finish", "error")
OUT_SUFFIXES = (".jsonl", ".ndjson", ".csv", ".tsv", ".parquet")


def read_questions(
    path: Path, format_name: str, column: str | None, system: str | None, tools: list[Tool] | None = None
) -> list[Question]:
    """Read a file's rows.

    Args:
        format_name: messages, sharegpt, alpaca, prompt_completion or auto.
        column: the column that holds the question, instead of a chat format.

    Raises:
        BadData: the file cannot be read, has no rows, or none of them is a question.
        BadConfig: it lacks `column`, or has a column with the name of one that is added.
    """
    questions: list[Question] = []
    for location, value, raw in read_values(path, path.name):
        if isinstance(value, BadRow):
            questions.append(Question({"row": raw}, None, f"{location}: {value}"))
            continue
        columns: dict[str, Cell] = dict(value) if isinstance(value, dict) else {"row": raw}
        try:
            row = {"prompt": value.get(column)} if column and isinstance(value, dict) else value
            messages = to_prompt(row, "prompt_completion" if column else format_name, tools)
        except BadRow as problem:
            questions.append(Question(columns, None, f"{location}: {problem}"))
            continue
        if system and messages[0]["role"] != "system":
            messages = with_system(messages, system)
        questions.append(Question(columns, messages))
    if not questions:
        raise BadData("The file has no rows.", where=str(path), next_step="name a file with at least one row")
    names = _names(questions)
    _check_columns(names, added_columns(questions), column, path)
    if all(question.messages is None for question in questions):
        first = questions[0].error or ""
        raise BadData(
            "No row of the input is a question for the model.",
            where=str(path),
            expected="chats, or rows with a question in the column that --column names",
            got=f"{first}; the columns are {', '.join(names[:10])}{', …' if len(names) > 10 else ''}",
            next_step="correct the rows" if column else "--column NAME names the column with the question",
        )
    return questions


def added_columns(questions: Sequence[Question]) -> tuple[str, ...]:
    """Return the columns that are added: `tool_calls` only if a row has tools."""
    has_tools = any(question.messages is not None and "tools" in question.messages[0] for question in questions)
    return (*ADDED, "tool_calls") if has_tools else ADDED


def _check_columns(names: list[str], added: Sequence[str], column: str | None, path: Path) -> None:
    if column and column not in names:
        raise BadConfig(
            "The input has no such column.",
            where=column,
            expected=f"one of {', '.join(names)}",
            next_step="correct --column",
        )
    taken = sorted(set(names) & set(added))
    if taken:
        raise BadConfig(
            "The input has columns with the names of the added columns.",
            where=str(path),
            got=", ".join(taken),
            next_step="rename them",
        )


def write_answers(path: Path, questions: Sequence[Question], answers: Sequence[Prediction], source: Path) -> None:
    """Write rows with their predictions to a temporary file, flush it, and rename it to `path`.

    Raises:
        BadData: a column has no type that the file format can hold.
    """
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(4)}")
    try:
        suffix = path.suffix.lower()
        if suffix == ".parquet":
            _write_parquet(temporary, questions, answers, source)
        elif suffix in (".csv", ".tsv"):
            _write_csv(temporary, questions, answers, "\t" if suffix == ".tsv" else ",")
        else:
            _write_jsonl(temporary, questions, answers)
        fsync_path(temporary)
        os.replace(temporary, path)
        fsync_path(path.parent)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


def _names(questions: Sequence[Question]) -> list[str]:
    return list(dict.fromkeys(name for question in questions for name in question.columns))


def _write_jsonl(path: Path, questions: Sequence[Question], answers: Sequence[Prediction]) -> None:
    added = added_columns(questions)
    with path.open("w", encoding="utf-8") as file:
        for question, answer in zip(questions, answers, strict=True):
            row = {**question.columns, **{name: getattr(answer, name) for name in added}}
            file.write(json.dumps(row, ensure_ascii=False, default=str) + "\n")


def _write_csv(path: Path, questions: Sequence[Question], answers: Sequence[Prediction], separator: str) -> None:
    import csv

    names, added = _names(questions), added_columns(questions)
    with path.open("w", encoding="utf-8", newline="") as file:
        table = csv.writer(file, delimiter=separator, lineterminator="\n")
        table.writerow([*names, *added])
        for question, answer in zip(questions, answers, strict=True):
            cells = [*(question.columns.get(name) for name in names), *(getattr(answer, name) for name in added)]
            table.writerow([_csv_cell(value) for value in cells])


def _csv_cell(value: Cell) -> Cell:
    if value is None or (isinstance(value, float) and math.isnan(value)):
        return ""
    return json.dumps(value, ensure_ascii=False, default=str) if isinstance(value, list | dict | bool) else value


def _write_parquet(path: Path, questions: Sequence[Question], answers: Sequence[Prediction], source: Path) -> None:
    import pyarrow as pa
    import pyarrow.parquet as pq

    if source.suffix.lower() == ".parquet":
        table = pq.read_table(source)  # keeps the columns' own types
    else:
        table = pa.table({name: _column(name, questions) for name in _names(questions)})
    kinds = {"tokens": pa.int64(), "tool_calls": calls_type()}
    for name in added_columns(questions):
        kind = kinds.get(name, pa.string())
        table = table.append_column(name, pa.array([getattr(answer, name) for answer in answers], kind))
    pq.write_table(table, path)


def _column(name: str, questions: Sequence[Question]) -> pa.Array:
    """Return a column's values in a type that Parquet has."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    values = [question.columns.get(name) for question in questions]
    try:
        column = pa.array(values)
        pq.write_table(pa.table({name: column.slice(0, 0)}), pa.BufferOutputStream())  # refuses what it has no type for
    except (pa.ArrowException, OverflowError, ValueError, TypeError, RecursionError) as error:
        raise BadData(
            "A column holds values of different types, or values that Parquet cannot store.",
            where=name,
            got=str(error).splitlines()[0][:200],
            next_step="write .jsonl or .csv",
        ) from error
    return column
