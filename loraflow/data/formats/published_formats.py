"""Formats of well-known datasets: Capybara's pairs, LIMA's texts, OpenAssistant's trees, xLAM's calls, Gemini's contents.

Rows of other shapes are refused, with a hint how they are converted.
"""

import json
import re
from collections.abc import Mapping, Sequence

from pydantic import JsonValue

from loraflow.data.answers.marks import MarkedFalse, excludes
from loraflow.data.cell_values import is_chat_as_text, objects_of, parsed_list, strict_json
from loraflow.data.chats import BadRow, Message
from loraflow.data.formats.question_parts import question_parts
from loraflow.data.formats.row_fields import (
    ASSISTANT,
    CONTENTS,
    ROLE_KEYS,
    TOOL,
    RawRow,
    RowFields,
    Turn,
    has_value,
    normal_role,
    objects,
)
from loraflow.data.formats.tools import read_calls
from loraflow.data.formats.transcripts import is_transcript, split_chat

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
    """Read a list of {input, output} (Capybara, xtuner), or of texts in turn (LIMA); None if it is neither.

    Raises:
        BadRow: texts end with a question or have labels of roles, or a pair is malformed.
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
    """Return the keys of a question and its answer in an object of a chat; None without."""
    if pair.keys() & {"role", "from"}:
        return None
    return next((keys for keys in _PAIRS if pair.keys() >= set(keys)), None)


def pairs_with_answer(value: JsonValue) -> list[JsonValue] | None:
    """Return pairs, or texts in turn, with a dummy for the last answer, if any; None for others."""
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
    """Tell whether a row, or its prompt, is a message with replies."""
    prompt = row.get("prompt", row)
    return isinstance(prompt, dict) and isinstance(prompt.get("replies"), list)


def read_tree(fields: RowFields) -> list[Turn]:
    """Read the best-ranked path of an OpenAssistant tree, without messages that are deleted or were not accepted.

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
    return next(
        (f"prompt.{key}: {message[key]}" for key in ("deleted", "review_result") if excludes(key, message.get(key))), ""
    )


def _order(reply: tuple[int, RawRow]) -> tuple[bool, bool, float, int]:
    """Return the order of a reply: rank 0 first, a question without an answer last."""
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


# Keys of a row → the filter of jq that makes chats of such rows.
_FILTERS = {
    "context question answers": "{instruction: .question, input: .context, output: .answers.text[0]}",
    "input preferred_output": "{messages: (.input.messages + .preferred_output)}",
    "winner conversation_a conversation_b": 'if .winner == "model_a" then {messages: .conversation_a} '
    'elif .winner == "model_b" then {messages: .conversation_b} else empty end',
    "response_0 response_1 better_response_id": "{prompt, completion: (if .better_response_id == 0 then .response_0 "
    "else .response_1 end)}",
    "problem deepseek_reasoning deepseek_solution": r'{prompt: .problem, completion: ("<think>\n" + .deepseek_reasoning + '
    r'"\n</think>\n\n" + .deepseek_solution)}',
    "question solutions": "{prompt: .question, completion: (.solutions | "
    'if type == "string" then fromjson else . end | .[0])}',
    "instruction instances": ".instruction as $i | .instances[] | {instruction: $i, input, output}",
}
# OpenAssistant's rows: all of a file are read (jq -s), and each tree becomes a row.
_TREES = (
    "def tree($all): . + {replies: [.message_id as $id | $all[] | select(.parent_id == $id) | tree($all)]}; "
    "group_by(.message_tree_id)[] | . as $all | .[] | select(.parent_id == null) | tree($all)"
)
# Names of an answer that is worse than another one, or of one of several
_OF_PAIRS = re.compile(
    r"reject|los(?:er|ing|t)(?![a-z])|worse|worst|wrong|incorrect|bad|negative|dispreferred|unsafe|toxic|harm|discard|"
    r"[-_. ](?:a|b|w|l|[0-9])$",
    re.IGNORECASE,
)
_ANSWER = re.compile(
    r"answer|response|completion|output|sol[0-9]|solution", re.IGNORECASE
)  # a label beside it is a mark
# Names of a text that is neither a question nor an answer
_NO_TEXT = re.compile(
    r"(?:^|[-_. ])(?:u?u?id|idx|index|url|path|file|source|split|subset|lang|language|date|model|name)$", re.IGNORECASE
)
_QUESTIONS = ("prompt", "instruction", "question", "problem", "query", "input")
# The key of a chat's id in a row that is one message of it
_CHAT_ID = re.compile("(conv|conversation|dialog|dialogue|session|thread|chat)_?id", re.IGNORECASE)


def conversion_hint(row: Mapping[str, JsonValue]) -> str:
    """Return how a row is made a chat, for the end of a message; empty if that is unknown."""
    if row.keys() >= {"message_id", "parent_id", "text"}:
        return "; these are the messages of trees, one in a row" + _by_jq(_TREES, "-cs").replace("chats", "trees")
    if all(keys := _keys_of_message(row)):
        chat, role, content = keys
        made = f"group_by(.{chat})[] | {{messages: map({{role: .{role}, content: .{content}}})}}"
        return "; if each row is one message of a chat" + _by_jq(made, "-cs").replace(";", ",", 1)
    if hint := _hint_to_join(row):
        return hint
    texts = [key for key, value in row.items() if is_transcript(value)]
    if "chosen" in row:
        return _hint_to_read_chosen(row)
    if len(texts) == 1 and not _OF_PAIRS.search(texts[0]) and _is_closed(row[texts[0]]):
        return f"; {texts[0]} has a chat: set data.columns: {{text: {texts[0]}}}"
    if hint := _hint_to_write_parts(row):
        return hint
    if (found := split_chat(row.get("text"))) and found[0].ends:
        return "; text is a chat that a template has rendered: write its messages as {role, content}"
    translation = row.get("translation")
    if isinstance(translation, dict) and len(translation) > 1:
        source, target = list(translation)[:2]
        made = f'{{instruction: "Translate to {target}.", input: .translation.{source}, output: .translation.{target}}}'
        return _by_jq(made)
    hint = next((_by_jq(made) for keys, made in _FILTERS.items() if row.keys() >= set(keys.split())), "")
    hint = hint or _hint_to_unpack(row) or _hint_to_name(row)
    for key in row:
        if any(_role(turn) == ASSISTANT for turn in _messages_of(key, row)[-1:]):
            hint += f"; if {key} is the whole chat, set data.columns: {{messages: {key}}}"
    return hint


def _hint_to_read_chosen(row: Mapping[str, JsonValue]) -> str:
    """Return how the chosen answer of a pair is read with its question; empty if nothing is known."""
    chosen = row["chosen"]
    turns = objects(parsed_list(chosen, "chosen") if is_chat_as_text(chosen) else chosen) or objects([chosen]) or [{}]
    role = normal_role(turns[0].get("role", turns[0].get("from")))
    question = next((key for key in _QUESTIONS if row.get(key)), "")
    asked = objects(row.get(question)) or [{}]
    are_lists = turns == chosen and "role" in turns[0] and "role" in asked[0]
    if len(turns) > 1 and role in ("user", "system"):
        columns = "messages: chosen"
    elif is_transcript(chosen):
        columns = "text: chosen"
    elif hint := _hint_to_write_parts(row):
        return hint
    elif are_lists or (isinstance(chosen, str) and not role):
        columns = "completion: chosen"
        if question == "instruction" and asked == [{}]:
            columns = "output: chosen"
        elif question != "prompt":
            columns = f"prompt: {question or 'the column of the question'}, {columns}"
    else:
        return ""
    return f"; for the chosen answers of preference pairs, set data.columns: {{{columns}}}"


def _hint_to_write_parts(row: Mapping[str, JsonValue]) -> str:
    parts = question_parts(row)
    if not parts or row.keys().isdisjoint(_QUESTIONS[1:]):
        return ""
    return f"; {parts[0]} is a part of the question: write a prompt that has it"


def _hint_to_unpack(row: Mapping[str, JsonValue]) -> str:
    """Return how the only chat inside an object becomes the row. Keys beside it, such as marks, are kept.

    A key with a single quote cannot be written between those of a shell.
    """
    inner = [key for key, value in row.items() if isinstance(value, dict) and _has_chat(value)]
    if len(inner) != 1 or _OF_PAIRS.search(inner[0]) or not row.keys().isdisjoint(("request", "response")):
        return ""
    return "" if "'" in inner[0] else _by_jq(f"{_path(inner[0])} + del({_path(inner[0])})")


def _has_chat(value: Mapping[str, JsonValue]) -> bool:
    for key in ("messages", "conversations"):
        if turns := objects(value.get(key)):
            return _role(turns[-1]) == ASSISTANT and any(isinstance(turns[-1].get(name), str) for name in CONTENTS)
    return any(
        all(isinstance(text := value.get(name), str) and text.strip() for name in pair)
        for pair in (("prompt", "completion"), ("instruction", "output"))
    )


def _hint_to_name(row: Mapping[str, JsonValue]) -> str:
    texts = [
        key
        for key, value in row.items()
        if isinstance(value, str) and value.strip() and not _OF_PAIRS.search(key) and not _NO_TEXT.search(key)
    ]
    if type(row.get("label")) is not int or not texts:
        way = "; set data.columns: {prompt: the column of the question, completion: that of the answer}"
        return way if len(texts) > 1 else ""
    way = "; label is the number of a class: write its name into a new column, and set data.columns: "
    is_mark = any(map(_ANSWER.search, row))
    return "" if is_mark else way + "{prompt: the column of the text, completion: the new column}"


def _is_closed(text: JsonValue) -> bool:
    found = split_chat(text)
    if found is None:
        return False
    *_, last = found[0].label.finditer(found[1])
    return bool(found[1][last.end() :].strip())


def is_history(name: str) -> bool:
    """Tell whether a column beside a question or an answer has the messages before them."""
    return re.fullmatch(r"contexts?|.*history|(?:previous|prior|earlier)_\w+", name.lower()) is not None


def refuse_lost_history(row: Mapping[str, JsonValue], messages: list[Message], used: Mapping[str, str]) -> None:
    """Refuse a row whose `context` or `chat_history` has messages that are not in the chat.

    Args:
        used: the keys that were read: loraflow's name → the row's column.

    Raises:
        BadRow: it has.
    """
    question = next((used[key] for key in ("prompt", "instruction") if key in used), None)
    answer = next((used[key] for key in ("completion", "output", "response") if key in used), None)
    if question is None or answer is None:
        return
    for key in row:
        turns = _messages_of(key, row)
        if not turns or key in used.values():
            continue
        texts = [
            " ".join(text.split()) for turn in turns for name in CONTENTS if isinstance(text := turn.get(name), str)
        ]
        *earlier, last = [" ".join(message["content"].split()) for message in messages]
        written = " ".join(earlier)
        if not all(text in written or text == last for text in texts):
            made = _to_join(row, key, question, answer) or "; write the row as messages"
            raise BadRow(f"{key} has earlier messages, which are not read{made}; or name {key} in data.ignore")


def _messages_of(key: str, row: Mapping[str, JsonValue]) -> list[dict[str, JsonValue]]:
    value = row[key]
    is_list = value.lstrip().startswith("[") if isinstance(value, str) else isinstance(value, list)
    turns = [dict(turn) for turn in objects_of(value)] if is_history(key) and is_list else []
    roles = list(map(_role, turns))
    is_chat = "user" in roles or key.lower().startswith("context")
    return turns if is_chat and all(role in ("user", ASSISTANT, "system", TOOL) for role in roles) else []


def _role(turn: Mapping[str, JsonValue]) -> JsonValue:
    return normal_role(next((turn[name] for name in ROLE_KEYS if name in turn), None))


def _hint_to_join(row: Mapping[str, JsonValue]) -> str:
    names = {key.lower(): key for key in row if isinstance(row[key], str)}
    question = next(
        (names[name] for name in ("question", "query", "prompt", "problem", "input", "message") if name in names), None
    )
    answer = next((names[name] for name in ("answer", "response", "output", "completion") if name in names), None)
    history = next((key for key in row if _messages_of(key, row)), None)
    return _to_join(row, history, question, answer) if history and question and answer else ""


def _to_join(row: Mapping[str, JsonValue], history: str, question: str, answer: str) -> str:
    keys = (history, question, answer)
    kinds = tuple(type(row[key]) for key in keys)
    if kinds != (list, str, str) or "'" in "".join(keys):  # a text may be a cell of CSV, which jq does not read
        return ""
    earlier = _messages_of(history, row)
    role = next(name for name in ROLE_KEYS if name in earlier[0])
    text = next((name for name in CONTENTS if name in earlier[0]), CONTENTS[0])
    if _role(earlier[0]) == ASSISTANT or any(turn.get(text) == row[answer] for turn in earlier):
        return ""  # no chat begins so, or it has the answer
    before, asked, answered = map(_path, keys)
    turns = f'{{{role}: "user", {text}: {asked}}}, {{{role}: "assistant", {text}: {answered}}}'
    return _by_jq(f". + {{messages: ({before} + [{turns}])}} | del({before}, {asked}, {answered})")


def _path(key: str) -> str:
    return f".{key}" if re.fullmatch(r"[A-Za-z_]\w*", key, re.ASCII) else f".[{json.dumps(key)}]"


def _keys_of_message(row: Mapping[str, JsonValue]) -> tuple[str | None, str | None, str | None]:
    """Return the keys of the chat's id, a known role and the text of a row that may be one message."""
    return (
        next((key for key in row if _CHAT_ID.fullmatch(key)), None),
        next((key for key in ROLE_KEYS if normal_role(row.get(key)) in ("user", ASSISTANT, "system", TOOL)), None),
        next((key for key in CONTENTS if isinstance(row.get(key), str)), None),
    )


def are_messages(rows: Sequence[Mapping[str, JsonValue]]) -> bool:
    """Tell whether rows are messages of chats: an id is repeated, and an assistant speaks."""
    chat, role, content = _keys_of_message(rows[0])
    ids = [str(row.get(chat or "")) for row in rows]
    is_answered = any(normal_role(row.get(role or "")) == ASSISTANT for row in rows)
    return bool(chat and content) and is_answered and len({*ids}) < len(ids)


def hint_to_choose(row: Mapping[str, JsonValue]) -> str:
    """Return how the chosen answer is put behind a chat that ends with a question; empty if the row has none."""
    key = next((key for key in ("messages", "conversations") if key in row), None)
    better, worse = ("chosen", "rejected") if "chosen" in row else ("chosen_response", "rejected_response")
    chosen = row.get(better)
    if key is None or not isinstance(chosen, str | dict) or not chosen:
        return ""
    answer = f".{better}" if isinstance(chosen, dict) else f'{{role: "assistant", content: .{better}}}'
    return _by_jq(f".{key} += [{answer}] | del(.{better}, .{worse})")


def _by_jq(made: str, options: str = "-c") -> str:
    return f"; jq {options} '{made}' IN.jsonl > OUT.jsonl makes chats of such rows"
