"""The sources of a mixture: `data.sources` of a recipe."""

import re
import shlex
from pathlib import PurePosixPath
from typing import Annotated, Any, Literal, Self

from pydantic import Field, field_validator, model_validator

from loraflow.credentials import mask
from loraflow.frozen import FrozenModel, Positive

RowFormat = Literal[
    "auto", "messages", "sharegpt", "alpaca", "prompt_completion", "gemini", "xlam", "glaive", "tree", "transcript"
]
COLUMNS = (
    "messages", "conversations", "instruction", "input", "output", "prompt", "completion", "system", "text", "reasoning",
    "train", "exclude",
)  # fmt: skip
MAX_WEIGHT = 100
# repository, revision, and a path whose parts are names; bucket and key
HUB_FILE = re.compile(
    r"hf://datasets/(?!.*(?:\*\*|/\.{0,2}/[^/]|/\.\.?/*$))((?:[\w.-]+/)?[\w.-]+)(?:@(refs/(?:convert|pr)/\w+|[\w.-]+))?(?:/(.+))?"
)
S3_OBJECT = re.compile(r"s3://([A-Za-z0-9][A-Za-z0-9._-]*)/(?!(?:.*/)?\.\.?$)([^*]*[^/*])")
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.-]*")
# Settings of `data` that each source has for itself.
REPLACED = (
    "source",
    "repo",
    "rev",
    "add",
    "remote",
    "format",
    "columns",
    "ignore",
    "train",
    "heldout",
    "extra_heldout",
)


def known_columns(value: dict[str, str]) -> dict[str, str]:
    """Return columns whose keys are those of a format.

    Raises:
        ValueError: a key is unknown.
    """
    if unknown := value.keys() - set(COLUMNS):
        raise ValueError(
            f"{', '.join(sorted(unknown))}: should be one of {', '.join(COLUMNS)}; your column's name is the value"
        )
    return value


def refuse_ignored_columns(columns: dict[str, str], ignore: list[str]) -> None:
    """Refuse to ignore a column that is read.

    Raises:
        ValueError: columns names it.
    """
    if both := sorted(set(columns.values()) & set(ignore)):
        raise ValueError(f"ignore: {', '.join(both)} is named in columns; remove it from one of them")


class DataSource(FrozenModel):
    """A source of rows."""

    source: str = Field(
        description="A .dvc file, a folder or file of chats, a pattern such as chats/*.jsonl, a SQLite database, "
        "hf://datasets/OWNER/NAME@COMMIT/PATH, or s3://BUCKET/KEY."
    )
    name: str | None = Field(None, description="Name in reports; the default is that of the file or folder.")
    repo: str = Field(".", description="Git repository, a folder or URL, that has the .dvc file.")
    rev: str | None = Field(None, description="Git revision or branch of the .dvc file; the default is the work tree.")
    remote: str | None = Field(None, description="DVC remote to fetch from; the default is DVC's default remote.")
    md5: Annotated[str, Field(pattern="^[0-9a-f]{32}$")] | None = Field(
        None, description="Of an s3:// object: the md5 of its content, which pins it."
    )
    files: list[str] = Field(["*"], description="The files of the source to read: names or patterns.")
    query: str | None = Field(
        None, description="For a SQLite database: a table, or a SELECT statement. The default is its only table."
    )
    weight: Annotated[float, Field(gt=0, le=MAX_WEIGHT)] = Field(
        1.0,
        description="How often a row enters training. Below 1: a seeded share of the rows is used. 2: every row twice. "
        "Held-out rows are not repeated.",
    )
    limit: Positive | None = Field(None, description="Use a seeded sample of this many rows, before weight and split.")
    format: RowFormat = Field("auto", description="Format of the rows.")
    columns: dict[str, str] = Field({}, description="Columns with other names: {prompt: question, completion: answer}.")
    ignore: list[str] = Field(
        [], description="Keys of rows and messages that are not looked at, such as quality or metadata.quality."
    )
    split: Literal["train", "heldout"] | None = Field(
        None,
        description="train: no row is held out. heldout: all rows are held out, and heldout_fraction does not apply to the "
        "other sources.",
    )

    _columns = field_validator("columns")(known_columns)

    @field_validator("source")
    @classmethod
    def _is_read(cls, value: str) -> str:
        if scheme := re.match(r"([a-z0-9]+)://", value):
            forms = {"hf": HUB_FILE, "s3": S3_OBJECT}
            if scheme[1] not in forms:
                # DVC reads web servers and other buckets itself, and pins their content.
                way = f"pin it with `dvc import-url {shlex.quote(mask(value))} NAME`, and name NAME.dvc"
                raise ValueError(f"{scheme[0]} is not read; {way}")
            if not (found := forms[scheme[1]].fullmatch(value)):
                form = "s3://BUCKET/KEY, not a pattern"
                if scheme[1] == "hf":
                    form = "hf://datasets/OWNER/NAME@COMMIT/PATH (a folder is read with its subfolders, without **)"
                raise ValueError(f"should be {form}: {mask(value)}")
            if scheme[1] == "hf":
                from huggingface_hub.utils import validate_repo_id

                validate_repo_id(found[1])
        if not value.strip():
            raise ValueError("should be a .dvc file, a folder, a file or a pattern")
        return value

    @field_validator("name")
    @classmethod
    def _is_plain(cls, value: str | None) -> str | None:
        if value is not None and not _NAME.fullmatch(value):
            raise ValueError("should be letters, digits, and - _ . between them")
        return value

    @model_validator(mode="after")
    def _is_possible(self) -> Self:
        refuse_ignored_columns(self.columns, self.ignore)
        if self.md5 is not None and not self.source.startswith("s3://"):
            raise ValueError(f"md5: only an object of s3:// is pinned by it, and source is {self.source}")
        if self.split == "heldout" and self.weight > 1:
            raise ValueError(f"weight {self.weight:g}: held-out rows are scored once each; remove it")
        if self.rev is not None and not self.source.endswith(".dvc"):
            raise ValueError(f"rev: only a .dvc file has revisions, and source is {self.source}")
        if not self.source.endswith(".dvc") and (self.repo != "." or self.remote is not None):
            raise ValueError(f"repo and remote: only a .dvc file comes from a repository, and source is {self.source}")
        return self

    @property
    def is_remote(self) -> bool:
        """Whether the source is on the Hugging Face hub or in a bucket."""
        return self.source.startswith(("hf://", "s3://"))

    @property
    def is_pattern(self) -> bool:
        """Whether the source is a pattern of file names."""
        return any(sign in self.source for sign in "*?[")

    @property
    def key(self) -> str:
        """The name, or what stands for it: the last part of the source that is no pattern, without its suffix."""
        if self.name is not None:
            return self.name
        source = re.sub(r"@[^/]*", "", self.source, count=1) if self.source.startswith("hf://") else self.source
        parts = [part for part in PurePosixPath(source).parts if not any(sign in part for sign in "*?[")]
        plain = re.sub(r"[^A-Za-z0-9_.-]+", "-", PurePosixPath(parts[-1]).stem if parts else "").strip("-.")
        return plain or "data"


def checked_sources(sources: list[DataSource]) -> list[DataSource]:
    """Return sources that do not contradict each other.

    Raises:
        ValueError: two have the same name, every row would be held out, or none could be.
    """
    first: dict[str, int] = {}
    for number, source in enumerate(sources, 1):
        if source.key in first:
            raise ValueError(f"sources {first[source.key]} and {number} are both named {source.key}: set name")
        first[source.key] = number
    if sources and all(source.split == "heldout" for source in sources):
        raise ValueError("every source is held out (split: heldout), so no row is left to train on")
    if sources and all(source.split == "train" for source in sources):
        raise ValueError(
            "every source is for training only (split: train), so no row can be held out for the gate; remove split from a "
            "source, or add a source with split: heldout"
        )
    return sources


def source_settings(source: DataSource) -> dict[str, Any]:
    """Return what decides which chats a source gives: its part of the fingerprint of check_dataset."""
    values = source.model_dump(
        include={"files", "query", "weight", "limit", "format", "columns", "ignore", "split"}, exclude_defaults=True
    )
    return {"name": source.key, **values}
