"""Merge an adapter's folder into a base model's folder.

Most adapters are merged from disk to disk (`streaming_merge`). Adapters with other settings are merged by peft.
"""

import json
import logging
import re
import shutil
import tempfile
import time
from dataclasses import replace
from pathlib import Path
from typing import Literal, NotRequired, TypedDict

from pydantic import JsonValue

from loraflow.adapters import validation
from loraflow.adapters.adapter_config import AdapterConfig
from loraflow.adapters.merge_plan import MergePlan, fits, plan_merge
from loraflow.adapters.merge_with_peft import merge_with_peft
from loraflow.adapters.nf4 import Nf4, quantized_names
from loraflow.adapters.streaming_merge import merge_streaming
from loraflow.adapters.tokenizer_files import (
    ORIGIN,
    check_origin,
    copy_tokenizer_files,
    has_own,
    template_hash,
    tokenizer_files,
    write_origin,
    write_tokenizer,
)
from loraflow.adapters.validation import check_adapter
from loraflow.adapters.vocabulary import embedding_names, is_tied
from loraflow.base.stored_weights import (
    TensorEntry,
    model_entries,
    model_without_weights,
    refuse_damaged_settings,
    refuse_pickles,
)
from loraflow.base.weight_checks import check_fits_config
from loraflow.failures import BadModel
from loraflow.job import Progress

log = logging.getLogger(__name__)
_EMBEDDINGS = ("embed_tokens", "wte", "embed_in")
_HEADS = ("lm_head", "embed_out")
_IN_A_LAYER = re.compile(r"\.\d+\.")  # neither embeddings nor head


class MergeOptions(TypedDict, total=False):
    """Keyword arguments of `merge` that do not depend on quantization."""

    dtype: str | None
    max_shard_bytes: int
    threads: int | None
    base_digest: str | None
    checked: bool


class MergeFigures(TypedDict):
    """Figures of a merge, as the store records them."""

    adapted: int  # matrices
    route: Literal["streamed", "peft"]
    seconds: float  # duration of the merge alone
    onto: NotRequired[str]  # base or dequantized: for an adapter that was trained in NF4
    kl_base: NotRequired[float]  # KL to the trained model, where both ways were compared; nats per token
    kl_dequantized: NotRequired[float]


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
    checked: bool = False,
) -> MergeFigures:
    """Merge an adapter's folder into a base's folder.

    Args:
        dtype: bfloat16, float16 or float32; None leaves each tensor's own.
        threads: the number of threads of a streamed merge; None is one for each core.
        progress: reports tensors; finished shards survive a kill in its `work` folder.
        base_digest: digest of the base's artifact, compared with the digest that the adapter records.
        nf4: merge into the base's weights as training saw them.
        checked: base and adapter are intact artifacts of resolve_base and train, so they are complete. Checking them takes
            seconds.

    Raises:
        BadModel: weights are a pickle, damaged or not finite; or adapter, base, tokenizer and template do not fit.
    """
    config, entries = _check_inputs(base, adapter, base_digest, trust=trust, checked=checked)
    started = time.perf_counter()
    plan = _plan(config, base, adapter, entries, nf4, trust=trust)
    if plan is None:
        adapted = merge_with_peft(base, adapter, out, dtype, max_shard_bytes, nf4)
    else:
        adapted = len(plan.updates)
        merge_streaming(base, plan, out, dtype, max_shard_bytes, threads, progress or Progress())
    seconds = time.perf_counter() - started
    _copy_other_files(base, adapter, out, dtype)
    _write_stop_ids(out)
    write_origin(out, base, base_digest)
    return {"adapted": adapted, "route": "peft" if plan is None else "streamed", "seconds": round(seconds, 2)}


def _check_inputs(
    base: Path, adapter: Path, base_digest: str | None, *, trust: bool, checked: bool
) -> tuple[AdapterConfig, list[TensorEntry]]:
    refuse_pickles(adapter)
    refuse_pickles(base)
    refuse_damaged_settings(base)
    config = AdapterConfig.read(adapter)
    validation.check_config(config, adapter)
    entries = model_entries(base)
    if checked:
        validation.check_tensors(adapter)
        check_origin(adapter, base, base_digest)
        if rows := [entry.shape[0] for entry in entries if _module_of(entry.name) in _EMBEDDINGS]:
            validation.check_vocabulary(base, adapter, rows[0])
        shapes = {entry.name: entry.shape for entry in entries}
        biases = ((shape, shapes.get(name.replace("weight", "bias"))) for name, shape in shapes.items())
        if any(len(shape) == 2 and shape[0] != shape[1] and bias == shape[1:] for shape, bias in biases):
            # As GPT-2's, its matrices are [inputs, outputs]. peft's file says false if the head is adapted too.
            config = config.model_copy(update={"fan_in_fan_out": True})
    else:
        config = check_adapter(adapter, base, base_digest=base_digest, trust=trust)
        if not trust:
            check_fits_config(base)
    return config, entries


def _plan(
    config: AdapterConfig,
    base: Path,
    adapter: Path,
    entries: list[TensorEntry],
    nf4: Nf4 | None,
    *,
    trust: bool,
) -> MergePlan | None:
    """Plan a merge from disk to disk; return None if only peft can merge this adapter."""
    plan = plan_merge(config, adapter)
    # Names on the disk are others than in memory for some architectures, and new tokens need more rows than the base has.
    if plan is None or not fits(entries, plan) or _unties(base, entries, plan, trust=trust):
        return None
    if nf4 is None:
        return plan
    names = quantized_names(base, trust=trust)
    return None if names is None else replace(plan, nf4=nf4, quantized=names - plan.replaced.keys())


def _module_of(tensor: str) -> str:
    return tensor.rpartition(".")[0].rpartition(".")[2]


def _unties(base: Path, entries: list[TensorEntry], plan: MergePlan, *, trust: bool) -> bool:
    """Tell whether an adapter of embeddings or head gives a tied base two weights instead of one.

    Any architecture may have its own names for both, so the model is asked.
    """
    # With LoRA on embeddings, peft also saves the base's own ones (`base_layer`), which were not trained.
    trained = {name for name, entry in plan.replaced.items() if ".base_layer." not in entry.name} | plan.updates.keys()
    if all(_IN_A_LAYER.search(name) for name in trained):
        return False
    model = model_without_weights(base, trust=trust)
    names = {f"{name}.weight" for name in embedding_names(model)}
    return not trained.isdisjoint(names) and (is_tied(model) or _is_tied(base, entries))


def _is_tied(base: Path, entries: list[TensorEntry]) -> bool:
    """Tell whether embeddings and head are one weight: by the config, or else by whether the head is stored."""
    config = json.loads((base / "config.json").read_text(encoding="utf-8"))
    tied = config.get("tie_word_embeddings", (config.get("text_config") or {}).get("tie_word_embeddings"))
    return not any(_module_of(entry.name) in _HEADS for entry in entries) if tied is None else bool(tied)


def _copy_other_files(base: Path, adapter: Path, out: Path, dtype: str | None) -> None:
    """Copy config, tokenizer, template and generation config: without the last, a model may never stop.

    The tokenizer and the template are the adapter's, if it has its own.
    """
    merged = out / "config.json"  # there already, if peft merged
    changed = _changed_settings(base, merged) if merged.exists() else {}
    tokenizer = tokenizer_files(base)
    for path in sorted(base.iterdir()):
        if path.is_dir() or path.name in ("manifest.json", ORIGIN, *tokenizer) or ".safetensors" in path.name:
            continue
        shutil.copyfile(path, out / path.name)
    if has_own(adapter):
        write_tokenizer(base, adapter, out)
    else:
        copy_tokenizer_files(base, out)
    if dtype is not None or changed:
        values = json.loads(merged.read_text(encoding="utf-8"))
        if dtype is not None:
            values.pop("torch_dtype", None)
            values["dtype"] = dtype
        for section, settings in changed.items():
            (values[section] if section else values).update(settings)
        merged.write_text(json.dumps(values, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def _changed_settings(base: Path, merged: Path) -> dict[str, dict[str, JsonValue]]:
    """Return what a merge changed in config.json: the vocabulary, and whether one weight is embeddings and head.

    The new values are by section of the file; the section "" is the file itself.
    """
    before, after = (json.loads(file.read_text(encoding="utf-8")) for file in (base / "config.json", merged))
    unties = after.get("tie_word_embeddings") is False and _is_tied(base, model_entries(base))
    changed: dict[str, dict[str, JsonValue]] = {"": {"tie_word_embeddings": False}} if unties else {}
    for section in ("", "text_config"):
        old, new = ((values.get(section) or {} if section else values) for values in (before, after))
        if "vocab_size" in old and "vocab_size" in new and new["vocab_size"] != old["vocab_size"]:
            changed.setdefault(section, {})["vocab_size"] = new["vocab_size"]
        if section and unties and "tie_word_embeddings" in old:
            changed.setdefault(section, {})["tie_word_embeddings"] = False
    return changed


def _write_stop_ids(out: Path) -> None:
    """Add the stop ids of template and config.json to the generation config: otherwise generation does not stop there."""
    if template_hash(out) is None:
        return
    from loraflow.base.model_files import copy_model
    from loraflow.data.tokens.loss_mask import ChatTemplate, eos_ids, vocabulary_of

    try:
        with tempfile.TemporaryDirectory(prefix="loraflow-tokenizer-") as name:
            folder = out
            if not (out / "tokenizer.json").exists():  # of sentencepiece's form, for instance
                folder = Path(name)
                copy_model(out, folder, trust=False, with_weights=False)
            needed = ChatTemplate(folder).stop_ids()
    except BadModel as error:  # training refuses such a template, but the merged weights are usable
        log.warning("The tokens that end an answer are unknown, so generation_config.json stays as it is: %s", error)
        return
    file = out / "generation_config.json"
    values = json.loads(file.read_text(encoding="utf-8")) if file.exists() else {}
    eos = values.get("eos_token_id")
    known = {token for token in (eos if isinstance(eos, list) else [eos]) if isinstance(token, int) and token >= 0}
    # Those of config.json end answers in an evaluation too, and transformers reads them only if there is no other file.
    rows = vocabulary_of(out)
    needed |= {token for token in eos_ids(out) if rows is None or token < rows}
    if not needed <= known:
        values["eos_token_id"] = sorted(known | needed)
        file.write_text(json.dumps(values, indent=2) + "\n", encoding="utf-8")
