"""Attention over documents that lie end to end, by torch's own variable-length flash attention.

`choose` probes once what the machine has, and says what it took and why. No package is needed: torch has
FlashAttention 2 for this; where flash-attn 3 or 4 is installed, torch hands its calls on to it.
"""

from __future__ import annotations

import importlib.util
import inspect
import logging
from dataclasses import dataclass
from typing import Any

from loraflow.failures import BadConfig, MissingExtra

log = logging.getLogger(__name__)

VARLEN = "loraflow_varlen"  # the name under which transformers finds it
MAX_HEAD = 256  # widest head of flash attention
_FLASH_4, _FLASH_3 = "flash_attn.cute", "flash_attn_interface"


@dataclass(frozen=True)
class Attention:
    """What was chosen."""

    implementation: str  # transformers' name
    flat: bool  # documents end to end, with their borders; else padded rows, with a mask
    kernel: str  # for the log and the manifest
    why: str


def choose(runtime: dict[str, Any], device: str, dtype: str, config: Any) -> Attention:
    """Choose the attention for training.

    Args:
        runtime: its `attn_implementation`.
        device: cpu or cuda.
        dtype: in which the model computes.
        config: the model's.

    Raises:
        MissingExtra: what is asked for is not there.
        BadConfig: what is asked for cannot compute this model.
    """
    wanted = runtime.get("attn_implementation", "auto")
    text = config.get_text_config()
    obstacle = _obstacle(device, dtype, text)
    if wanted in ("varlen", "fa3", "fa4") and obstacle:
        raise BadConfig(
            f"Attention {wanted} cannot be had here.", where="runtime.attn_implementation", got=obstacle,
            next_step="set runtime.attn_implementation to auto",
        )  # fmt: skip
    if wanted == "flash_attention_2":
        _require("flash_attn", wanted, device)
        return Attention(wanted, True, "flash-attn 2", "asked for")
    if wanted in ("sdpa", "eager", "flex_attention"):
        return Attention(wanted, False, wanted, "asked for")
    if obstacle:
        return Attention("sdpa", False, "sdpa", obstacle)
    kernel, why = _activate(wanted, device)
    _register()
    return Attention(VARLEN, True, kernel, why)


def _obstacle(device: str, dtype: str, text: Any) -> str:
    import torch

    head = getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads
    if device != "cuda":
        return "no GPU"
    if torch.cuda.get_device_capability() < (8, 0):
        return f"{torch.cuda.get_device_name()} is older than Ampere"
    if dtype == "float32":
        return "flash attention has no float32"
    if head > MAX_HEAD:
        return f"heads are {head} wide, flash attention's at most {MAX_HEAD}"
    if getattr(text, "attn_logit_softcapping", None):
        return "the model caps its attention logits"
    if getattr(text, "attention_dropout", 0.0):
        return "the model drops attention weights"
    return ""


def _activate(wanted: str, device: str) -> tuple[str, str]:
    """Switch torch's flash attention to the newest that is installed; return (kernel, why)."""
    import torch

    if device != "cuda" or wanted == "varlen":
        return "torch varlen (FA2)", "asked for"
    major = torch.cuda.get_device_capability()[0]
    newer = [("fa4", "FA4", _FLASH_4, major in (9, 10)), ("fa3", "FA3", _FLASH_3, major == 9)]
    for name, impl, package, fits in newer:
        if wanted == name and not fits:
            raise BadConfig(
                f"{impl} does not run on this GPU.", where="runtime.attn_implementation", got=torch.cuda.get_device_name(),
                next_step="set runtime.attn_implementation to auto",
            )  # fmt: skip
        if wanted == name:
            _require(package, wanted, device)
        if (wanted in ("auto", name)) and fits and _there(package):
            try:
                from torch.nn.attention import activate_flash_attention_impl

                activate_flash_attention_impl(impl)
                return f"torch varlen ({impl})", f"{package} is installed"
            except Exception as error:  # a package of another version: say so, and take what torch has
                if wanted == name:
                    raise BadConfig(
                        f"{impl} could not be switched on.", where="runtime.attn_implementation", got=str(error)[:300]
                    ) from error
                log.warning("%s is installed, but could not be switched on: %s", package, str(error)[:300])
    return "torch varlen (FA2)", "no newer flash attention is installed"


def _there(package: str) -> bool:
    try:
        return importlib.util.find_spec(package) is not None
    except ModuleNotFoundError:  # its parent is missing
        return False


def _require(package: str, wanted: str, device: str) -> None:
    if device != "cuda" or not _there(package):
        raise MissingExtra(
            f"{wanted} needs CUDA and the package {package.split('.')[0]}.",
            where="runtime.attn_implementation",
            next_step="set runtime.attn_implementation to auto",
        )


def _register() -> None:
    from transformers import AttentionInterface

    # No mask function is registered under this name, so that transformers builds no mask.
    AttentionInterface.register(VARLEN, attend)


def attend(
    module: Any,
    query: Any,
    key: Any,
    value: Any,
    attention_mask: Any = None,
    scaling: float | None = None,
    sliding_window: int | None = None,
    cu_seq_lens_q: Any = None,
    max_length_q: int | None = None,
    **_: Any,
) -> tuple[Any, None]:
    """Attend within each document, causally.

    Args:
        module: the attention module; unused.
        query: [1, heads, tokens, width]; key and value the same, with as many or fewer heads.
        key: see query.
        value: see query.
        attention_mask: none; borders say it all.
        scaling: of the products; default 1/√width.
        sliding_window: tokens that each token sees, itself included; none is all before it.
        cu_seq_lens_q: where documents begin, [entries] int32, the last ones the number of tokens.
        max_length_q: tokens of the longest document, a constant.

    Returns:
        [1, tokens, heads, width], and no weights.
    """
    assert cu_seq_lens_q is not None and max_length_q is not None, "documents end to end need their borders"
    q, k, v = (one.squeeze(0).transpose(0, 1) for one in (query, key, value))
    # A window that no document reaches masks nothing, and is told as none: kernels are faster without.
    window = (-1, 0) if sliding_window is None or sliding_window >= max_length_q else (sliding_window - 1, 0)
    kernel = _varlen if query.is_cuda else _by_document
    return kernel(q, k, v, cu_seq_lens_q, max_length_q, scaling, window).unsqueeze(0), None


def _varlen(q: Any, k: Any, v: Any, begins: Any, longest: int, scaling: float | None, window: tuple[int, int]) -> Any:
    from torch.nn.attention.varlen import varlen_attn

    options: dict[str, Any] = {"scale": scaling, "window_size": window}
    if q.shape[1] != k.shape[1]:
        if "enable_gqa" in inspect.signature(varlen_attn).parameters:
            options["enable_gqa"] = True
        else:
            k, v = (one.repeat_interleave(q.shape[1] // k.shape[1], 1) for one in (k, v))
    return varlen_attn(q, k, v, begins, begins, longest, longest, **options)


def _by_document(
    q: Any, k: Any, v: Any, begins: Any, longest: int, scaling: float | None, window: tuple[int, int]
) -> Any:
    """Attend to one document after another: slow, for tests on a CPU."""
    import torch

    borders = begins.tolist()
    parts = []
    for start, end in zip(borders[:-1], borders[1:], strict=True):
        if start == end:
            continue
        distance = torch.arange(end - start)[:, None] - torch.arange(end - start)[None]
        seen = (distance >= 0) & ((distance <= window[0]) if window[0] >= 0 else True)
        one = [part[start:end].transpose(0, 1) for part in (q, k, v)]
        parts.append(
            torch.nn.functional.scaled_dot_product_attention(
                *one, attn_mask=seen, scale=scaling, enable_gqa=q.shape[1] != k.shape[1]
            ).transpose(0, 1)
        )
    return torch.cat(parts)
