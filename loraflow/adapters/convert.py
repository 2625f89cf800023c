"""Convert adapters: loralib's checkpoints to PEFT's folders, and between split and fused projections.

An adapter for q_proj, k_proj and v_proj is converted for a base with qkv_proj, and the reverse.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TypedDict

from loraflow.adapters.adapter_check import check_adapter
from loraflow.adapters.fit_to_base import BaseShapes, fit
from loraflow.adapters.loralib_checkpoint import LoralibSettings, from_loralib, read_tensors
from loraflow.adapters.peft_folder import read_peft, refuse_unconvertible, write_peft
from loraflow.adapters.tokenizer_files import copy_tokenizer_files
from loraflow.failures import BadModel


class ConvertFigures(TypedDict):
    """What a conversion did to the adapter's modules."""

    kept: int
    split: int
    fused: int
    ranks: list[int]  # the distinct ranks of the new adapter's modules


def convert(
    source: Path,
    base: Path,
    out: Path,
    *,
    lora_alpha: float | None = None,
    enable_lora: Mapping[str, list[str]] | None = None,
) -> ConvertFigures:
    """Write an adapter as PEFT's folder for this base.

    Args:
        source: a PEFT adapter's folder, or a file of loralib's `lora_state_dict`. A file of `torch.save` is read by
            torch's `weights_only` reader, which builds tensors and refuses everything else.
        base: folder of the model that the adapter is to fit; its weights are not read.
        out: a folder that does not exist yet.
        lora_alpha: alpha of a loralib checkpoint, which does not contain it.
        enable_lora: the adapted blocks of fused modules in a loralib checkpoint, if not all blocks are adapted.

    Raises:
        BadModel: the adapter does not fit the base, split or fused; it is damaged, or contains more than LoRA.
    """
    shapes = BaseShapes.read(base)
    if source.is_dir():
        refuse_unconvertible(source)
        check_adapter(source, base, convertible=True)
        adapter = read_peft(source)
    elif lora_alpha is None:
        raise BadModel(
            "A loralib checkpoint does not contain alpha.", where=str(source), next_step="set it with --alpha"
        )
    else:
        adapter = from_loralib(read_tensors(source), shapes, LoralibSettings(lora_alpha, enable_lora or {}))
    fitted, done = fit(adapter, shapes)
    write_peft(fitted, out)
    if source.is_dir():
        copy_tokenizer_files(source, out)
    ranks = sorted({update.rank for update in fitted.updates.values()})
    return {"kept": done.kept, "split": done.split, "fused": done.fused, "ranks": ranks}


def parse_enabled(pairs: tuple[str, ...]) -> dict[str, list[str]]:
    """Parse options such as `qkv_proj=q,v`."""
    split = (pair.partition("=") for pair in pairs)
    return {module: [block for block in blocks.split(",") if block] for module, _, blocks in split}
