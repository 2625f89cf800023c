"""Read the keys of a row, and record which ones were read, so that no text of a row is left out without being named."""

from collections.abc import Collection, Mapping, Sequence
from typing import NamedTuple

from pydantic import JsonValue

from loraflow.data.answers.labels import ANSWERS, Labels, answers_of, is_absent
from loraflow.data.answers.marks import Weight, answer_weight, excludes, is_mark
from loraflow.data.answers.unread_values import without_ignored
from loraflow.data.cell_values import media_key
from loraflow.data.chats import REASONING_KEYS, BadRow, ToolCall
from loraflow.data.formats.content_parts import as_json, is_parts, is_texts, read_parts, reasoning_text
from loraflow.data.formats.tools import read_calls, read_tools

RawRow = dict[str, JsonValue]  # a row as its file has it
MARKS = ("train", "exclude")  # of data.columns: the column says which rows are learned; not every row must have it


class Turn(NamedTuple):
    """A message whose role and content are not checked yet."""

    role: JsonValue
    content: JsonValue
    weight: float = 1.0  # of its tokens in the loss, by its marks; 0: it is not learned
    calls: tuple[ToolCall, ...] = ()
    call_id: JsonValue = None  # of a tool's result: the call that it belongs to
    name: JsonValue = None  # of a tool's result: its tool
    reasoning: str = ""  # of an answer, beside its content
    excluded_by: str = ""  # the mark that excludes it from the loss


class RowFields:
    """A row, and which keys of it and of its messages were read.

    Args:
        labels: tells whether a label is a class; None if marks are not read.

    Raises:
        BadRow: the row lacks a column of `columns`.
    """

    __slots__ = ("_columns", "_inner_unread", "_own", "_used", "ignore", "labels", "media", "row", "tools")

    def __init__(self, row: RawRow, columns: Mapping[str, str], labels: Labels | None, ignore: Collection[str] = ()):
        if ignore:
            row = without_ignored(row, ignore)
        self._own, self._columns, self.labels, self.ignore = row, columns, labels, ignore
        self.row = _renamed(row, columns) if columns else row
        self._used: set[str] = set()
        self._inner_unread: dict[str, None] = {}
        self.media: str | None = None  # the key of a message that has an image, such as messages.images
        self.tools: JsonValue = None  # that a format has in a text or a message, not in a key of the row

    def value(self, *names: str) -> JsonValue:
        """Return the value of the first key that has one.

        Raises:
            BadRow: none of the keys is there, or two of them have different values.
        """
        row = self.row
        found = None
        if self._columns and (chosen := [name for name in names if name in self._columns]):
            names = tuple(chosen)  # the recipe says which one is read
        for name in names:
            if name in row and has_value(row[name]):
                self._used.add(name)
                if found is not None and row[name] != row[found]:
                    raise BadRow(f"{found} and {name} have different values: remove one, or choose it by data.columns")
                found = found or name
        found = found or next((name for name in names if name in row), None)
        if found is None:
            raise BadRow(f"expected the key {' or '.join(names)}; got {', '.join(map(str, list(row)[:8]))}")
        return row[found]

    def optional(self, *names: str) -> JsonValue:
        """Return the value of the first key that has one; None if none of the keys is there."""
        return self.value(*names) if any(name in self.row for name in names) else None

    @property
    def own(self) -> RawRow:
        """The row with its own names, as its file has it, without ignored keys."""
        return self._own

    @property
    def used(self) -> Mapping[str, str]:
        """The keys that were read: loraflow's name → the row's own; the same unless a recipe names the column."""
        return {key: self.own_name(key) for key in self._used}

    def own_name(self, key: str) -> str:
        """Return the row's own name of a key."""
        return self._columns.get(key, key)

    def chosen_answers(self) -> tuple[str, ...]:
        """Return the row's columns that a recipe names as the answer and that were read as such."""
        return tuple(column for key, column in self._columns.items() if key in self._used and key in ANSWERS)

    def with_reasoning(self, turns: list[Turn]) -> list[Turn]:
        """Return a chat whose last answer has the reasoning of the column that a recipe names as such.

        Raises:
            BadRow: the column is no text, or the answer has another reasoning.
        """
        if "reasoning" not in self._columns or not turns:
            return turns
        text = self.value("reasoning")
        if not has_value(text):
            return turns
        has_own = "</think>" in str(turns[-1].content) or "[/THINK]" in str(turns[-1].content)
        if not isinstance(text, str) or has_own or turns[-1].reasoning not in ("", text):
            raise BadRow(
                f"the column {self._columns['reasoning']}: expected text, and no other reasoning of the answer"
            )
        return [*turns[:-1], turns[-1]._replace(reasoning=text)]

    def row_weight(self) -> Weight:
        """Return the weight of the row's answers in the loss, by the row's marks; 0: they are not learned.

        Raises:
            BadRow: a mark is unclear.
        """
        if self.labels is None:
            return Weight(1.0)
        read = {*self._used, *self._columns.values()}
        others = {key: value for key, value in self.row.items() if key not in read}
        answers = [column for key, column in self._columns.items() if key in ANSWERS]
        texts = tuple(answers_of(self.row))
        weight = answer_weight(others, "", self._used, self.labels, answers, texts, self.row)
        mark, found, value = weight.excluded_by.partition(": ")
        if found and mark in self._columns:
            weight = weight._replace(excluded_by=f"{self._columns[mark]}: {value}")
        return weight

    def turns(
        self, column: str, items: list[RawRow], roles: tuple[str, ...], contents: tuple[str, ...], first: int = 1
    ) -> list[Turn]:
        """Read messages and their marks.

        Args:
            first: the number of the first message, for the problem's text.

        Raises:
            BadRow: a message has a malformed tool call, an unclear mark, two roles or contents, or a part that is not text.
        """
        role_key, content_key = roles[0], contents[0]
        self._refuse_analysis(column, items, role_key, first)
        out: list[Turn] = []
        for number, item in enumerate(items, first):
            if len(item) == 2 and role_key in item and content_key in item:
                turn = Turn(normal_role(item[role_key]), item[content_key])
            else:
                turn = self._turn(column, item, roles, contents, number)
            if turn.role == FUNCTION_CALL:
                calls = turn.calls or tuple(read_calls(turn.content, f"message {number}: {content_key}"))
                if not calls:
                    raise BadRow(f"message {number}: a {item.get(role_key)} without a call")
                _add_calls(out, turn._replace(role=ASSISTANT, content="", calls=calls))
            elif turn.role == TOOL and turn.content is None and turn.calls:  # ChatGLM3's: the call and its result
                _add_calls(out, turn._replace(role=ASSISTANT, content="", name=None))
                if (observation := item.get("observation")) is not None:
                    text = observation if isinstance(observation, str) else as_json(observation)
                    out.append(Turn(TOOL, text, name=turn.name))
            elif isinstance(turn.content, list):
                out += self._of_parts(turn, f"message {number}", column)
            else:
                out.append(turn)
        return out

    def _refuse_analysis(self, column: str, items: list[RawRow], role_key: str, first: int) -> None:
        """Refuse messages of gpt-oss's channel analysis before an answer in another one: they are its reasoning."""
        if not any("channel" in item for item in items):
            return
        number = 0
        for position, item in enumerate(items, first):
            kept = without_ignored(item, self.ignore) if self.ignore else item
            channel = kept.get("channel")
            if normal_role(item.get(role_key)) != ASSISTANT or not isinstance(channel, str):
                continue
            if channel.strip().lower() == "analysis":
                number = number or position
            elif number and channel.strip():
                raise BadRow(
                    f"message {number}: channel analysis: write it as the key thinking of the answer that follows, or name "
                    f"{column}.channel in data.ignore if it is to be learned as an answer of its own"
                )

    def _turn(self, column: str, item: RawRow, roles: tuple[str, ...], contents: tuple[str, ...], number: int) -> Turn:
        if self.ignore:
            item = without_ignored(item, self.ignore)
        calls = [call for key in CALLS for call in read_calls(item.get(key), f"message {number}: {key}")]
        fields = RowFields(item, {}, self.labels)
        role, content = normal_role(fields.optional(*roles)), fields.optional(*contents)
        is_answer = role in (ASSISTANT, FUNCTION_CALL)
        reasoning = _reasoning(fields, f"message {number}") if is_answer else ""
        weight, used = Weight(1.0), fields._used | {*roles, *contents, *CALLS}
        if calls and not is_answer:
            raise BadRow(f"message {number}: a tool call in a {role} message; only an assistant calls tools")
        if role == "system" and (key := next((key for key in _TOOLS if _may_be_tools(item.get(key))), None)):
            read_tools(item[key], f"message {number}: {key}")
            self.tools, used = item[key], used | {key}
        if role == TOOL:
            used |= {"tool_call_id", "name"}
            parameters, observation = item.get("parameters"), item.get("observation")
            if content is None and parameters is None and observation is not None:
                content, used = observation, used | {"observation"}
            elif content is None and parameters is not None:  # ChatGLM3's: a call
                calls = read_calls({"name": item.get("name"), "parameters": parameters}, f"message {number}")
                is_answer, used = True, used | {"parameters", "observation"}
        if is_answer and self.labels is not None:
            answers = [content] if isinstance(content, str) else []
            name = next((key for key in roles if key in item), "")
            columns = (self._columns.get(column, column),)
            weight = answer_weight(
                item, f"message {number}: ", used, self.labels, columns, answers, role=(name, item.get(name))
            )
        else:  # only answers are learned: a mark that excludes another message changes nothing
            used |= {key for key, value in item.items() if is_mark(key) and excludes(key, value)}
        self.note_unread(column, item, used)
        if self.media is None and (key := media_key(item, used)):
            self.media = f"{self.own_name(column)}.{key}"
        ids = item.get("tool_call_id"), item.get("name")
        return Turn(role, content, weight.value, tuple(calls), *ids, reasoning, weight.excluded_by)

    def _of_parts(self, turn: Turn, where: str, column: str) -> list[Turn]:
        """Return the turns of a message whose content is a list of parts: results of tools are messages of their own."""
        content = turn.content
        assert isinstance(content, list)
        if turn.role == TOOL and content and not is_parts(content):
            return [turn._replace(content=as_json(content))]  # a result that is a list
        parts = read_parts(content, where)
        for part in parts.unread:
            self.note_unread(f"{column}.content", part, self._marks_of_part(turn, part, where, column))
        if (parts.calls or parts.reasoning) and turn.role != ASSISTANT:
            raise BadRow(f"{where}: a tool call or reasoning in a {turn.role} message; expected it in an assistant's")
        if parts.results and turn.role not in ("user", TOOL):
            raise BadRow(f"{where}: a tool's result in a {turn.role} message; expected it in a user's")
        if parts.reasoning and turn.reasoning:
            raise BadRow(f"{where}: reasoning in the content and beside it; expected it once")
        if parts.calls and turn.calls and not _are_equal(parts.calls, turn.calls):
            raise BadRow(f"{where}: different calls in the content and in tool_calls; expected each call once")
        beside = turn if turn.role == TOOL else Turn(TOOL, None)
        out = [
            Turn(TOOL, result.text, call_id=result.call_id or beside.call_id, name=result.name or beside.name)
            for result in parts.results
        ]
        if beside.call_id and any(result.call_id != beside.call_id for result in out):
            raise BadRow(
                f"{where}: the result is one of {out[0].call_id!r} in the content, and of {beside.call_id!r} beside it"
            )
        if parts.texts or not out:
            reasoning = turn.reasoning or "".join(parts.reasoning)
            calls = turn.calls or tuple(parts.calls)
            out.append(turn._replace(content="".join(parts.texts), calls=calls, reasoning=reasoning))
        return out

    def _marks_of_part(self, turn: Turn, part: RawRow, where: str, column: str) -> set[str]:
        if turn.role != ASSISTANT or self.labels is None:
            return {key for key, value in part.items() if is_mark(key) and excludes(key, value)}
        used: set[str] = set()
        weight = answer_weight(part, f"{where}: ", used, self.labels, (self._columns.get(column, column),))
        if weight.value != 1:
            by = weight.excluded_by or f"weight: {weight.value:g}"
            raise BadRow(f"{where}: {by} marks a part of the answer; only a whole message can be left out or weighted")
        return used

    def joined(self, content: list[JsonValue], column: str) -> str:
        """Join the text parts of a system column: [{"type": "text", "text": …}].

        Raises:
            BadRow: a part is not text.
        """
        (turn,) = self._of_parts(Turn("system", content), column, column)
        return str(turn.content)

    def note_unread(self, column: str, item: RawRow, used: set[str]) -> None:
        """Record the keys of an object in a column that have a value and are not in `used`."""
        for key, value in item.items():
            if key not in used and not is_absent(value):
                self._inner_unread[f"{self.own_name(column)}.{key}"] = None

    def unread(self) -> tuple[str, ...]:
        """Return the keys of the row, and of its messages, that have a value and were not read."""
        row, used = self._own, self._used
        if len(used) == len(row) and not self._columns:
            return tuple(self._inner_unread)
        if self._columns:
            used = {self._columns.get(key, key) for key in used}
        found = [str(key) for key, value in row.items() if key not in used and not is_absent(value)]
        return (*found, *self._inner_unread)


def _add_calls(turns: list[Turn], answer: Turn) -> None:
    """Add an answer with calls to the turns. It is one answer with a text or calls directly before it."""
    last = turns[-1] if turns else None
    is_joined = last is not None and last.role == ASSISTANT and last.weight == answer.weight and not answer.reasoning
    if last is not None and is_joined and isinstance(last.content, str):
        turns[-1] = last._replace(calls=(*last.calls, *answer.calls))
    else:
        turns.append(answer)


def _are_equal(calls: Sequence[ToolCall], others: Sequence[ToolCall]) -> bool:
    """Tell whether calls are the same. Their ids count where both have one."""
    return [call["function"] for call in calls] == [call["function"] for call in others] and all(
        call.get("id", other.get("id")) == other.get("id", call.get("id"))
        for call, other in zip(calls, others, strict=True)
    )


def _may_be_tools(value: JsonValue) -> bool:
    if isinstance(value, str):
        return '"name"' in value
    items = objects(value) or []
    return bool(items) and all({"name", "function", "parameters"} & item.keys() for item in items)


def without_answer(items: list[RawRow]) -> list[RawRow]:
    """Return messages of a row without the last answer, if they end with one: a text, calls, or both."""
    roles = [normal_role(next((item[key] for key in ROLE_KEYS if item.get(key)), None)) for item in items]
    end = len(items)
    while end and (roles[end - 1] == FUNCTION_CALL or (roles[end - 1] == TOOL and _is_open_call(items[end - 1]))):
        end -= 1
    return items[: end - 1] if end and roles[end - 1] == ASSISTANT else items[:end]


def _is_open_call(item: RawRow) -> bool:
    return item.get("parameters") is not None and item.get("content") is None and item.get("observation") is None


def _reasoning(message: RowFields, where: str) -> str:
    """Return the reasoning beside an answer's content: texts, or lists of texts or parts; other values stay unread."""
    found: dict[str, str] = {}  # text → its key
    for key in REASONING_KEYS:
        value = message.row.get(key)
        if has_value(value) and (is_texts(value) or is_parts(value)):
            message._used.add(key)
            found.setdefault(reasoning_text(value, f"{where}: {key}"), key)
    found = {text: key for text, key in found.items() if has_value(text)}
    if len(found) > 1:
        raise BadRow(f"{where}: {' and '.join(found.values())} have different values: remove one")
    return next(iter(found), "")


def _renamed(row: RawRow, columns: Mapping[str, str]) -> RawRow:
    for key, column in columns.items():
        if column not in row and key not in MARKS:
            raise BadRow(f"expected the column {column} ({key}); got {', '.join(map(str, list(row)[:8]))}")
    return {**row, **{key: row[column] for key, column in columns.items() if column in row}}


def has_value(value: JsonValue) -> bool:
    """Tell whether a key has a value: not null, blank or an empty list."""
    if isinstance(value, str):
        return bool(value) and not value.isspace()
    return value is not None and value != [] and value != {}


def objects(value: JsonValue) -> list[RawRow] | None:
    """Return the value if it is a list of objects, or an object of equally long lists (`datasets.Sequence`); else None."""
    if isinstance(value, dict) and value:
        columns = [column for column in value.values() if isinstance(column, list)]
        if len(columns) != len(value) or len({len(column) for column in columns}) != 1:
            return None
        return [dict(zip(value, cells, strict=True)) for cells in zip(*columns, strict=True)]
    if not isinstance(value, list):
        return None
    found = [item for item in value if isinstance(item, dict)]
    return found if len(found) == len(value) else None


ROLE_KEYS = ("role", "from", "sender", "speaker", "author")  # of a message
CONTENTS = ("content", "value", "text", "utterance", "message")  # keys of its text
CALLS = ("tool_calls", "function_call", "function_calls")  # keys of an answer with calls; the last is Olmo's
_TOOLS = ("tools", "functions")  # keys of a system message with the tools: GLM's and Olmo's
FUNCTION_CALL = "function_call"  # ShareGPT's role of an answer that is a call; ms-swift's tool_call
ASSISTANT, TOOL = "assistant", "tool"
ROLES = {
    **dict.fromkeys(
        ("gpt", "assistant", "chatgpt", "bard", "model", "bing", "bot", "chatbot", "agent", "ai"), ASSISTANT
    ),
    **dict.fromkeys(("human", "user", "prompter", "customer"), "user"),
    **dict.fromkeys(("system", "developer"), "system"),  # developer: OpenAI's newer name
    **dict.fromkeys(("tool", "observation", "function", "ipython", "environment"), TOOL),
    **dict.fromkeys(("tool_response", "tool_result", "function_response"), TOOL),
    **dict.fromkeys((FUNCTION_CALL, "tool_call"), FUNCTION_CALL),
}


def key_of(messages: list[RawRow], keys: tuple[str, ...]) -> str:
    """Return the first key that has a value in a message. Parquet gives each of them the keys of all."""
    return next((key for key in keys if any(message.get(key) is not None for message in messages)), keys[0])


def normal_role(value: JsonValue) -> JsonValue:
    """Return a role as user, assistant, system or tool, for `Human`, `gpt` and the like; an unknown role unchanged."""
    if not isinstance(value, str):
        return value
    return ROLES.get(value) or ROLES.get(value.strip().lower().replace("-", "_").replace(" ", "_"), value)
