"""Serving: answers through the openai client are those of `generate`, and mistakes show before the model is loaded."""

import asyncio
import json
import os
import signal
import socket
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace

import pytest
from click.testing import CliRunner

from loraflow.cli import cli, main
from loraflow.failures import BadConfig, MissingExtra
from loraflow.serving import serve
from loraflow.serving.models import Model
from loraflow.serving.serve import plan_server
from tests.conftest import build_phi3

pytest.importorskip("openai")


def free_port():
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return listener.getsockname()[1]


@pytest.fixture
def cache(tmp_path, monkeypatch):
    monkeypatch.setattr(serve.tempfile, "tempdir", str(tmp_path))


@pytest.mark.slow
def test_the_openai_client_receives_the_answers_of_generate(tmp_path):
    import openai
    from transformers import AutoModelForCausalLM, AutoTokenizer

    folder = build_phi3(tmp_path / "odd @ name", dtype="float32")
    port = free_port()
    env = {**os.environ, "TMPDIR": str(tmp_path), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-c", "from loraflow.cli import main; main()", "serve", str(folder), "--port", str(port),
               "--name", "tickets"]  # fmt: skip
    process = subprocess.Popen(
        command, cwd=tmp_path, env=env, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )
    try:
        client = openai.OpenAI(base_url=f"http://127.0.0.1:{port}/v1", api_key="none", max_retries=0)
        tokenizer = AutoTokenizer.from_pretrained(folder)
        model = AutoModelForCausalLM.from_pretrained(folder, dtype="auto")
        limit = time.monotonic() + 120
        while True:
            with socket.socket() as probe:
                if probe.connect_ex(("127.0.0.1", port)) == 0:
                    break
            assert time.monotonic() < limit and process.poll() is None, process.stdout.read()
            time.sleep(0.2)
        assert [model.id for model in client.models.list()] == ["tickets"]
        expected_answers = {}
        for text in ("what is red", "please answer the bird of the tree", "a", "what is the tree of the bird"):
            messages = [{"role": "user", "content": text}]
            ids = tokenizer.apply_chat_template(
                messages, add_generation_prompt=True, return_tensors="pt", return_dict=True
            )
            new = model.generate(**ids, max_new_tokens=12, do_sample=False)[0, ids["input_ids"].shape[1] :]
            expected = expected_answers[text] = tokenizer.decode(new, skip_special_tokens=True)
            answer = client.chat.completions.create(model="tickets", messages=messages, max_tokens=12, temperature=0)
            assert answer.choices[0].message.content == expected
            stream = client.chat.completions.create(
                model="tickets", messages=messages, max_tokens=12, temperature=0, stream=True
            )
            parts = "".join(part.choices[0].delta.content or "" for part in stream if part.choices)
            with pytest.raises(openai.BadRequestError, match="n: 2 has no effect here"):
                client.chat.completions.create(model="tickets", messages=messages, n=2)
            assert parts.rstrip("\ufffd") == expected.rstrip("\ufffd"), "(half a character at the cut may be left out)"

        def ask(text):
            messages = [{"role": "user", "content": text}]
            answer = client.chat.completions.create(model="tickets", messages=messages, max_tokens=12, temperature=0)
            return answer.choices[0].message.content

        with ThreadPoolExecutor(8) as threads:
            assert list(threads.map(ask, 2 * list(expected_answers))) == 2 * list(expected_answers.values())
        process.send_signal(signal.SIGTERM)
        assert process.wait(timeout=30) in (0, -signal.SIGTERM, 143), "the signal reached the server itself"
        assert not list(tmp_path.glob(f"{serve.PREFIX}*"))
        greeting = process.stdout.read()
        assert f"http://127.0.0.1:{port}/v1" in greeting and '"model": "tickets"' in greeting
    finally:
        process.kill()


def test_a_taken_port_is_refused_before_anything_loads(tmp_path):
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        result = CliRunner().invoke(cli, ["serve", "no-such-model", "--port", str(port), "--store", str(tmp_path)])
    assert isinstance(result.exception, BadConfig) and "cannot listen" in str(result.exception)
    assert str(port) in result.exception.where and f"--port {port + 1}" in result.exception.next_step


def test_a_start_removes_no_other_folder(phi3, cache, tmp_path):
    others = [tmp_path / f"{serve.PREFIX}{name}" for name in ("notes", "running")]
    for other in others:
        other.mkdir()
        (other / "file").write_text("mine")
    server = plan_server(Model("tiny", phi3), "transformers", "127.0.0.1", 8000, None, None)
    assert server.cache not in others and all((other / "file").read_text() == "mine" for other in others)


def test_a_temporary_folder_that_cannot_be_written_is_named_in_one_sentence(phi3, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(serve.tempfile, "tempdir", str(tmp_path / "missing"))
    monkeypatch.setattr(sys, "argv", ["loraflow", "serve", str(phi3), "--port", str(free_port())])
    terminated = signal.getsignal(signal.SIGTERM)
    try:
        with pytest.raises(SystemExit) as ended:
            main()
    finally:
        signal.signal(signal.SIGTERM, terminated)
    printed = capsys.readouterr().err
    assert ended.value.code != 0 and str(tmp_path / "missing") in printed and "Traceback" not in printed


@pytest.mark.parametrize("end", ["sys.exit(2)", "raise KeyboardInterrupt", "signal.raise_signal(signal.SIGTERM)"])
def test_a_server_that_ends_removes_its_folder_and_keeps_its_status(tmp_path, end):
    code = f"import signal, sys; from pathlib import Path; from loraflow.serving import serve\n{end}"
    expected = subprocess.run([sys.executable, "-c", code], capture_output=True).returncode
    folder = tmp_path / f"{serve.PREFIX}x"
    folder.mkdir()
    code = code.replace("\n", "; serve._remove_at_exit(Path.cwd())\n")
    done = subprocess.run([sys.executable, "-c", code], cwd=folder, capture_output=True, text=True)
    assert done.returncode == expected != 0, done.stderr
    assert not folder.exists()


@pytest.mark.parametrize("end", ["signal.raise_signal(signal.SIGTERM)", "sys.exit()"])
def test_a_forked_child_that_ends_leaves_the_folder_of_the_living_server(tmp_path, end):
    code = f"""import os, signal, sys
from pathlib import Path
from loraflow.serving import serve
serve._remove_at_exit(Path.cwd())
child = os.fork()
if not child:
    {end}
os.waitpid(child, 0)
print(os.path.exists(os.environ["FOLDER"]))"""
    folder = tmp_path / f"{serve.PREFIX}x"
    folder.mkdir()
    env = {**os.environ, "FOLDER": str(folder)}
    done = subprocess.run([sys.executable, "-c", code], cwd=folder, env=env, capture_output=True, text=True)
    assert done.stdout == "True\n", done.stderr
    assert not folder.exists(), "the server removes it"


@pytest.mark.parametrize(
    ("engine", "module", "install"), [("transformers", "openai", "loraflow[serve]"), ("vllm", "vllm", "vllm")]
)
def test_a_missing_package_is_named_with_the_way_to_install_it(phi3, cache, monkeypatch, engine, module, install):
    monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(MissingExtra) as caught:
        plan_server(Model("tiny", phi3), engine, "127.0.0.1", free_port(), None, None)
    assert module in caught.value.got and install in caught.value.next_step


def test_the_served_model_has_its_name_and_every_stop_id(tmp_path, cache):
    folder = build_phi3(tmp_path / "model")
    (folder / "generation_config.json").write_text('{"eos_token_id": 502, "temperature": 0.5}')
    server = plan_server(
        Model("tickets", folder), "transformers", "0.0.0.0", free_port(), None, "bfloat16", ("--compile",)
    )
    (view,) = server.cache.glob("models--tickets/snapshots/*")
    settings = json.loads((view / "generation_config.json").read_text())
    assert settings == {"eos_token_id": [502, 505], "temperature": 0.5}, "other settings are unchanged"
    assert (view / "model.safetensors").resolve() == folder / "model.safetensors"
    assert (
        server.command[1] == "-P"
        and server.command[4:6] == ["serve", "tickets"]
        and server.command[-3:] == ["--dtype", "bfloat16", "--compile"]
    )
    assert "caution" in server.greeting and "http://127.0.0.1:" in server.greeting
    again = plan_server(Model("tickets", folder), "transformers", "127.0.0.1", free_port(), None, None)
    assert again.cache != server.cache, "nothing can damage it between two servers"
    assert "caution" not in again.greeting


@pytest.fixture
def handler(monkeypatch):
    """A handler of `transformers serve` that checks requests; it has no model."""
    from transformers.cli.serving import chat_completion, server, utils

    for owner, names in {
        server: ("build_server",),
        utils.BaseHandler: (
            "_validate_request",
            "_build_generation_config",
            "get_processor_inputs_from_messages",
        ),
        utils.GenerateManager: ("generate_streaming", "generate_non_streaming"),
        utils.CBGenerateManager: ("generate_streaming", "generate_non_streaming"),
    }.items():
        for name in names:  # restored after the test
            monkeypatch.setattr(owner, name, owner.__dict__[name])
    serve.check_requests()
    return chat_completion.ChatCompletionHandler(None, utils.GenerationState())


MESSAGES = [{"role": "user", "content": "a"}]


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("n", 2),
        ("logprobs", True),
        ("presence_penalty", 0.5),
        ("response_format", {"type": "json_object"}),
        ("tool_choice", "required"),
        ("functions", [{"name": "f"}]),
        ("messages", []),
        ("logit_bias", {"5": 100}),
    ],
)
def test_a_request_that_would_be_answered_as_if_fields_were_missing_is_refused(handler, field, value):
    from fastapi import HTTPException

    with pytest.raises(HTTPException, match=field) as error:
        handler._validate_request({"messages": MESSAGES, field: value})
    assert error.value.status_code == 400


@pytest.mark.parametrize(
    "fields",
    [
        {},
        {"n": 1, "logprobs": False, "presence_penalty": 0, "response_format": {"type": "text"}, "tool_choice": "auto"},
        {"user": "u", "metadata": {"a": "b"}, "store": True, "stream": True, "stream_options": {"include_usage": True}},
        {"temperature": 0.7, "top_p": 0.9, "seed": 1, "max_tokens": 5, "stop": None, "tools": [], "logit_bias": {}},
        {"tool_choice": "none", "function_call": "none", "reasoning_effort": "low"},
    ],
)
def test_requests_as_clients_send_them_are_accepted(handler, fields):
    from transformers import GenerationConfig

    handler._validate_request({"messages": MESSAGES, **fields})
    for batched in (False, True):
        handler._build_generation_config({"messages": MESSAGES, **fields}, GenerationConfig(), use_cb=batched)


def test_a_model_that_must_not_call_its_tools_is_refused(handler):
    from fastapi import HTTPException

    with pytest.raises(HTTPException, match="tool_choice: 'none'"):
        handler._validate_request({"messages": MESSAGES, "tools": [{"type": "function"}], "tool_choice": "none"})


@pytest.mark.parametrize(("kind", "accepted"), [("text", True), ("json_object", False)])
def test_the_verbosity_of_a_response_is_accepted_and_another_format_is_not(handler, kind, accepted):
    from fastapi import HTTPException
    from transformers.cli.serving.response import ResponseHandler

    responses = ResponseHandler(None, handler.generation_state)
    body = {"input": "a", "include": ["reasoning.encrypted_content"], "text": {"verbosity": "low"}}
    responses._validate_request(body)
    body["text"]["format"] = {"type": kind}
    with nullcontext() if accepted else pytest.raises(HTTPException, match="json_object"):
        responses._validate_request(body)


@pytest.mark.parametrize(
    ("settings", "tokens"), [("{}", None), ('{"max_length": 40}', 40), ('{"max_new_tokens": 3}', 3)]
)
def test_a_generation_config_without_max_tokens_is_answered(handler, phi3, monkeypatch, settings, tokens):
    from transformers import AutoModelForCausalLM, AutoTokenizer
    from transformers.cli.serving.utils import Modality

    model, tokenizer = AutoModelForCausalLM.from_pretrained(phi3), AutoTokenizer.from_pretrained(phi3)
    model.config.max_position_embeddings = 64
    used = []
    generate = type(model).generate
    monkeypatch.setattr(
        type(model), "generate", lambda *args, **options: used.append(options) or generate(*args, **options)
    )
    handler.model_manager = SimpleNamespace(get_model_modality=lambda *_, **__: Modality.LLM)
    handler._resolve_model = lambda body: ("m", model, tokenizer)
    response = asyncio.run(handler.handle_request({"messages": MESSAGES, "generation_config": settings}, "1"))
    assert response.status_code == 200
    length = used[0]["input_ids"].shape[-1]
    wanted = {None: 64 - length, 40: 40 - length, 3: 3}[tokens]
    assert used[0]["generation_config"].max_new_tokens == wanted


@pytest.mark.parametrize("fields", [{"stop": ["x"]}, {"frequency_penalty": 1.0}, {"generation_config": "{}"}])
def test_what_a_batch_shares_is_refused_there_and_applied_alone(handler, fields):
    from fastapi import HTTPException
    from transformers import GenerationConfig

    with pytest.raises(HTTPException, match="-- --no-continuous-batching"):
        handler._build_generation_config(fields, GenerationConfig(), use_cb=True)
    built = handler._build_generation_config(fields, GenerationConfig(), use_cb=False)
    assert built.stop_strings == fields.get("stop")
    sampled = GenerationConfig(do_sample=True)
    assert not handler._build_generation_config({"temperature": 0.7}, sampled, use_cb=True).do_sample
    assert handler._build_generation_config({"temperature": 0.7}, sampled, use_cb=False).do_sample


def test_an_image_is_refused_for_a_model_that_reads_text_only(handler):
    from fastapi import HTTPException
    from transformers.cli.serving.utils import Modality

    text, image = {"type": "text", "text": "a"}, {"type": "image_url", "image_url": {"url": "data:,"}}
    with pytest.raises(HTTPException, match="no image_url"):
        handler.get_processor_inputs_from_messages([{"role": "user", "content": [text, image]}], Modality.LLM)
    assert handler.get_processor_inputs_from_messages([{"role": "user", "content": [text]}], Modality.LLM) == MESSAGES
    [read] = handler.get_processor_inputs_from_messages([{"role": "user", "content": [text, image]}], Modality.VLM)
    assert len(read["content"]) == 2


def test_an_answer_ends_with_the_positions_that_the_model_knows(phi3):
    from fastapi import HTTPException
    from transformers import AutoModelForCausalLM, GenerationConfig

    model, config = AutoModelForCausalLM.from_pretrained(phi3), GenerationConfig(max_new_tokens=10**9)
    positions = model.config.max_position_embeddings
    serve.limit_length(model, {"input_ids": [0] * 10}, config)
    assert config.max_new_tokens == positions - 10
    with pytest.raises(HTTPException, match=f"prompt: {positions} tokens"):
        serve.limit_length(model, {"input_ids": [0] * positions}, config)
    model.config.rope_parameters = {"rope_type": "yarn", "factor": 2, "original_max_position_embeddings": positions}
    serve.limit_length(model, {"input_ids": [0] * positions}, config := GenerationConfig(max_new_tokens=10**9))
    assert config.max_new_tokens == positions, "as in training"


@pytest.mark.parametrize(("model_type", "concurrent"), [("phi3", True), ("falcon_h1", False)])
def test_requests_are_answered_together_where_the_architecture_is_tested_for_that(
    tmp_path, cache, model_type, concurrent
):
    folder = build_phi3(tmp_path / "model")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "model_type": model_type}))
    server = plan_server(Model("m", folder), "transformers", "127.0.0.1", free_port(), None, None, ("--x",))
    assert ("--continuous-batching" in server.command) is concurrent and server.command[-1] == "--x"


def test_the_model_name_is_valid_in_the_api(tmp_path, cache):
    folder = build_phi3(tmp_path / "my model @ home.")
    plain = plan_server(Model(folder.name, folder), "transformers", "127.0.0.1", free_port(), None, None)
    assert plain.command[5] == "my-model-home"
    with pytest.raises(BadConfig, match="name"):
        plan_server(Model("x", folder), "transformers", "127.0.0.1", free_port(), "a/b@c", None)


def test_an_unmerged_adapter_is_refused(phi3, cache):
    with pytest.raises(BadConfig, match="merged") as caught:
        plan_server(Model("a", phi3, unmerged_adapter=Path("/adapter")), "auto", "127.0.0.1", free_port(), None, None)
    assert "loraflow merge /adapter" in caught.value.next_step


@pytest.mark.parametrize(("text", "line"), [("<tool_call>{{ arguments }}", "--tool-call-parser hermes"), ("", "")])
def test_a_server_of_vllm_says_which_parser_finds_tool_calls(tmp_path, cache, monkeypatch, text, line):
    folder = build_phi3(tmp_path / "model")
    file = folder / "chat_template.jinja"
    file.write_text("{# " + text + " #}" + file.read_text())
    monkeypatch.setattr(serve, "_pick_engine", lambda engine: engine)
    for options, is_warned in (((), bool(line)), (("--tool-call-parser", "x"), False)):
        server = plan_server(Model("m", folder), "vllm", "127.0.0.1", free_port(), None, None, options)
        assert ("--enable-auto-tool-choice" in server.greeting and line in server.greeting) is is_warned
