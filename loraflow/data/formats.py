"""From people's files to chats: JSONL, JSON, CSV and Parquet; messages, ShareGPT, Alpaca, prompt/completion.

A row comes out as `{"messages": [{"role", "content"}, …]}` or as the reason why it does not, with its place.
"""

from __future__ import annotations

import csv
import itertools
import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any

from loraflow.failures import BadData

MAX_ROW_BYTES = 50_000_000
ROLES = ("system", "user", "assistant", "tool")
_SHAREGPT_ROLES = {
    "human": "user",
    "user": "user",
    "gpt": "assistant",
    "assistant": "assistant",
    "chatgpt": "assistant",
    "bard": "assistant",
    "model": "assistant",
    "bing": "assistant",
    "system": "system",
    "tool": "tool",
    "observation": "tool",
    "function": "tool",
}
_PAIRS = (("question", "answer"), ("question", "response"), ("query", "response"), ("query", "answer"), ("input", "output"),
          ("prompt", "answer"), ("prompt", "output"), ("problem", "solution"), ("user", "assistant"))  # fmt: skip
_SUFFIXES = {".jsonl", ".ndjson", ".json", ".csv", ".tsv", ".parquet"}


class BadRow(Exception):
    """A row that is no chat. The message says what was expected."""


@dataclass(frozen=True)
class Row:
    """A row as read: its place in the files, and its chat or the reason why there is none."""

    place: str  # file:line, or file:row
    messages: list[dict[str, str]] | None
    problem: str | None = None
    raw: str = ""


def read_rows(
    folder: Path, names: list[str], form: str, columns: Mapping[str, str] = MappingProxyType({})
) -> Iterator[Row]:
    """Read files below a folder, row by row; malformed rows come out with their problem.

    Args:
        folder: of the dataset.
        names: of its files.
        form: how a row says who said what, or auto.
        columns: {name here: name in the files}, for columns of other names.

    Raises:
        BadData: a file that cannot be read at all, or of an unknown kind.
    """
    for name in names:
        for place, value, raw in read_values(folder / name, name):
            if isinstance(value, BadRow):
                yield Row(place, None, str(value), raw)
                continue
            try:
                yield Row(place, to_messages(_renamed(value, columns), form), None, raw)
            except BadRow as problem:
                yield Row(place, None, str(problem), raw)


def _renamed(row: Any, columns: Mapping[str, str]) -> Any:
    if not columns or not isinstance(row, dict):
        return row
    for ours, theirs in columns.items():
        if theirs not in row:
            raise BadRow(f"expected the column {theirs} ({ours}); got {', '.join(map(str, list(row)[:8]))}")
    return {**row, **{ours: row[theirs] for ours, theirs in columns.items()}}


def read_values(path: Path, name: str) -> Iterator[tuple[str, Any, str]]:
    """Read a file's rows as they are, whatever they hold: (place, value or the reason why there is none, raw text).

    Raises:
        BadData: the file cannot be read at all, or is of an unknown kind.
    """
    reader = {
        ".jsonl": _jsonl,
        ".ndjson": _jsonl,
        ".json": _json,
        ".csv": _csv,
        ".tsv": _csv,
        ".parquet": _parquet,
    }.get(path.suffix.lower())
    if reader is None:
        raise BadData(
            "This kind of file is not read.", where=name, expected=", ".join(sorted(_SUFFIXES)), got=path.suffix
        )
    yield from reader(path, name)


def match_files(folder: Path, patterns: list[str]) -> list[str]:
    """Return the names below a folder that match, sorted; each pattern must match something.

    Raises:
        BadData: a pattern matches nothing.
    """
    have = sorted(
        p.relative_to(folder).as_posix() for p in folder.rglob("*") if p.is_file() and p.suffix.lower() in _SUFFIXES
    )
    found: list[str] = []
    for pattern in patterns:
        hits = [name for name in have if name == pattern or Path(name).match(pattern)]
        if not hits:
            raise BadData(
                "No file of the dataset has this name.",
                where=pattern,
                expected="one of " + ", ".join(have[:10]) if have else f"a file of kind {', '.join(sorted(_SUFFIXES))}",
                next_step="mend data.train, data.heldout or data.extra_heldout",
            )
        found += [name for name in hits if name not in found]
    return found


# one function per kind of file; each yields (place, value or BadRow, raw text)


def _jsonl(path: Path, name: str) -> Iterator[tuple[str, Any, str]]:
    with path.open("rb") as file:
        for number, line in enumerate(file, 1):
            place = f"{name}:{number}"
            if number == 1:
                line = line.removeprefix(b"\xef\xbb\xbf")
            if not line.strip():
                continue
            if len(line) > MAX_ROW_BYTES:
                yield place, BadRow(f"a row of {len(line):,} bytes; at most {MAX_ROW_BYTES:,}"), ""
                continue
            try:
                text = line.decode("utf-8")
            except UnicodeDecodeError as error:
                yield place, BadRow(f"byte {error.start + 1} is no UTF-8 (0x{line[error.start]:02x})"), repr(line[:200])
                continue
            try:
                yield place, _strict_json(text), text.rstrip("\n")
            except json.JSONDecodeError as error:
                problem = f"column {error.pos + 1}: {error.msg}; expected one JSON object a line"
                yield place, BadRow(problem), text.rstrip("\n")[:2000]
            except RecursionError:
                yield place, BadRow("nested too deeply"), text[:200]
            except ValueError as error:
                yield place, BadRow(str(error)), text[:2000]


def _json(path: Path, name: str) -> Iterator[tuple[str, Any, str]]:
    try:
        rows = _strict_json(path.read_text(encoding="utf-8-sig"))
    except json.JSONDecodeError as error:
        raise BadData(
            "The file is no JSON.",
            where=f"{name}:{error.lineno}:{error.colno}",
            got=error.msg,
            expected="a list of rows",
        ) from error
    except (UnicodeDecodeError, RecursionError, ValueError) as error:
        raise BadData("The file is no JSON.", where=name, got=str(error), expected="a list of rows") from error
    if not isinstance(rows, list):
        raise BadData("The file holds no list.", where=name, expected="a JSON list of rows", got=type(rows).__name__)
    for number, row in enumerate(rows, 1):
        yield f"{name}:row {number}", row, json.dumps(row, ensure_ascii=False)[:2000]


def _csv(path: Path, name: str) -> Iterator[tuple[str, Any, str]]:
    import pandas as pd

    try:
        table = pd.read_csv(
            path,
            dtype=str,
            keep_default_na=False,
            sep="\t" if path.suffix.lower() == ".tsv" else ",",
            encoding="utf-8-sig",
        )
    except (ValueError, UnicodeDecodeError, csv.Error) as error:
        raise BadData("The table cannot be read.", where=name, got=str(error)[:300], expected="UTF-8 CSV") from error
    yield from _table(table.to_dict("records"), name)


def _parquet(path: Path, name: str) -> Iterator[tuple[str, Any, str]]:
    from datasets import Dataset

    try:
        table = Dataset.from_parquet(str(path), keep_in_memory=True)
    except Exception as error:  # pyarrow and datasets raise many kinds; all mean the same to a person
        raise BadData(
            "The Parquet file cannot be read.", where=name, got=f"{type(error).__name__}: {error}"[:300]
        ) from error
    yield from _table(table, name)


def _table(records: Any, name: str) -> Iterator[tuple[str, Any, str]]:
    for number, record in enumerate(records, 1):
        row = dict(record)
        for key in ("messages", "conversations"):
            if isinstance(row.get(key), str):
                try:
                    row[key] = _strict_json(row[key])
                except ValueError as error:
                    yield f"{name}:row {number}", BadRow(f"column {key} is no JSON: {error}"), str(row)[:2000]
                    break
        else:
            yield f"{name}:row {number}", row, json.dumps(row, ensure_ascii=False, default=str)[:2000]


def _strict_json(text: str) -> Any:
    def refuse(name: str) -> Any:
        raise ValueError(f"{name} is no JSON")

    value = json.loads(text, parse_constant=refuse)
    if "\\u" in text:
        try:
            json.dumps(value, ensure_ascii=False).encode("utf-8")
        except UnicodeEncodeError:
            raise ValueError("a lone surrogate (half of a character)") from None
    return value


# from a row to messages


def to_messages(row: Any, form: str = "auto") -> list[dict[str, str]]:
    """Return a row's chat.

    Raises:
        BadRow: it is none; the message says what was expected.
    """
    if not isinstance(row, dict):
        raise BadRow(f"expected an object, got {type(row).__name__}")
    if form == "auto":
        form = _guess(row)
    return _checked({"messages": _messages, "sharegpt": _sharegpt, "alpaca": _alpaca,
                     "prompt_completion": _prompt_completion}[form](row))  # fmt: skip


def to_prompt(row: Any, form: str = "auto") -> list[dict[str, str]]:
    """Return what a row asks a model: its chat without the last answer, whether there is one or not.

    Raises:
        BadRow: it asks nothing; the message says what was expected.
    """
    return to_messages(_answered(row) if isinstance(row, dict) else row, form)[:-1]


def _answered(row: dict[str, Any]) -> dict[str, Any]:
    """Put an answer where one belongs, so that a question passes the checks of a whole chat."""
    out = dict(row)
    for key, role, said in (("messages", "role", "content"), ("conversations", "from", "value")):
        turns = out.get(key)
        if isinstance(turns, list) and turns and all(isinstance(turn, dict) for turn in turns):
            last = turns[-1].get(role)
            answered = (_SHAREGPT_ROLES.get(last) if isinstance(last, str) else None) == "assistant"
            out[key] = [*(turns[:-1] if answered else turns), {role: "assistant", said: "."}]
    if "instruction" in out:
        out["output"] = "."
    if "prompt" in out:
        chat = isinstance(out["prompt"], list)
        out["completion"] = [{"role": "assistant", "content": "."}] if chat else "."
    return out


def _guess(row: dict[str, Any]) -> str:
    if "messages" in row:
        return "messages"
    if "conversations" in row:
        return "sharegpt"
    if "instruction" in row and ("output" in row or "response" in row):
        return "alpaca"
    if "prompt" in row and ("completion" in row or "response" in row):
        return "prompt_completion"
    raise BadRow(
        "expected messages, conversations, instruction/output or prompt/completion; "
        f"got the keys {', '.join(map(str, list(row)[:8])) or '(none)'}"
    )


def guess_columns(row: Any) -> dict[str, str]:
    """Return what `data.columns` should say for a row of one of the usual pairs of names; empty if it is none."""
    if not isinstance(row, dict):
        return {}
    for prompt, completion in _PAIRS:
        if isinstance(row.get(prompt), str) and isinstance(row.get(completion), str):
            return {"prompt": prompt, "completion": completion}
    return {}


def _field(row: dict[str, Any], *names: str) -> Any:
    for name in names:
        if name in row:
            return row[name]
    raise BadRow(f"expected the key {' or '.join(names)}; got {', '.join(map(str, list(row)[:8]))}")


def _messages(row: dict[str, Any]) -> list[dict[str, Any]]:
    messages = _field(row, "messages")
    if not isinstance(messages, list) or not all(isinstance(m, dict) for m in messages):
        raise BadRow("messages: expected a list of {role, content}")
    if any(m.get("tool_calls") for m in messages):
        raise BadRow("messages: tool_calls are not read")
    return [{"role": m.get("role"), "content": _text(m.get("content"), i)} for i, m in enumerate(messages, 1)]


def _text(content: Any, number: int) -> Any:
    """Join a message's parts, where it has parts: [{"type": "text", "text": …}]."""
    if not isinstance(content, list):
        return content
    if not all(isinstance(part, dict) for part in content):
        raise BadRow(f"message {number}: content is a list; expected text, or parts of type text")
    for part in content:
        if part.get("type") != "text" or not isinstance(part.get("text"), str):
            raise BadRow(f"message {number}: a part of type {part.get('type')}; only text is read")
    return "".join(part["text"] for part in content)


def _sharegpt(row: dict[str, Any]) -> list[dict[str, Any]]:
    turns = _field(row, "conversations")
    if not isinstance(turns, list) or not all(isinstance(t, dict) for t in turns):
        raise BadRow("conversations: expected a list of {from, value}")
    out: list[dict[str, Any]] = []
    if isinstance(row.get("system"), str) and row["system"].strip():
        out.append({"role": "system", "content": row["system"]})
    for number, turn in enumerate(turns, 1):
        who = turn.get("from", turn.get("role"))
        if not isinstance(who, str) or who not in _SHAREGPT_ROLES:
            raise BadRow(f"turn {number}: unknown role {who!r}; expected one of {', '.join(sorted(_SHAREGPT_ROLES))}")
        out.append({"role": _SHAREGPT_ROLES[who], "content": turn.get("value", turn.get("content"))})
    return out


def _alpaca(row: dict[str, Any]) -> list[dict[str, Any]]:
    instruction, given = _field(row, "instruction"), row.get("input", row.get("context"))  # Dolly says context
    if not isinstance(instruction, str):
        raise BadRow(f"instruction is {type(instruction).__name__}; expected text")
    user = f"{instruction}\n\n{given}" if isinstance(given, str) and given.strip() else instruction
    out = [{"role": "user", "content": user}, {"role": "assistant", "content": _field(row, "output", "response")}]
    if isinstance(row.get("system"), str) and row["system"].strip():
        out.insert(0, {"role": "system", "content": row["system"]})
    return out


def _prompt_completion(row: dict[str, Any]) -> list[dict[str, Any]]:
    prompt, completion = _field(row, "prompt"), _field(row, "completion", "response")
    if isinstance(prompt, list) and isinstance(completion, list):  # trl's conversational form
        return _messages({"messages": [*prompt, *completion]})
    out = [{"role": "user", "content": prompt}, {"role": "assistant", "content": completion}]
    if isinstance(row.get("system"), str) and row["system"].strip():
        out.insert(0, {"role": "system", "content": row["system"]})
    return out


def _checked(messages: list[dict[str, Any]]) -> list[dict[str, str]]:
    """Check roles, their order and contents: system first if at all, then user and assistant in turn, assistant last."""
    if not messages:
        raise BadRow("a chat without messages")
    for number, message in enumerate(messages, 1):
        role, content = message["role"], message["content"]
        if role not in ROLES:
            raise BadRow(f"message {number}: unknown role {role!r}; expected one of {', '.join(ROLES)}")
        if not isinstance(content, str):
            raise BadRow(f"message {number}: content is {type(content).__name__}; expected text")
        if not content.strip() and role != "system":
            raise BadRow(f"message {number}: an empty {role} message")
        if role == "system" and number != 1:
            raise BadRow(f"message {number}: a system message comes first or not at all")
    turns = [m["role"] for m in messages if m["role"] not in ("system", "tool")]
    if not turns or turns[0] != "user":
        raise BadRow("a chat starts with a user message")
    if messages[-1]["role"] != "assistant":
        raise BadRow(f"the last message is of {messages[-1]['role']}; expected assistant")
    for number, (one, two) in enumerate(itertools.pairwise(turns), 1):
        if one == two == "user":
            raise BadRow(f"two user messages in a row (turns {number} and {number + 1})")
    return [{"role": m["role"], "content": m["content"]} for m in messages]
