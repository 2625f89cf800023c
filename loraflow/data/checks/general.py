"""Stage check_general: read the rows that show whether a model keeps its general ability (evaluation.general).

A row is a chat, whose last answer's loss is measured, or a multiple-choice question:

    {"messages": [{"role": "user", "content": "Is tea a herb?"}, {"role": "assistant", "content": "No, a shrub."}]}
    {"question": "What is tea made of?", "choices": ["leaves", "stones"], "answer": 0}
    {"prompt": "Question: What is tea made of?\\nAnswer:", "choices": ["leaves", "stones"], "answer": "leaves"}

These rows are few and chosen by hand, so none is left out: a bad row stops the run.
"""

import hashlib
import json
import shutil
from collections import Counter
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import NamedTuple

from pydantic import JsonValue

from loraflow.config.data import Data
from loraflow.config.locations import DatasetLocation, DvcOrigin, FolderOrigin
from loraflow.config.stage_configs import CheckGeneralConfig
from loraflow.data.chats import GENERAL_FILE, BadRow, GeneralRow
from loraflow.data.checks.split import chat_key, normalize, normalized_key, row_id, to_json
from loraflow.data.files.readers import READABLE, match_nothing, read_values, readable_files
from loraflow.data.formats.chat_formats import read_chat
from loraflow.data.versions.version import fetch_dataset, locate_dataset
from loraflow.failures import BadConfig, BadData
from loraflow.job import Inputs, Job, Progress
from loraflow.store import Summary
from loraflow.store.files import HashMemo

SHOWN = 5  # problems in a failure
KINDS = {"loss": "chats", "accuracy": "choices", "accuracy_norm": "choices"}  # what a score of gate.forgetting needs


class Problem(NamedTuple):
    """A row that cannot be used."""

    place: str  # file:line, or file:row
    why: str


def locate_general(source: str, memo: HashMemo) -> DatasetLocation:
    """Return the file that evaluation.general names: its md5, and where to read it.

    Raises:
        BadData: the file does not exist, or its `.dvc` file cannot be read.
        DirtyData: the file in the work tree differs from the pin.
    """
    if not Path(source).exists():
        raise BadData(
            "The file with general rows does not exist.",
            where=f"evaluation.general: {source}",
            expected="a file of chats and questions, or its .dvc file",
            next_step="correct evaluation.general",
        )
    return locate_dataset(Data(source=source), memo, key="evaluation.general")


def run(job: Job[CheckGeneralConfig], inputs: Inputs, out: Path, progress: Progress) -> Summary:
    """Write general.jsonl.

    Raises:
        BadData: no file is of a type that is read; a row is neither a chat nor a question, is there twice, or is a
            training row; or there are no rows.
        MissingData: neither DVC's cache nor a remote has the file.
    """
    origin, files = job.runtime.origin, out / "files"
    if not isinstance(origin, FolderOrigin | DvcOrigin):
        raise TypeError(f"not the origin of general rows: {origin!r}")
    files.mkdir()
    fetch_dataset(origin, job.config.md5 or "", files, HashMemo(None))
    names = readable_files(files) or match_nothing(files)[:1]  # one of another type is refused when it is read
    rows, problems = _read(files, names)
    problems += _repeated(rows)
    problems += _trained_on(rows, inputs["rows"])
    shutil.rmtree(files)  # general.jsonl has the rows
    if problems:
        raise BadData(
            f"{len(problems)} row{'s' * (len(problems) > 1)} of the general set cannot be used.",
            where=problems[0].place,
            expected='chats, or {"question": …, "choices": [...], "answer": POSITION}; no duplicates, no training rows',
            got="".join(f"\n            {place}: {why}" for place, why in problems[:SHOWN]),
            next_step="correct or remove " + ("these rows" if len(problems) > 1 else "this row"),
        )
    if not rows:
        source = origin.folder if isinstance(origin, FolderOrigin) else origin.dvc_file
        raise BadData(
            "The general set has no rows.",
            where=f"evaluation.general: {source}",
            expected=f"chats and questions, in a file that is not hidden, of a type among {', '.join(READABLE)}",
            got=f"no row in {', '.join(names[:SHOWN])}" if names else "no such file",
            next_step="add rows, or remove evaluation.general",
        )
    text = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
    (out / GENERAL_FILE).write_text(text, encoding="utf-8")
    counts = {"chats": sum(row["kind"] == "chat" for row in rows)}
    counts["choices"] = len(rows) - counts["chats"]
    return Summary(figures=dict(counts), facets={"general": [GENERAL_FILE]})


def group_sizes(lines: bytes, score: str) -> list[int]:
    """Return the rows of each prompt in a general.jsonl that a score of gate.forgetting needs: they are not independent."""
    rows = [row for row in map(json.loads, lines.splitlines()) if (row["kind"] == "chat") == (KINDS[score] == "chats")]
    return [*Counter(row.get("context") or to_json(row["messages"][:-1]) for row in rows).values()]


def check_limits(lines: bytes, wanted: Mapping[str, float], minimum: int) -> None:
    """Stop the run before it trains, if the general set cannot confirm what gate.forgetting asks for.

    Args:
        lines: the content of general.jsonl.
        minimum: independent rows that the gate needs to decide anything.

    Raises:
        BadConfig: there are too few rows of the kind that a score needs.
    """
    for score in wanted:
        found = len(group_sizes(lines, score))
        if found < minimum:
            kind = "chats" if KINDS[score] == "chats" else "multiple-choice questions"
            raise BadConfig(
                f"The general set has too few {kind} for gate.forgetting, so no model could be promoted.",
                where=f"gate.forgetting: {score}",
                expected=f"at least {minimum} {kind} with different prompts in the file of evaluation.general",
                got=str(found),
                next_step=f"add {kind}, or remove {score} from gate.forgetting",
            )


def _read(folder: Path, names: list[str]) -> tuple[list[GeneralRow], list[Problem]]:
    rows: list[GeneralRow] = []
    problems: list[Problem] = []
    for name in names:
        for place, value, _ in read_values(folder / name, name):
            try:
                if isinstance(value, BadRow):
                    raise value
                rows.append(_general_row(value, place))
            except BadRow as problem:
                problems.append(Problem(place, str(problem)))
    return rows, problems


def _general_row(value: JsonValue, place: str) -> GeneralRow:
    if not isinstance(value, dict):
        raise BadRow(f"expected an object, got {type(value).__name__}")
    if "choices" in value or "question" in value:
        return _question(value, place)
    messages = read_chat(value).messages
    return {"id": row_id(messages), "kind": "chat", "place": place, "messages": messages}


def _question(value: Mapping[str, JsonValue], place: str) -> GeneralRow:
    choices = value.get("choices")
    if not isinstance(choices, list) or len(choices) < 2:
        raise BadRow("choices: expected a list of at least two texts")
    texts = [choice for choice in choices if isinstance(choice, str) and choice.strip()]
    if len(texts) < len(choices):
        raise BadRow("choices: expected texts that are not empty")
    if len(set(map(normalize, texts))) < len(texts):
        raise BadRow("choices: two of them are the same text")
    answer = value.get("answer")
    if isinstance(answer, str) and answer in texts:
        answer = texts.index(answer)
    if isinstance(answer, bool) or not isinstance(answer, int) or not 0 <= answer < len(texts):
        raise BadRow(
            f"answer: expected a position from 0 to {len(texts) - 1}, or the text of a choice, got {json.dumps(answer)}"
        )
    asked = [key for key in ("question", "prompt") if value.get(key) is not None]
    text = value.get(asked[0]) if len(asked) == 1 else None
    if not isinstance(text, str) or not text.strip():
        raise BadRow("expected either a question or a prompt, a text that is not empty")
    context = f"Question: {text}\nAnswer:" if asked == ["question"] else text
    name = hashlib.sha256(json.dumps([context, texts], ensure_ascii=False).encode()).hexdigest()[:16]
    return {"id": name, "kind": "choice", "place": place, "context": context, "choices": texts, "answer": answer}


def _repeated(rows: list[GeneralRow]) -> Iterator[Problem]:
    first: dict[tuple[object, ...], str] = {}
    for row in rows:
        if "messages" in row:
            key: tuple[object, ...] = ("chat", normalized_key(row["messages"]))
        else:
            key = ("choice", normalize(row["context"]), *sorted(map(normalize, row["choices"])))
        if key in first:
            yield Problem(row["place"], f"the same row as {first[key]}")
        first.setdefault(key, row["place"])


def _trained_on(rows: list[GeneralRow], checked: Path) -> Iterator[Problem]:
    """Yield the rows whose prompt is a prompt of a training or validation row: their scores would measure memory."""
    prompts: dict[str, str] = {}
    questions: dict[str, str] = {}
    for name in ("train.jsonl", "validation.jsonl"):
        with (checked / name).open(encoding="utf-8", newline="\n") as lines:
            for row in map(json.loads, lines):
                place = row.get("place", name)
                prompts.setdefault(chat_key(row["messages"]), place)
                for message in row["messages"]:
                    if message["role"] == "user" and isinstance(message["content"], str):
                        questions.setdefault(normalize(message["content"]), place)
    for row in rows:
        if "messages" in row:
            place = prompts.get(chat_key(row["messages"]))
        else:
            bare = row["context"].removeprefix("Question: ").removesuffix("\nAnswer:")
            place = questions.get(normalize(bare)) or questions.get(normalize(row["context"]))
        if place is not None:
            yield Problem(row["place"], f"its prompt is that of the training row {place}")
