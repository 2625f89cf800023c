"""Rows as files of vendors, trainers and public datasets have them: calls of tools, parts of messages, roles and labels.

The shapes were taken from the files themselves (names in the table); the texts are our own.
"""

import json
import shutil
import subprocess

import pytest

from loraflow.data.chat_formats import read_chat, to_prompt
from loraflow.data.chats import BadRow
from loraflow.data.guess_columns import guess_columns
from loraflow.data.marks import MarkedFalse
from loraflow.data.published_formats import _TREES
from loraflow.data.tools import read_tools


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
    "Glaive's version 1": (
        {"sample": GLAIVE + '\nUSER: q\nASSISTANT: <functioncall> {"name": "f", "arguments": {"x": 1}}\nFUNCTION RESPONSE: 1\nASSISTANT: a'}, CALLED),
}  # fmt: skip


@pytest.mark.parametrize("shape", ROWS)
def test_a_row_is_read_as_its_file_means_it(shape):
    row, expected = ROWS[shape]
    assert told(row) == expected
    columns = guess_columns(row)
    renamed = {key: value for key, value in row.items() if key not in columns.values()}
    prompt = to_prompt({**renamed, **{ours: row[theirs] for ours, theirs in columns.items()}})
    assert len(prompt) == len(expected) - 1


@pytest.mark.parametrize(
    ("role", "content"), [("role", "content"), ("role", "value"), ("from", "value"), ("from", "content")]
)
def test_a_prompt_has_no_answer_however_its_role_is_written(role, content):
    row = {"conversations": [{role: "user", content: "q"}, {role: "assistant", content: "a"}]}
    assert to_prompt(row) == [user("q")]


REFUSED = {
    "a part that is not learned": (
        {"messages": [user("q"), answer([{"type": "text", "text": "No.", "train": False}, {"type": "text", "text": "a"}])]}, "train: False marks a part"),
    "a part with weight 0": ({"messages": [user("q"), answer([{"type": "text", "text": "a", "weight": 0}])]}, "weight: 0 marks a part"),
    "arguments under an unknown name": (called_by({"name": "f", "values": {"x": 1}}), "values is not read"),
    "arguments twice": (called_by({"name": "f", "arguments": {"x": 1}, "parameters": {"x": 2}}), "arguments and parameters have different values"),
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
    with pytest.raises(BadRow, match="the column Complex_CoT: expected text"):
        told({**row, "Complex_CoT": ["r"]}, {**guess_columns(row), "reasoning": "Complex_CoT"})


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
    with pytest.raises(BadRow, match="the chat ends with a question, and its answer is in chosen") as refused:
        read_chat(row)
    command = str(refused.value).split("jq -c '")[1].split("' IN.jsonl")[0]
    made = subprocess.run(["jq", "-c", command], input=json.dumps(row), capture_output=True, text=True, check=True)
    assert told(json.loads(made.stdout)) == QA
