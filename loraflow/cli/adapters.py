"""`loraflow adapters`: convert adapters from other tools."""

from __future__ import annotations

import shutil
from pathlib import Path

import click

from loraflow.failures import BadConfig


@click.group()
def adapters() -> None:
    """Convert adapters from other tools, or for bases with split or fused projections."""


@adapters.command()
@click.argument("source", type=click.Path(exists=True, path_type=Path))
@click.argument("base", type=click.Path(exists=True, file_okay=False, path_type=Path))
@click.argument("out", type=click.Path(path_type=Path))
@click.option("--alpha", type=float, help="lora_alpha of a loralib checkpoint, which does not contain it.")
@click.option(
    "--enable-lora",
    multiple=True,
    metavar="MODULE=BLOCKS",
    help="Adapted blocks of a loralib checkpoint's fused module, such as qkv_proj=q,v. Default: all.",
)
def convert(source: Path, base: Path, out: Path, alpha: float | None, enable_lora: tuple[str, ...]) -> None:
    """Write SOURCE as a PEFT adapter that fits BASE (a model's folder) to OUT.

    SOURCE is a PEFT adapter's folder, or a checkpoint of loralib's lora_state_dict: safetensors, or a file of torch.save,
    from which only tensors are read. Modules are split or fused as in the base: q_proj, k_proj, v_proj and qkv_proj;
    gate_proj, up_proj and gate_up_proj.
    """
    from loraflow.adapters.convert import convert as convert_adapter
    from loraflow.adapters.convert import parse_enabled
    from loraflow.serving.artifacts import require_intact_files
    from loraflow.store.files import set_default_modes

    if out.exists():
        raise BadConfig("The target exists already.", where=str(out), next_step="name a folder that does not exist")
    if source.is_dir() and (alpha is not None or enable_lora):
        raise BadConfig(
            "--alpha and --enable-lora are for loralib checkpoints only.",
            where=str(source),
            next_step="omit these options: a PEFT adapter contains both",
        )
    require_intact_files(source, base)
    unfinished = out.with_name(out.name + ".unfinished")
    shutil.rmtree(unfinished, ignore_errors=True)
    try:
        figures = convert_adapter(source, base, unfinished, lora_alpha=alpha, enable_lora=parse_enabled(enable_lora))
        set_default_modes(unfinished)
        unfinished.rename(out)
    finally:
        shutil.rmtree(unfinished, ignore_errors=True)
    click.echo(
        f"{figures['kept']} modules unchanged, {figures['split']} split, {figures['fused']} fused; "
        f"ranks {', '.join(map(str, figures['ranks']))}: {out}"
    )
