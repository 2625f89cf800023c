"""`predict` reads tools and writes the calls of answers as OpenAI's API does; `serve` names vLLM's parser where it is known."""

import json
from types import SimpleNamespace

import pandas as pd
import pytest

from loraflow.data.formats.chat_formats import read_chat
from loraflow.failures import BadConfig
from loraflow.registry.runs import RunRecord, StageRun
from loraflow.serving import predict as prediction
from loraflow.serving.chat import Sampling
from loraflow.serving.models import Loaded, Model, tools_of
from loraflow.serving.predict import PredictOptions, predict
from loraflow.serving.written_calls import reads_calls_of, vllm_parser, written_calls
from tests.unit.data.test_tools import CHAT, TOOLS, call
from tests.unit.data.test_trl_templates import TEMPLATES, template_of, tokenizer_with_control_tokens  # noqa: F401

CALL = '<tool_call>\n{"name": "get_weather", "arguments": {"city": "Köln"}}\n</tool_call>'
ANSWERS = [CALL, "No.", f"{CALL}\n{CALL}", '<tool_call>{"name": "get_wea']


@pytest.fixture
def answer(tmp_path, monkeypatch, template_of):  # noqa: F811
    """Predict with given answers instead of a model's."""

    def run(rows: list[dict], answers: list[str], out: str, template: str = "qwen3", **options):
        built, tokenizer = template_of(template)
        loaded = Loaded(SimpleNamespace(), tokenizer, built, [2], None)
        monkeypatch.setattr(prediction, "load", lambda *_: loaded)
        monkeypatch.setattr(
            "loraflow.evaluation.generation.generate_answers",
            lambda model, tokenizer, prompts, **_: [
                {"text": text, "tokens": 1, "finish": "stop"} for text in answers[: len(prompts)]
            ],
        )
        (tmp_path / "model").mkdir(exist_ok=True)
        (tmp_path / "in.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        target = tmp_path / out
        chosen = PredictOptions(sampling=Sampling(max_new_tokens=6), **options)
        predict(Model("m", tmp_path / "model"), tmp_path / "in.jsonl", target, chosen)
        return target

    return run


@pytest.mark.parametrize("by_row", [True, False])
@pytest.mark.parametrize("suffix", ["jsonl", "csv", "parquet"])
def test_calls_are_written_beside_the_text_in_the_shape_of_openai(answer, suffix, by_row):
    rows = [{"prompt": f"rain in {city}?", **({"tools": TOOLS} if by_row else {})} for city in ("a", "b", "c", "d")]
    file = answer(rows, ANSWERS, f"out.{suffix}", tools=None if by_row else TOOLS)
    if suffix == "jsonl":
        calls = [json.loads(line)["tool_calls"] for line in file.read_text().splitlines()]
    elif suffix == "csv":
        calls = [json.loads(cell) if cell else None for cell in pd.read_csv(file, keep_default_na=False).tool_calls]
    else:
        calls = [None if found is None else list(found) for found in pd.read_parquet(file).tool_calls]
    assert [found and len(found) for found in calls] == [1, None, 2, None]
    assert calls[0][0]["type"] == "function"
    assert calls[0][0]["function"] == {"name": "get_weather", "arguments": '{"city": "Köln"}'}
    ids = [called["id"] for found in calls if found for called in found]
    assert len(set(ids)) == 3 and all(len(identifier) == 9 and identifier.isalnum() for identifier in ids)


def test_without_tools_there_is_no_column_of_calls(answer):
    row = json.loads(answer([{"prompt": "a"}], [CALL], "out.jsonl").read_text())
    assert list(row) == ["prompt", "prediction", "tokens", "finish", "error"]


def test_calls_of_a_format_that_is_not_known_are_left_to_the_text_and_told(answer, caplog):
    caplog.set_level("WARNING", "loraflow")
    file = answer([{"prompt": "a", "tools": TOOLS}], [CALL], "out.jsonl", template="gptoss")
    row = json.loads(file.read_text())
    assert row["tool_calls"] is None and row["prediction"] == CALL
    assert "format of calls is unknown" in caplog.text


def test_written_calls_can_be_read_as_a_chat_again():
    calls = written_calls(CALL, CHAT[:1])
    chat = [CHAT[0], {"role": "assistant", "content": None, "tool_calls": calls}]
    (called,) = read_chat({"messages": chat, "tools": TOOLS}).messages[1]["tool_calls"]
    assert called["function"] == call("Köln")["function"] and called["id"] == calls[0]["id"]


def test_data_tools_are_those_of_the_run_and_not_of_the_file_today(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "tools.json").write_text(json.dumps([{"name": "another"}]))
    run = RunRecord(
        run="r",
        recipe="x",
        resolved={"data": {"tools": "tools.json"}},
        stages=[StageRun(stage="check_dataset", state="computed", fingerprint="f", digest="d")],
    )
    manifest = SimpleNamespace(payload={"config": {"tools": TOOLS}})
    there = SimpleNamespace(find=lambda *_: "ref", manifest=lambda _: manifest)
    gone = SimpleNamespace(find=lambda *_: None)
    model = Model("m", tmp_path, run=run)
    assert tools_of(there, model) == TOOLS
    assert tools_of(gone, model) == [{"name": "another"}]
    assert tools_of(there, Model("m", tmp_path)) is None


@pytest.mark.parametrize("content", [None, "{", "{}"])
def test_tools_that_are_gone_can_be_given_by_an_option(tmp_path, monkeypatch, content):
    monkeypatch.chdir(tmp_path)
    if content is not None:
        (tmp_path / "tools.json").write_text(content)
    run = RunRecord(run="r", recipe="x", resolved={"data": {"tools": "tools.json"}})
    with pytest.raises(BadConfig) as caught:
        tools_of(SimpleNamespace(find=lambda *_: None), Model("m", tmp_path, run=run))
    assert "--tools FILE" in caught.value.next_step and "tools.json" in caught.value.where and caught.value.got


# By vLLM's page "Tool Calling". Templates without tools, and formats whose parser is not known here, have none.
PARSERS = {
    "qwen2_5": "hermes",
    "qwen3": "hermes",
    "qwen3_instruct_2507": "hermes",
    "qwen3_5_think": "qwen3_coder",
    "qwen3_6": "qwen3_coder",
    "glm4moe": "glm45",
    "gptoss": "openai",
    "llama3_1": "llama3_json",
    "llama3_2": "llama3_json",
    "llama3": None,
    "phi3": None,
    "phi3_5": None,
    "gemma": None,
    "gemma3": None,
    "gemma4": None,
    "lfm2": None,
    "cohere": None,
    "smolvlm": None,
    "deepseekv3": None,
}


@pytest.mark.parametrize(("name", "parser"), PARSERS.items())
def test_the_parser_of_vllm_is_named_where_it_is_known(name, parser):
    if name not in TEMPLATES:
        pytest.skip(f"this trl has no template {name}")
    assert vllm_parser(TEMPLATES[name]) == parser


@pytest.mark.parametrize(("name", "reads"), [("qwen3", True), ("qwen3_5_think", True), ("gptoss", False), ("phi3", False)])  # fmt: skip
def test_the_calls_of_a_template_are_read_or_it_is_known_that_they_are_not(template_of, name, reads):  # noqa: F811
    assert reads_calls_of(template_of(name)[0]) is reads
