"""Publish a model on the hub, as one commit of weights, tokenizer and card. Nothing else uploads to the Hugging Face Hub.

The token comes from the environment (HF_TOKEN, or the login of `hf auth login`) and is sent in requests only.
"""

from __future__ import annotations

import json
import logging
import re
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from loraflow.adapters.tokenizer_files import VOCABULARY, tokenizer_files
from loraflow.data.templates.tokenizer_config import further_templates
from loraflow.failures import BadConfig, BadModel, Failure, Network, first_line, from_library_error
from loraflow.identity import short
from loraflow.registry.anchor import now
from loraflow.registry.runs import Publication
from loraflow.serving.card import Facts, PublishedForm, collect_facts, write_card
from loraflow.serving.models import MODEL_FILE_SUFFIXES, Model, check_unmerged, intact_folder
from loraflow.store import Store, open_store
from loraflow.store.base import MANIFEST
from loraflow.store.checksum import check_document, with_checksum
from loraflow.store.files import HashMemo

if TYPE_CHECKING:
    from huggingface_hub import CommitOperationAdd, CommitOperationDelete, HfApi
    from huggingface_hub.errors import HfHubHTTPError

log = logging.getLogger("loraflow")
REPO = re.compile(r"[\w.-]+/[\w.-]+")
WEIGHT_SUFFIXES = (".safetensors", ".safetensors.index.json")
_PATHS = ("_name_or_path", "name_or_path", "tokenizer_file", "vocab_file", "base_model_name_or_path")


@contextmanager
def package(
    store: Store, model: Model, repo: str, what: PublishedForm, licence: str | None
) -> Iterator[tuple[Path, Facts]]:
    """Prepare the upload in a temporary folder: links to the weights, edited copies of configurations, and the card.

    Raises:
        BadConfig: the repository's name is not valid, or the model does not exist in the form to publish.
        BadModel: a file still holds a path of this machine.
    """
    if not REPO.fullmatch(repo):
        raise BadConfig(
            "The repository's name is not ORG/NAME.", where="--repo", got=repo, next_step="write --repo ORG/NAME"
        )
    model = _select(model, what)
    facts = collect_facts(model, model.digest(HashMemo(None)), licence)
    with tempfile.TemporaryDirectory(prefix="loraflow-publish-") as name:
        folder = Path(name)
        for target, file in _hub_files(model, what).items():
            if target in ("config.json", "tokenizer_config.json", "adapter_config.json"):
                (folder / target).write_text(_without_paths(file, facts), encoding="utf-8")
            else:
                (folder / target).parent.mkdir(exist_ok=True)
                (folder / target).symlink_to(file)
        (folder / "README.md").write_text(write_card(facts, what, repo), encoding="utf-8")
        _refuse_leaks(folder, [store.uri, str(Path.home()), _token() or ""])
        yield folder, facts


def publish(
    store: Store, model: Model, repo: str, *, what: PublishedForm, private: bool, licence: str | None = None
) -> Publication:
    """Upload a model in one commit. Files that the repository already has are not sent again.

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
            "There is no token for the hub.", where="HF_TOKEN", next_step="set HF_TOKEN to a token with write access"
        )
    api = HfApi(token=token)
    huggingface_hub.utils.disable_progress_bars()
    try:
        known = collect_facts(_select(model, what), "", licence)
        licence = known.licence or (_licence(api, known.base) if known.base else None)
        with package(store, model, repo, what, licence) as (folder, facts):
            api.create_repo(repo, private=private, exist_ok=True)
            if private and not api.model_info(repo).private:
                raise BadConfig(
                    "The repository is public, and this model should be private.",
                    where=repo,
                    next_step="name another repository, or publish with --public",
                )
            commit = api.create_commit(repo, _operations(api, repo, folder), commit_message=facts.subject)
    except HfHubHTTPError as error:
        raise _refusal(error, repo, token) from None
    except (HTTPError, OSError) as error:
        if machine := from_library_error(error, tempfile.gettempdir()):
            raise machine from error
        raise Network(
            "The hub did not answer.",
            where=repo,
            got=_first_line(error, token),
            next_step="run the command again: files that arrived are not sent again",
        ) from None
    publication = Publication(repo=repo, what=what, url=str(commit.commit_url), commit=commit.oid)
    _write_publication(store, model, publication)
    return publication


def _operations(api: HfApi, repo: str, folder: Path) -> list[CommitOperationAdd | CommitOperationDelete]:
    """Return all operations of one commit. (The library's own upload of a folder may make several commits.)

    Weights of an earlier commit that are not uploaded now are deleted, or its other shards would stay in the repository.
    """
    from huggingface_hub import CommitOperationAdd, CommitOperationDelete

    files = {path.relative_to(folder).as_posix(): path for path in sorted(folder.rglob("*")) if path.is_file()}
    stale = [name for name in api.list_repo_files(repo) if name.endswith(WEIGHT_SUFFIXES) and name not in files]
    return [
        *[CommitOperationDelete(path_in_repo=name) for name in stale],
        *[CommitOperationAdd(path_in_repo=name, path_or_fileobj=path) for name, path in files.items()],
    ]


def find_publication(store: Store, model: Model, repo: str, what: PublishedForm) -> Publication | None:
    """Return the record of an earlier upload of the same model to a repository; None if there was none."""
    name = _record_name(model, repo, what)
    data = store.read_document(name)
    if data is None:
        return None
    try:
        found = Publication.model_validate_json(check_document(name, data))
    except ValueError as error:  # pydantic's error is one, too; the hub does not take the same files twice
        log.warning("the record of an upload is not used, %s: %s", name, str(error).splitlines()[0])
        return None
    return found if (found.repo, found.what) == (repo, what) else None


def _write_publication(store: Store, model: Model, publication: Publication) -> None:
    # A model that is not an artifact of the store has no record there.
    if model.ref is None or publication.what is None:
        return
    document = publication.model_copy(update={"time": now()}).model_dump(mode="json")
    name = _record_name(model, publication.repo, publication.what)
    store.write_document(name, with_checksum(name, document))


def _record_name(model: Model, repo: str, what: PublishedForm) -> str:
    digest = short(model.ref.digest) if model.ref else "folder"
    return f"runs/published/{digest}-{what}-{repo.replace('/', '--')}.json"


def _select(model: Model, what: PublishedForm) -> Model:
    """Return the model in the form to publish. The adapter of a merged model is in the store."""
    if what == "merged":
        model.refuse_unmerged("Publishing")
        return model
    if model.unmerged_adapter is None and model.adapter_ref is not None and model.base is not None:
        store = open_store(model.adapter_ref.uri)
        if not store.check(model.adapter_ref):
            adapter = intact_folder(store, model.adapter_ref) / "adapter"
            model.intact_base()
            return replace(model, unmerged_adapter=adapter, folder=model.base, ref=None)
    if model.unmerged_adapter is None:
        raise BadConfig(
            "The adapter of this model is not in the store.", where=str(model.folder), next_step="publish with --merged"
        )
    return replace(model, base=model.base or model.folder)


def _hub_files(model: Model, what: PublishedForm) -> dict[str, Path]:
    """Return {name in the repository: file}: weights, configuration, tokenizer and template, and nothing else."""
    from loraflow.base.resolve import TOKENIZER_FILES

    if what == "merged":
        paths = [path for path in sorted(model.folder.iterdir()) if path.is_file() and path.name != MANIFEST]
        files = {path.name: path for path in paths if path.suffix in MODEL_FILE_SUFFIXES}
        return files | {name: model.folder / name for name in further_templates(model.folder)}
    assert model.unmerged_adapter is not None and model.base is not None
    files = {name: model.unmerged_adapter / name for name in ("adapter_config.json", "adapter_model.safetensors")}
    if model.adapter_ref is None:  # an intact artifact of the train stage is complete
        check_unmerged(model)
    # An adapter that has only a template goes with the base's tokenizer.
    own = tokenizer_files(model.unmerged_adapter)
    if VOCABULARY not in own:
        files |= {path.name: path for path in sorted(model.base.iterdir()) if path.name.startswith(TOKENIZER_FILES)}
    return files | {name: model.unmerged_adapter / name for name in own}


def _without_paths(file: Path, facts: Facts) -> str:
    """Return a configuration without the names of local folders. An adapter's configuration names its base on the hub."""
    values = json.loads(file.read_text(encoding="utf-8"))
    for key in _PATHS:
        if isinstance(values.get(key), str):
            del values[key]
    if file.name == "adapter_config.json":
        values["base_model_name_or_path"] = None if facts.lineage.repacked else facts.base
    return json.dumps(values, indent=2, ensure_ascii=False) + "\n"


def _refuse_leaks(folder: Path, secrets: list[str]) -> None:
    for path in sorted(folder.rglob("*")):
        if path.suffix not in (".json", ".md", ".jinja") or path.name == "tokenizer.json":
            continue
        text = path.read_text(encoding="utf-8")
        if any(len(secret) > 4 and secret in text for secret in secrets):
            raise BadModel(
                "A file contains a path of this machine, or the token; nothing was uploaded.",
                where=path.name,
                next_step="remove it from the model's file, then run the command again",
            )


def _token() -> str | None:
    from huggingface_hub import get_token

    token: str | None = get_token()
    return token


def _licence(api: HfApi, base: str) -> str | None:
    """Ask the hub for the licence of a base; None if it does not know the base."""
    from huggingface_hub.errors import HfHubHTTPError

    try:
        card = api.model_info(base).card_data
    except HfHubHTTPError:
        return None
    licence: str | None = card.get("license") if card else None
    return licence


def _refusal(error: HfHubHTTPError, repo: str, token: str) -> Failure:
    from huggingface_hub.errors import RepositoryNotFoundError

    status = error.response.status_code if error.response is not None else None
    if status in (401, 403) or isinstance(error, RepositoryNotFoundError):
        return BadConfig(
            "The hub refuses the token for this repository.",
            where=repo,
            got=_first_line(error, token),
            next_step="set HF_TOKEN to a token that may write there",
        )
    return Network(
        "The hub answered with an error.", where=repo, got=_first_line(error, token), next_step="run the command again"
    )


def _first_line(error: BaseException, token: str) -> str:
    return first_line(error).replace(token, "…")
