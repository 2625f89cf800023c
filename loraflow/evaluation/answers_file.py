"""Finished answers of an unfinished job: a file with a line for each, from which a retry resumes.

Each line has a checksum over the answer and its owner. A line that was cut off or damaged, or that another model, input or
setting wrote, is left out: its row is answered again.
"""

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import BinaryIO, Literal

from pydantic import ConfigDict, TypeAdapter, with_config
from typing_extensions import TypedDict  # before Python 3.12, pydantic refuses that of typing

from loraflow.store.checksum import checksum


class GeneratedAnswer(TypedDict):
    """A model's answer to a prompt."""

    text: str
    tokens: int
    finish: Literal["stop", "length"]


@with_config(ConfigDict(extra="forbid", strict=True))
class _Line(GeneratedAnswer):
    index: int
    checksum: str


_LINE = TypeAdapter(_Line)


def append_answers(file: Path, owner: str, answers: Mapping[int, GeneratedAnswer]) -> None:
    """Append answers by the number of their prompt.

    Args:
        owner: identity of the job: model, prompts and settings.
    """
    lines = [
        json.dumps({"index": i, **answer, "checksum": _checksum(owner, i, answer)}, ensure_ascii=False) + "\n"
        for i, answer in answers.items()
    ]
    with file.open("a+b") as opened:
        if opened.tell() and not _ends_with_newline(opened):  # a killed attempt cut off its last line
            lines.insert(0, "\n")
        opened.write("".join(lines).encode())


def read_answers(file: Path, owner: str, rows: int | None = None) -> dict[int, GeneratedAnswer]:
    """Return the finished answers of a job by the number of their prompt.

    Args:
        file: the main process's file. The files of other processes, also those of earlier attempts, are beside it.
        rows: how many prompts there are; None if that is not known.
    """
    found: dict[int, GeneratedAnswer] = {}
    for part in (file, *sorted(file.parent.glob(f"{file.stem}-*{file.suffix}"))):
        for line in _read(part).split(b"\n"):
            try:
                row = _LINE.validate_json(line)
            except ValueError:  # a ValidationError: the line at which an earlier attempt was killed, or damage
                continue
            answer: GeneratedAnswer = {"text": row["text"], "tokens": row["tokens"], "finish": row["finish"]}
            is_inside = row["index"] >= 0 and (rows is None or row["index"] < rows)
            if is_inside and row["checksum"] == _checksum(owner, row["index"], answer):
                found[row["index"]] = answer
    return found


def _ends_with_newline(opened: BinaryIO) -> bool:
    opened.seek(-1, os.SEEK_END)
    return opened.read(1) == b"\n"


def _read(file: Path) -> bytes:
    return file.read_bytes() if file.exists() else b""


def _checksum(owner: str, index: int, answer: GeneratedAnswer) -> str:
    return checksum(f"{owner} {index}", json.dumps(answer, sort_keys=True).encode())
