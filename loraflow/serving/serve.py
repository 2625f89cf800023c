"""Serve a model by somebody else's server: `transformers serve`, or vLLM where it is installed. Both speak OpenAI's API.

What is ours: which folder, under which name, with all its stop ids, on a port that is free; then the server takes our
place (exec), so that signals and exit status are its own.
"""

from __future__ import annotations

import json
import os
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
    folder: Path  # where it runs: transformers knows the model by its name below it
    greeting: str

    def start(self) -> None:
        """Become the server. Does not return."""
        sys.stdout.flush()
        os.chdir(self.folder)
        os.execvpe(self.command[0], self.command, {**os.environ, "HF_HUB_OFFLINE": "1"})


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
    name = name or model.name
    if not name or "@" in name or "/" in name:
        raise BadConfig("The model needs a plain name.", where="--name", got=name, expected="no @ and no /")
    engine = _pick_engine(engine)
    _refuse_taken(host, port)
    place = _view(model.folder, name)
    if engine == "vllm":
        command = [sys.executable, "-m", "vllm.entrypoints.openai.api_server", "--model", name,
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
    """Return a folder in which the model lies under its name, as links, with all stop ids in its generation config.

    A server stops at what generation_config.json names, and at nothing else; a base whose template ends answers with
    another token would talk on.
    """
    from loraflow.base.load import stop_ids

    stops = stop_ids(folder)
    files = [path for path in sorted(folder.iterdir()) if path.is_file() and path.name != MANIFEST]
    file = folder / "generation_config.json"
    settings = json.loads(file.read_text(encoding="utf-8")) if file.exists() else {}
    settings["eos_token_id"] = stops
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    key = short(fingerprint({"files": [str(path) for path in files], "settings": settings, "name": name}))
    home = cache / "loraflow" / "serve" / key
    if not home.exists():
        aside = home.with_name(f".{uuid.uuid4().hex}")
        (aside / name).mkdir(parents=True)
        for path in files:
            if path != file:
                (aside / name / path.name).symlink_to(path)
        (aside / name / file.name).write_text(json.dumps(settings, indent=2) + "\n", encoding="utf-8")
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
