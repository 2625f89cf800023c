"""Tool calls: read in each shape, checked against their schemas, rendered by the model's template, never learned at results."""

import json
import re

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from pydantic import BaseModel

from loraflow.config.data import read_tools_file
from loraflow.data.chats import BadRow
from loraflow.data.checks.near import comparable_text, grams, jaccard
from loraflow.data.checks.split import normalized_key, row_id
from loraflow.data.files.readers import read_rows
from loraflow.data.formats.call_parser import parse_calls
from loraflow.data.formats.chat_formats import read_chat, to_prompt
from loraflow.data.formats.tools import dataset_tools
from loraflow.data.tokens.loss_mask import ChatTemplate, name_row
from loraflow.data.tokens.token_labels import IGNORED
from loraflow.evaluation.metric_modules import compute
from loraflow.failures import BadModel, Failure
from tests.unit.data.test_check import run_check
from tests.unit.data.test_trl_templates import TEMPLATES, template_of, tokenizer_with_control_tokens  # noqa: F401

SCHEMA = {
    "type": "object",
    "properties": {"city": {"type": "string"}, "days": {"type": "integer"}},
    "required": ["city"],
}
TOOLS = [{"type": "function", "function": {"name": "get_weather", "description": "Get it.", "parameters": SCHEMA}}]


def call(city="Rom", identifier="abcdefghi", **more) -> dict:
    function = {"name": "get_weather", "arguments": {"city": city, **more}}
    return {"type": "function", "function": function, "id": identifier}


def openai(arguments='{"city": "Rom"}') -> dict:
    called = {"id": "abcdefghi", "type": "function", "function": {"name": "get_weather", "arguments": arguments}}
    return {
        "messages": [
            {"role": "user", "content": "rain in Rom?"},
            {"role": "assistant", "content": None, "tool_calls": [called]},
            {"role": "tool", "tool_call_id": "abcdefghi", "content": '{"rain": 3}'},
            {"role": "assistant", "content": "Yes."},
        ],
        "tools": TOOLS,
    }


SHAREGPT = {
    "conversations": [
        {"from": "human", "value": "rain in Rom?"},
        {"from": "function_call", "value": '{"name": "get_weather", "arguments": {"city": "Rom"}}'},
        {"from": "observation", "value": '{"rain": 3}'},
        {"from": "gpt", "value": "Yes."},
    ],
    "tools": json.dumps([TOOLS[0]["function"]]),
}


def plain(messages: list) -> list:
    """Return messages without the ids of calls."""
    text = json.dumps([{k: v for k, v in m.items() if k != "tool_call_id"} for m in messages])
    return json.loads(text.replace(', "id": "abcdefghi"', ""))


def test_openais_and_sharegpts_shapes_give_the_same_chat_with_objects_as_arguments():
    chat = read_chat(openai()).messages
    assert chat[1] == {"role": "assistant", "content": "", "tool_calls": [call()]}
    assert chat[2] == {"role": "tool", "content": '{"rain": 3}', "tool_call_id": "abcdefghi"}
    assert chat[0]["tools"] == TOOLS and read_chat(openai()).unread == ()
    same = [openai({"city": "Rom"}), {**openai(), "tools": json.dumps(TOOLS)}, SHAREGPT]
    older = openai()
    older["messages"][1] = {
        "role": "assistant",
        "content": "",
        "function_call": {"name": "get_weather", "arguments": '{"city": "Rom"}'},
    }
    older["messages"][2] = {"role": "function", "name": "get_weather", "content": '{"rain": 3}'}
    older["functions"] = [older.pop("tools")[0]["function"]]
    for row in same:
        assert plain(read_chat(row).messages) == plain(chat), row
    named = read_chat(older).messages
    assert named[2].pop("name") == "get_weather" and plain(named) == plain(chat)
    assert to_prompt(openai()) == chat[:3] and to_prompt(SHAREGPT)[-1]["role"] == "tool"
    assert read_chat({k: v for k, v in openai().items() if k != "tools"}, tools=TOOLS).messages == chat, "data.tools"


@pytest.mark.parametrize(
    ("change", "problem"),
    [
        ({"arguments": '{"city": 3}'}, "message 2: tool_calls[0].function.arguments.city: 3 is not of type 'string'"),
        ({"arguments": "{}"}, "message 2: tool_calls[0].function.arguments: 'city' is a required property"),
        ({"arguments": '{"city": "a"'}, "tool_calls[0].function.arguments is not valid JSON: Expecting ',' delimiter"),
        ({"arguments": '{"city": "a", "city": "b"}'}, 'the key "city" is duplicated'),
        ({"arguments": "[1]"}, "tool_calls[0].function.arguments is list; expected an object"),
        ({"name": "get_wether"}, "tool_calls[0].function.name 'get_wether' is not one of the tools: get_weather"),
        ({"name": None}, "tool_calls[0].function.name is None"),
    ],
)
def test_a_call_that_does_not_fit_its_schema_names_file_line_and_field(tmp_path, change, problem):
    row = openai()
    row["messages"][1]["tool_calls"][0]["function"].update(change)
    (tmp_path / "x.jsonl").write_text(json.dumps(openai()) + "\n" + json.dumps(row) + "\n")
    good, bad = read_rows(tmp_path, ["x.jsonl"], "auto")
    assert good.messages and bad.place == "x.jsonl:2" and problem in bad.problem


@pytest.mark.parametrize(
    ("tools", "problem"),
    [
        ({"a": 1}, "tools is dict; expected a list"),
        ("[{", "tools is not valid JSON"),
        ([{"type": "function", "function": {"parameters": SCHEMA}}], "tools[0].function.name is None"),
        ([{"name": "f", "parameters": {"type": "objekt"}}], "tools[0].function.parameters is not a JSON schema"),
        ([{"name": "f"}, {"name": "f"}], "tools[1].function.name 'f' is duplicated"),
        ([{"name": "get_weather", "parameters": {"$ref": "https://example.com/x.json"}}], "refers to another document"),
        ([1], "tools[0] is int"),
    ],
)
def test_malformed_tools_are_named(tools, problem):
    with pytest.raises(BadRow, match=re.escape(problem)):
        read_chat({**openai(), "tools": tools})


def test_results_without_their_call_and_calls_of_a_user_are_malformed():
    row = openai()
    row["messages"][2]["tool_call_id"] = "other"
    with pytest.raises(BadRow, match="message 3: tool_call_id 'other' is not among the calls before it"):
        read_chat(row)
    row = openai()
    row["messages"][0]["tool_calls"] = row["messages"][1]["tool_calls"]
    with pytest.raises(BadRow, match="message 1: a tool call in a user message"):
        read_chat(row)
    row = openai()
    row["messages"].insert(1, {"role": "tool", "content": "x"})
    with pytest.raises(BadRow, match="message 2: a tool's result that does not follow a call"):
        read_chat(row)
    assert read_chat({**SHAREGPT, "tools": ["get_weather"]}).unread == ("tools",), "names alone are no part of a prompt"


def test_parquets_members_of_other_rows_are_no_arguments(tmp_path):
    """A struct column has the members of all rows; those of other rows are null."""
    rows = [openai({"city": "Rom"}), openai({"city": "Rom", "days": 2})]
    pd.DataFrame(rows).to_parquet(tmp_path / "x.parquet")
    first, second = read_rows(tmp_path, ["x.parquet"], "auto")
    assert first.messages[1]["tool_calls"][0]["function"]["arguments"] == {"city": "Rom"}
    assert second.messages[1]["tool_calls"][0]["function"]["arguments"] == {"city": "Rom", "days": 2}
    assert first.messages[0]["tools"] == TOOLS


def test_check_dataset_quarantines_calls_and_keeps_the_tools_of_the_dataset(tmp_path):
    good = {k: v for k, v in openai().items() if k != "tools"}
    bad = {"messages": openai('{"city": 1}')["messages"]}
    (tmp_path / "data").mkdir()
    (tmp_path / "tools.json").write_text(json.dumps(TOOLS))
    rows = [good, bad, {"prompt": "hi", "completion": "hello"}]
    (tmp_path / "data" / "train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (tmp_path / "data" / "heldout.jsonl").write_text(json.dumps({"prompt": "ho", "completion": "hello"}) + "\n")
    report = run_check(tmp_path / "data", tmp_path / "out", train=["train.jsonl"], heldout=["heldout.jsonl"], tools=str(tmp_path / "tools.json"),
                       system="s")  # fmt: skip
    assert report["counts"]["malformed"] == 1
    train = [json.loads(line) for line in (tmp_path / "out" / "train.jsonl").open()]
    assert [row["messages"][0] for row in train] == [{"role": "system", "content": "s", "tools": TOOLS}] * 2
    assert "train.jsonl:2" in (tmp_path / "out" / "quarantine.jsonl").read_text()


# -- rendering and masks ------------------------------------------------------------------------------------------------

CHAT = [
    {"role": "user", "content": "what is red", "tools": TOOLS},
    {"role": "assistant", "content": "", "tool_calls": [call('Köln "x"', days=3)]},
    {"role": "tool", "content": '{"temp": 7}', "tool_call_id": "abcdefghi", "name": "get_weather"},
    {"role": "assistant", "content": "a color"},
]
LEARNED = {n for n in TEMPLATES if n.startswith(("qwen2_5", "qwen3", "llama3_1", "llama3_2", "lfm2_2_5", "lfm2_v2", "muse"))
           and "_vl" not in n} | {"gemma4_v2", "lfm2_2_5_vl", "qwen3_vl", "qwen3_vl_training"}  # fmt: skip


@pytest.mark.parametrize("name", sorted(TEMPLATES))
def test_each_template_of_trl_learns_the_call_and_not_the_result_or_refuses_in_one_sentence(template_of, name):  # noqa: F811
    template, tokenizer = template_of(name)
    try:
        (encoded,) = template.encode([CHAT], "assistant")
    except (
        BadModel,
        TypeError,
    ) as refusal:  # DeepSeek's wants arguments as text; in its process, this is a BadModel too
        assert name not in LEARNED, refusal
        return
    ids = encoded.ids.tolist()
    bare = [{key: value for key, value in message.items() if key != "tools"} for message in CHAT]
    assert ids == tokenizer.apply_chat_template(bare, tools=TOOLS, return_dict=True)["input_ids"]
    learned = tokenizer.decode([i for i, label in zip(ids, encoded.labels, strict=True) if label != IGNORED])
    assert "get_weather" in learned and "Köln" in learned and "a color" in learned
    assert "temp" not in learned and "what is red" not in learned and "Get it." not in learned
    served = tokenizer.apply_chat_template(bare[:-1], tools=TOOLS, add_generation_prompt=True, return_dict=True)
    assert template.prompt_ids([CHAT]) == [served["input_ids"]] and ids[: encoded.prompt] == served["input_ids"]


def test_a_template_that_knows_no_tools_is_refused_with_the_row(phi3):
    template = ChatTemplate(phi3)
    chats = {"leaves out the tools": [CHAT[0], CHAT[3]], "leaves out a tool call": CHAT[:2]}
    for sentence, chat in chats.items():
        with pytest.raises(BadModel, match=sentence) as refusal, name_row(["x.jsonl:7"]):
            template.encode([chat], "assistant")
        assert "x.jsonl:7" in refusal.value.where
    with pytest.raises(BadModel, match="leaves out the tools"):
        template.prompt_ids([[CHAT[0]]])


WORDS = st.lists(
    st.sampled_from(["red", "house", "two", "cat", "😀", "Köln", '"', "\\", "é\n", "{x}"]), min_size=1, max_size=4
).map(" ".join)


@st.composite
def weighted_chats(draw):
    """Return a chat with tools, the numbers of its learned answers, and their weights."""
    chat, answers = [], []
    for _ in range(draw(st.integers(1, 3))):
        chat.append({"role": "user", "content": draw(WORDS)})
        for _ in range(draw(st.integers(0, 2))):
            answers.append(len(chat))
            calls = [call(draw(WORDS), days=draw(st.integers(0, 99))) for _ in range(draw(st.integers(1, 2)))]
            chat.append({"role": "assistant", "content": draw(st.just("") | WORDS), "tool_calls": calls})
            chat += [{"role": "tool", "content": draw(WORDS)} for _ in calls]
        answers.append(len(chat))
        chat.append({"role": "assistant", "content": draw(WORDS)})
    chat[0]["tools"] = TOOLS
    learned = draw(st.lists(st.sampled_from(answers), min_size=1, unique=True).map(sorted))
    weights = draw(st.lists(st.sampled_from([1.0, 0.5, 0.1, 10.0]), min_size=len(learned), max_size=len(learned)))
    return chat, answers, learned, weights


@settings(max_examples=40, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(case=weighted_chats())
def test_masks_with_tools_and_weights_equal_those_of_a_slow_renderer(template_of, case):  # noqa: F811
    """ChatML: what is between an assistant's head and its end is learned, found in transformers' text by its characters."""
    chat, answers, learned, weights = case
    template, tokenizer = template_of("qwen2_5")
    bare = [{key: value for key, value in message.items() if key != "tools"} for message in chat]
    text = tokenizer.apply_chat_template(bare, tools=TOOLS, tokenize=False)
    slow = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
    spans = [match.span(1) for match in re.finditer(r"<\|im_start\|>assistant\n(.*?<\|im_end\|>)", text, re.DOTALL)]
    assert len(spans) == len(answers)
    expected = np.zeros(len(slow["input_ids"]), np.float32)
    for number, span in zip(answers, spans, strict=True):
        if number in learned:
            for token, (start, end) in enumerate(slow["offset_mapping"]):
                if span[0] <= start < span[1] and end > start:
                    expected[token] = weights[learned.index(number)]
    (encoded,) = template.encode([chat], "assistant", learned=[learned], weights=[weights])
    assert encoded.ids.tolist() == slow["input_ids"]
    assert (encoded.labels != IGNORED).tolist() == (expected > 0).tolist()
    assert encoded.weights.tolist() == expected.tolist()


# -- scores of calls ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "text",
    [
        '<tool_call>\n{"name": "f", "arguments": {"a": 1}}\n</tool_call>',
        '{"name": "f", "arguments": {"a": 1}}',
        'Let me look.\n<tool_call>\n{"name": "f", "arguments": {"a": 1}}\n</tool_call>',
        '<|python_tag|>{"name": "f", "parameters": {"a": 1}}',
        '[TOOL_CALLS] [{"name": "f", "arguments": {"a": 1}}]</s>'.removesuffix("</s>"),
        '[TOOL_CALLS]f[ARGS]{"a": 1}',
        "<tool_call>\n<function=f>\n<parameter=a>\n1\n</parameter>\n</function>\n</tool_call>",
        '<think>\n\n</think>\n\n<tool_call>\n{"name": "f", "arguments": {"a": 1}}\n</tool_call>',
    ],
)
def test_calls_are_parsed_in_the_formats_of_common_templates(text):
    assert parse_calls(text) == [{"name": "f", "arguments": {"a": 1}}]


def test_texts_are_no_calls_and_broken_calls_are_not_valid():
    for text in ("Yes.", "", '{"answer": 3}', "[1, 2]", "See {this}"):
        assert parse_calls(text) == [], text
    for text in ('<tool_call>{"name": "f"', "<tool_call>\nf(1)\n</tool_call>", "<function=f>"):
        assert parse_calls(text) is None, text
    two = '<tool_call>{"name": "f", "arguments": {}}</tool_call>\n<tool_call>{"name": "g", "arguments": {}}</tool_call>'
    assert [found["name"] for found in parse_calls(two)] == ["f", "g"]


def test_scores_of_calls_are_the_name_the_arguments_and_the_schema():
    def reference(*calls) -> str:
        return json.dumps({"calls": [c["function"] for c in calls], "tools": TOOLS})

    def text(called) -> str:
        return f"<tool_call>{json.dumps(called['function'])}</tool_call>"

    expected = reference(call("Rom", days=3))
    answers = [
        text(call("Rom", days=3)),
        text(call("Rom", days=4)),
        text(call("Rom", days="x")),
        "Rain.",
        "<tool_call>{",
        text(call("Rom", days=float("nan"))),
    ]
    scores = compute("tool_calls", [*answers, "Rain."], [expected] * 6 + [reference()])
    assert scores.rows["tool_name"] == [1, 1, 1, 0, 0, 1, 1]
    assert scores.rows["tool_arguments_f1"] == [1, 0.5, 0.5, 0, 0, 0.5, 1]
    assert scores.rows["valid_call_rate"] == [1, 1, 0, 0, 0, 0, 1]
    assert scores.values["tool_name"] == pytest.approx(5 / 7)


def test_the_reference_of_a_call_is_its_text_as_the_model_generates_it(template_of):  # noqa: F811
    template, _ = template_of("qwen3")
    texts = template.answer_texts([CHAT[:2], CHAT])
    assert parse_calls(texts[0]) == [CHAT[1]["tool_calls"][0]["function"]] and texts[1] == "a color"


def test_the_ids_of_calls_make_no_other_chat():
    chats = [[*CHAT[:1], {**CHAT[1], "tool_calls": [call(identifier=name)]}] for name in ("abcdefghi", "123456789")]
    assert row_id(chats[0]) == row_id(chats[1])
    assert normalized_key(chats[0]) == normalized_key(chats[1])
    assert row_id(chats[0]) != row_id([*CHAT[:1], {**CHAT[1], "tool_calls": [call("Ulm")]}])


def test_equal_tools_do_not_make_chats_similar():
    chats = [[{**CHAT[0], "content": text}, {"role": "assistant", "content": text[::-1]}]
             for text in ("When does the museum open on Sundays?", "Please translate this letter into Polish")]  # fmt: skip
    assert jaccard(*(grams(comparable_text(chat)) for chat in chats)) < 0.1


@pytest.mark.parametrize("text", ["[Note] see below", "[link](x)", "code:\n{\n  return 1;\n}"])
def test_text_with_brackets_is_no_broken_call(text):
    assert parse_calls(text) == []


@pytest.mark.parametrize(
    ("parameters", "arguments"),
    [
        ({"$ref": "#"}, {"a": 1}),
        ({"$defs": {"a": {"$ref": "#/$defs/b"}, "b": {"$ref": "#/$defs/a"}}, "$ref": "#/$defs/a"}, {"a": 1}),
        ({"properties": {"a": {"multipleOf": 0.1}}}, {"a": 10**400}),
    ],
)
def test_schemas_that_cannot_be_applied_are_problems_of_the_row(parameters, arguments):
    row = openai(arguments)
    row["tools"] = [{"type": "function", "function": {"name": "get_weather", "parameters": parameters}}]
    with pytest.raises(BadRow):
        read_chat(row)


@pytest.mark.parametrize(
    "schema", [{"$schema": 5}, {"$schema": {}}, json.dumps({"a": 0}).replace("0", "[" * 400 + "]" * 400)]
)
def test_odd_schemas_are_malformed_rows(schema):
    row = openai()
    row["tools"] = [{"type": "function", "function": {"name": "get_weather", "parameters": schema}}]
    with pytest.raises(BadRow):
        read_chat(row)


def test_nulls_that_the_tool_does_not_know_are_no_arguments():
    row = openai({"city": "Rom", "date": None})
    row["tools"] = [{"type": "function", "function": {"name": "get_weather",
                                                      "parameters": {"properties": {"city": {"type": "string"}}}}}]  # fmt: skip
    (called,) = read_chat(row).messages[1]["tool_calls"]
    assert called["function"]["arguments"] == {"city": "Rom"}


def test_a_role_that_is_no_text_is_a_malformed_row():
    with pytest.raises(BadRow):
        read_chat({"messages": [{"role": ["user"], "content": "a", "x": 1}, {"role": "assistant", "content": "b"}]})


@pytest.mark.parametrize("content", ['["search", "open"]', "[NaN]", "[1e400]", '["\\ud800"]'])
def test_a_file_of_tools_that_are_no_functions_is_refused(tmp_path, content):
    (tmp_path / "tools.json").write_text(content)
    with pytest.raises(Failure):
        dataset_tools(read_tools_file(str(tmp_path / "tools.json")), "data.tools")


class Forecast(BaseModel):
    """Its schema has `"default": null`, as that of each optional argument that pydantic describes."""

    city: str
    unit: str | None = None


@pytest.mark.parametrize("wrap", [lambda tools: tools, json.dumps], ids=["objects", "text"])
def test_a_schema_of_pydantic_is_rendered_as_a_server_renders_it(template_of, wrap):  # noqa: F811
    function = {"name": "forecast", "description": "Get it.", "parameters": Forecast.model_json_schema()}
    tools = [{"type": "function", "function": function}]
    messages = [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}]
    template, tokenizer = template_of("qwen2_5")
    chat = read_chat({"messages": messages, "tools": wrap(tools)}).messages
    (encoded,) = template.encode([chat], "assistant")
    assert encoded.ids.tolist() == tokenizer.apply_chat_template(messages, tools=tools, return_dict=True)["input_ids"]
    assert '"default": null' in tokenizer.decode(encoded.ids)


CITY = {"type": "string", "description": "A city."}
OTHER_ROWS = {
    "default": ({**CITY, "default": "Rom"}, "Rom"),
    "const": ({"type": "string", "const": "Rom"}, "Rom"),
    "enum": ({"type": "string", "enum": ["Rom"]}, "Rom"),
    "nullable": ({**CITY, "nullable": True}, "Rom"),
    "optional": ({"anyOf": [{"type": "string"}, {"type": "null"}], "default": None}, "Rom"),
    "types": ({"type": "integer", "minimum": 1}, 3),
    "nested": ({"type": "object", "properties": {"zip": {"type": "string", "default": "1"}}}, {"zip": "2"}),
    "literal": ({"oneOf": [{"const": "Rom", "title": "R"}]}, "Rom"),
    "reference": ({"$ref": "#/$defs/City", "title": "A city"}, "Rom"),
}


@pytest.mark.parametrize("key", OTHER_ROWS)
def test_tools_in_structs_of_parquet_are_those_of_json(tmp_path, key):
    schema, city = OTHER_ROWS[key]
    rows = []
    for number, (found, argument) in enumerate([(CITY, "Oslo"), (schema, city)]):
        parameters = {"type": "object", "properties": {"city": found}, "required": ["city"]}
        if "$ref" in found:
            parameters["$defs"] = {"City": {"type": "string"}}
        row = openai(json.dumps({"city": argument}))
        rows.append({**row, "tools": [{**TOOLS[0], "function": {**TOOLS[0]["function"], "parameters": parameters}}]})
        rows[-1]["messages"][0]["content"] = f"{number}?"
    (tmp_path / "t.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "t.parquet")
    from_json, from_parquet = (list(read_rows(tmp_path, [name], "auto")) for name in ("t.jsonl", "t.parquet"))
    assert [row.problem for row in from_parquet] == [None, None]
    assert [row.messages for row in from_parquet] == [row.messages for row in from_json]
