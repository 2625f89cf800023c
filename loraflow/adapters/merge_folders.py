"""Merge an adapter's folder into a base model's folder.

LoRA in all its forms is streamed from disk to disk (`streaming_merge`). What needs more than that (single trained tokens,
weights that are stored transposed) goes through peft itself.
"""

from __future__ import annotations

import json
import logging
import shutil
import time
from dataclasses import replace
from pathlib import Path
from typing import Any, TypedDict

from loraflow.adapters import safetensors_files as tensors
from loraflow.adapters import validation as accept
from loraflow.adapters.nf4 import Nf4, packed_names
from loraflow.adapters.streaming_merge import Plan, merge_streaming, plan_of
from loraflow.failures import BadModel
from loraflow.job import Progress

log = logging.getLogger(__name__)
_EMBEDDINGS = ("embed_tokens", "wte", "embed_in")
_HEADS = ("lm_head", "embed_out")


class MergeOptions(TypedDict, total=False):
    """Options of `merge` that both ways of merging pass on."""

    dtype: str | None
    max_shard_bytes: int
    threads: int | None
    base_digest: str | None


def merge(
    base: Path,
    adapter: Path,
    out: Path,
    *,
    dtype: str | None = None,
    max_shard_bytes: int = 5 * 10**9,
    threads: int | None = None,
    progress: Progress | None = None,
    base_digest: str | None = None,
    nf4: Nf4 | None = None,
    trust: bool = False,
) -> dict[str, Any]:
    """Merge an adapter's folder into a base's folder; `out` must be empty.

    Args:
        base: the model's folder.
        adapter: PEFT's folder.
        out: where the merged model goes.
        dtype: bfloat16, float16 or float32; None keeps each tensor's own.
        max_shard_bytes: of one file.
        threads: at work; None is all cores.
        progress: reports tensors; finished shards survive a kill in its `work` folder.
        base_digest: the artifact's, compared with what the adapter says that it was trained on.
        nf4: take the base's weights as training saw them, packed and unpacked.
        trust: run code that comes with the base, to know which of its weights are packed.

    Returns:
        Figures: `adapted` matrices, `route` (streamed or peft), `seconds` of the merge alone.

    Raises:
        BadModel: a pickle; damaged; not finite; of another base or chat template; a tensor without its place; a tokenizer
            with more tokens than the embeddings have rows.
    """
    accept.refuse_pickles(adapter)
    accept.refuse_pickles(base)
    config = accept.read_config(adapter)
    accept.check_config(config, adapter)
    accept.check_adapter(adapter)
    accept.check_origin(adapter, base, base_digest)
    entries = tensors.model_entries(base)
    _check_vocabulary(base, adapter, entries)
    started = time.perf_counter()
    plan = plan_of(config, adapter)
    if plan is not None:
        _check_tied(base, entries, plan)
    if plan is not None and nf4 is not None:
        names = packed_names(base, trust=trust)
        plan = None if names is None else replace(plan, nf4=nf4, packed=names - plan.replaced.keys())
    if plan is None:
        adapted = _merge_through_peft(base, adapter, out, dtype, max_shard_bytes, nf4)
    else:
        adapted = len(plan.loras)
        merge_streaming(base, plan, out, dtype, max_shard_bytes, threads, progress or Progress())
    seconds = time.perf_counter() - started
    _copy_the_rest(base, out, dtype)
    _write_stop_ids(out)
    accept.write_origin(out, base, base_digest)
    return {"adapted": adapted, "route": "peft" if plan is None else "streamed", "seconds": round(seconds, 2)}


def _module(name: str) -> str:
    return name.rpartition(".")[0].rpartition(".")[2]


def _check_vocabulary(base: Path, adapter: Path, entries: list[tensors.Entry]) -> None:
    rows = [entry.shape[0] for entry in entries if _module(entry.name) in _EMBEDDINGS]
    if rows:
        accept.check_vocabulary(base, adapter, rows[0])


def _check_tied(base: Path, entries: list[tensors.Entry], plan: Plan) -> None:
    """Refuse embeddings or a head that were trained as a whole where the base has one weight for both."""
    config = json.loads((base / "config.json").read_text(encoding="utf-8"))
    told = config.get("tie_word_embeddings", (config.get("text_config") or {}).get("tie_word_embeddings"))
    if not (told if told is not None else not any(_module(entry.name) in _HEADS for entry in entries)):
        return
    for name, entry in plan.replaced.items():
        # What lies below a LoRA, as peft saves it with one on the embeddings, is the base's own.
        if _module(name) in _EMBEDDINGS + _HEADS and ".base_layer." not in entry.name:
            raise BadModel(
                "The adapter holds embeddings or a head of its own, and the base has one weight for both.",
                where=name,
                got="tie_word_embeddings",
                next_step="serve base and adapter together, with peft; or train single tokens: trainable_token_indices",
            )
    for name, lora in plan.loras.items():
        if lora.embedding and _module(name) in _EMBEDDINGS:
            log.warning("%s is the head's weight too: the merge changes both, where training changed one.", name)


def _wants_memory(error: Exception) -> bool:
    """Tell whether memory did not suffice, which torch says by a RuntimeError too: the adapter is not to blame."""
    return type(error).__name__ == "OutOfMemoryError" or "can't allocate memory" in str(error).lower()


def _merge_through_peft(
    base: Path, adapter: Path, out: Path, dtype: str | None, max_bytes: int, nf4: Nf4 | None
) -> int:
    import torch
    from peft import PeftModel
    from peft.tuners.tuners_utils import BaseTunerLayer
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(base, dtype="auto", use_safetensors=True)
    if nf4 is not None:
        nf4.apply(model)
    try:
        wrapped = PeftModel.from_pretrained(model, str(adapter))
    except (RuntimeError, ValueError, KeyError) as error:
        if _wants_memory(error):
            raise
        raise BadModel(
            "The adapter does not fit the base.",
            where=str(adapter),
            got=str(error).strip()[:300],
            next_step="merge it into the base that it was trained on",
        ) from error
    _check_used(wrapped, adapter)
    adapted = sum(isinstance(module, BaseTunerLayer) for module in wrapped.modules())
    if adapted == 0:
        raise BadModel("The adapter adapts nothing in this base.", where=str(adapter))
    try:
        merged = wrapped.merge_and_unload(safe_merge=False)
    except (RuntimeError, ValueError, NotImplementedError) as error:
        if _wants_memory(error):
            raise
        raise BadModel(
            "peft cannot merge this adapter.",
            where=str(adapter),
            got=str(error).strip()[:300],
            next_step="serve base and adapter together, with peft",
        ) from error
    if dtype is not None:
        merged = merged.to(getattr(torch, dtype))
    merged.save_pretrained(out, max_shard_size=max_bytes)
    return adapted


def _check_used(wrapped: Any, adapter: Path) -> None:
    """Every tensor of the adapter must have found its place: peft leaves those that do not at their initial values.

    Raises:
        BadModel: one did not.
    """
    from peft import get_peft_model_state_dict, load_peft_weights

    theirs = {name.replace(".default.", ".") for name in load_peft_weights(str(adapter), device="cpu")}
    ours = {name.replace(".default.", ".") for name in get_peft_model_state_dict(wrapped)}
    lost = sorted(theirs - ours) + sorted(name for name in ours - theirs if "lora_" in name)
    if lost:
        raise BadModel(
            "The adapter's tensors do not fit the base.",
            where=str(adapter),
            got=f"{len(lost)} without a partner, such as {lost[0]}",
            next_step="merge it into the base that it was trained on",
        )


def _copy_the_rest(base: Path, out: Path, dtype: str | None) -> None:
    """Carry over configuration, tokenizer, template and generation config: without the last a model may never stop."""
    for path in sorted(base.iterdir()):
        if path.is_dir() or path.name in ("manifest.json", accept.ORIGIN) or ".safetensors" in path.name:
            continue
        shutil.copyfile(path, out / path.name)
    if dtype is not None:
        file = out / "config.json"
        values = json.loads(file.read_text(encoding="utf-8"))
        values.pop("torch_dtype", None)
        file.write_text(json.dumps({**values, "dtype": dtype}, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def _write_stop_ids(out: Path) -> None:
    """Make what ends an answer in the template end generation too: a model that is not told so never stops."""
    if accept.template_hash(out) is None or not (out / "tokenizer.json").exists():
        return
    from loraflow.data.loss_mask import ChatTemplate

    try:
        needed = ChatTemplate(out).stop_ids()
    except BadModel as error:  # a template that training would refuse; the merged weights are as good as their base's
        log.warning("What ends an answer is not known, so generation_config.json stays as it is: %s", error)
        return
    file = out / "generation_config.json"
    values = json.loads(file.read_text(encoding="utf-8")) if file.exists() else {}
    eos = values.get("eos_token_id")
    known = set(eos if isinstance(eos, list) else [] if eos is None else [eos])
    if not needed <= known:
        values["eos_token_id"] = sorted(known | needed)
        file.write_text(json.dumps(values, indent=2) + "\n", encoding="utf-8")
