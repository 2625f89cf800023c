"""Formats of well-known datasets: Capybara's pairs, LIMA's texts, OpenAssistant's trees, xLAM's calls, Gemini's contents."""

from __future__ import annotations

import re
from collections.abc import Mapping

from pydantic import JsonValue

from loraflow.data.cell_values import parsed_list
from loraflow.data.chats import BadRow
from loraflow.data.container_text import strict_json
from loraflow.data.marks import MarkedFalse, excludes
from loraflow.data.row_fields import ASSISTANT, RawRow, RowFields, Turn, has_value, normal_role, objects
from loraflow.data.tools import read_calls

_MESSAGE = ("role",), ("content",)
# Capybara and xtuner; Firefly and ms-swift; others
_PAIRS = (
    ("input", "output"),
    ("human", "assistant"),
    ("user", "assistant"),
    ("question", "answer"),
    ("prompt", "response"),
)
_ROLE_LABEL = re.compile(
    r"\s*(?:### ?)?(?:human|user|customer|prompter|gpt|assistant|bot|chatbot|chatgpt|ai|model|agent|system) ?:",
    re.IGNORECASE,
)


def read_pairs(fields: RowFields, column: str, value: JsonValue) -> list[Turn] | None:
    """Read a chat that is a list of {input, output} (Capybara, xtuner), or of texts in turn (LIMA); None if it is neither.

    Raises:
        BadRow: a list of texts ends with a question or has labels of roles, or a pair is malformed.
    """
    if isinstance(value, list) and value and all(isinstance(item, str) for item in value):
        if label := next((found[0].strip() for text in value if (found := _ROLE_LABEL.match(str(text)))), ""):
            raise BadRow(
                f"{column}: texts with the label {label!r}, which would be learned; write a list of {{from, value}}"
            )
        if len(value) % 2:
            raise BadRow(f"{column}: {len(value)} texts in turn end with a question; expected an answer at the end")
        return [Turn("assistant" if number % 2 else "user", text) for number, text in enumerate(value)]
    pairs = objects(value)
    if not pairs or not all(pair_keys(pair) for pair in pairs):
        return None
    items: list[RawRow] = []
    for pair in pairs:
        question, answer = pair_keys(pair) or ("", "")
        if has_value(pair.get("system")):
            items.append({"role": "system", "content": pair["system"]})
        marks = {key: item for key, item in pair.items() if key not in ("system", question, answer)}
        items += [{"role": "user", "content": pair[question]}, {**marks, "role": ASSISTANT, "content": pair[answer]}]
    return fields.turns(column, items, *_MESSAGE)


def pair_keys(pair: RawRow) -> tuple[str, str] | None:
    """Return the keys of a question and its answer in an object of a chat; None if it is a message or something else."""
    if pair.keys() & {"role", "from"}:
        return None
    return next((keys for keys in _PAIRS if pair.keys() >= set(keys)), None)


def pairs_with_answer(value: JsonValue) -> list[JsonValue] | None:
    """Return pairs, or texts in turn, with a dummy for the last answer, whether it is there or not; else None."""
    if not isinstance(value, list) or not value:
        return None
    if all(isinstance(item, str) for item in value):
        return [*(value if len(value) % 2 else value[:-1]), "."]
    last = value[-1]
    if not isinstance(last, dict) or last.keys() & {"role", "from"}:
        return None
    answer = next((answer for question, answer in _PAIRS if question in last), None)
    return None if answer is None else [*value[:-1], {**last, answer: "."}]


def is_tree(row: Mapping[str, JsonValue]) -> bool:
    """Tell whether a row is a tree of messages: its prompt is a message with replies, or it is such a message itself."""
    prompt = row.get("prompt", row)
    return isinstance(prompt, dict) and isinstance(prompt.get("replies"), list)


def read_tree(fields: RowFields) -> list[Turn]:
    """Read the best-ranked path of an OpenAssistant tree. Messages that are deleted or were not accepted are not followed.

    Raises:
        MarkedFalse: the tree is not ready for export, or its question was not accepted.
        BadRow: its question has no answer.
    """
    prompt, state = fields.row, fields.optional("tree_state")
    if isinstance(state, str) and state != "ready_for_export":
        raise MarkedFalse("the tree is not ready for export", f"tree_state: {state}")
    if "prompt" in fields.row:
        value = fields.value("prompt")
        prompt = value if isinstance(value, dict) else {}
    else:
        for key in ("text", "role", "replies"):
            fields.value(key)
    if not is_tree(fields.row):
        raise BadRow("prompt: expected a message with text, role and replies")
    if mark := _excluded_by(prompt):
        raise MarkedFalse("the question of the tree is marked as not to be learned", mark)
    path: list[RawRow] = [prompt]
    while replies := [reply for reply in objects(path[-1].get("replies")) or [] if not _excluded_by(reply)]:
        path.append(min(enumerate(replies), key=_order)[1])
    while path and normal_role(path[-1].get("role")) != ASSISTANT:
        path.pop()
    if not path:
        raise BadRow("the tree has no answer")
    return [Turn(normal_role(message.get("role")), message.get("text")) for message in path]


def _excluded_by(message: RawRow) -> str:
    """Return the mark of a message of a tree by which it is not followed; empty without."""
    return next(
        (f"prompt.{key}: {message[key]}" for key in ("deleted", "review_result") if excludes(key, message.get(key))), ""
    )


def _order(reply: tuple[int, RawRow]) -> tuple[bool, bool, float, int]:
    """Return the place of a reply among its siblings: rank 0 is the best. A question without an answer is the last."""
    number, message = reply
    rank = message.get("rank")
    has_rank = isinstance(rank, int | float) and rank == rank  # NaN is no rank
    is_open = normal_role(message.get("role")) != ASSISTANT and not message.get("replies")
    return is_open, not has_rank, float(rank) if isinstance(rank, int | float) and has_rank else 0.0, number


def is_xlam(row: Mapping[str, JsonValue]) -> bool:
    """Tell whether a row has a question and the calls that answer it."""
    answers = row.get("answers")
    if isinstance(answers, str):
        return isinstance(row.get("query"), str) and answers.lstrip().startswith("[")
    calls = objects(answers) or []
    return isinstance(row.get("query"), str) and bool(calls) and all("name" in call for call in calls)


def read_xlam(fields: RowFields) -> list[Turn]:
    """Read a question whose answer is a list of calls.

    Raises:
        BadRow: there is no call.
    """
    query, calls = fields.value("query"), read_calls(fields.value("answers"), "answers")
    if not calls:
        raise BadRow("answers has no call: write the answer that is expected then, as messages")
    return [Turn("user", query), Turn(ASSISTANT, "", calls=tuple(calls))]


def read_gemini(fields: RowFields) -> list[Turn]:
    """Read `contents` of {role, parts}, and the text of `systemInstruction`.

    Raises:
        BadRow: a part is malformed.
    """
    contents = objects(parsed_list(fields.value("contents"), "contents"))
    if contents is None:
        raise BadRow("contents: expected a list of {role, parts}")
    system = fields.optional("systemInstruction", "system_instruction")
    turns = []
    if isinstance(system, dict):
        parts = system.get("parts")
        turns.append(Turn("system", fields.joined(parts if isinstance(parts, list) else [parts], "systemInstruction")))
    items = [{**item, "parts": [item["parts"]]} if isinstance(item.get("parts"), dict) else item for item in contents]
    return turns + fields.turns("contents", items, ("role",), ("parts",))


def template_arguments(fields: RowFields, turns: list[Turn]) -> tuple[JsonValue, JsonValue]:
    """Return the system message and the tools that smoltalk2 has in `chat_template_kwargs`, an object or its JSON text.

    Args:
        fields: the row.
        turns: its chat. None is returned for its own system message.

    Raises:
        BadRow: there are other instructions than the system message, or tools as Python code.
    """
    key = "chat_template_kwargs"
    arguments = fields.row.get(key)
    if isinstance(arguments, str):
        try:
            arguments = strict_json(arguments)
        except ValueError:
            return None, None  # it is named as not read
    if not isinstance(arguments, dict):
        return None, None
    fields.value(key)
    fields.note_unread(key, arguments, {"custom_instructions", "xml_tools"})
    system, tools = arguments.get("custom_instructions"), arguments.get("xml_tools")
    if has_value(arguments.get("python_tools")):
        raise BadRow(f"{key}.python_tools are not read: write them as tools with JSON schemas, or remove them")
    if has_value(system) and turns and turns[0].role == "system":
        if turns[0].content != system:
            raise BadRow(f"two different system messages: one in the chat, one in {key}.custom_instructions")
        system = None
    return (system if has_value(system) else None), (tools if has_value(tools) else None)
