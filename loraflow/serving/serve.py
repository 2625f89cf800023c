"""Serve a model by somebody else's server: `transformers serve`, or vLLM where it is installed. Both speak OpenAI's API.

What is ours: which folder, under which name, with all its stop ids, on a port that is free; then the server takes our
place (exec), so that signals and exit status are its own.
"""

from __future__ import annotations

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

from loraflow.failures import BadConfig, MissingExtra
from loraflow.identity import fingerprint, short
from loraflow.serving.models import Model
from loraflow.store.base import MANIFEST

EXTRA = ("fastapi", "openai", "uvicorn")  # what `transformers serve` imports beyond transformers itself


@dataclass(frozen=True)
class Server:
    """A command that is ready to run."""

    command: list[str]
    cache: Path  # a hub cache that holds the model under its name, and nothing else
    greeting: str

    def start(self) -> None:
        """Become the server. Does not return."""
        sys.stdout.flush()
        os.chdir(self.cache)  # where no folder has the model's name: it would be taken for the model
        os.execvpe(
            self.command[0], self.command, {**os.environ, "HF_HUB_CACHE": str(self.cache), "HF_HUB_OFFLINE": "1"}
        )


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
        BadConfig: an adapter that is not merged, a name that the API cannot have, a port that is taken.
        MissingExtra: the engine is not installed.
    """
    model.refuse_unmerged("A server")
    name = name or re.sub(r"[^\w.]+", "-", model.name).strip("-.") or "model"
    if not re.fullmatch(r"\w(?:[.-]?\w)*", name, re.ASCII):
        raise BadConfig("This cannot be the model's name.", where="--name", got=name, expected="a name as tickets-v2")
    engine = _pick_engine(engine)
    _refuse_taken(host, port)
    place = _view(model.folder, name)
    if engine == "vllm":
        weights = str(next(place.glob("*/snapshots/*")))
        command = [sys.executable, "-m", "vllm.entrypoints.openai.api_server", "--model", weights,
                   "--served-model-name", name, "--host", host, "--port", str(port)]  # fmt: skip
    else:
        command = [sys.executable, "-m", "transformers.cli.transformers", "serve", name,
                   "--host", host, "--port", str(port)]  # fmt: skip
    if dtype:
        command += ["--dtype", dtype]
    return Server([*command, *options], place, _greeting(engine, model, name, host, port))


def _pick_engine(engine: str) -> str:
    if engine == "auto":
        engine = "vllm" if find_spec("vllm") is not None and _has_cuda() else "transformers"
    missing = [one for one in (("vllm",) if engine == "vllm" else EXTRA) if find_spec(one) is None]
    if missing:
        raise MissingExtra(
            f"The {engine} server needs packages that are not installed.",
            where="loraflow serve",
            got=f"missing: {', '.join(missing)}",
            next_step="pip install vllm" if engine == "vllm" else "pip install 'loraflow[serve]'",
        )
    return engine


def _has_cuda() -> bool:
    import torch

    return torch.cuda.is_available()


def _refuse_taken(host: str, port: int) -> None:
    """Try the port: the server would find out only after it has loaded the model.

    Raises:
        BadConfig: it is taken, or the address is not ours.
    """
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    with socket.socket(family) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((host, port))
        except OSError as error:
            with socket.socket(family) as other:
                other.bind(("::1" if family == socket.AF_INET6 else "127.0.0.1", 0))
                free = other.getsockname()[1]
            raise BadConfig(
                "The server cannot listen there.",
                where=f"{host} port {port}",
                got=error.strerror or str(error),
                next_step=f"another port, such as --port {free}",
            ) from error


def _view(folder: Path, name: str) -> Path:
    """Return a hub cache with one model in it: this one under its name, as links, with all its stop ids.

    A server stops at what generation_config.json names and at nothing else; a base whose template ends answers with
    another token would talk on. A cache, because `transformers serve` lists that, and no folder, in /v1/models.
    """
    from loraflow.base.load import stop_ids

    files = [path for path in sorted(folder.iterdir()) if path.is_file() and path.name != MANIFEST]
    file = folder / "generation_config.json"
    settings = json.loads(file.read_text(encoding="utf-8")) if file.exists() else {}
    settings["eos_token_id"] = stop_ids(folder)
    key = fingerprint({"files": [str(path) for path in files], "settings": settings, "name": name})
    home = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "loraflow" / "serve" / short(key)
    if not home.exists():
        aside = home.with_name(f".{uuid.uuid4().hex}")
        repo, commit = aside / f"models--{name}", key[:40]
        snapshot = repo / "snapshots" / commit
        snapshot.mkdir(parents=True)
        for path in files:
            if path != file:
                (snapshot / path.name).symlink_to(path)
        (snapshot / file.name).write_text(json.dumps(settings, indent=2) + "\n", encoding="utf-8")
        (repo / "blobs").mkdir()
        (repo / "refs").mkdir()
        (repo / "refs" / "main").write_text(commit)
        try:
            aside.rename(home)
        except OSError:  # another server of the same model was faster
            shutil.rmtree(aside)
    return home


def _greeting(engine: str, model: Model, name: str, host: str, port: int) -> str:
    reached = {"0.0.0.0": "127.0.0.1", "::": "[::1]"}.get(host, f"[{host}]" if ":" in host else host)
    address = f"http://{reached}:{port}/v1"
    body = json.dumps({"model": name, "messages": [{"role": "user", "content": "Hello"}]})
    lines = [
        f"{name} by {engine}: {model.folder}",
        f"address  {address}",
        f"curl     curl -s {address}/chat/completions -H 'Content-Type: application/json' -d '{body}'",
        f'python   openai.OpenAI(base_url="{address}", api_key="none").chat.completions.create(model="{name}", messages=…)',
    ]
    if host not in ("127.0.0.1", "localhost", "::1"):
        lines.append(f"caution  {host} is open to whoever reaches it: the server asks for no password")
    return "\n".join(lines)
