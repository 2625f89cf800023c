"""Chats that are written into one text: with labels, as `Human: …`; as a chat template renders them; and Glaive's calls.

Only texts that begin with a question's label are read so: a label somewhere in a text is a part of it.
"""

import itertools
import json
import re
from typing import NamedTuple

from pydantic import JsonValue

from loraflow.data.cell_values import strict_json
from loraflow.data.chats import BadRow
from loraflow.data.formats.row_fields import ASSISTANT, TOOL, RowFields, Turn, normal_role
from loraflow.data.formats.tools import read_calls


class _Dialect(NamedTuple):
    begin: re.Pattern[str]  # of a text
    label: re.Pattern[str]  # before each message; its group is the role
    begin_mark: str = ""  # with which each label begins, and nothing else
    ends: tuple[str, ...] = ()  # one is after each message, or after each answer; only of a rendered chat
    preamble: str = ""  # with which the system message begins, in front of the first label


def _labelled(question: str) -> _Dialect:
    """Return the dialect of lines that begin with `Human:` or `User:`, and `Assistant:`; the first may be `System:`."""
    return _Dialect(
        re.compile(rf"\s*{question}:"),
        re.compile(rf"^({question}|Assistant):[ \t]?|\A(System):[ \t]?", re.MULTILINE),
    )


def _rendered(mark: str, behind: str, *ends: str, role: str = r"\w+") -> _Dialect:
    """Return the dialect of a template: the text before each role, patterns of what follows it and of roles, and ends."""
    before = re.escape(mark)
    return _Dialect(
        re.compile(before + role),
        re.compile(f"{before}({role}){behind}"),
        mark if role == r"\w+" else "",
        ends,
    )


_LINE = r"(?:\r?\n|\Z)"
# No pattern that is searched for begins with white space: a long run of it would be scanned once from each of its places.
_DIALECTS = (
    _labelled("Human"),  # Anthropic's; BELLE has no blank lines
    _labelled("User"),
    # OIG's
    _Dialect(re.compile(r"\s*<human>:"), re.compile(r"^<(human|bot)>:[ \t]?", re.MULTILINE)),
    # openassistant-guanaco
    _Dialect(re.compile(r"\s*### Human:"), re.compile(r"### (Human|Assistant):[ \t]?")),
    _rendered("<|im_start|>", _LINE, "<|im_end|>"),  # ChatML
    _rendered("<|start_header_id|>", r"<\|end_header_id\|>", "<|eot_id|>", "<|eom_id|>"),  # Llama 3
    _rendered("<start_of_turn>", _LINE, "<end_of_turn>"),  # Gemma
    _rendered("<|turn>", _LINE, "<turn|>"),  # Gemma 4
    # Phi-3, Zephyr, GLM; a token of another role is a label too, and refused
    _rendered("<|", r"\|>", "<|end|>", "<|endoftext|>", "</s>", role=r"(?!end)/?\w+"),
    # Llama 2, Mistral
    _Dialect(re.compile(r"\[INST\]"), re.compile(r"\[(/?INST)\]"), ends=("</s>",)),
    _Dialect(
        re.compile(r"### Instruction:"),
        re.compile(r"^### (Instruction|Response):", re.MULTILINE),
        ends=("\n### End", "</s>", "<|endoftext|>"),
        preamble="Below is an instruction that describes a task",
    ),  # Alpaca
)
# What a text with a chat may begin with. It decides quickly about most texts.
_CHAT = re.compile(r"\s*(?:[<[]|###|(?:Human|User|System):|Below is an)")
_BEGIN = re.compile(r"(?:<s>|<bos>|\[gMASK\]<sop>|<\|begin_of_text\|>)")
_ENDS = ("<eos>", "<|end_of_text|>", "<|endoftext|>")
_ROLES = {"INST": "user", "/INST": ASSISTANT, "Instruction": "user", "Response": ASSISTANT}
_INPUT = re.compile("^### Input:", re.MULTILINE)  # Alpaca's second part of a question
_LLAMA_SYSTEM = re.compile(r"<<SYS>>(.*?)<</SYS>>", re.DOTALL)
_SYSTEM = re.compile(r"\s*System:")  # before the first question, whose label begins a line
_QUESTION = re.compile(r"^(?:Human|User):", re.MULTILINE)
_NEMO = re.compile(r"\n<extra_id_1>(User|Assistant)(?:\n|\Z)")  # HelpSteer's, after the first question
_GLAIVE = re.compile(r"(?:\A|(?<=\n\n\n))[ \t]{0,4}(USER|ASSISTANT|FUNCTION RESPONSE):")
_GLAIVE_LINE = re.compile(r"^[ \t]{0,4}(USER|ASSISTANT|FUNCTION RESPONSE):", re.MULTILINE)
_GLAIVE_SYSTEM = re.compile(r"\s*SYSTEM:")
_GLAIVE_QUESTION = re.compile(r"^[ \t]{0,4}USER:", re.MULTILINE)
_GLAIVE_ROLES = {"USER": "user", "ASSISTANT": ASSISTANT, "FUNCTION RESPONSE": TOOL}
_GLAIVE_END = "<|endoftext|>"
# Glaive's call whose arguments are in single quotes
_QUOTED_CALL = re.compile(r"""\{\s*"name"\s*:\s*("(?:[^"\\]|\\.)*")\s*,\s*"arguments"\s*:\s*'""", re.DOTALL)
_ESCAPED = re.compile(r"\\(.)", re.DOTALL)
_WHITE = re.compile(r"\s*")
_HAS_FUNCTIONS = re.compile(
    r"You are a helpful assistant with access to the following functions\. Use them if required\s*-?"
)


def is_transcript(value: JsonValue) -> bool:
    """Tell whether a value is a text that has a chat, with a question and an answer."""
    found = split_chat(value)
    return found is not None and any(_role(label) == ASSISTANT for label in found[0].label.finditer(found[1]))


def read_transcript(fields: RowFields) -> list[Turn]:
    """Read a row whose `text` has a chat.

    Raises:
        BadRow: the text has no chat, a part of it belongs to no message, or two answers follow each other.
    """
    text = fields.value("text")
    found = split_chat(text)
    if found is None or not is_transcript(text):
        raise BadRow(
            "text: expected a chat with the labels Human: or User: and Assistant:, ### Human:, or those of a template"
        )
    return _turns(found[1], found[0])


def prompt_turns(prompt: str, answer: JsonValue) -> list[Turn] | None:
    """Return the messages of a prompt that has the chat so far and ends with the label of the answer; else None.

    Args:
        prompt: such as "Human: q Assistant:", with line breaks before the labels.
        answer: the text that follows it. It is the last message unchanged, whatever labels it has. Of a rendered chat, it
            may begin with its label, and end with the token that closes it.

    Raises:
        BadRow: a text belongs to no message, or two answers follow each other.
    """
    if not isinstance(answer, str):
        return None
    if _NEMO.search(prompt):
        first, *rest = _NEMO.split(prompt)
        turns = [Turn("user", first), *map(Turn, map(normal_role, rest[::2]), rest[1::2])]
        if turns[-1].role == ASSISTANT and not str(turns[-1].content).strip():
            turns.pop()  # the label of the answer
        return alternating([*turns, Turn(ASSISTANT, answer)])
    found = split_chat(prompt)
    labels = list(found[0].label.finditer(found[1])) if found is not None else []
    if found is None or not labels:
        return None
    dialect, prompt = found
    begun = prompt[labels[-1].end() :].lstrip()  # a template may open the reasoning
    if _role(labels[-1]) == ASSISTANT and begun.rstrip() in ("", "<think>"):
        prompt = prompt[: labels[-1].start()]
        answer = begun + answer
    else:
        label = dialect.label.match(answer.lstrip())
        if not dialect.ends or _role(labels[-1]) != "user" or label is None or _role(label) != ASSISTANT:
            return None
        answer = label.string[label.end() :].lstrip()
    if dialect.ends:
        answer = _without_end(answer, dialect, _ENDS)
        before = (answer[: label.start()].rstrip().removesuffix("<s>") for label in dialect.label.finditer(answer))
        if any(text != _without_end(text, dialect) for text in before):
            raise BadRow("more than one message in the answer")
    return alternating([*_turns(prompt, dialect), Turn(ASSISTANT, answer)])


def split_chat(text: JsonValue) -> tuple[_Dialect, str] | None:
    """Return the dialect of a text, and the text without the token that begins it; None if it is no chat."""
    if not isinstance(text, str) or not _CHAT.match(text):
        return None
    text = text.lstrip()
    begin = _BEGIN.match(text)
    for dialect in _DIALECTS:
        if dialect.ends and begin:
            text, begin = text[begin.end() :].lstrip(), None
        first = None
        if dialect.preamble and text.startswith(dialect.preamble):
            first = dialect.label.search(text)
        elif not dialect.ends and _SYSTEM.match(text):
            first = _QUESTION.search(text)
        if dialect.begin.match(text, first.start() if first else 0):
            return dialect, text
    return None


def _without_end(text: str, dialect: _Dialect, also: tuple[str, ...] = ()) -> str:
    """Return a message without the tokens that end it and the document. `</s>` that closes an `<s>` in it is HTML."""
    found = ""
    for ends in (dialect.ends + also, dialect.ends):
        cut = text.rstrip()
        end = next((end for end in ends if end != found and cut.endswith(end)), "")
        if end and (end != "</s>" or cut.count("<s>") < cut.count(end)):
            text, found = cut.removesuffix(end), end
    if end := next((end for end in dialect.ends if end in text and end not in ("</s>", "\n### End")), ""):
        raise BadRow(f"more than one message: {end} is not at the end")
    return text


def _role(label: re.Match[str]) -> JsonValue:
    name = label[label.lastindex or 0]
    return _ROLES.get(name) or normal_role(name)


def _turns(text: str, dialect: _Dialect) -> list[Turn]:
    labels = list(dialect.label.finditer(text))
    before = (text[: labels[0].start()] if labels else text).strip()
    turns: list[Turn] = []
    if before and dialect.preamble and before.startswith(dialect.preamble):
        turns.append(Turn("system", before))
    elif before:
        raise BadRow(f"a text before the first message: {before[:40]!r}")
    if dialect.begin_mark and text.count(dialect.begin_mark) != len(labels):
        raise BadRow(f"expected a role after each {dialect.begin_mark}, and behind it what the template writes")
    has_ends = labels and any(end in text[: labels[-1].start()] for end in dialect.ends)
    for label, following in zip(labels, [*labels[1:], None], strict=True):
        role, content = _role(label), text[label.end() : following.start() if following else len(text)].strip()
        if dialect.ends:
            if not dialect.begin_mark and role not in ("system", "user", ASSISTANT):
                raise BadRow(f"{label[0]} is the label of another role")
            question = following if following is not None and _role(following) == "user" else None
            content = whole = content.removesuffix("<s>").rstrip() if question else content
            if role == ASSISTANT or label[0].startswith("<"):
                content = _without_end(whole, dialect, _ENDS if role == ASSISTANT else ())
            if question and content == whole and (has_ends or not label[0].startswith("<")):
                raise BadRow(
                    f"a label in a message cuts it: {question[0].strip()} without {dialect.ends[-1]} before it"
                )
            if dialect.preamble and role == "user":
                content = "\n\n".join(part.strip() for part in _INPUT.split(content, 1) if part.strip())
        elif role == ASSISTANT:
            content = _without_end(content, dialect, (*_ENDS, "</s>"))
        turns.append(Turn(role, content.strip()))
    if turns and (system := _LLAMA_SYSTEM.match(str(turns[0].content))):
        turns[:1] = Turn("system", system[1].strip()), Turn("user", system.string[system.end() :].strip())
    return alternating(turns)


def alternating(turns: list[Turn]) -> list[Turn]:
    """Return the messages of a text, in which two answers that follow each other have been cut at the wrong places.

    Raises:
        BadRow: they do.
    """
    for number, (turn, following) in enumerate(itertools.pairwise(turns), 1):
        if turn.role == following.role and turn.role in ("user", ASSISTANT):
            raise BadRow(
                f"two {turn.role} messages in a row (turns {number} and {number + 1}): a label in a message cuts it"
            )
    return turns


def is_glaive(row: dict[str, JsonValue]) -> bool:
    """Tell whether a row has the texts `system` and `chat` of Glaive's function calls, or both in one text."""
    return bool(_glaive_texts(row)[0])


def _glaive_texts(row: dict[str, JsonValue]) -> tuple[list[str], str, str]:
    """Return the keys of Glaive's texts, the system text and the chat. There are no keys if the row has none."""
    system, chat = row.get("system"), row.get("chat")
    if isinstance(system, str) and isinstance(chat, str):
        return (["system", "chat"] if _GLAIVE.match(chat.lstrip()) else []), system, chat.lstrip()
    for key in ("text", "sample"):
        text = row.get(key)
        if isinstance(text, str) and _GLAIVE_SYSTEM.match(text) and (found := _GLAIVE_QUESTION.search(text)):
            return [key], text[: found.start()], text[found.start() :]
    return [], "", ""


def read_glaive(fields: RowFields) -> list[Turn]:
    """Read Glaive's function calls: the tools are JSON in the system text, the calls follow `<functioncall>`.

    Raises:
        BadRow: a tool or a call is no JSON.
    """
    keys, system, chat = _glaive_texts(fields.row)
    if not keys:
        raise BadRow("expected the texts system and chat, with the labels USER: and ASSISTANT:")
    for key in keys:
        fields.value(key)
    text, fields.tools = _functions(system.strip().removeprefix("SYSTEM:").strip())
    labels = list(_GLAIVE.finditer(chat))
    if not any(label[1] == "ASSISTANT" for label in labels):  # version 1 has no blank lines before its labels
        labels = list(_GLAIVE_LINE.finditer(chat))
    ends = [label.start() for label in labels[1:]] + [len(chat)]
    turns = [Turn("system", text)] if text else []
    for label, end in zip(labels, ends, strict=True):
        content = chat[label.end() : end].strip().removesuffix(_GLAIVE_END).strip()
        turn = Turn(_GLAIVE_ROLES[label[1]], content)
        if turn.role == ASSISTANT and "<functioncall>" in content:
            text, _, call = content.partition("<functioncall>")
            turn = turn._replace(content=text.strip(), calls=tuple(read_calls(_call(call.strip()), "functioncall")))
        turns.append(turn)
    return alternating(turns)


def _functions(system: str) -> tuple[str, JsonValue]:
    begin = re.search(r"^(?:\[\s*)?\{", system, re.MULTILINE)
    if begin is None:
        return system, None
    text, at = system[: begin.start()].strip(), begin.start()
    decoder, tools = json.JSONDecoder(), list[JsonValue]()
    while at < len(system):
        try:
            tool, end = decoder.raw_decode(system, at)
        except (ValueError, RecursionError) as error:
            raise BadRow(f"system: a function is no JSON: {error}") from None
        tools += tool if isinstance(tool, list) else [tool]
        white = _WHITE.match(system, end)
        at = end if white is None else white.end()
    return _HAS_FUNCTIONS.sub("", text).strip(), tools


def _call(text: str) -> JsonValue:
    """Return a call whose arguments are JSON, or JSON in single quotes as Glaive writes them."""
    try:
        if (found := _QUOTED_CALL.match(text)) is None:
            call = strict_json(text)
        else:
            arguments = text[found.end() :].removesuffix("}").rstrip()
            if not text.endswith("}") or not arguments.endswith("'"):
                raise ValueError("a quote or brace is not closed")
            arguments = _ESCAPED.sub(lambda sign: "'" if sign[1] == "'" else sign[0], arguments[:-1])
            call = {"name": strict_json(found[1]), "arguments": strict_json(arguments)}
    except ValueError as error:
        raise BadRow(f"<functioncall> {text[:60]!r}: the call or its arguments are no JSON: {error}") from None
    if not isinstance(call, dict) or "name" not in call or not call.keys() <= {"name", "arguments"}:
        raise BadRow(f"expected <functioncall> with name and arguments; got {text[:60]!r}")
    return call
