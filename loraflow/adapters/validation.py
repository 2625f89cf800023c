"""What a merge takes in, checked before anything is written: no pickle, whole, finite, and of the base at hand."""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from loraflow.failures import BadModel

log = logging.getLogger(__name__)
ORIGIN = "loraflow.json"  # beside an adapter's or a merged model's files: what it belongs to


def refuse_pickles(folder: Path) -> None:
    """Refuse an adapter or model that comes as a pickle.

    Raises:
        BadModel: there are weights, but no safetensors; nothing was opened.
    """
    names = [path.name for path in folder.iterdir()] if folder.is_dir() else []
    if not any(name.endswith(".safetensors") for name in names):
        pickles = [name for name in names if name.endswith((".bin", ".pt", ".pth", ".pkl", ".ckpt"))]
        raise BadModel(
            "The folder has no safetensors."
            + (" A pickle can run code when it is opened, so it is refused." if pickles else ""),
            where=str(folder),
            expected="*.safetensors",
            got=", ".join(pickles or names[:5]) or "nothing",
            next_step=_instead(folder, names, pickles),
        )


def _instead(folder: Path, names: list[str], pickles: list[str]) -> str:
    inner = sorted(name for name in names if (folder / name / "adapter_config.json").exists())
    if inner:  # peft saves each adapter but the one called default in a folder of its name
        return f"name one adapter: {', '.join(str(folder / name) for name in inner[:4])}"
    if "adapter_model.bin" in pickles:
        return "load it with peft where you trust it, and save_pretrained() it again: that writes safetensors"
    return ""


# Initialisations that change the base's weights. peft does so again when it loads the adapter: from the weights alone for
# the first two; for the others it needs what the adapter does not bring (data, gradients, a random state).
REDONE = ("pissa", "olora")
_LOST = ("pissa_niter", "corda", "loftq", "lora_ga")


def changed_base(config: Mapping[str, Any]) -> bool:
    """Tell whether an adapter belongs to a base whose weights its initialisation changed."""
    return str(config.get("init_lora_weights")).lower().startswith((*REDONE, *_LOST))


def check_config(config: Mapping[str, Any], adapter: Path) -> None:
    """Refuse an adapter that no merge into one checkpoint can do justice to, by its configuration alone.

    Raises:
        BadModel: its base's weights cannot be told, it has no place in a checkpoint, or a value is no number.
    """
    where = str(adapter / "adapter_config.json")
    if (how := str(config.get("init_lora_weights")).lower()).startswith(_LOST):
        raise BadModel(
            "The adapter was trained on weights that its initialisation changed, and it does not say to which.",
            where=where,
            expected="init_lora_weights: true",
            got=how,
            next_step="merge it where it was trained"
            if how == "loftq"
            else "save it again where it was trained, with peft's path_initial_model_for_weight_conversion: that makes it "
            "LoRA on the base itself",
        )
    for key, why in (
        ("layer_replication", "it makes more layers than the base has"),
        ("alora_invocation_tokens", "it acts behind certain tokens only"),
    ):
        if config.get(key):
            raise BadModel(
                f"This adapter cannot be merged: {why}.",
                where=f"{where}: {key}",
                got=str(config[key])[:200],
                next_step="serve base and adapter together, with peft",
            )
    numbers = {key: config[key] for key in ("r", "lora_alpha") if key in config}
    for key in ("rank_pattern", "alpha_pattern"):
        patterns = config.get(key) or {}
        numbers |= (
            {f"{key}.{name}": v for name, v in patterns.items()} if isinstance(patterns, dict) else {key: patterns}
        )
    for key, value in numbers.items():
        if isinstance(value, bool) or not isinstance(value, int | float):
            raise BadModel(
                "The adapter's configuration is damaged.", where=where, expected=f"a number at {key}", got=repr(value)
            )


def read_config(adapter: Path) -> dict[str, Any]:
    """Return an adapter's adapter_config.json.

    Raises:
        BadModel: it is missing, or no JSON.
    """
    try:
        return dict(json.loads((adapter / "adapter_config.json").read_text(encoding="utf-8")))
    except (OSError, ValueError, TypeError) as error:
        raise BadModel(
            "The adapter's configuration cannot be read.",
            where=str(adapter / "adapter_config.json"),
            expected="the JSON that peft writes beside adapter_model.safetensors",
            got=f"{type(error).__name__}: {error}".splitlines()[0][:200],
        ) from error


def refuse_bad_numbers(tensors: Iterable[tuple[str, Any]], where: Path) -> None:
    """Refuse an adapter with NaN or infinity: merged, it would spread to every answer.

    Raises:
        BadModel: it has one.
    """
    for name, tensor in tensors:
        if tensor.itemsize < 2 or not tensor.is_floating_point():
            raise BadModel(
                "The adapter holds numbers of a type that is not merged.",
                where=f"{where}: {name}",
                expected="bfloat16, float16, float32 or float64",
                got=str(tensor.dtype).removeprefix("torch."),
            )
        if not tensor.isfinite().all():
            raise BadModel(
                "The adapter holds numbers that are not finite.",
                where=f"{where}: {name}",
                got=f"{int((~tensor.isfinite()).sum())} of {tensor.numel()}",
                next_step="train again, or take an earlier checkpoint",
            )


def check_adapter(adapter: Path) -> None:
    """Read each of an adapter's tensors once, one at a time.

    Raises:
        BadModel: the file is damaged or missing, or holds a number that is not finite.
    """
    from safetensors import SafetensorError, safe_open

    file = adapter / "adapter_model.safetensors"
    if not file.exists():
        raise BadModel("The adapter's weights are missing.", where=str(adapter), expected=file.name)
    try:
        with safe_open(file, framework="pt") as opened:
            refuse_bad_numbers(((name, opened.get_tensor(name)) for name in opened.keys()), adapter)  # noqa: SIM118
    except SafetensorError as error:
        raise BadModel(
            "A safetensors file is damaged.", where=str(file), got=str(error)[:200], next_step="fetch it again"
        ) from error


def _template(folder: Path) -> str | None:
    from loraflow.data.loss_mask import read_template

    file = folder / "tokenizer_config.json"
    if not file.exists():
        return None
    try:
        return read_template(folder, json.loads(file.read_text(encoding="utf-8")))
    except BadModel:  # it has none
        return None


def template_hash(folder: Path) -> str | None:
    """Return the sha256 of a model's chat template, or None where it has none."""
    template = _template(folder)
    return None if template is None else hashlib.sha256(template.encode()).hexdigest()


def write_origin(folder: Path, base: Path, base_digest: str | None) -> None:
    """Write down which base and which chat template an adapter was trained with, or a merged model was made with."""
    values = {"base": base_digest, "chat_template_sha256": template_hash(base)}
    (folder / ORIGIN).write_text(json.dumps(values, indent=1, sort_keys=True) + "\n", encoding="utf-8")


def check_origin(adapter: Path, base: Path, base_digest: str | None) -> None:
    """Compare what an adapter was trained with to the base at hand; an adapter from elsewhere says nothing.

    Raises:
        BadModel: another base, or another chat template: the model would be asked in another form than it learned.
    """
    if not (adapter / ORIGIN).exists():
        return
    trained: Mapping[str, Any] = json.loads((adapter / ORIGIN).read_text(encoding="utf-8"))
    for what, mine, theirs in (
        ("base", base_digest, trained.get("base")),
        ("chat template", template_hash(base), trained.get("chat_template_sha256")),
    ):
        if mine and theirs and mine != theirs:
            raise BadModel(
                f"The adapter was trained with another {what}.",
                where=str(adapter / ORIGIN),
                expected=theirs,
                got=mine,
                next_step="merge it into the base that it was trained on, with that one's tokenizer and template",
            )


def check_vocabulary(base: Path, adapter: Path, rows: int) -> None:
    """Check that each token that a chat or the adapter brings has a row in the embeddings.

    Some published bases have tokens of no use to them behind their embeddings, such as gemma-3-1b's for images
    (https://github.com/huggingface/transformers/issues/37011). They are logged.

    Args:
        base: the model's folder.
        adapter: PEFT's folder; it may bring a tokenizer.
        rows: of the embeddings.

    Raises:
        BadModel: the vocabulary grew without its embeddings.
    """
    spare, template = _beyond(base, rows), _template(base) or ""
    refused = {(base, token) for token in spare if token in template}
    refused |= {(adapter, token) for token in _beyond(adapter, rows).keys() - spare.keys()}
    for folder, token in sorted(refused):
        raise BadModel(
            "The tokenizer has tokens that the embeddings have no row for.",
            where=str(folder / "tokenizer.json"),
            expected=f"ids below {rows}",
            got=f"{token}, {len(refused)} in all",
            next_step="resize and save the base's embeddings first, then train on that base",
        )
    if spare:
        log.warning("The base's tokenizer has %d tokens without embeddings, such as %s.", len(spare), min(spare))


def _beyond(folder: Path, rows: int) -> dict[str, int]:
    """Return the tokens whose ids are not below `rows`."""
    if not (folder / "tokenizer.json").exists():
        return {}
    from tokenizers import Tokenizer

    vocabulary = Tokenizer.from_file(str(folder / "tokenizer.json")).get_vocab(with_added_tokens=True)
    return {token: index for token, index in vocabulary.items() if index >= rows}
