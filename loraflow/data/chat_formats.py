"""From a row to its chat: messages, ShareGPT, Alpaca, prompt/completion.

What a row holds and no form reads is not dropped in silence: it is refused where it changes what is to be learned, and
named where it does not.
"""

from __future__ import annotations

import itertools
import json
from collections.abc import Mapping
from typing import Any

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
_SYSTEM = ("system", "system_prompt")
_IN_TURNS = ("role", "content", "from", "value", "weight", "train", "training")
_NOTHING: tuple[Any, ...] = (None, "", [], {}, "[]", "{}", "null")


class BadRow(Exception):
    """A row that is no chat. The message says what was expected."""


def to_messages(row: Any, form: str = "auto") -> list[dict[str, str]]:
    """Return a row's chat.

    Raises:
        BadRow: it is none; the message says what was expected.
    """
    _refuse_marks(row)
    return _chat(row, form)


def _chat(row: Any, form: str) -> list[dict[str, str]]:
    if not isinstance(row, dict):
        raise BadRow(f"expected an object, got {type(row).__name__}")
    if form == "auto":
        form = _guess(row)
    return _checked(_with_system(row, _FORMS[form][0](row)))


def _refuse_marks(row: Any) -> None:
    """Refuse what says that an answer is not to be learned: OpenAI's weight, axolotl's train, the label of trl's KTO.

    Raises:
        BadRow: there is such a mark.
    """
    if not isinstance(row, dict):
        return
    if row.get("label") is False and "completion" in row:
        raise BadRow("label is false, as trl's KTO marks a completion that is not wanted; leave such rows out")
    turns = row.get("messages", row.get("conversations"))
    for number, turn in enumerate(turns if isinstance(turns, list) else [], 1):
        for key in ("weight", "train", "training"):
            mark = turn.get(key) if isinstance(turn, dict) else None
            who = turn.get("role", turn.get("from")) if mark is not None else None
            if (
                isinstance(mark, bool | int | float)
                and not mark
                and isinstance(who, str)
                and _SHAREGPT_ROLES.get(who) == "assistant"
            ):
                raise BadRow(
                    f"message {number}: {key} {json.dumps(mark)} marks an answer that is not to be learned, and such marks "
                    "are not read; without them, data.loss_on: last_assistant learns the last answer only"
                )


def _with_system(row: dict[str, Any], chat: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Put a column with a system message (Anthropic's and Alpaca's system, OpenOrca's system_prompt) before the chat."""
    said = next((row[key] for key in _SYSTEM if row.get(key)), None)
    if isinstance(said, list):
        said = _text(said, 0)
    if not isinstance(said, str) or not said.strip():
        return chat
    if chat and chat[0].get("role") == "system":
        if chat[0]["content"] == said:
            return chat
        raise BadRow("a system message, and another one in the column system")
    return [{"role": "system", "content": said}, *chat]


def to_prompt(row: Any, form: str = "auto") -> list[dict[str, str]]:
    """Return what a row asks a model: its chat without the last answer, whether there is one or not.

    Raises:
        BadRow: it asks nothing; the message says what was expected.
    """
    return _chat(_answered(row) if isinstance(row, dict) else row, form)[:-1]


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
    pairs = "; of preference pairs, data.columns {completion: chosen} (or {messages: chosen}) takes the chosen answers"
    raise BadRow(
        "expected messages, conversations, instruction/output or prompt/completion; "
        f"got the keys {', '.join(map(str, list(row)[:8])) or '(none)'}{pairs if 'chosen' in row else ''}"
    )


def guess_columns(row: Any) -> dict[str, str]:
    """Return what `data.columns` should say for a row of one of the usual pairs of names; empty if it is none."""
    if not isinstance(row, dict):
        return {}
    given = {name.lower(): name for name in row if isinstance(name, str)}
    for prompt, completion in (*_PAIRS, ("prompt", "completion"), ("instruction", "output")):
        asked, answer = given.get(prompt), given.get(completion)
        if asked and answer and isinstance(row[asked], str) and isinstance(row[answer], str):
            # What a question is about is part of it: Alpaca's form has a place for that.
            alpaca = "context" in given or prompt == "instruction"
            out = {"instruction": asked, "output": answer} if alpaca else {"prompt": asked, "completion": answer}
            return {**out, "input": given["context"]} if given.get("context", "context") != "context" else out
    for name, turns in row.items():
        for ours in (
            ("messages", "conversations") if isinstance(turns, list) and name not in ("chosen", "rejected") else ()
        ):
            try:
                to_messages({ours: turns})
            except BadRow:
                continue
            return {ours: str(name)}
    return {}


def has_form(row: dict[str, Any]) -> bool:
    """Tell whether a row has the keys of a form, whatever they hold."""
    try:
        _guess(row)
    except BadRow:
        return False
    return True


def unread(row: Any, form: str, columns: Mapping[str, str]) -> tuple[str, ...]:
    """Return the keys of a row, and of its turns, that hold something which is not read."""
    if not isinstance(row, dict):
        return ()
    renamed = {**row, **dict.fromkeys(columns, "")}
    read = {*_FORMS[_guess(renamed) if form == "auto" else form][1], *_SYSTEM, *columns.values()}
    found = [str(key) for key, value in row.items() if key not in read and value not in _NOTHING]
    for key in {"messages", "conversations", *columns.values()} & row.keys() & read:
        turns = row[key] if isinstance(row[key], list) else []
        inner = dict.fromkeys(one for turn in turns for one, value in turn.items() if value not in _NOTHING)
        found += [f"{key}.{one}" for one in inner if one not in _IN_TURNS]
    return tuple(found)


def _field(row: dict[str, Any], *names: str) -> Any:
    for name in names:
        if name in row:
            return row[name]
    raise BadRow(f"expected the key {' or '.join(names)}; got {', '.join(map(str, list(row)[:8]))}")


def _messages(row: dict[str, Any]) -> list[dict[str, Any]]:
    messages = _field(row, "messages")
    if not isinstance(messages, list) or not all(isinstance(m, dict) for m in messages):
        raise BadRow("messages: expected a list of {role, content}")
    for key in ("tool_calls", "function_call"):
        if any(m.get(key) for m in messages):
            raise BadRow(f"messages: {key} are not read" if key == "tool_calls" else f"messages: a {key} is not read")
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
    if given is not None and not isinstance(given, str):
        raise BadRow(f"input is {type(given).__name__}; expected text")
    user = f"{instruction}\n\n{given}" if isinstance(given, str) and given.strip() else instruction
    out: list[dict[str, Any]] = []
    for pair in row.get("history") or []:  # LLaMA-Factory's: earlier questions and answers
        if not isinstance(pair, list) or len(pair) != 2:
            raise BadRow("history: expected a list of [question, answer]")
        out += [{"role": "user", "content": pair[0]}, {"role": "assistant", "content": pair[1]}]
    answer = _field(row, "output", "response")
    return [*out, {"role": "user", "content": user}, {"role": "assistant", "content": answer}]


def _prompt_completion(row: dict[str, Any]) -> list[dict[str, Any]]:
    prompt, completion = _field(row, "prompt"), _field(row, "completion", "response")
    if isinstance(prompt, list) and isinstance(completion, list):  # trl's conversational form
        return _messages({"messages": [*prompt, *completion]})
    return [{"role": "user", "content": prompt}, {"role": "assistant", "content": completion}]


# form → (how it is read, the keys that it reads)
_FORMS: dict[str, tuple[Any, tuple[str, ...]]] = {
    "messages": (_messages, ("messages",)),
    "sharegpt": (_sharegpt, ("conversations",)),
    "alpaca": (_alpaca, ("instruction", "input", "context", "output", "response", "history")),
    "prompt_completion": (_prompt_completion, ("prompt", "completion", "response")),
}


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
