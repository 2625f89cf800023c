"""Attention over documents that lie end to end, by torch's own variable-length flash attention.

`choose` probes once what the machine has, and says what it took and why. No package is needed: torch has
FlashAttention 2 for this; where flash-attn 3 or 4 is installed, it is taken once it has given the same on this card.
"""

from __future__ import annotations

import importlib.util
import inspect
import logging
from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

from loraflow.config import Runtime
from loraflow.failures import BadConfig, MissingExtra

log = logging.getLogger(__name__)

VARLEN = "loraflow_varlen"  # the name under which transformers finds it
MAX_HEAD = 256  # widest head of flash attention


@dataclass(frozen=True)
class Attention:
    """What was chosen."""

    implementation: str  # transformers' name
    flat: bool  # documents end to end, with their borders; else padded rows, with a mask
    kernel: str  # for the log and the manifest
    why: str


def choose(runtime: Runtime, device: str, dtype: str, config: Any) -> Attention:
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
    wanted = runtime.attn_implementation
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
    if wanted in ("sdpa", "eager"):
        return Attention(wanted, False, wanted, "asked for")
    if obstacle:
        return Attention("sdpa", False, "sdpa", obstacle)
    kernel, name, why = _fastest(wanted)
    register(kernel)
    return Attention(VARLEN, True, name, why)


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


def _fastest(wanted: str) -> tuple[Callable[..., Any], str, str]:
    """Return (kernel, its name, why): the newest that is installed and gives on this card what torch's own gives."""
    import torch

    if wanted == "varlen":
        return _varlen, "torch varlen (FA2)", "asked for"
    major = torch.cuda.get_device_capability()[0]
    why = "no newer flash attention is installed"
    for name, package, cards in (("fa4", "flash_attn.cute", (9, 10)), ("fa3", "flash_attn_interface", (9,))):
        if wanted == name:
            _require(package, wanted, "cuda")
        if wanted not in ("auto", name) or major not in cards or not _there(package):
            continue
        try:
            return _probed(name), f"{name.upper()} ({package})", "installed, and agrees with torch's own on this card"
        except Exception as error:  # whatever a package of another version raises: torch's own is always there
            said = f"{type(error).__name__}: {error}".splitlines()[0][:200]
            if wanted == name:
                raise BadConfig(
                    f"{name.upper()} does not work here.", where="runtime.attn_implementation", got=said,
                    next_step="set runtime.attn_implementation to auto",
                ) from error  # fmt: skip
            log.warning("%s is installed, but does not work here: %s", package, said)
            why = f"{package} is installed, but does not work here: {said}"
    if wanted in ("fa3", "fa4"):
        raise BadConfig(
            f"{wanted.upper()} does not run on this GPU.", where="runtime.attn_implementation",
            got=torch.cuda.get_device_name(), next_step="set runtime.attn_implementation to auto",
        )  # fmt: skip
    return _varlen, "torch varlen (FA2)", why


def _probed(name: str) -> Callable[..., Any]:
    """Return a kernel once it has given, forward and backward, what torch's own gives."""
    wanted = _probe(_varlen)
    if name == "fa3":
        from torch.nn.attention import activate_flash_attention_impl

        activate_flash_attention_impl("FA3")  # torch hands its calls on to it from here
        _compare(_probe(_varlen), wanted)
        return _varlen
    from loraflow.training import flash4

    try:
        _compare(_probe(flash4.attend), wanted)
        return flash4.attend
    except Exception:
        _compare(_probe(flash4.attend_contiguous), wanted)
        return flash4.attend_contiguous


def _probe(kernel: Callable[..., Any]) -> list[Any]:
    """Run a kernel on small documents, laid out as a model lays them out; return output and gradients."""
    import torch

    draw = torch.Generator("cuda").manual_seed(0)
    tokens, heads, width = 384, 4, 96
    q, k, v = (
        torch.randn(heads, tokens, width, device="cuda", dtype=torch.bfloat16, generator=draw).requires_grad_()
        for _ in range(3)
    )
    begins = torch.tensor([0, 100, 101, 300, tokens, tokens], dtype=torch.int32, device="cuda")
    out = kernel(q.transpose(0, 1), k.transpose(0, 1), v.transpose(0, 1), begins, 256, width**-0.5, (-1, 0))
    out.backward(torch.randn(out.shape, device="cuda", dtype=out.dtype, generator=draw))
    return [out, q.grad, k.grad, v.grad]


def _compare(got: list[Any], wanted: list[Any]) -> None:
    for name, one, other in zip(("output", "dq", "dk", "dv"), got, wanted, strict=True):
        error = float((one.float() - other.float()).norm() / other.float().norm())
        if not error < 0.02:  # two kernels in bfloat16 differ by 0.001 to 0.003
            raise ValueError(f"{name} differs from torch's own by {error:.3g}")


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


_kernel: Callable[..., Any] | None = None


def register(kernel: Callable[..., Any] | None = None) -> None:
    """Make `attend` known to transformers, with a kernel; none takes torch's own."""
    global _kernel
    from transformers import AttentionInterface

    _kernel = kernel
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
    # Under autocast rotary embeddings leave q and k in float32: the kernels want what the projections gave.
    q, k, v = (one.squeeze(0).transpose(0, 1).to(value.dtype) for one in (query, key, value))
    # A window that no document reaches masks nothing, and is told as none: kernels are faster without.
    window = (-1, 0) if sliding_window is None or sliding_window >= max_length_q else (sliding_window - 1, 0)
    kernel = (_kernel or _varlen) if query.is_cuda else _by_document
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
    for start, end in pairwise(borders):
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
