"""Checks of a base's weights, before anything is trained or merged: names, shapes and values."""

from __future__ import annotations

import json
import logging
import math
from collections.abc import Iterator, Mapping, Set
from pathlib import Path
from typing import TYPE_CHECKING, TypedDict, cast

from loraflow.base.architecture import config_errors, reason_of
from loraflow.base.load import refuse_missing_weights
from loraflow.base.stored_weights import TensorEntry, loaded_files, model_entries, not_used
from loraflow.failures import BadModel

if TYPE_CHECKING:
    from safetensors import safe_open
    from torch import Tensor
    from transformers import PreTrainedModel

log = logging.getLogger(__name__)
FLOATS = ("BF16", "F16", "F32", "F64")  # in the names of safetensors; other types are not read
_QUANTIZED = frozenset({"F4", "F6_E2M3", "F6_E3M2", "F8_E4M3", "F8_E5M2", "F8_E8M0", "I8", "U8"})
_KERNEL = "_attn_implementation"  # in a config.json, transformers uses it whatever else is asked for
BLOCK_VALUES = 2**22  # of a weight, at a time


class _LoadReport(TypedDict):
    """What transformers reports about the weights that it loaded."""

    missing_keys: set[str]
    unexpected_keys: set[str]
    mismatched_keys: set[tuple[str, tuple[int, ...], tuple[int, ...]]]  # name, shape in the file, shape in the model


def check_weights(folder: Path) -> None:
    """Check that a folder's files of weights can be opened, and that they hold what their index says.

    Raises:
        BadModel: one is damaged or missing, or the index is; a merge would not read them.
    """
    from safetensors import SafetensorError, safe_open

    for file in loaded_files(folder):
        if file.suffix != ".safetensors":  # the index
            continue
        try:
            with safe_open(file, "np") as tensors:
                tensors.keys()
        except (SafetensorError, OSError) as error:
            raise BadModel(
                "A file of weights is damaged.", where=str(file), got=str(error)[:200], next_step="fetch the base again"
            ) from error
    model_entries(folder)


def check_fits_config(folder: Path, *, trust: bool = False) -> list[str]:
    """Check that a folder's files have every weight of the model that its config.json describes, in the right shape.

    transformers opens the model on torch's meta device: it reads names and shapes only, and converts names of older files.

    Args:
        trust: run Python code that comes with the model. If it does not run without memory for weights, only their types are
            checked here, and their names and shapes by the training.

    Returns:
        the names of weights that the model does not use, sorted, such as those of layers beyond `num_hidden_layers`.

    Raises:
        BadModel: a weight is missing, which transformers would fill with random numbers, has another shape, or is quantized;
            or tied weights have different values.
    """
    try:
        model, report = _open_without_weights(folder, trust=trust)
    except BadModel as failure:
        if not trust:
            raise
        log.warning(
            "The model's own code does not run without weights, so only the training checks their names and shapes: %s",
            failure.got,
        )
        _refuse_quantized(
            folder, frozenset(name for name, entry in _stored(folder).items() if entry.shape[:2] == (1, 1))
        )
        return []
    refuse_missing_weights(folder, {"missing_keys": report["missing_keys"]})
    for name, found, expected in sorted(report["mismatched_keys"]):
        raise BadModel(
            "A weight of the base has another shape than config.json says.",
            where=f"{folder}: {name}",
            expected=str(list(expected)),
            got=str(list(found)),
            next_step="fetch the base again: config.json and weights are of two models",
        )
    if any(entry.dtype not in FLOATS for entry in _stored(folder).values()):
        _refuse_quantized(folder, _unused(folder, model, report), model)
    if not trust:
        _refuse_rotary_angles(folder, model)
    _refuse_two_values(folder, getattr(model, "all_tied_weights_keys", {}))
    if unused := sorted(report["unexpected_keys"]):
        log.warning("The base's files have %d weights that its model does not use, such as %s.", len(unused), unused[0])
    return unused


def _open_without_weights(folder: Path, *, trust: bool = False) -> tuple[PreTrainedModel, _LoadReport]:
    """Open a model on torch's meta device, and return what transformers reports about its files' weights."""
    from transformers import AutoModelForCausalLM
    from transformers.utils import logging as their_logging

    has_progress_bar = their_logging.is_progress_bar_enabled()
    their_logging.disable_progress_bar()
    errors = (Exception,) if trust else config_errors()  # a model's own code raises anything
    verbosity = their_logging.get_verbosity()
    their_logging.set_verbosity_error()  # its table of names says the same in many lines
    try:
        loaded = AutoModelForCausalLM.from_pretrained(
            folder,
            device_map="meta",
            output_loading_info=True,
            use_safetensors=True,
            ignore_mismatched_sizes=True,
            trust_remote_code=trust,
            attn_implementation="eager",  # a config may ask for a kernel that is not installed; nothing is computed here
        )
    except errors as error:
        raise BadModel(
            "transformers cannot open the base's weights.",
            where=str(folder),
            expected="weights that fit config.json",
            got=reason_of(error),
            next_step=_advice(folder),
        ) from error
    finally:
        their_logging.set_verbosity(verbosity)
        if has_progress_bar:
            their_logging.enable_progress_bar()
    return cast("tuple[PreTrainedModel, _LoadReport]", loaded)


def _advice(folder: Path) -> str:
    """Return the next step for a base that transformers cannot open."""
    kernel = json.loads((folder / "config.json").read_text(encoding="utf-8")).get(_KERNEL)
    if kernel is not None and kernel not in ("eager", "sdpa"):
        return f"remove {_KERNEL} from config.json; runtime.attn_implementation chooses the kernel"
    return "fetch the base again, or choose another one"


def unused_weights(folder: Path) -> frozenset[str]:
    """Return the names of stored weights that the model does not load, such as buffers of older transformers.

    Of a model that only code of its own can open, all weights count as used.
    """
    try:
        model, report = _open_without_weights(folder)
    except BadModel:
        return frozenset()
    return _unused(folder, model, report)


def _unused(folder: Path, model: PreTrainedModel, report: _LoadReport) -> frozenset[str]:
    return frozenset(not_used(model, _stored(folder), model.state_dict().keys(), report["unexpected_keys"]))


def _refuse_rotary_angles(folder: Path, model: PreTrainedModel) -> None:
    """Refuse rotary angles that are not finite, as those of `rope_theta: 0`: the model would compute NaN only."""
    for module in model.modules():
        config = getattr(module, "config", None)
        if config is None or not any(name.endswith("inv_freq") for name in module._buffers):
            continue
        angles = type(module)(config=config)
        scales = (value for name, value in vars(angles).items() if name.endswith("attention_scaling"))
        if not (all(map(is_finite, angles.buffers())) and all(map(math.isfinite, scales))):
            raise BadModel(
                "The model's rotary angles are not finite.",
                where=f"{folder / 'config.json'}: rope_parameters",
                expected="a rope_theta and factors above 0",
                got=str(config.rope_parameters)[:300],
                next_step="fetch config.json again",
            )


def _refuse_quantized(folder: Path, unused: Set[str], model: PreTrainedModel | None = None) -> None:
    """Refuse weights in integers or 8 bits. Without a quantization_config, transformers takes them for the weights."""
    tensors = {} if model is None else model.state_dict()
    floating = {name for name, tensor in tensors.items() if tensor.is_floating_point()}
    # Such as DeepSeek-V4's table of experts. The rest of a stored name may be another than the model's.
    integers = {name.rpartition(".")[2] for name in tensors.keys() - floating}
    for name, entry in sorted(_stored(folder).items()):
        is_small = entry.dtype in _QUANTIZED
        is_number = is_small or (model is not None and entry.dtype[0] in "IU")
        is_used = name not in unused and name.rpartition(".")[2] not in integers
        if (is_number and is_used) or (entry.dtype not in FLOATS and name in floating):
            raise BadModel(
                "The base's weights are quantized, and config.json does not say how."
                if is_small
                else "A weight of the base has an integer type.",
                where=f"{entry.file}: {name}",
                expected="weights in bfloat16, float16 or float32",
                got=entry.dtype,
                next_step="name the original model; base.quantization: nf4 or fp8 quantizes it for the training only",
            )


def refuse_non_finite_weights(folder: Path) -> None:
    """Refuse a model with NaN or infinity in a weight that it loads. All weights are read, in blocks.

    Raises:
        BadModel: there is such a weight.
    """
    from safetensors import safe_open

    unused: frozenset[str] | None = None
    for file in sorted({entry.file for entry in model_entries(folder)}):
        with safe_open(file, "pt") as tensors:
            for name in sorted(tensors.keys()):
                if all(is_finite(block) for block in _blocks(tensors, name)):
                    continue
                if unused is None:
                    unused = unused_weights(folder)
                if name not in unused:
                    raise BadModel(
                        "A weight of the base is not finite.",
                        where=f"{file}: {name}",
                        expected="finite values",
                        got="NaN or infinity",
                        next_step="fetch the base again, or choose another one",
                    )


def is_finite(values: Tensor) -> bool:
    """Tell whether no value is NaN or infinite. The smallest and the largest show it, without a copy of all values."""
    import torch

    return not values.numel() or bool(torch.isfinite(torch.stack(torch.aminmax(values))).all())


def _stored(folder: Path) -> dict[str, TensorEntry]:
    """Return the weights that transformers finds, by name."""
    return {entry.name: entry for entry in model_entries(folder)}


def _blocks(tensors: safe_open, name: str) -> Iterator[Tensor]:
    """Yield a weight of a floating-point type in blocks of rows: a mixture's experts can be one tensor of gigabytes."""
    part = tensors.get_slice(name)  # type: ignore[no-untyped-call]
    if part.get_dtype() not in FLOATS:
        return
    shape = part.get_shape()
    if not shape:
        yield tensors.get_tensor(name)  # type: ignore[no-untyped-call]
        return
    rows = max(1, BLOCK_VALUES // max(1, math.prod(shape[1:])))
    for first in range(0, shape[0], rows):
        yield part[first : first + rows]


def _refuse_two_values(folder: Path, tied: Mapping[str, str]) -> None:
    """Refuse weights that are one weight by the config, but are stored with different values.

    transformers 5 trains them as two, and a server that follows the config serves them as one.
    """
    import torch

    stored = _stored(folder)
    for pair in tied.items():
        if not all(name in stored for name in pair):
            continue
        first, second = (_read(stored[name].file, name) for name in pair)
        if not torch.equal(first, second):
            raise BadModel(
                "config.json ties two weights, but the base's files have different values for them.",
                where=f"{folder}: {', '.join(pair)}",
                expected="tie_word_embeddings: false, or equal weights",
                got="tie_word_embeddings: true, which is also the default of some architectures",
                next_step="set tie_word_embeddings to false in config.json, if the head is a weight of its own",
            )


def _read(file: Path, name: str) -> Tensor:
    from safetensors import safe_open

    with safe_open(file, "pt") as tensors:
        tensor: Tensor = tensors.get_tensor(name)
        return tensor
