"""Rows in, rows and their predictions out: JSONL, CSV, TSV and Parquet, by the file's suffix; order and columns are kept."""

from __future__ import annotations

import json
import math
import os
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from loraflow.data.chat_formats import BadRow, to_prompt
from loraflow.data.chats import Message
from loraflow.data.readers import read_values
from loraflow.failures import BadConfig, BadData
from loraflow.store.files import fsync_path

ADDED = ("prediction", "tokens", "finish", "error")
OUT_SUFFIXES = (".jsonl", ".ndjson", ".csv", ".tsv", ".parquet")


@dataclass(frozen=True)
class Question:
    """A row of the input: its columns, and its prompt or the reason why there is none."""

    columns: dict[str, Any]
    messages: list[Message] | None
    error: str | None = None


def read_questions(path: Path, form: str, column: str | None, system: str | None) -> list[Question]:
    """Read a file's rows.

    Args:
        path: the file.
        form: messages, sharegpt, alpaca, prompt_completion or auto.
        column: the column that holds the question, in place of a form.
        system: a message put before chats that have none.

    Raises:
        BadData: it cannot be read, or has no rows.
        BadConfig: it has a column of the name of one that is added.
    """
    found: list[Question] = []
    for place, value, raw in read_values(path, path.name):
        if isinstance(value, BadRow):
            found.append(Question({"row": raw}, None, f"{place}: {value}"))
            continue
        columns = dict(value) if isinstance(value, dict) else {"row": raw}
        try:
            asked = {"prompt": value.get(column)} if column and isinstance(value, dict) else value
            messages = to_prompt(asked, "prompt_completion" if column else form)
        except BadRow as problem:
            found.append(Question(columns, None, f"{place}: {problem}"))
            continue
        if system and messages[0]["role"] != "system":
            messages.insert(0, {"role": "system", "content": system})
        found.append(Question(columns, messages))
    if not found:
        raise BadData("The file has no rows.", where=str(path))
    names = list(dict.fromkeys(name for one in found for name in one.columns))
    if column and column not in names:
        raise BadConfig("The input has no such column.", where=column, expected=f"one of {', '.join(names)}")
    taken = sorted(set(names) & set(ADDED))
    if taken:
        raise BadConfig(
            "The input has columns of the names that are added.",
            where=str(path),
            got=", ".join(taken),
            next_step="rename them",
        )
    return found


def write_answers(path: Path, questions: Sequence[Question], answers: Sequence[dict[str, Any]], source: Path) -> None:
    """Write rows with their predictions: aside, flushed, and renamed.

    Raises:
        BadData: a column has no type that the kind of file can hold.
    """
    fd, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    os.close(fd)
    aside = Path(name)
    try:
        kind = path.suffix.lower()
        if kind == ".parquet":
            _parquet(aside, questions, answers, source)
        elif kind in (".csv", ".tsv"):
            _csv(aside, questions, answers, "\t" if kind == ".tsv" else ",")
        else:
            with aside.open("w", encoding="utf-8") as file:
                for question, answer in zip(questions, answers, strict=True):
                    row = {**question.columns, **answer}
                    file.write(json.dumps(row, ensure_ascii=False, default=str) + "\n")
        os.chmod(aside, 0o666 & ~_umask())
        fsync_path(aside)
        os.replace(aside, path)
        fsync_path(path.parent)
    except BaseException:
        aside.unlink(missing_ok=True)
        raise


def _names(questions: Sequence[Question]) -> list[str]:
    return list(dict.fromkeys(name for one in questions for name in one.columns))


def _csv(path: Path, questions: Sequence[Question], answers: Sequence[dict[str, Any]], separator: str) -> None:
    import csv

    names = _names(questions)
    with path.open("w", encoding="utf-8", newline="") as file:
        table = csv.writer(file, delimiter=separator, lineterminator="\n")
        table.writerow([*names, *ADDED])
        for question, answer in zip(questions, answers, strict=True):
            cells = [question.columns.get(name) for name in names] + [answer[name] for name in ADDED]
            table.writerow([_cell(value) for value in cells])


def _cell(value: Any) -> Any:
    if value is None or (isinstance(value, float) and math.isnan(value)):
        return ""
    return json.dumps(value, ensure_ascii=False, default=str) if isinstance(value, list | dict | bool) else value


def _parquet(path: Path, questions: Sequence[Question], answers: Sequence[dict[str, Any]], source: Path) -> None:
    import pyarrow as pa
    import pyarrow.parquet as pq

    if source.suffix.lower() == ".parquet":
        table = pq.read_table(source)  # with its own types
    else:
        columns = {}
        for name in _names(questions):
            values = [one.columns.get(name) for one in questions]
            try:
                columns[name] = pa.array(values)
            except (pa.ArrowInvalid, pa.ArrowTypeError) as error:
                raise BadData(
                    "A column holds values of different types, and Parquet does not.",
                    where=name,
                    got=str(error).splitlines()[0][:200],
                    next_step="write .jsonl or .csv",
                ) from error
        table = pa.table(columns)
    for name, kind in zip(ADDED, (pa.string(), pa.int64(), pa.string(), pa.string()), strict=True):
        table = table.append_column(name, pa.array([answer[name] for answer in answers], kind))
    pq.write_table(table, path)


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask
