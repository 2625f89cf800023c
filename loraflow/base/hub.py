"""Models on the Hugging Face hub, pinned by commit: a branch is resolved once, and the lock file remembers the commit."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Annotated

from pydantic import StringConstraints, TypeAdapter, ValidationError

from loraflow.failures import BadConfig, BadModel, Network
from loraflow.store.files import write_json

LOCK = Path("loraflow.lock")  # in the working folder: {"model@revision": commit}
_LOCKED = TypeAdapter(dict[str, Annotated[str, StringConstraints(pattern="^[0-9a-f]{40}$")]])


def commit_of(model: str, revision: str) -> str:
    """Return the commit of a revision: the revision itself, the one in the lock file, or the hub's answer.

    Raises:
        BadModel: the hub has no such model.
        Network: the hub did not answer.
    """
    if re.fullmatch(r"[0-9a-f]{40}", revision):
        return revision
    key = f"{model}@{revision}"
    locked = _read_lock()
    if key in locked:
        return locked[key]
    commit = _ask_the_hub(model, revision, key)
    write_json(LOCK, {**locked, key: commit})
    return commit


def _read_lock() -> dict[str, str]:
    if not LOCK.exists():
        return {}
    try:
        return _LOCKED.validate_json(LOCK.read_bytes())
    except ValidationError as error:
        raise BadConfig(
            "The lock file of the base models cannot be read.",
            where=str(LOCK),
            expected='{"model@revision": commit of 40 hex digits}',
            got=error.errors()[0]["msg"],
            next_step=f"restore it with git (git checkout {LOCK}), or set base.revision to a commit and remove the file",
        ) from error


def _ask_the_hub(model: str, revision: str, key: str) -> str:
    from huggingface_hub import HfApi
    from huggingface_hub.errors import HfHubHTTPError, HTTPError, OfflineModeIsEnabled, RepositoryNotFoundError

    try:
        commit: str = HfApi().model_info(model, revision=revision).sha
    except RepositoryNotFoundError as error:
        raise BadModel(
            "The hub has no such model.", where="base.model", got=model, next_step="correct base.model"
        ) from error
    except (OSError, HTTPError, HfHubHTTPError, OfflineModeIsEnabled, RuntimeError) as error:
        raise Network(
            "The hub did not return the commit of the branch.",
            where=key,
            got=f"{type(error).__name__}: {error}".splitlines()[0][:200],
            next_step="set base.revision to the commit's 40 hex digits, or base.model to a local folder",
        ) from error
    return commit


def download_config(model: str, commit: str) -> Path:
    """Download a model's config.json alone, and return its folder.

    Raises:
        Network: the hub did not deliver it.
        BadModel: the model has none.
    """
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import EntryNotFoundError, HfHubHTTPError, HTTPError, LocalEntryNotFoundError

    try:
        return Path(hf_hub_download(model, "config.json", revision=commit)).parent
    except (OSError, HTTPError, LocalEntryNotFoundError, HfHubHTTPError) as error:
        if isinstance(error, EntryNotFoundError) and not isinstance(error, LocalEntryNotFoundError):
            raise BadModel(
                "The hub's repository does not contain a model.", where=model, expected="config.json", got="none"
            ) from error
        if isinstance(error, OSError) and error.errno is not None and error.filename:
            raise  # the local disk's failure, not the network's
        raise _not_delivered(model, commit, error) from error


def _not_delivered(model: str, commit: str, error: Exception) -> Network:
    return Network(
        "The model could not be downloaded from the hub.",
        where=f"{model} at {commit}",
        got=f"{type(error).__name__}: {error}".splitlines()[0][:200],
        next_step="check the network (and HF_TOKEN for a gated model), or set base.model to a local folder",
    )


def download(model: str, commit: str, *, trust: bool, with_weights: bool = True) -> Path:
    """Download a model's files, with its Python code only if `trust` is set, and return their folder.

    Raises:
        Network: the hub did not deliver them.
    """
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HTTPError, LocalEntryNotFoundError

    patterns = ["*.json", "*.safetensors", "*.jinja", "tokenizer*", "vocab*", "merges*"]
    if not with_weights:
        patterns = ["[!m]*.json", "*.jinja", "tokenizer*", "vocab*", "merges*"]  # without model.safetensors.index.json
    try:
        return Path(snapshot_download(model, revision=commit, allow_patterns=patterns + ["*.py"] * trust))
    except (OSError, HTTPError, LocalEntryNotFoundError, HfHubHTTPError) as error:
        if isinstance(error, OSError) and error.errno is not None and error.filename:
            raise  # the local disk's failure, not the network's
        raise _not_delivered(model, commit, error) from error
