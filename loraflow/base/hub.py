"""Models on the Hugging Face hub, pinned by commit: a branch is resolved once, and the lock file remembers the commit."""

import hashlib
import re
import shlex
from pathlib import Path

from loraflow.config.locations import LOCK, read_lock
from loraflow.failures import BadModel, Failure, Network, first_line, from_library_error
from loraflow.store.files import hash_file, write_json

# A file of the hub's cache is named by its content: git's id of a blob, or the sha256 of a large file.
_BLOB = re.compile(r"[0-9a-f]{40}|[0-9a-f]{64}")
# The same weights once more, as Mistral, Meta and others publish them for their own programs.
_NOT_LOADED = ["consolidated*.safetensors", "*/*.safetensors"]


def commit_of(model: str, revision: str) -> str:
    """Return the commit of a revision: the revision itself, the one in the lock file, or the hub's answer.

    Raises:
        BadModel: the hub has no such model.
        Network: the hub did not answer.
    """
    if re.fullmatch(r"[0-9a-f]{40}", revision):
        return revision
    key = f"{model}@{revision}"
    if isinstance(found := read_lock().get(key), str):
        return found
    from huggingface_hub import HfApi
    from huggingface_hub.errors import HFValidationError, RepositoryNotFoundError

    try:
        commit: str = HfApi().model_info(model, revision=revision).sha
    except (RepositoryNotFoundError, HFValidationError) as error:
        raise BadModel(
            "The hub has no such model.", where="base.model", got=model, next_step="correct base.model"
        ) from error
    except _errors() as error:
        raise Network(
            "The hub did not return the commit of the branch.",
            where=key,
            got=first_line(error),
            next_step="set base.revision to the commit's 40 hex digits, or base.model to a local folder",
        ) from error
    write_json(LOCK, {**read_lock(), key: commit})  # others may have written it
    return commit


def _errors() -> tuple[type[Exception], ...]:
    """Return the errors of the hub's library: also of an answer that is not the hub's."""
    from huggingface_hub.errors import HTTPError

    return OSError, HTTPError, RuntimeError, ValueError, LookupError, TypeError


def download_config(model: str, commit: str) -> Path:
    """Download a model's config.json alone, and return its folder.

    Raises:
        Network: the hub did not deliver it.
        BadModel: the model has none.
    """
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import EntryNotFoundError, LocalEntryNotFoundError

    try:
        return Path(hf_hub_download(model, "config.json", revision=commit)).parent
    except _errors() as error:
        if isinstance(error, EntryNotFoundError) and not isinstance(error, LocalEntryNotFoundError):
            raise BadModel(
                "The hub's repository does not contain a model.",
                where=model,
                expected="config.json",
                got="none",
                next_step="name the repository of a model, such as microsoft/Phi-3-mini-4k-instruct",
            ) from error
        raise _not_delivered(model, commit, error) from error


def _not_delivered(model: str, commit: str, error: Exception) -> Failure:
    if known := from_library_error(error, where := f"{model} at {commit}"):
        return known
    if isinstance(error, OSError) and error.filename:
        raise error  # also the disk's
    return Network(
        "The model could not be downloaded from the hub.",
        where=where,
        got=first_line(error),
        next_step="check the network (and HF_TOKEN for a gated model), or set base.model to a local folder",
    )


def download(model: str, commit: str, *, trust: bool, with_weights: bool = True) -> Path:
    """Download a model's files, with its Python code only if `trust` is set, and return their folder.

    Raises:
        Network: the hub did not deliver them; also if a file was removed from its cache, and there is no network.
        BadModel: a file of the hub's cache on this machine is damaged.
    """
    from huggingface_hub import snapshot_download
    from huggingface_hub.utils import filter_repo_objects

    patterns = ["*.json", "*.jinja", "tokenizer*", "vocab*", "merges*", "*.model", "*.tiktoken"]
    if with_weights:
        patterns.append("*.safetensors")
    else:
        patterns[0] = "[!m]*.json"  # without model.safetensors.index.json
    patterns += ["*.py"] * trust
    try:
        folder = Path(snapshot_download(model, revision=commit, allow_patterns=patterns, ignore_patterns=_NOT_LOADED))
    except _errors() as error:
        raise _not_delivered(model, commit, error) from error
    links = [str(file.relative_to(folder)) for file in sorted(folder.rglob("*")) if file.is_symlink()]
    # The cache may have other files, in any state.
    for name in filter_repo_objects(links, allow_patterns=patterns, ignore_patterns=_NOT_LOADED):
        if not (folder / name).exists():
            gone = FileNotFoundError(f"{name} was removed from the hub's cache on this machine")
            raise _not_delivered(model, commit, gone)
        _refuse_damaged(folder / name)
    return folder


def _refuse_damaged(file: Path) -> None:
    """Hash a file of a snapshot: the hub's library does not look again at what it has downloaded once.

    The file is a link to one that is named by its content, except on Windows.
    """
    blob = file.resolve()
    if not _BLOB.fullmatch(blob.name):
        return
    found = _hashes(blob)
    if blob.name not in found:
        raise BadModel(
            "A file of the base is damaged in the hub's cache on this machine.",
            where=str(file),
            expected=f"the hash {blob.name[:12]}",
            got=found[0][:12],
            next_step=f"rm {shlex.quote(str(blob))}, then run again: it is downloaded again",
        )


def _hashes(blob: Path) -> list[str]:
    """Return the names that a blob may have by its content: the hub's is the first one."""
    if len(blob.name) == 64:
        return [hash_file(blob)]
    content = blob.read_bytes()
    # A mirror of the hub may name a file by its sha1, as Artifactory's ETags do.
    parts = (b"blob %d\0" % len(content) + content, content)
    return [hashlib.sha1(part, usedforsecurity=False).hexdigest() for part in parts]
