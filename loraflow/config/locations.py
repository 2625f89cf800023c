"""Facts about a dataset and a base model that are not in the recipe: content hashes, commits, and where files are."""

from pathlib import Path
from typing import Annotated

from pydantic import Field, StringConstraints, TypeAdapter, ValidationError

from loraflow.failures import BadConfig
from loraflow.frozen import FrozenModel

LOCK = Path("loraflow.lock")  # in the working folder: {"model@revision": commit, "hf://…": {file: md5}}
_Commit = Annotated[str, StringConstraints(pattern="^[0-9a-f]{40}$")]
_Md5 = Annotated[str, StringConstraints(pattern="^[0-9a-f]{32}$")]
_LOCKED = TypeAdapter(dict[str, _Commit | dict[str, _Md5]])


def read_lock() -> dict[str, str | dict[str, str]]:
    """Return what the lock file remembers of the hub: the commits of branches, and the md5 of the files of datasets.

    Raises:
        BadConfig: the file cannot be read.
    """
    if not LOCK.exists():
        return {}
    try:
        return dict(_LOCKED.validate_json(LOCK.read_bytes()))
    except ValidationError as error:
        raise BadConfig(
            "The lock file of the hub's models and datasets cannot be read.",
            where=str(LOCK),
            expected='{"model@revision": commit of 40 hex digits, "hf://…": {file: md5}}',
            got=error.errors()[0]["msg"],
            next_step=f"restore it with git (git checkout {LOCK}), or set base.revision to a commit and remove the file",
        ) from error


class FolderOrigin(FrozenModel):
    """A folder or file on this machine."""

    folder: str


class DvcOrigin(FrozenModel):
    """The output of a `.dvc` file in a git repository."""

    dvc_file: str = Field(description="Relative to the repository.")
    path: str = Field(description="Of the output, relative to the repository.")
    md5: str
    repo: str = Field(description="Folder or URL of the git repository.")
    rev: str | None = Field(description="Git revision or branch; None is the work tree.")
    commit: str | None = Field(description="The commit that `rev` named when the run began.")
    remote: str | None = Field(None, description="DVC remote to fetch from; None is the default remote.")


class RemoteOrigin(FrozenModel):
    """A file of a dataset on the Hugging Face hub, or an object in a bucket."""

    url: str = Field(description="hf://datasets/OWNER/NAME@COMMIT/PATH, or s3://BUCKET/KEY.")


class SourcePart(FrozenModel):
    """A file of a source, or its folder."""

    path: str = Field(description="Below the source's folder; empty if it is the folder.")
    md5: str
    origin: FolderOrigin | DvcOrigin | RemoteOrigin


class SourcesOrigin(FrozenModel):
    """The sources of a mixture (data.sources)."""

    sources: dict[str, list[SourcePart]]


class HubOrigin(FrozenModel):
    """A commit of a model on the Hugging Face hub."""

    hub: str
    commit: str


class GgufOrigin(FrozenModel):
    """A GGUF file on this machine."""

    gguf: str


Origin = FolderOrigin | DvcOrigin | SourcesOrigin | HubOrigin | GgufOrigin


class DatasetLocation(FrozenModel):
    """The identity of a recipe's dataset, and where its files are read from."""

    md5: str
    name: str
    origin: FolderOrigin | DvcOrigin | SourcesOrigin


class BaseLocation(FrozenModel):
    """The identity of a recipe's base model (content or commit), and where its files are read from."""

    source: dict[str, str]
    origin: FolderOrigin | HubOrigin | GgufOrigin
    chat_template: str | None = None  # the text of base.chat_template; None is the model's own
