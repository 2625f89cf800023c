"""Put a model on the hub: one commit of weights, tokenizer and card. Opt-in; nothing else of loraflow uploads anything.

The token comes from the environment (HF_TOKEN, or the login of `hf auth login`), and goes into requests only.
"""

from __future__ import annotations

import json
import re
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

from loraflow.failures import BadConfig, BadModel, Failure, Network
from loraflow.identity import short
from loraflow.serving.card import Facts, gather, hub_files, write_card
from loraflow.serving.models import Model
from loraflow.store import Store, open_store
from loraflow.store.files import HashMemo

REPO = re.compile(r"[\w.-]+/[\w.-]+")
STALE = (".safetensors", ".safetensors.index.json")
_PATHS = ("_name_or_path", "name_or_path", "tokenizer_file", "vocab_file", "base_model_name_or_path")


@contextmanager
def package(store: Store, model: Model, repo: str, what: str, licence: str | None) -> Iterator[tuple[Path, Facts]]:
    """Lay out what will be uploaded: links to the weights, copies of what has to lose a local path, and the card.

    Raises:
        BadConfig: the repository's name, or an adapter where a merged model is wanted, or the other way round.
        BadModel: a file still holds a path of this machine.
    """
    if not REPO.fullmatch(repo):
        raise BadConfig("A repository is ORG/NAME.", where="--repo", got=repo)
    model = _as(store, model, what)
    facts = gather(model, model.digest(HashMemo(None)), licence)
    with tempfile.TemporaryDirectory(prefix="loraflow-publish-") as name:
        folder = Path(name)
        for target, file in hub_files(model, what).items():
            if target in ("config.json", "tokenizer_config.json", "adapter_config.json"):
                (folder / target).write_text(_without_paths(file, facts), encoding="utf-8")
            else:
                (folder / target).symlink_to(file)
        (folder / "README.md").write_text(write_card(facts, what, repo), encoding="utf-8")
        _refuse_leaks(folder, [store.uri, str(Path.home()), _token() or ""])
        yield folder, facts


def publish(
    store: Store, model: Model, repo: str, *, what: str, private: bool, licence: str | None = None
) -> dict[str, Any]:
    """Upload a model in one commit and return `repo`, `url` and `commit`. What the repository has already is not sent.

    Raises:
        BadConfig: there is no token, the hub refuses it, or the repository is public and should be private.
        Network: the hub does not answer.
    """
    import huggingface_hub
    from huggingface_hub import HfApi
    from huggingface_hub.errors import HfHubHTTPError, HTTPError

    token = _token()
    if token is None:
        raise BadConfig(
            "There is no token for the hub.", where="HF_TOKEN", next_step="set HF_TOKEN to one that may write"
        )
    api = HfApi(token=token)
    huggingface_hub.utils.disable_progress_bars()
    try:
        known = gather(_as(store, model, what), "", licence)
        licence = known.licence or (_licence(api, known.base) if known.base else None)
        with package(store, model, repo, what, licence) as (folder, facts):
            api.create_repo(repo, private=private, exist_ok=True)
            if private and not api.model_info(repo).private:
                raise BadConfig(
                    "The repository is public, and this should be private.",
                    where=repo,
                    next_step="name another repository, or publish with --public",
                )
            done = api.create_commit(repo, _operations(api, repo, folder), commit_message=facts.subject)
    except HfHubHTTPError as error:
        raise _refusal(error, repo, token) from None
    except (HTTPError, OSError) as error:
        raise Network(
            "The hub did not answer.",
            where=repo,
            got=_said(error, token),
            next_step="run it again: nothing is sent twice",
        ) from None
    result = {"repo": repo, "what": what, "url": str(done.commit_url), "commit": done.oid}
    _remember(store, model, result)
    return result


def _operations(api: Any, repo: str, folder: Path) -> list[Any]:
    """Return all that one commit does: a folder's upload by the hub's library may come in several, and be seen half done.

    Weights of an earlier commit that are not among these go: other shards would lie beside them.
    """
    from huggingface_hub import CommitOperationAdd, CommitOperationDelete

    files = {path.name: path for path in sorted(folder.iterdir())}
    stale = [name for name in api.list_repo_files(repo) if name.endswith(STALE) and name not in files]
    return [
        *[CommitOperationDelete(path_in_repo=name) for name in stale],
        *[CommitOperationAdd(path_in_repo=name, path_or_fileobj=path) for name, path in files.items()],
    ]


def published(store: Store, model: Model, repo: str, what: str) -> dict[str, Any] | None:
    """Return what was published of this very model to a repository, if it was."""
    data = store.read_document(_record(model, repo, what))
    return json.loads(data) if data is not None else None


def _remember(store: Store, model: Model, result: dict[str, Any]) -> None:
    if model.ref is not None:  # a folder of somebody's own leaves no trace in the store
        said = {**result, "time": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())}
        store.write_document(_record(model, result["repo"], result["what"]), json.dumps(said, indent=1).encode())


def _record(model: Model, repo: str, what: str) -> str:
    digest = short(model.ref.digest) if model.ref else "folder"
    return f"runs/published/{digest}-{what}-{repo.replace('/', '--')}.json"


def _as(store: Store, model: Model, what: str) -> Model:
    """Return the model as what shall be published: the adapter of a merged one is in the store."""
    if what == "merged":
        model.refuse_unmerged("Publishing")
        return model
    if model.adapter is None and model.tuned is not None and model.base is not None:
        folder = open_store(model.tuned.uri).path(model.tuned) / "adapter"
        if (folder / "adapter_config.json").exists():
            return replace(model, adapter=folder, folder=model.base, ref=None)
    if model.adapter is None:
        raise BadConfig(
            "The adapter of this model is not in the store.", where=str(model.folder), next_step="publish with --merged"
        )
    return replace(model, base=model.base or model.folder)


def _without_paths(file: Path, facts: Facts) -> str:
    """Return a configuration without the names of local folders; an adapter's names its base on the hub."""
    values = json.loads(file.read_text(encoding="utf-8"))
    for key in _PATHS:
        if isinstance(values.get(key), str):
            del values[key]
    if file.name == "adapter_config.json":
        values["base_model_name_or_path"] = None if facts.repacked else facts.base
    return json.dumps(values, indent=2, ensure_ascii=False) + "\n"


def _refuse_leaks(folder: Path, secrets: list[str]) -> None:
    for path in sorted(folder.iterdir()):
        if path.suffix not in (".json", ".md", ".jinja") or path.name == "tokenizer.json":
            continue
        text = path.read_text(encoding="utf-8")
        if any(len(secret) > 4 and secret in text for secret in secrets):
            raise BadModel(
                "A file holds a path of this machine, or the token; nothing was sent.",
                where=path.name,
                next_step="remove it from the model's file, and run again",
            )


def _token() -> str | None:
    from huggingface_hub import get_token

    return get_token()


def _licence(api: Any, base: str) -> str | None:
    """Ask the hub for the licence of a base. A base that it does not know has none on the card."""
    from huggingface_hub.errors import HfHubHTTPError

    try:
        card = api.model_info(base).card_data
    except HfHubHTTPError:
        return None
    return card.get("license") if card else None


def _refusal(error: Any, repo: str, token: str) -> Failure:
    from huggingface_hub.errors import RepositoryNotFoundError

    status = error.response.status_code if error.response is not None else None
    if status in (401, 403) or isinstance(error, RepositoryNotFoundError):
        return BadConfig(
            "The hub refuses the token for this repository.",
            where=repo,
            got=_said(error, token),
            next_step="set HF_TOKEN to one that may write there",
        )
    return Network("The hub answered with an error.", where=repo, got=_said(error, token), next_step="run it again")


def _said(error: BaseException, token: str) -> str:
    return f"{type(error).__name__}: {error}".splitlines()[0][:200].replace(token, "…")
