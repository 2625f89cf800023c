"""Facts about a dataset and a base model that are not in the recipe: content hashes, commits, and where files are."""

from __future__ import annotations

from pydantic import Field

from loraflow.frozen import FrozenModel


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


class SourcePart(FrozenModel):
    """A file of a source, or its folder."""

    path: str = Field(description="Below the source's folder; empty if it is the folder.")
    md5: str
    origin: FolderOrigin | DvcOrigin


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
