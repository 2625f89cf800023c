"""A base's configuration as transformers reads it, or a refusal in one sentence."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING

from loraflow.failures import BadModel

if TYPE_CHECKING:
    from transformers import PreTrainedConfig


def config_errors() -> tuple[type[Exception], ...]:
    """Return what transformers raises for a configuration that it cannot use."""
    from huggingface_hub.errors import (
        StrictDataclassError,
    )  # of values with a wrong type, or that contradict each other

    return (
        OSError, ValueError, KeyError, TypeError, AttributeError, ImportError, RuntimeError, IndexError, AssertionError,
        ZeroDivisionError, StrictDataclassError,
    )  # fmt: skip


def read_config(folder: Path, *, trust: bool = False) -> PreTrainedConfig:
    """Read a base's configuration.

    Args:
        folder: with config.json.
        trust: run Python code that comes with the model.

    Raises:
        BadModel: transformers cannot use it, or cannot tell which part of it is the language model.
    """
    from transformers import AutoConfig

    try:
        config: PreTrainedConfig = AutoConfig.from_pretrained(folder, local_files_only=True, trust_remote_code=trust)
        config.get_text_config()
    except config_errors() as error:
        raise BadModel(
            "transformers cannot use the base's configuration.",
            where=str(folder / "config.json"),
            expected="config.json of a causal model",
            got=reason_of(error),
            next_step="fetch config.json again, or choose another base",
        ) from error
    return config


def reason_of(error: Exception) -> str:
    """Return an error's text in one line."""
    return " ".join(str(error).split())[:300] or type(error).__name__


def code_references(file: Path) -> list[str]:
    """Return the classes of own code that a JSON file's `auto_map` names; none if it cannot be read, which others refuse."""
    try:
        mapped = json.loads(file.read_text(encoding="utf-8"))["auto_map"]
    except (OSError, ValueError, RecursionError, KeyError, TypeError):
        return []
    values = mapped.values() if isinstance(mapped, dict) else [mapped]
    named = [name for value in values for name in (value if isinstance(value, list) else [value])]
    return [name for name in named if isinstance(name, str)]
