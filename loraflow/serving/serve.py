"""Serve a model with an existing server: `transformers serve`, or vLLM where it is installed. Both have OpenAI's API.

loraflow prepares the model's folder, its name, all its stop ids and a free port. Then the server replaces this process
(exec), so that signals and exit status are the server's own.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import shutil
import socket
import sys
import uuid
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path

from pydantic import JsonValue

from loraflow.data.templates.served_template import served_date
from loraflow.data.templates.tokenizer_config import find_template, further_templates
from loraflow.failures import BadConfig, MissingExtra
from loraflow.identity import fingerprint, short
from loraflow.serving.models import Model
from loraflow.serving.written_calls import vllm_parser
from loraflow.store.base import MANIFEST

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
        BadConfig: the adapter is not merged, the API does not allow the name, or the port is taken.
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
    _refuse_taken(host, port)
    cache = _hub_cache(model.folder, name)
    address = ["--host", host, "--port", str(port)]
    if engine == "vllm":
        weights = str(next(cache.glob("*/snapshots/*")))
        command = ["vllm.entrypoints.openai.api_server", "--model", weights, "--served-model-name", name, *address]
    else:
        command = ["transformers.cli.transformers", "serve", name, *address, *_concurrency(model.folder)]
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


def _refuse_taken(host: str, port: int) -> None:
    """Bind the port now: the server would report a taken port only after loading the model."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    with socket.socket(family) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((host, port))
        except OSError as error:
            raise BadConfig(
                "The server cannot listen on this address.",
                where=f"{host} port {port}",
                got=error.strerror or str(error),
                next_step=f"name another port, such as --port {port + 1}",
            ) from error


def _hub_cache(folder: Path, name: str) -> Path:
    """Return a hub cache that contains this model only: links to its files, and a generation config with all its stop ids.

    A server stops only at the ids in generation_config.json, and /v1/models lists the models of a hub cache, not a folder.
    """
    from loraflow.base.load import stop_ids

    names = [path.name for path in sorted(folder.iterdir()) if path.is_file() and path.name != MANIFEST]
    names += further_templates(folder)
    file = folder / "generation_config.json"
    settings: dict[str, JsonValue] = json.loads(file.read_text(encoding="utf-8")) if file.exists() else {}
    settings["eos_token_id"] = [*stop_ids(folder)]
    key = fingerprint({"files": [str(folder / path) for path in names], "settings": settings, "name": name})
    caches = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "loraflow" / "serve"
    cache = caches / short(key)
    temporary = caches / f".{uuid.uuid4().hex}"
    repo, commit = temporary / f"models--{name}", key[:40]
    snapshot = repo / "snapshots" / commit
    snapshot.mkdir(parents=True)
    for path in names:
        if path != file.name:
            (snapshot / path).parent.mkdir(exist_ok=True)
            (snapshot / path).symlink_to(folder / path)
    (snapshot / file.name).write_text(json.dumps(settings, indent=2) + "\n", encoding="utf-8")
    (repo / "blobs").mkdir()
    (repo / "refs").mkdir()
    (repo / "refs" / "main").write_text(commit)
    old = temporary.with_suffix(".old")
    if not _is_intact(cache, temporary):  # damaged or incomplete
        with contextlib.suppress(FileNotFoundError):
            cache.rename(old)
    try:
        temporary.rename(cache)
    except OSError:  # it is there
        if not _is_intact(cache, temporary):
            raise
    finally:
        for unused in (old, temporary):
            shutil.rmtree(unused, ignore_errors=True)
    return cache


def _is_intact(cache: Path, expected: Path) -> bool:
    """Tell whether a hub cache has the expected links and texts, and its snapshot nothing else. A server adds locks."""
    found, wanted = _content(cache), _content(expected)
    return {name: value for name, value in found.items() if name in wanted or "/snapshots/" in name} == wanted


def _content(folder: Path) -> dict[str, Path | bytes]:
    """Return the target of each link, and the first MiB of each file that is not one, by relative name."""
    found: dict[str, Path | bytes] = {}
    for path in folder.rglob("*"):
        name = path.relative_to(folder).as_posix()
        if path.is_symlink():
            found[name] = path.readlink()
        elif path.is_file():
            with path.open("rb") as file:
                found[name] = file.read(1 << 20)
    return found


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
        lines.append(f"note     the chat template prints the date {date}, as in training, whatever the day is")
    if host not in ("127.0.0.1", "localhost", "::1"):
        lines.append(f"caution  anyone who can reach {host} can use this server: it asks for no password")
    return "\n".join(lines)
