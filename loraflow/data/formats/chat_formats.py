"""Convert rows to chats: messages, ShareGPT, Alpaca and prompt/completion.

Nothing is dropped silently. A key that has a value and is not read is reported (`ReadChat.unread`). Two keys for one thing
with different texts are refused. Marks that exclude an answer from the loss are honoured or refused
(`loraflow/data/answers/marks.py`).
"""

from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from functools import partial
from types import MappingProxyType

from pydantic import JsonValue

from loraflow.data.answers.labels import Labels
from loraflow.data.answers.marks import MAX_WEIGHT, MarkedFalse
from loraflow.data.answers.preference_pairs import refuse_corrected, refuse_rejected
from loraflow.data.cell_values import is_chat_as_text, is_missing, media_key, parsed_list, refuse_media
from loraflow.data.chats import BadRow, Message, Tool
from loraflow.data.formats.message_checks import messages_with_tools, plain_messages
from loraflow.data.formats.published_formats import (
    conversion_hint,
    hint_to_choose,
    is_tree,
    is_xlam,
    pairs_with_answer,
    read_gemini,
    read_pairs,
    read_tree,
    read_xlam,
    refuse_lost_history,
    template_arguments,
)
from loraflow.data.formats.question_parts import refuse_answers_by_letter, refuse_lost_parts
from loraflow.data.formats.row_fields import (
    ASSISTANT,
    CONTENTS,
    ROLE_KEYS,
    RawRow,
    RowFields,
    Turn,
    has_value,
    key_of,
    objects,
    without_answer,
)
from loraflow.data.formats.transcripts import is_glaive, is_transcript, prompt_turns, read_glaive, read_transcript

# Anthropic's and Alpaca's; OpenOrca's
_SYSTEM_KEYS = ("system", "system_prompt")
# Read only if they are texts and none of the former has a value: they may be flags, events or Gemini's objects.
_SYSTEM_TEXTS = (
    "systemPrompt", "SystemPrompt", "system_message", "systemMessage", "SystemMessage", "system_instruction",
    "systemInstruction",
)  # fmt: skip
_NO_COLUMNS: Mapping[str, str] = MappingProxyType({})


@dataclass(frozen=True, slots=True)
class ReadChat:
    """A row's chat."""

    messages: list[Message]
    learned: tuple[int, ...] | None = None  # numbers of the answers that are learned, from 0; None: every answer
    weights: tuple[float, ...] | None = None  # of each of `learned` in the loss; None: 1 for all
    unread: tuple[str, ...] = ()  # keys that have a value and were not read


def read_chat(
    row: JsonValue,
    format_name: str = "auto",
    columns: Mapping[str, str] = _NO_COLUMNS,
    labels: Labels | None = None,
    tools: list[Tool] | None = None,
    ignore: Collection[str] = (),
) -> ReadChat:
    """Return a row's chat, which answers of it are learned, and which keys were not read.

    Args:
        columns: {loraflow's column: the row's column}, for columns with other names.
        labels: tells whether a label is a class. By default none is.

    Raises:
        MarkedFalse: marks exclude every answer of the row.
        BadRow: the row is not a valid chat.
    """
    is_plain = not columns and tools is None and format_name in ("auto", "messages")
    turns_alone = row.get("messages") if is_plain and isinstance(row, dict) and len(row) == 1 else None
    if (plain := plain_messages(turns_alone)) is not None:
        return ReadChat(plain)
    fields = RowFields(_object(row), columns, labels or Labels(), ignore)
    turns = _turns(fields, format_name)
    has_others = not fields.row.keys() <= _FORMAT_KEYS
    row_weight, excluded_by = fields.row_weight() if has_others else (1.0, "")
    if turns and turns[-1].role == "user" and (hint := hint_to_choose(fields.row)):
        raise BadRow(f"the chat ends with a question, and the chosen answer is beside it{hint}")
    messages = messages_with_tools(fields, turns, tools)
    if not row_weight:
        raise MarkedFalse("the row is marked as not to be learned", excluded_by)
    learned, weights = _marked(turns, row_weight, messages)
    unread = fields.unread()
    if has_others or fields.media or unread:  # only of what is learned
        used = fields.used
        read = {*used, *used.values()}
        refuse_media(fields.row, [turn.content for turn in turns], fields.media or media_key(fields.row, read))
        refuse_answers_by_letter(fields.row, messages, read)
        refuse_lost_history(fields.own, messages, used)
        refuse_lost_parts(fields.own, messages, used, columns)
        refuse_rejected(fields.row, messages, fields.chosen_answers())
        refuse_corrected(fields.row, messages, used)
    return ReadChat(messages, learned, weights, unread)


def _marked(
    turns: list[Turn], row_weight: float, messages: list[Message]
) -> tuple[tuple[int, ...] | None, tuple[float, ...] | None]:
    """Return the numbers of the learned answers, and their weights; None for what no mark changes."""
    if row_weight == 1 and all(turn.weight == 1 for turn in turns):
        return None, None
    answers = [n for n, message in enumerate(messages) if message["role"] == "assistant"]
    learned = tuple(n for n in answers if turns[n].weight)
    if not learned:
        by = dict.fromkeys(turns[n].excluded_by for n in answers)
        raise MarkedFalse("its answers are marked as not to be learned", ", ".join(by))
    weights = tuple(turns[n].weight * row_weight for n in learned)
    if max(weights) > MAX_WEIGHT:
        raise BadRow(
            f"the product of the row's and an answer's weight is {max(weights):g}; expected at most {MAX_WEIGHT}"
        )
    has_weights = any(weight != 1 for weight in weights)
    return (learned if has_weights or len(learned) < len(answers) else None), (weights if has_weights else None)


def to_prompt(row: JsonValue, format_name: str = "auto", tools: list[Tool] | None = None) -> list[Message]:
    """Return a row's prompt: its chat without the last answer, whether the row has that answer or not.

    Marks are not read: a question whose answer is marked as wrong may still be asked.

    Raises:
        BadRow: the row has no prompt.
    """

    def messages(row: RawRow, name: str) -> list[Message]:
        fields = RowFields(row, _NO_COLUMNS, None)
        return messages_with_tools(fields, _turns(fields, name), tools)

    own = _object(row)
    try:
        # As it is learned: beside prompt and completion, `instruction` is not read.
        return messages(own, format_name)[:-1]
    except BadRow:
        pass
    dummy = _with_dummy_answer(own)
    if format_name == "auto" and detect_format(dummy) == "alpaca" and has_value(own.get("prompt")):
        format_name = _format_of_question(own)
    return messages(dummy, format_name)[:-1]


def _format_of_question(row: RawRow) -> str:
    """Return the format of a row with `instruction` and `prompt`, by the keys of its answer."""
    formats = [
        name for name in ("alpaca", "prompt_completion") if any(key <= row.keys() for key in FORMATS[name].needs)
    ]
    if len(formats) != 1 and row["prompt"] != row["instruction"]:
        raise BadRow("instruction and prompt may both be the question; choose by --format alpaca or prompt_completion")
    return formats[0] if formats else "alpaca"


def _object(row: JsonValue) -> RawRow:
    if isinstance(row, dict):
        return row
    raise BadRow(f"expected an object, got {type(row).__name__}")


def is_bare_chat(value: JsonValue) -> bool:
    """Tell whether a row is a list of messages that is not in an object."""
    turns = objects(value) if isinstance(value, list) else None
    return bool(turns) and all("role" in turn or "from" in turn for turn in turns or ())


def _turns(fields: RowFields, format_name: str) -> list[Turn]:
    if format_name == "auto":
        format_name = detect_format(fields.row)
        if (
            format_name == "messages"
            and has_value(fields.row.get("conversations"))
            and fields.value("conversations") != fields.row["messages"]  # data.columns may name one column for both
        ):
            _refuse_two_chats(fields)
    turns = _with_system(fields, FORMATS[format_name].read(fields))
    if "chat_template_kwargs" in fields.row:
        system, tools = template_arguments(fields, turns)
        fields.tools = fields.tools if tools is None else tools
        turns = turns if system is None else [Turn("system", system), *turns]
    return fields.with_reasoning(turns)


def _refuse_two_chats(fields: RowFields) -> None:
    chats = [[turn[:2] for turn in FORMATS[name].read(fields)] for name in ("messages", "sharegpt")]
    if chats[0] != chats[1]:
        raise BadRow(
            "messages and conversations have different chats; choose one by data.format (messages or sharegpt)"
        )


def _with_system(fields: RowFields, chat: list[Turn]) -> list[Turn]:
    if not fields.used.keys().isdisjoint(_SYSTEM_KEYS):  # the format has read it
        return chat
    texts = {
        key: text for key in _SYSTEM_TEXTS if isinstance(text := fields.row.get(key), str) and not is_missing(text)
    }
    if texts and not any(has_value(fields.row.get(key)) for key in _SYSTEM_KEYS):
        system = fields.optional(*texts)
    else:
        system = fields.optional(*_SYSTEM_KEYS)
    if isinstance(system, list):
        system = fields.joined(system, "system")
    if not has_value(system) or is_missing(system):
        return chat
    if not isinstance(system, str):
        key = next(key for key in _SYSTEM_KEYS if has_value(fields.row.get(key)))
        raise BadRow(f"the system column {key} is {type(system).__name__}; expected text")
    if chat and chat[0].role == "system":
        if chat[0].content == system:
            return chat
        raise BadRow("two different system messages: one in the chat, one in the system column")
    return [Turn("system", system), *chat]


def _with_dummy_answer(row: RawRow) -> RawRow:
    """Put a dummy answer where the answer belongs, so that a prompt passes the checks of a whole chat."""
    out = dict(row)
    for key in ("messages", "conversations", "contents"):
        value = parsed_list(out.get(key), key)
        turns = objects(value)
        if (pairs := pairs_with_answer(value)) is not None:
            out[key] = pairs
        elif turns:
            role, content = key_of(turns, ROLE_KEYS), key_of(turns, (*CONTENTS, "parts"))
            out[key] = [*without_answer(turns), {role: ASSISTANT, content: "."}]
    for question, answer in (("instruction", "output"), ("prompt", "completion")):
        if question in out and not isinstance(out[question], dict):  # a tree has its own answers
            if is_chat_as_text(out[question]):
                out[question] = parsed_list(out[question], question)
            out.pop("response", None)
            out[answer] = [{"role": "assistant", "content": "."}] if isinstance(out[question], list) else "."
    return out


def detect_format(row: RawRow) -> str:
    """Return the name of the first format whose keys have values in a row, else of the first whose keys it has.

    Raises:
        BadRow: the row does not have the keys of any format.
    """
    for keys in ({key for key, value in row.items() if has_value(value)}, row.keys()):
        for name, needed in _NEEDS:
            if needed <= keys and FORMATS[name].fits(row):
                return name
    raise BadRow(
        "expected messages, conversations, instruction/output or prompt/completion; "
        f"got the keys {', '.join(map(str, list(row)[:8])) or '(none)'}{conversion_hint(row)}"
    )


def has_known_keys(row: RawRow) -> bool:
    """Tell whether a row has the keys of a format. Their values are not checked."""
    try:
        detect_format(row)
    except BadRow:
        return False
    return True


# -- one function per format ----------------------------------------------------------------------------------------


def _chat(column: str, fields: RowFields) -> list[Turn]:
    value = parsed_list(fields.value(column), column)
    if (pairs := read_pairs(fields, column, value)) is not None:
        return pairs
    messages = objects(value)
    if messages is None:
        raise BadRow(f"{column}: expected a list of {{role, content}} or {{from, value}}")
    # In `messages` with a role, `from` may be its author.
    own = 1 if column == "messages" else 2
    roles, contents = (
        (key, *({*names[:own]} - {key} if key in names[:own] else ()))
        for names in (ROLE_KEYS, CONTENTS)
        for key in [key_of(messages, names)]
    )
    return fields.turns(column, messages, roles, contents)


def _alpaca(fields: RowFields) -> list[Turn]:
    instruction, context = fields.value("instruction"), fields.optional("input", "context")  # Dolly says context
    if not isinstance(instruction, str):
        raise BadRow(f"instruction is {type(instruction).__name__}; expected text")
    if context is not None and not isinstance(context, str):
        raise BadRow(f"input is {type(context).__name__}; expected text")
    _refuse_chat_as_text("instruction", instruction)
    user = instruction
    if context is not None and context.strip() and not is_missing(context):
        user = f"{instruction}\n\n{context}" if instruction.strip() else context
    answer = fields.value("output", "response")
    if user == instruction:
        return _prompt_and_answer(fields, instruction, answer)
    turns = [Turn("user", user), Turn("assistant", answer)]
    return [*_history(fields, turns), *turns]


def _prompt_and_answer(fields: RowFields, prompt: JsonValue, answer: JsonValue) -> list[Turn]:
    """Return the messages of a prompt and its answer, with earlier ones. Beside a system column, `System:` is text."""
    turns = prompt_turns(prompt, answer) if isinstance(prompt, str) else None
    has_system = any(
        isinstance(text := fields.row.get(key), str | list) and has_value(text) and not is_missing(text)
        for key in (*_SYSTEM_KEYS, *_SYSTEM_TEXTS)
    )
    if turns is None or (has_system and turns[0].role == "system" and str(prompt).lstrip().startswith("System:")):
        turns = [Turn("user", prompt), Turn("assistant", answer)]
    first = turns[0].role == "system"
    return [*turns[:first], *_history(fields, turns), *turns[first:]]


def _history(fields: RowFields, turns: list[Turn]) -> list[Turn]:
    """Return LLaMA-Factory's and ms-swift's earlier questions and answers."""
    history = parsed_list(fields.optional("history"), "history")
    if not has_value(history) or is_missing(history):
        return []
    out: list[Turn] = []
    for pair in history if isinstance(history, list) else [history]:
        if not isinstance(pair, list) or len(pair) != 2:
            raise BadRow("history: expected a list of [question, answer]; if it is none, name history in data.ignore")
        out += [Turn("user", pair[0]), Turn("assistant", pair[1])]
    if out[-2:] == turns[-2:] and len(str(turns[-1].content).split()) > 3:
        raise BadRow("history ends with the question and answer of its row: remove both there")
    return out


def _prompt_completion(fields: RowFields) -> list[Turn]:
    prompt, completion = fields.value("prompt"), fields.value("completion", "response")
    if is_chat_as_text(prompt) and is_chat_as_text(completion):  # CSV has no lists
        prompt, completion = parsed_list(prompt, "prompt"), parsed_list(completion, "completion")
    _refuse_chat_as_text("prompt", prompt)
    if isinstance(prompt, list) and isinstance(completion, str):  # Nemotron, OpenAI's evals
        completion = [{"role": ASSISTANT, "content": completion}]
    if isinstance(prompt, list) and isinstance(completion, list):  # trl's conversational format
        asked, answered = objects(prompt), objects(completion)
        if asked is None or answered is None:
            raise BadRow("prompt, completion: expected lists of {role, content}")
        keys = ("role",), ("content",)
        return [
            *fields.turns("prompt", asked, *keys),
            *fields.turns("completion", answered, *keys, first=len(asked) + 1),
        ]
    return _prompt_and_answer(fields, prompt, completion)


def _refuse_chat_as_text(key: str, value: JsonValue) -> None:
    """Refuse a prompt that was a list of messages before it was written as text: its brackets would be learned."""
    if is_chat_as_text(value):
        raise BadRow(
            f"{key} is a list of messages as text; write it as a list, with a list of messages as the completion"
        )


@dataclass(frozen=True)
class ChatFormat:
    """A format: the function that reads it, and the keys that it needs: those of one of the sets."""

    read: Callable[[RowFields], list[Turn]]
    needs: tuple[frozenset[str], ...]
    # Tells whether a row with these keys has the format: the keys may have other meanings.
    fits: Callable[[RawRow], bool] = lambda row: True


FORMATS = {
    "messages": ChatFormat(partial(_chat, "messages"), (frozenset({"messages"}),)),
    "sharegpt": ChatFormat(partial(_chat, "conversations"), (frozenset({"conversations"}),)),
    "alpaca": ChatFormat(_alpaca, (frozenset({"instruction", "output"}), frozenset({"instruction", "response"}))),
    "prompt_completion": ChatFormat(
        _prompt_completion, (frozenset({"prompt", "completion"}), frozenset({"prompt", "response"}))
    ),
    "gemini": ChatFormat(read_gemini, (frozenset({"contents"}),), lambda row: not isinstance(row["contents"], str)),
    "xlam": ChatFormat(read_xlam, (frozenset({"query", "answers", "tools"}),), is_xlam),
    "glaive": ChatFormat(
        read_glaive, (frozenset({"system", "chat"}), frozenset({"text"}), frozenset({"sample"})), is_glaive
    ),
    "tree": ChatFormat(read_tree, (frozenset({"prompt"}), frozenset({"text", "role", "replies"})), is_tree),
    "transcript": ChatFormat(read_transcript, (frozenset({"text"}),), lambda row: is_transcript(row["text"])),
}
_NEEDS = [(name, needed) for name, chat_format in FORMATS.items() for needed in chat_format.needs]
# A row with only these has no mark, and no part of its question beside it.
_FORMAT_KEYS = {*_SYSTEM_KEYS, *_SYSTEM_TEXTS}.union(
    *(needed for name in ("messages", "sharegpt", "alpaca", "prompt_completion") for needed in FORMATS[name].needs)
)
