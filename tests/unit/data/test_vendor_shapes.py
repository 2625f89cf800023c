"""Rows as files of vendors, trainers and public datasets have them: calls of tools, parts of messages, roles and labels.

The shapes were taken from the files themselves (names in the table); the texts are our own.
"""

import json
import shutil
import subprocess
import tracemalloc

import pytest

from loraflow.data.answers.labels import Labels
from loraflow.data.answers.marks import MarkedFalse
from loraflow.data.chats import BadRow
from loraflow.data.files.guess_columns import guess_columns
from loraflow.data.formats.chat_formats import read_chat, to_prompt
from loraflow.data.formats.published_formats import _TREES
from loraflow.data.formats.tools import read_tools


def user(text):
    return {"role": "user", "content": text}


def answer(text, **marks):
    return {"role": "assistant", "content": text, **marks}


def calls(*found, **others):
    return {"role": "assistant", "tool_calls": list(found), **others}


def told(row, columns=None):
    """Return what of a row is read: role, reasoning in braces, text, calls in brackets, and the tools of the first message."""
    out = []
    for message in read_chat(row, columns=guess_columns(row) if columns is None else columns).messages:
        reasoning = f"{{{message['reasoning_content']}}} " if "reasoning_content" in message else ""
        called = [
            f"{call['function']['name']}{json.dumps(call['function']['arguments'])}"
            for call in message.get("tool_calls", [])
        ]
        out.append(f"{message['role'][0]}: {reasoning}{message['content']}{' ' if called else ''}{'+'.join(called)}")
    return out


TOOL = {"name": "f", "description": "d", "parameters": {"type": "object", "properties": {"x": {"type": "integer"}}}}
QA = ["u: q", "a: a"]
CALLED = ["u: q", 'a:  f{"x": 1}', "t: 1", "a: a"]
GLAIVE = (
    "SYSTEM: You are a helpful assistant with access to the following functions. Use them if required -\n"
    + json.dumps(TOOL, indent=4)
)


def called_by(call, **others):
    return {"messages": [user("q"), calls(call, **others), {"role": "tool", "content": "1"}, answer("a")]}


ROWS = {
    "InternLM, xtuner": (called_by({"name": "f", "parameters": {"x": 1}}), CALLED),
    "a function_call with parameters": (
        {"messages": [user("q"), answer("", function_call={"name": "f", "parameters": {"x": 1}}), {"role": "function", "name": "f", "content": "1"},
                      answer("a")], "functions": [TOOL]}, CALLED),
    "LangChain": (called_by({"name": "f", "args": {"x": 1}, "id": "1", "type": "tool_call"}), CALLED),
    "a call by the name of its function": (called_by({"function": "f", "arguments": '{"x": 1}'}), CALLED),
    "ms-swift": (
        {"tools": json.dumps([TOOL]), "messages": [user("q"), {"role": "tool_call", "content": '{"name": "f", "arguments": {"x": 1}}'},
                                                   {"role": "tool_response", "content": "1"}, answer("a")]}, CALLED),
    "two calls of ms-swift after a text": (
        {"messages": [user("q"), answer("Two."), *[{"role": "tool_call", "content": json.dumps({"name": "f", "arguments": {"x": x}})} for x in (1, 2)],
                      {"role": "tool_response", "content": "1"}, {"role": "tool_response", "content": "2"}, answer("a")]},
        ["u: q", 'a: Two. f{"x": 1}+f{"x": 2}', "t: 1", "t: 2", "a: a"]),
    "function_response": (
        {"conversations": [{"from": "human", "value": "q"}, {"from": "function_call", "value": '{"name": "f", "arguments": {"x": 1}}'},
                           {"from": "function_response", "value": "1"}, {"from": "gpt", "value": "a"}]}, CALLED),
    "ChatGLM3, Firefly": (
        {"tools": [json.dumps([TOOL])], "conversations": [
            user("q"), answer("I call."), {"role": "tool", "name": "f", "parameters": {"x": 1}, "observation": [{"type": "y"}]}, answer("a")]},
        ["u: q", 'a: I call. f{"x": 1}', 't: [{"type": "y"}]', "a: a"]),
    "a text and calls at the end": (
        {"messages": [user("q"), answer("Two."), *[{"role": "tool_call", "content": '{"name": "f", "arguments": {}}'}] * 2]}, ["u: q", "a: Two. f{}+f{}"]),
    "a call with its own reasoning": (
        {"messages": [user("q"), answer("Text."), {"role": "tool_call", "content": '{"name": "f", "arguments": {}}', "reasoning_content": "r"},
                      {"role": "tool", "content": "1"}, answer("a")]}, ["u: q", "a: Text.", "a: {r}  f{}", "t: 1", "a: a"]),
    "a call of ChatGLM3 at the end": (
        {"conversations": [user("q"), {"role": "tool", "name": "f", "parameters": {"x": 1}}]}, ["u: q", 'a:  f{"x": 1}']),
    "Anthropic": (
        {"tools": [{"name": "f", "input_schema": TOOL["parameters"]}], "messages": [
            user("q"),
            answer([{"type": "thinking", "thinking": "r", "signature": "s"}, {"type": "text", "text": "Look."},
                    {"type": "tool_use", "id": "i", "name": "f", "input": {"x": 1}}]),
            user([{"type": "tool_result", "tool_use_id": "i", "content": [{"type": "text", "text": "1"}]}, {"type": "text", "text": "and?"}]),
            answer([{"type": "text", "text": "a"}])]},
        ["u: q", 'a: {r} Look. f{"x": 1}', "t: 1", "u: and?", "a: a"]),
    "Bedrock": (
        {"toolConfig": {"tools": [{"toolSpec": {"name": "f", "inputSchema": {"json": TOOL["parameters"]}}}]}, "messages": [
            user([{"text": "q"}]), answer([{"toolUse": {"toolUseId": "i", "name": "f", "input": {"x": 1}}}]),
            user([{"toolResult": {"toolUseId": "i", "content": [{"json": 1}]}}]), answer([{"text": "a", "cachePoint": None}])]}, CALLED),
    "Gemini": (
        {"tools": [{"functionDeclarations": [{"name": "f", "parameters": {"type": "OBJECT", "properties": {"x": {"type": "INTEGER"}}}}]}], "contents": [
            {"role": "user", "parts": {"text": "q"}}, {"role": "model", "parts": [{"functionCall": {"name": "f", "args": {"x": 1}}}]},
            {"role": "function", "parts": [{"functionResponse": {"name": "f", "response": {"y": 1}}}]}, {"role": "model", "parts": [{"text": "a"}]}]},
        ["u: q", 'a:  f{"x": 1}', 't: {"y": 1}', "a: a"]),
    "OpenAI's Responses": (
        {"messages": [user([{"type": "input_text", "text": "q"}]), answer([{"type": "output_text", "text": "a"}])]}, QA),
    "axolotl's parts": ({"messages": [user([{"type": "text", "content": "q", "train": False}]), answer([{"type": "text", "value": "a", "train": True}])]}, QA),
    "reasoning in parts": (
        {"messages": [user("q"), answer("a", reasoning_content=[{"type": "text", "text": "r"}, {"type": "text", "text": "s"}])]},
        ["u: q", "a: {rs} a"]),
    "Mistral's reasoning": (
        {"messages": [user("q"), answer([{"type": "thinking", "thinking": [{"type": "text", "text": "r"}]}, {"type": "text", "text": "a"}])]},
        ["u: q", "a: {r} a"]),
    "Firefly and ms-swift's pairs": (
        {"conversation_id": 1, "conversation": [{"human": "q", "assistant": "a"}, {"human": "r", "assistant": "b"}]}, [*QA, "u: r", "a: b"]),
    "Nemotron": ({"input": [user("q")], "output": "a", "system_prompt": "s", "reasoning": "off"}, ["s: s", *QA]),
    "OpenAI's evals": ({"input": [{"role": "system", "content": "s"}, user("q")], "ideal": "a"}, ["s: s", *QA]),
    "a solution that was generated": ({"problem": "q", "answer": "1", "generated_solution": "a"}, QA),
    "Camel": ({"message_1": "q", "message_2": "a", "topic": "t"}, QA),
    "messages of ShareGPT": ({"messages": [{"from": "human", "value": "q"}, {"from": "gpt", "value": "a"}]}, QA),
    "authors of messages": ({"messages": [{**user("q"), "from": "ann"}, {**answer("a"), "from": "desk", "value": 3}]}, QA),
    "a result that is an object": (
        {"conversations": [{"from": "human", "value": "q"}, {"from": "gpt", "value": "", "tool_calls": [{"name": "f", "arguments": {"x": 1}}]},
                           {"from": "tool", "value": {"y": [1]}}, {"from": "gpt", "value": "a"}]}, ["u: q", 'a:  f{"x": 1}', 't: {"y": [1]}', "a: a"]),
    "mistral-finetune's interactions": ({"interactions": [user("q"), answer("a")]}, QA),
    "OpenAssistant's messages with replies": (
        {"message_id": "m", "parent_id": None, "text": "q", "role": "prompter", "review_result": True, "deleted": False, "rank": None, "replies": [
            {"text": "worse", "role": "assistant", "rank": 1, "replies": []}, {"text": "a", "role": "assistant", "rank": 0, "replies": []}]}, QA),
    "a text with System": ({"text": "System: s\n\nUser: q\n\nAssistant: a"}, ["s: s", *QA]),
    "a text of OIG": ({"text": "<human>: q\n<bot>: a\n<human>: r\n<bot>: b"}, [*QA, "u: r", "a: b"]),
    "Guanaco's prompt": ({"instruction": "User: q\nAssistant:", "input": "", "output": "a"}, QA),
    "a label of another dialect": ({"text": "Human: q\nAssistant: a form:\nUser: x\nSystem: y"}, ["u: q", "a: a form:\nUser: x\nSystem: y"]),
    "Glaive's system and chat in one text": (
        {"text": GLAIVE + '\n\n\nUSER: q\n\n\nASSISTANT: <functioncall> {"name": "f", "arguments": \'{"x": 1}\'} <|endoftext|>\n\n\nFUNCTION RESPONSE: 1'
                          "\n\n\nASSISTANT: a\nUSER: b <|endoftext|>"}, [*CALLED[:-1], "a: a\nUSER: b"]),
    "Gemini's thoughts": (
        {"contents": [{"role": "user", "parts": [{"text": "q", "thought": False}]}, {"role": "model", "parts": [
            {"text": "r", "thought": True, "thoughtSignature": "s"}, {"text": "a", "thoughtSignature": "s"}]}]}, ["u: q", "a: {r} a"]),
    "Gemini's calls with signatures": (
        {"contents": [{"role": "user", "parts": [{"text": "q"}]},
                      {"role": "model", "parts": [{"functionCall": {"name": "f", "args": {"x": 1}}, "thoughtSignature": "s"}]},
                      {"role": "user", "parts": [{"function_response": {"name": "f", "response": 1}}]}, {"role": "model", "parts": [{"text": "a"}]}]}, CALLED),
    "Gemini's settings of calls": (
        {"toolConfig": {"functionCallingConfig": {"mode": "NONE"}}, "contents": [
            {"role": "user", "parts": [{"text": "q"}]}, {"role": "model", "parts": [{"text": "a"}]}]}, QA),
    "Gemini without tools": ({"tools": [{"functionDeclarations": []}], "messages": [user("q"), answer("a")]}, QA),
    **{f"toolConfig {json.dumps(value)}": ({"toolConfig": value, "messages": [user("q"), answer("a")]}, QA)
       for value in ("auto", False, {"toolChoice": {"auto": {}}})},
    "LangChain's calls in two places": (
        {"messages": [user("q"), answer([{"type": "text", "text": "x"}, {"type": "tool_use", "id": "1", "name": "f", "input": {"x": 1}}],
                                        tool_calls=[{"name": "f", "args": {"x": 1}, "id": "1", "type": "tool_call"}]),
                      {"role": "tool", "tool_call_id": "1", "content": "1"}, answer("a")]}, ["u: q", 'a: x f{"x": 1}', "t: 1", "a: a"]),
    **{f"arguments beside {json.dumps(other)}": (called_by({"name": "f", "arguments": {"x": 1}, **other}), CALLED) for other in (
        {"parameters": TOOL["parameters"]}, {"parameters": {"x": 1}}, {"input": "x"}, {"result": {"t": 1}})},
    "arguments as text beside parameters": (called_by({"name": "f", "arguments": '{"x": 1}', "parameters": {"x": 1}}), CALLED),
    "parameters as text beside input": (called_by({"name": "f", "arguments": None, "parameters": '{"x": 1}', "input": {"x": 1}}), CALLED),
    "arguments that are null": (called_by({"name": "f", "arguments": None, "result": {"t": 1}}), ["u: q", "a:  f{}", *CALLED[2:]]),
    "names of tools in brackets": ({"tools": ["[search]", "[calc]"], "messages": [user("q"), answer("a")]}, QA),
    "an observation without a call": (
        {"messages": [user("q"), calls({"name": "f", "arguments": {"x": 1}}), {"role": "tool", "name": "f", "observation": "1"}, answer("a")]}, CALLED),
    "ChatGLM3's nulls in Parquet": (
        {"messages": [user("q"), calls({"name": "f", "arguments": {"x": 1}}),
                      {"role": "tool", "name": "f", "content": None, "parameters": None, "observation": None}, answer("a")]}, [*CALLED[:2], "t: ", "a: a"]),
    "a result that is an empty list": (
        {"messages": [user("q"), calls({"name": "f", "arguments": {"x": 1}}), {"role": "tool", "content": []}, answer("a")]}, [*CALLED[:2], "t: ", "a: a"]),
    "results that are no parts": (
        {"messages": [user("q"), calls({"name": "f", "arguments": {"x": 1}}), {"role": "tool", "content": [{"file": "a.py"}]},
                      {"role": "tool", "content": [{"title": "t", "text": "x"}]}, answer("a")]},
        [*CALLED[:2], 't: [{"file": "a.py"}]', 't: [{"title": "t", "text": "x"}]', "a: a"]),
    "a reasoning's content": ({"messages": [user("q"), answer([{"type": "reasoning", "content": "r"}, {"type": "text", "text": "a"}])]}, ["u: q", "a: {r} a"]),
    "reasoning in parts of reasoning": (
        {"messages": [user("q"), answer([{"type": "thinking", "thinking": [{"type": "thinking", "thinking": "r"}]}, {"type": "text", "text": "a"}])]},
        ["u: q", "a: {r} a"]),
    **{f"reasoning beside an answer: {json.dumps(beside)}": ({"messages": [user("q"), answer("a", **beside)]}, ["u: q", "a: {r} a"]) for beside in (
        {"reasoning_content": [{"type": "thinking", "thinking": "r"}]}, {"thinking": [{"type": "reasoning", "text": "r"}]}, {"reasoning": ["r"]},
        {"reasoning_content": [{"text": "r"}], "thinking": "r"})},
    "null roles": ({"conversations": [{"from": "human", "value": "q", "role": None}, {"from": "gpt", "value": "a", "role": None}]}, QA),
    "null roles of messages": ({"messages": [{"from": "human", "value": "q", "role": None, "content": None}, {"from": "gpt", "value": "a"}]}, QA),
    **{f"messages of {role} and {content}": ({column: [{role: "user", content: "q"}, {role: "assistant", content: "a"}]}, QA)
       for column in ("messages", "conversations", "chat") for role in ("role", "from") for content in ("content", "value")},
    "a prompt with System and earlier turns": (
        {"prompt": "System: s\nUser: q\nAssistant:", "completion": "a", "history": [["h", "i"]]}, ["s: s", "u: h", "a: i", *QA]),
    "a prompt with System beside a system column": (
        {"instruction": "System: t\nUser: q\nAssistant:", "output": "a", "system": "s"}, ["s: s", "u: System: t\nUser: q\nAssistant:", "a: a"]),
    "a chat beside a problem": ({"problem": "q", "answer": "42", "conversation": [user("q"), answer("a")]}, QA),
    "a chat beside a solution": ({"question": "q", "solution": "42", "chat": [user("q"), answer("a")]}, QA),
    "a chat beside an expected output": ({"input": "q", "expected_output": "42", "conversation": [user("q"), answer("a")]}, QA),
    "a problem and its result": ({"problem": "q", "answer": "42", "level": "Level 5"}, ["u: q", "a: 42"]),
    "a question and an answer by letters": ({"q": "q", "a": "a", "id": 3}, QA),
    **{f"Glaive beside {json.dumps(other)}": ({**other, "sample": "SYSTEM: s\n[1] be kind\nUSER: q\nASSISTANT: a"}, ["s: s\n[1] be kind", *QA])
       for other in ({"text": None}, {"text": "title"}, {"system": None, "chat": None})},
    "Glaive's list of tools": (
        {"text": "SYSTEM: s\n[\n  " + json.dumps(TOOL) + "]\nUSER: q\nASSISTANT: a"}, ["s: s", *QA]),
    "Glaive's version 1": (
        {"sample": GLAIVE + '\nUSER: q\nASSISTANT: <functioncall> {"name": "f", "arguments": {"x": 1}}\nFUNCTION RESPONSE: 1\nASSISTANT: a'}, CALLED),
}  # fmt: skip


@pytest.mark.parametrize("shape", ROWS)
def test_a_row_is_read_as_its_file_means_it(shape):
    row, expected = ROWS[shape]
    assert told(row) == expected
    columns = guess_columns(row)
    renamed = {key: value for key, value in row.items() if key not in columns.values()}
    prompt = to_prompt({**renamed, **{key: row[column] for key, column in columns.items()}})
    assert len(prompt) == len(expected) - 1


@pytest.mark.parametrize(
    ("role", "content"), [("role", "content"), ("role", "value"), ("from", "value"), ("from", "content")]
)
@pytest.mark.parametrize("column", ["messages", "conversations"])
def test_a_prompt_has_no_answer_however_its_role_is_written(column, role, content):
    nulls = dict.fromkeys(("role", "from", "content", "value"))  # of Parquet
    for others in ({}, nulls):
        turns = [{**others, role: "user", content: "q"}, {**others, role: "assistant", content: "a"}]
        assert to_prompt({column: turns}) == to_prompt({column: turns[:1]}) == [user("q")]


REFUSED = {
    "a part that is not learned": (
        {"messages": [user("q"), answer([{"type": "text", "text": "No.", "train": False}, {"type": "text", "text": "a"}])]}, "train: False marks a part"),
    "a part with weight 0": ({"messages": [user("q"), answer([{"type": "text", "text": "a", "weight": 0}])]}, "weight: 0 marks a part"),
    "arguments under an unknown name": (called_by({"name": "f", "values": {"x": 1}}), "values is not read"),
    "arguments twice": (called_by({"name": "f", "input": {"x": 1}, "parameters": {"x": 2}}), "parameters and input have different values"),
    **{f"a call that is not learned, by {key}": (
        {"messages": [user("q"), answer([{"type": "tool_use", "name": "f", "input": {}, key: mark}])]}, f"{key}: {mark} marks a part")
       for key, mark in (("train", False), ("weight", 0), ("loss", False), ("label", False))},
    "a text with a label of 0": ({"messages": [user("q"), answer([{"type": "text", "text": "a", "label": 0}])]}, "label: 0 marks a part"),
    "Gemini's text with an image": (
        {"contents": [{"role": "user", "parts": [{"text": "q", "inlineData": {"data": "x"}}]}, {"role": "model", "parts": [{"text": "a"}]}]},
        "message 1: a part with the keys text, inlineData"),
    "Gemini's code": (
        {"contents": [{"role": "user", "parts": [{"text": "q"}]}, {"role": "model", "parts": [{"executableCode": {"code": "1"}}]}]},
        "message 2: a part with the keys executableCode"),
    "Gemini's image": (
        {"contents": [{"role": "user", "parts": [{"inlineData": {"data": "x"}}]}, {"role": "model", "parts": [{"text": "a"}]}]}, "a part of type file"),
    "an image in the system's instruction": (
        {"systemInstruction": {"parts": [{"functionCalling": {}}]}, "contents": [{"role": "user", "parts": [{"text": "q"}]}]}, "systemInstruction: a part with"),
    "two calls in two places": (
        {"messages": [user("q"), answer([{"type": "tool_use", "id": "1", "name": "f", "input": {}}],
                                        tool_calls=[{"id": "2", "name": "f", "arguments": {}}])]}, "message 2: different calls"),
    "a result of another call": (
        {"messages": [user("q"), answer([{"type": "tool_use", "id": "1", "name": "f", "input": {}}]),
                      {"role": "tool", "tool_call_id": "2", "content": [{"type": "tool_result", "content": "1"}]}, answer("a")]},
        "tool_call_id '2' is not among the calls"),
    "a result of two calls": (
        {"messages": [user("q"), answer([{"type": "tool_use", "id": "1", "name": "f", "input": {}}]),
                      {"role": "tool", "tool_call_id": "2", "content": [{"type": "tool_result", "tool_use_id": "1", "content": "1"}]}, answer("a")]},
        "one of '1' in the content, and of '2' beside it"),
    "reasoning with a call": ({"messages": [user("q"), answer("a", thinking=[{"type": "tool_use", "name": "f", "input": {}}])]}, "reasoning that is no text"),
    "two reasonings": ({"messages": [user("q"), answer("a", thinking="r", reasoning=["r", "s"])]}, "reasoning and thinking have different values"),
    "a call in a tool's result": (
        {"messages": [user("q"), calls({"name": "f", "arguments": {}}),
                      user([{"type": "tool_result", "content": [{"type": "tool_use", "name": "f", "input": {}}]}]), answer("a")]}, "expected parts of type text"),
    "a text after a call": (
        {"messages": [user("q"), answer([{"type": "tool_use", "name": "f", "input": {}}, {"type": "text", "text": "a"}])]}, "part of type text after"),
    "a call of the user": ({"messages": [user([{"type": "tool_use", "name": "f", "input": {}}]), answer("a")]}, "a tool call or reasoning in a user"),
    "an image in a tool's result": (
        {"messages": [user("q"), calls({"name": "f", "arguments": {}}), user([{"type": "tool_result", "content": [{"type": "image", "source": "x"}]}]),
                      answer("a")]}, "a part of type image"),
    "the type of a tool's parameter": ({**called_by({"name": "f"}), "tools": [{"name": "f", "parameters": {"type": "strng"}}]}, "is not a JSON schema"),
}  # fmt: skip


@pytest.mark.parametrize("shape", REFUSED)
def test_a_row_that_would_be_learned_wrongly_is_refused(shape):
    row, problem = REFUSED[shape]
    with pytest.raises(BadRow, match=problem):
        read_chat(row)


UNREAD = {
    "a second text of a part": ([{"type": "text", "text": "a", "content": "b", "thinking": "c"}], ["content", "thinking"]),
    "a second text of a reasoning": ([{"type": "thinking", "thinking": "r", "text": "s", "signature": "x"}, {"type": "text", "text": "a"}], ["text"]),
    "a class of a part": ([{"type": "text", "text": "a", "label": "greeting"}], ["label"]),
    "a key of a call": ([{"type": "tool_use", "id": "1", "name": "f", "input": {}, "caller": "x"}], ["caller"]),
}  # fmt: skip


@pytest.mark.parametrize("shape", UNREAD)
def test_what_is_not_read_of_a_part_is_named(shape):
    parts, keys = UNREAD[shape]
    row = {"messages": [user("q"), answer(parts)]}
    read = read_chat(row, labels=Labels(lambda: iter([row]), is_training=True))
    assert read.unread == tuple(f"messages.content.{key}" for key in keys)


def test_results_of_parallel_calls_belong_to_the_calls_that_their_messages_name():
    found = [{"type": "tool_use", "id": name, "name": f"f{name}", "input": {}} for name in "12"]
    results = [
        {"role": "tool", "tool_call_id": name, "content": [{"type": "tool_result", "content": name}]} for name in "21"
    ]
    messages = read_chat({"messages": [user("q"), answer(found), *results, answer("a")]}).messages
    assert [(message["tool_call_id"], message["content"]) for message in messages[2:4]] == [("2", "2"), ("1", "1")]


@pytest.mark.parametrize(
    "row",
    [
        {"q": "q", "a": "x", "b": "y", "c": "z", key: value}
        for key, value in (("label", "1"), ("ans", "b"), ("gold", 1), ("answer_key", "B"))
    ]
    + [{"problem": "q", "answer": "42", key: "Six times seven is 42."} for key in ("generation", "explanation", "why")]
    + [{"problem": "q", "answer": "42", "rationale": "6 * 7"}],
)
def test_a_part_of_the_answer_is_not_guessed(row):
    assert guess_columns(row) == {}


@pytest.mark.parametrize(("kind", "key"), [("tool_result", "content"), ("thinking", "thinking")])
def test_deeply_nested_parts_are_refused(kind, key):
    parts = "x"
    for _ in range(400):
        parts = [{"type": kind, key: parts}]
    with pytest.raises(BadRow, match="nested too deeply"):
        read_chat({"messages": [user("q"), answer(parts)]})


@pytest.mark.parametrize("question", ["System: ", "SYSTEM: "])
def test_a_long_text_without_a_chat_takes_no_memory_for_each_character(question):
    text = question + "word\n" * 400_000
    tracemalloc.start()
    with pytest.raises(BadRow, match="expected messages"):
        read_chat({"text": text})
    assert tracemalloc.get_traced_memory()[1] < 4 * len(text)
    tracemalloc.stop()


def test_a_mark_of_a_whole_call_is_honoured():
    call = {"role": "tool_call", "content": '{"name": "f", "arguments": {}}'}
    row = {
        "messages": [user("q"), answer("Text."), {**call, "loss": False}, {"role": "tool", "content": "1"}, answer("a")]
    }
    chat = read_chat(row)
    assert (len(chat.messages), chat.learned) == (5, (1, 4))  # not joined with the text, which is learned
    with pytest.raises(MarkedFalse):
        read_chat({"messages": [user("q"), {"role": "tool", "name": "f", "parameters": {}, "loss": False}]})


@pytest.mark.parametrize(
    "written", ["dict", "OBJECT", "HashMap"]
)  # of the leaderboard's Python, of Gemini, of the leaderboard's Java
def test_types_of_other_languages_are_types_of_json_in_the_check_and_unchanged_in_the_prompt(written):
    schema = {
        "type": written,
        "properties": {
            "type": {"type": "float"},
            "y": {"type": "any"},
            "z": {"type": "tuple", "items": {"type": "str"}},
        },
    }
    (tool,) = read_tools([{"name": "f", "parameters": schema}])
    assert tool["function"]["parameters"] == schema
    row = called_by({"name": "f", "arguments": {"type": 1.5, "y": [1], "z": ["s"]}}) | {"tools": [tool]}
    assert read_chat(row).messages[1]["tool_calls"]
    with pytest.raises(BadRow, match="is not of type 'number'"):
        read_chat(called_by({"name": "f", "arguments": {"type": "1.5"}}) | {"tools": [tool]})


def test_the_column_of_the_reasoning_is_read_if_the_recipe_names_it():
    row = {"Question": "q", "Complex_CoT": "r", "Response": "a"}
    assert guess_columns(row) == {"prompt": "Question", "completion": "Response"}
    assert read_chat(row, columns=guess_columns(row)).unread == ("Complex_CoT",)
    assert told(row, {**guess_columns(row), "reasoning": "Complex_CoT"}) == ["u: q", "a: {r} a"]
    assert told({**row, "Complex_CoT": None}, {**guess_columns(row), "reasoning": "Complex_CoT"}) == QA
    for other in ({"Complex_CoT": ["r"]}, {"Response": "<think>r</think>a"}):
        with pytest.raises(BadRow, match="the column Complex_CoT: expected text"):
            told({**row, **other}, {**guess_columns(row), "reasoning": "Complex_CoT"})


@pytest.mark.skipif(shutil.which("jq") is None, reason="jq is not installed")
def test_the_command_for_flat_rows_of_trees_makes_a_tree_of_each():
    def flat(name, parent, text, role, rank=None):
        return {
            "message_id": name,
            "parent_id": parent,
            "message_tree_id": name[0],
            "text": text,
            "role": role,
            "rank": rank,
        }

    rows = [flat("b", None, "r", "prompter"), flat("a1", "a", "worse", "assistant", 1), flat("a2", "a", "a", "assistant", 0),
            flat("a", None, "q", "prompter"), flat("b1", "b", "b", "assistant")]  # fmt: skip
    with pytest.raises(BadRow) as refused:
        read_chat(rows[0])
    assert f"jq -cs '{_TREES}' IN.jsonl > OUT.jsonl" in str(refused.value)
    made = subprocess.run(
        ["jq", "-cs", _TREES], input="\n".join(map(json.dumps, rows)), capture_output=True, text=True, check=True
    )
    assert [told(json.loads(line)) for line in made.stdout.splitlines()] == [QA, ["u: r", "a: b"]]


@pytest.mark.skipif(shutil.which("jq") is None, reason="jq is not installed")
@pytest.mark.parametrize("chosen", [{"from": "gpt", "value": "a"}, "a"])
def test_the_command_for_pairs_puts_the_chosen_answer_behind_the_chat(chosen):
    row = {"conversations": [{"from": "human", "value": "q"}], "chosen": chosen, "rejected": "b"}
    with pytest.raises(BadRow, match="the chat ends with a question, and the chosen answer is beside it") as refused:
        read_chat(row)
    command = str(refused.value).split("jq -c '")[1].split("' IN.jsonl")[0]
    made = subprocess.run(["jq", "-c", command], input=json.dumps(row), capture_output=True, text=True, check=True)
    assert told(json.loads(made.stdout)) == QA
