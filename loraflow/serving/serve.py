"""Serve a model with an existing server: `transformers serve`, or vLLM where it is installed. Both have OpenAI's API.

loraflow prepares the model's folder, its name, all its stop ids and a free port. Then the server replaces this process
(exec), so that signals and exit status are the server's own. Started as a module, this file is `transformers serve`,
which ignores fields that it does not support, drops images, and answers beyond the positions that the model knows: here
it refuses such requests.
"""

import atexit
import json
import os
import re
import shutil
import signal
import sys
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from pydantic import JsonValue

from loraflow.data.templates.served_template import served_date
from loraflow.data.templates.tokenizer_config import find_template, further_templates
from loraflow.failures import BadConfig, MissingExtra
from loraflow.serving.models import Model, positions_of
from loraflow.serving.written_calls import vllm_parser
from loraflow.store.base import MANIFEST

PREFIX = "loraflow-serve-"  # of the temporary folders that are served
EXTRA = ("fastapi", "openai", "uvicorn")  # what `transformers serve` imports beyond transformers itself


@dataclass(frozen=True)
class Server:
    """The command of a server, ready to run."""

    command: list[str]
    cache: Path  # a hub cache that contains only this model
    greeting: str

    def start(self) -> None:
        """Replace this process by the server. Does not return."""
        sys.stdout.flush()
        os.chdir(self.cache)  # a folder with the model's name in the working folder would be served instead
        environment = {**os.environ, "HF_HUB_CACHE": str(self.cache), "HF_HUB_OFFLINE": "1"}
        os.execvpe(self.command[0], self.command, environment)


def plan_server(
    model: Model,
    engine: str,
    host: str,
    port: int,
    name: str | None,
    dtype: str | None,
    options: Sequence[str] = (),
) -> Server:
    """Return the server's command.

    Raises:
        BadConfig: the adapter is not merged, or the API does not allow the name.
        MissingExtra: the engine is not installed.
    """
    model.refuse_unmerged("A server")
    name = name or re.sub(r"[^\w.]+", "-", model.name).strip("-.") or "model"
    if not re.fullmatch(r"\w(?:[.-]?\w)*", name, re.ASCII):
        raise BadConfig(
            "This is not a valid name of a model.",
            where="--name",
            got=name,
            expected="a name such as tickets-v2",
            next_step="choose another --name",
        )
    engine = _pick_engine(engine)
    cache = _hub_cache(model.folder, name)
    address = ["--host", host, "--port", str(port)]
    if engine == "vllm":
        weights = str(next(cache.glob("*/snapshots/*")))
        command = ["vllm.entrypoints.openai.api_server", "--model", weights, "--served-model-name", name, *address]
    else:
        command = ["loraflow.serving.serve", "serve", name, *address, *_concurrency(model.folder)]
    command = [sys.executable, "-P", "-m", *command]
    if dtype:
        command += ["--dtype", dtype]
    greeting = _greeting(engine, model, name, host, port)
    if engine == "vllm" and not any(option.startswith("--tool-call-parser") for option in options):
        greeting += _tools_line(model.folder)
    return Server([*command, *options], cache, greeting)


def _pick_engine(engine: str) -> str:
    if engine == "auto":
        engine = "vllm" if find_spec("vllm") is not None and _has_cuda() else "transformers"
    needed = ("vllm",) if engine == "vllm" else EXTRA
    missing = [package for package in needed if find_spec(package) is None]
    if missing:
        raise MissingExtra(
            f"The {engine} server needs packages that are not installed.",
            where="loraflow serve",
            got=f"missing: {', '.join(missing)}",
            next_step="pip install vllm" if engine == "vllm" else "pip install 'loraflow[serve]'",
        )
    return engine


def _concurrency(folder: Path) -> list[str]:
    """Return the option that lets `transformers serve` answer requests together; without it they wait for each other.

    Requests then share a row, as documents do in training, so only architectures get it that are tested for that.
    """
    from transformers import AutoConfig

    from loraflow.base.architecture import is_tested

    return ["--continuous-batching"] if is_tested(AutoConfig.from_pretrained(folder)) else []


def _has_cuda() -> bool:
    import torch

    available: bool = torch.cuda.is_available()
    return available


def _hub_cache(folder: Path, name: str) -> Path:
    """Return a new hub cache that contains this model only: links to its files, and a generation config with all stop ids.

    A server stops only at the ids in generation_config.json, and /v1/models lists the models of a hub cache, not a folder.
    """
    from loraflow.base.load import stop_ids

    cache = Path(tempfile.mkdtemp(prefix=PREFIX))
    repo, commit = cache / f"models--{name}", "0" * 40
    snapshot = repo / "snapshots" / commit
    for path in [path.name for path in folder.iterdir() if path.is_file()] + further_templates(folder):
        (snapshot / path).parent.mkdir(parents=True, exist_ok=True)
        if path != MANIFEST:
            (snapshot / path).symlink_to(folder / path)
    file = snapshot / "generation_config.json"
    settings: dict[str, JsonValue] = json.loads(file.read_text(encoding="utf-8")) if file.exists() else {}
    file.unlink(missing_ok=True)
    settings["eos_token_id"] = [*stop_ids(folder)]
    file.write_text(json.dumps(settings, indent=2) + "\n", encoding="utf-8")
    (repo / "blobs").mkdir()
    (repo / "refs").mkdir()
    (repo / "refs" / "main").write_text(commit)
    return cache


def _tools_line(folder: Path) -> str:
    """Return a line with vLLM's options for tool calls; empty if the parser of the model's template is not known."""
    template = find_template(folder)
    parser = None if template is None else vllm_parser(template)
    return "" if parser is None else f"\ntools    -- --enable-auto-tool-choice --tool-call-parser {parser}"


def _greeting(engine: str, model: Model, name: str, host: str, port: int) -> str:
    reachable = {"0.0.0.0": "127.0.0.1", "::": "[::1]"}.get(host, f"[{host}]" if ":" in host else host)
    address = f"http://{reachable}:{port}/v1"
    body = json.dumps({"model": name, "messages": [{"role": "user", "content": "Hello"}]})
    lines = [
        f"{name} by {engine}: {model.folder}",
        f"address  {address}",
        f"curl     curl -s {address}/chat/completions -H 'Content-Type: application/json' -d '{body}'",
        f'python   openai.OpenAI(base_url="{address}", api_key="none").chat.completions.create(model="{name}", messages=…)',
    ]
    if (date := served_date(model.folder)) is not None:
        lines.append(f"note     the chat template always prints the date {date}, as in training")
    if host not in ("127.0.0.1", "localhost", "::1"):
        lines.append(f"caution  anyone who can reach {host} can use this server: it asks for no password")
    return "\n".join(lines)


HARMLESS = {"metadata", "parallel_tool_calls", "service_tier", "store", "stream_options", "user"}
HARMLESS |= {"include", "reasoning_effort"}  # hints, which clients send to any model
# Values that mean the same as no field; so do 0, false and empty ones, and "none" without tools.
NEUTRAL = {
    "n": 1,
    "best_of": 1,
    "modalities": ["text"],
    "response_format": {"type": "text"},
    "text": {"type": "text"},
    "tool_choice": "auto",
    "truncation": "disabled",
}
# `transformers serve` takes them from the first request of all, for every batch.
SHARED = {"frequency_penalty", "generation_config", "stop"}


def refuse_ignored(body: dict[str, Any], ignored: set[str], advice: str = "remove it") -> None:
    """Refuse a request with a field that has no effect, but should change the answer."""
    from fastapi import HTTPException

    for field in sorted(ignored - HARMLESS):
        value = body.get(field)
        if field == "text" and isinstance(value, dict):
            value = value.get("format")
        if value and value != NEUTRAL.get(field) and not (value == "none" and not body.get("tools")):
            raise HTTPException(400, f"{field}: {value!r:.80} has no effect here; {advice}")


def limit_length(model: Any, inputs: Any, config: Any) -> None:
    """Let the answer end with the positions that the model knows. Refuse a prompt that leaves none."""
    from fastapi import HTTPException

    ids = inputs["input_ids"]
    length = len(ids) if isinstance(ids, list) else ids.shape[-1]
    if (positions := positions_of(model)) is not None:
        if length >= positions:
            raise HTTPException(400, f"prompt: {length} tokens; prompt and answer have {positions} together")
        new = config.max_new_tokens or (config.max_length or positions) - length
        config.max_new_tokens = min(new, positions - length)


async def openai_error(request: Any, error: Any) -> Any:
    """Answer as OpenAI's API does: its clients show this message, and not FastAPI's `detail`."""
    from fastapi.responses import JSONResponse

    return JSONResponse({"error": {"message": error.detail, "type": "invalid_request_error"}}, error.status_code)


def check_requests() -> None:
    """Let the handlers of `transformers serve` check each request."""
    from fastapi import HTTPException
    from transformers.cli.serving import server
    from transformers.cli.serving.utils import BaseHandler, CBGenerateManager, GenerateManager, Modality

    build_server = server.build_server

    def with_errors(*arguments: Any, **options: Any) -> Any:
        application = build_server(*arguments, **options)
        application.exception_handler(HTTPException)(openai_error)
        return application

    server.build_server = with_errors
    handler: Any = BaseHandler
    validate, build = handler._validate_request, handler._build_generation_config
    read = handler.get_processor_inputs_from_messages

    def validate_request(self: Any, body: dict[str, Any]) -> None:
        validate(self, body)
        refuse_ignored(body, self._unused_fields | {"logit_bias"})  # its answer is status 500
        if not body.get("messages") and "messages" in self._valid_params_class.__mutable_keys__:
            raise HTTPException(400, "messages: there is none")

    def build_config(self: Any, body: dict[str, Any], config: Any, use_cb: bool = False) -> Any:
        if use_cb:
            refuse_ignored(body, SHARED, "start `loraflow serve` with `-- --no-continuous-batching`")
        built = build(self, body, config, use_cb=use_cb)
        built.do_sample = built.do_sample and not use_cb  # the temperature is shared, too
        return built

    def read_messages(messages: list[dict[str, Any]], modality: Any) -> Any:
        for message in messages:
            content = message.get("content")
            for part in content if isinstance(content, list) and modality is Modality.LLM else []:
                if "text" not in part:
                    raise HTTPException(400, f"this model reads text only, no {part.get('type')}")
        return read(messages, modality)

    def limited(generate: Callable[..., Any]) -> Callable[..., Any]:
        def wrapper(self: Any, model: Any, processor: Any, inputs: Any, config: Any, **options: Any) -> Any:
            limit_length(model, inputs, config)
            return generate(self, model, processor, inputs, config, **options)

        return wrapper

    handler._validate_request, handler._build_generation_config = validate_request, build_config
    handler.get_processor_inputs_from_messages = staticmethod(read_messages)
    for manager in (GenerateManager, CBGenerateManager):
        for name in ("generate_streaming", "generate_non_streaming"):
            setattr(manager, name, limited(getattr(manager, name)))


def _remove_at_exit(cache: Path) -> None:
    """Remove the served folder when this process ends, also by SIGTERM; a forked child leaves it."""
    server = os.getpid()

    def remove() -> None:
        if os.getpid() == server:
            shutil.rmtree(cache, ignore_errors=True)

    def end(number: int, _: object) -> None:
        remove()
        signal.signal(number, signal.SIG_DFL)
        signal.raise_signal(number)

    atexit.register(remove)
    signal.signal(signal.SIGTERM, end)


if __name__ == "__main__":  # the server's own process
    if Path.cwd().name.startswith(PREFIX):
        _remove_at_exit(Path.cwd())
    from transformers.cli.transformers import app

    check_requests()
    app()
