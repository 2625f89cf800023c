"""The recipe's peft_config as peft's LoraConfig, with every requested target matched, or an error."""

from __future__ import annotations

from typing import Any

from loraflow.failures import BadConfig


def lora_config(peft_config: dict[str, Any]) -> Any:
    """Return peft's LoraConfig."""
    from peft import LoraConfig

    values = {key: value for key, value in peft_config.items() if value not in (None, [], {})}
    return LoraConfig(**values)


def check_targets(model: Any, peft_config: dict[str, Any]) -> None:
    """Refuse names that match no module: peft says nothing as long as one of them matches.

    The guide's notebooks ask Phi-3 for q_proj, k_proj, …; it has qkv_proj, and so they trained half of what they meant.

    Raises:
        BadConfig: a name matches nothing; the message lists what the model has.
    """
    import torch

    named = dict(model.named_modules())
    for field in ("target_modules", "modules_to_save", "exclude_modules"):
        wanted = peft_config.get(field)
        if not isinstance(wanted, list):
            continue
        for target in wanted:
            if not any(name == target or name.endswith(f".{target}") for name in named):
                have = sorted({name.rsplit(".", 1)[-1] for name, m in named.items() if isinstance(m, torch.nn.Linear)})
                raise BadConfig(
                    f"No module of the base is called {target}.",
                    where=f"peft_config.{field}",
                    expected=f"among {', '.join(have)}",
                    got=target,
                    next_step=_hint(target, have),
                )


def _hint(target: str, have: list[str]) -> str:
    fused = {"q_proj": "qkv_proj", "k_proj": "qkv_proj", "v_proj": "qkv_proj", "gate_proj": "gate_up_proj"}
    fused |= {"up_proj": "gate_up_proj"}
    if fused.get(target) in have:
        return f"this model fuses it: name {fused[target]}, or set target_modules: all-linear"
    return "set target_modules: all-linear, or name modules of the list"
