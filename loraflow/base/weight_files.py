"""Weights are read from safetensors only. A pickle can run code when it is opened, so it is refused unopened."""

from __future__ import annotations

from pathlib import Path

from loraflow.failures import BadModel

PICKLES = (".bin", ".pt", ".pth", ".pkl", ".ckpt")


def refuse_pickles(folder: Path) -> None:
    """Refuse the folder of a model or an adapter that holds no safetensors.

    Raises:
        BadModel: the weights are missing, or they are a pickle; nothing was opened.
    """
    names = sorted(path.name for path in folder.iterdir()) if folder.is_dir() else []
    if any(name.endswith(".safetensors") for name in names):
        return
    pickles = [name for name in names if name.endswith(PICKLES)]
    raise BadModel(
        "The folder has no safetensors."
        + (" A pickle can run code when it is opened, so it is refused." if pickles else ""),
        where=str(folder),
        expected="*.safetensors",
        got=", ".join(pickles or names[:5]) or "nothing",
        next_step=_next_step(folder, names, pickles),
    )


def _next_step(folder: Path, names: list[str], pickles: list[str]) -> str:
    adapters = [name for name in names if (folder / name / "adapter_config.json").exists()]
    if adapters:  # PEFT saves every adapter that is not called "default" in a folder of its own name
        return f"name one adapter: {', '.join(str(folder / name) for name in adapters[:4])}"
    if "adapter_model.bin" in pickles:
        return "load it with peft where you trust it, and save_pretrained() it again: that writes safetensors"
    if pickles:
        return "convert it where you trust it: AutoModelForCausalLM.from_pretrained(…).save_pretrained(…)"
    return "name the folder that holds the weights"
