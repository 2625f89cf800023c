"""The section `data` of a recipe."""

import json
from pathlib import Path
from typing import Annotated, Literal, Self

from pydantic import Field, JsonValue, field_validator, model_validator

from loraflow.config.data_sources import (
    REPLACED,
    DataSource,
    RowFormat,
    checked_sources,
    known_columns,
    refuse_ignored_columns,
)
from loraflow.failures import BadConfig
from loraflow.frozen import FrozenModel, Positive, Share, ShareOrCount

GENERAL_SETS = ("general chats", "general questions")  # the names in reports of the sets of evaluation.general

ProfileCheckName = Literal["refusals", "openings", "disputed", "scripts", "broken_text", "control_tokens", "personal"]


class ProfileRule(FrozenModel):
    """What one check of `data.profile` does."""

    action: Literal["warn", "quarantine", "fail"] = Field(
        "warn", description="warn: report it. quarantine: leave these rows out, and count them. fail: stop the run."
    )
    share: Annotated[float, Field(ge=0, lt=1)] | None = Field(
        None,
        description="Act only if more than this share of the rows is concerned. With quarantine, the default is 0.",
    )


class Data(FrozenModel):
    """The dataset, and the use of its rows."""

    source: str = Field("data.dvc", description="A .dvc file, or a folder or file of chats.")
    repo: str = Field(".", description="Git repository, a folder or URL, that has the .dvc file.")
    rev: str | None = Field(None, description="Git revision or branch of the .dvc file; the default is the work tree.")
    add: bool = Field(False, description="Version the folder before the run: `dvc add` and `dvc push`.")
    remote: str | None = Field(
        None, description="DVC remote to push to and fetch from; the default is DVC's default remote."
    )
    sources: list[DataSource] = Field(
        [],
        description="A mixture of several sources, each with its own files, format, columns and weight; instead of source.",
    )
    format: RowFormat = Field("auto", description="Format of the rows; auto detects it for each row by its keys.")
    columns: dict[str, str] = Field(
        {},
        description="Columns with other names: {prompt: question, completion: answer}. {train: checked} or {exclude: toxic} "
        "marks rows.",
    )
    ignore: list[str] = Field(
        [], description="Keys of rows and messages that are not looked at, such as quality or metadata.quality."
    )
    tools: str | None = Field(
        None,
        description="A JSON file with the tools of all rows that have none of their own: a list of functions as in OpenAI's "
        "API.",
    )
    group: str | None = Field(
        None,
        description="Field of the rows whose value names a group, such as the document that a question is about. The "
        "gate does not count rows of a group as independent, and heldout_fraction keeps them together.",
    )
    train: list[str] = Field(
        ["train*"], description="Files with training rows: names or patterns, relative to the source."
    )
    heldout: list[str] = Field(
        [], description="Files with held-out rows; if empty, heldout_fraction of the training files is held out."
    )
    heldout_fraction: Share = Field(0.1, description="Share of rows to hold out, by a seeded hash of the prompt.")
    heldout_reserve: ShareOrCount | None = Field(
        None,
        description="Share or number of the held-out rows to keep in reserve. The first model is scored on the other rows. "
        "Each later model is scored on as many rows of the reserve, on which no model was scored before.",
    )
    extra_heldout: dict[str, str] = Field(
        {}, description="More held-out sets, {name: file}; reported, but not used by the gate."
    )
    validation_fraction: Share = Field(0.0, description="Share of training rows used to choose the best checkpoint.")
    system: str | None = Field(None, description="System message for chats that have none.")
    loss_on: Literal["assistant", "last_assistant", "all"] = Field("assistant", description="Tokens to learn.")
    thinking: Literal["keep", "strip", "empty"] | None = Field(
        None,
        description="Reasoning (<think> … </think>) in answers. By default, rows whose reasoning the chat template cuts are "
        "refused. keep: such answers are only context. strip: remove reasoning from all rows. empty: remove it, and "
        "train and serve with an empty think block (enable_thinking: false).",
    )
    too_long: Literal["error", "drop", "truncate"] = Field(
        "error", description="What to do with rows longer than max_length."
    )
    special_tokens: Literal["error", "drop", "allow"] = Field(
        "drop", description="What to do with rows whose text contains a control token, such as <|end|>."
    )
    duplicates: Literal["drop", "keep"] = Field("drop", description="What to do with duplicated training rows.")
    near_duplicates: Literal["off", "report", "drop", "refuse"] = Field(
        "off",
        description="What to do with rows whose text is nearly the same (Jaccard index of 5-grams of at least 0.8). report: "
        "count them. drop: keep them on one side of the split, and leave out training rows that are near to a held-out "
        "row. refuse: as drop, but stop the run if training rows are near to a held-out file.",
    )
    profile: dict[ProfileCheckName, ProfileRule] = Field(
        {},
        description="Checks of the rows' texts, {CHECK: {share: SHARE, action: warn | quarantine | fail}}. CHECK is "
        "refusals, openings, disputed, scripts, broken_text, control_tokens or personal.",
    )
    max_quarantined: Share = Field(0.01, description="Largest share of malformed rows; the run stops above it.")
    limit: Positive | None = Field(None, description="Use a seeded sample of this many training rows.")
    seed: int = Field(0, description="Seed of the split and of the sample of limit.")

    _columns = field_validator("columns")(known_columns)
    _sources = field_validator("sources")(checked_sources)

    @model_validator(mode="after")
    def _one_way(self) -> Self:
        refuse_ignored_columns(self.columns, self.ignore)
        changed = [name for name in REPLACED if getattr(self, name) != type(self).model_fields[name].default]
        if self.sources and changed:
            raise ValueError(f"{', '.join(changed)}: with sources, each source has its own; remove it here")
        return self

    @field_validator("extra_heldout")
    @classmethod
    def _names(cls, value: dict[str, str]) -> dict[str, str]:
        if taken := {"heldout", "train", "validation", *GENERAL_SETS} & value.keys():
            raise ValueError(f"{', '.join(sorted(taken))} is a reserved name; choose another")
        return value


def read_tools_file(name: str) -> list[JsonValue]:
    """Return the tools of a dataset. check_dataset checks them.

    Raises:
        BadConfig: the file is missing, or is not a JSON list.
    """
    try:
        value = json.loads(Path(name).read_text(encoding="utf-8"))
        # Refuses NaN, infinities and lone surrogates, which neither fingerprints nor rows can contain.
        json.dumps(value, ensure_ascii=False, allow_nan=False).encode("utf-8")
    except (OSError, ValueError, RecursionError) as error:
        raise BadConfig(
            "The tools cannot be read.",
            where=f"data.tools: {name}",
            got=str(error)[:200],
            next_step="correct the path, or the file's JSON",
        ) from error
    if not isinstance(value, list) or not value:
        raise BadConfig(
            "The file is not a list of tools.",
            where=f"data.tools: {name}",
            expected='a JSON list: [{"type": "function", "function": {"name": …, "parameters": …}}, …]',
            got=type(value).__name__,
            next_step="write the tools as OpenAI's API takes them",
        )
    return value
