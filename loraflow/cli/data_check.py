"""What `loraflow data check` reads, and how it prints what the checks of `data.profile` found."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import click

from loraflow.config.data import ProfileCheckName, ProfileRule
from loraflow.data.answers.unread_values import doubtful
from loraflow.data.checks.broken_text import has_carriage_return
from loraflow.data.checks.chat_table import source_of
from loraflow.data.checks.findings import default_rules
from loraflow.data.checks.split import prompt_key
from loraflow.data.files.readers import is_answer_learned, is_partly_learned
from loraflow.failures import BadConfig

if TYPE_CHECKING:
    from loraflow.config.stage_configs import CheckDatasetConfig
    from loraflow.data.chats import Tool
    from loraflow.data.checks.check_report import Finding
    from loraflow.data.checks.findings import Detector
    from loraflow.data.files.readers import Row

MAX_FILES = 20  # files that are printed as not read


@dataclass(frozen=True)
class CheckedSource:
    """The files of a dataset, how they are read, and the checks of their rows."""

    folder: Path
    sets: Mapping[str, list[str]]  # files of each set
    format: str
    columns: dict[str, str]
    rules: Mapping[ProfileCheckName, ProfileRule]
    group: str | None = None
    tools: list[Tool] | None = None
    ignore: Collection[str] = ()
    convert: Callable[[Row], Row] = lambda row: row  # what the recipe makes of a row
    config: CheckDatasetConfig | None = None  # set for a recipe with data.sources, which name their own files
    heldout: frozenset[str] = frozenset()  # sets whose files are held out
    unread_files: Sequence[str] = ()  # files that no pattern of the recipe names

    def rows(self) -> Iterator[tuple[str, Row]]:
        """Yield each row with its set."""
        from loraflow.data.checks.sources import files_of_sources
        from loraflow.data.files.readers import read_rows

        if self.config is not None:
            for file in files_of_sources(self.folder, self.config, self.tools):
                for row in file.rows():
                    yield file.set_name, self.convert(row)
        for name, files in self.sets.items():
            is_training = name not in self.heldout
            for row in read_rows(
                self.folder,
                files,
                self.format,
                self.columns,
                self.group,
                self.tools,
                ignore=self.ignore,
                is_training=is_training,
            ):
                yield name, self.convert(row)


def checked_source(source: str, form: str | None, ignore: Collection[str] = (), *, personal: bool) -> CheckedSource:
    """Return what to check: the dataset of a recipe, or a file or folder.

    Args:
        form: the rows' format, or auto; None if it is not named. A recipe has its own.
        ignore: keys that are not looked at. A recipe has its own.

    Raises:
        BadConfig: a format or keys are named for a recipe.
    """
    from loraflow.data.files.guess_columns import columns_of
    from loraflow.data.files.readers import match_files

    path = Path(source)
    if not path.exists():
        raise click.BadParameter(f"{source} does not exist")
    if path.suffix in (".yaml", ".yml"):
        for option, value in (("format", form), ("ignore", ", ".join(ignore))):
            if value:
                raise BadConfig(
                    f"--{option} and a recipe exclude each other.",
                    where=f"data check {source}",
                    got=f"--{option} {value}",
                    next_step=f"leave --{option} out, and set data.{option} in the recipe",
                )
        return _of_recipe(source, personal=personal)
    form = form or "auto"
    folder, patterns = (path, ["*"]) if path.is_dir() else (path.parent, [path.name])
    names = match_files(folder, patterns)
    columns = columns_of(folder / names[0], names[0]) if names and form == "auto" else {}
    rules = default_rules(personal=personal)
    return CheckedSource(folder, {name: [name] for name in names}, form, columns, rules, ignore=ignore)


def _of_recipe(recipe: str, *, personal: bool) -> CheckedSource:
    from loraflow.config import load_recipe
    from loraflow.config.stage_configs import CheckDatasetConfig
    from loraflow.data.checks.chat_table import TRAIN
    from loraflow.data.checks.check import assign_files, unread_files
    from loraflow.data.checks.rows_file import with_thinking
    from loraflow.data.formats.tools import dataset_tools
    from loraflow.execution.runner import intact_result
    from loraflow.execution.workspace import Workspace
    from loraflow.reporting.rows import used_elsewhere
    from loraflow.stages import VERSION_DATASET

    workspace = Workspace(load_recipe(recipe))
    with workspace.store.reader_lock():
        folder = workspace.store.path(intact_result(workspace, VERSION_DATASET)) / "files"
        workspace.save()
    config = CheckDatasetConfig.from_recipe(workspace.recipe, workspace)
    rules = {**default_rules(personal=personal), **config.profile}
    tools = dataset_tools(config.tools, "data.tools")
    elsewhere = used_elsewhere(workspace.recipe)
    sets = {} if config.sources else assign_files(folder, config)
    return CheckedSource(
        folder,
        sets,
        config.format,
        config.columns,
        rules,
        config.group,
        tools,
        config.ignore,
        convert=partial(with_thinking, thinking=config.thinking),
        config=config if config.sources else None,
        heldout=frozenset(sets) - {TRAIN},
        unread_files=[name for name in unread_files(folder, config) if name not in elsewhere],
    )


def print_unread(files: Sequence[str], why: str) -> None:
    """Print the first files that are not read, and the number of the others."""
    for name in files[:MAX_FILES]:
        click.echo(f"not read  {name}: {why}", err=True)
    if len(files) > MAX_FILES:
        click.echo(f"not read  … and {len(files) - MAX_FILES} more files", err=True)


def print_findings(findings: list[Finding], scripts: Mapping[str, float]) -> None:
    """Print what was found: with examples where a check acts, otherwise only the number of rows."""
    from loraflow.data.checks.check_report import finding_lines

    if len(scripts) > 1:
        click.echo("scripts of the answers: " + ", ".join(f"{name} {share:.1%}" for name, share in scripts.items()))
    for finding in findings:
        head, *examples = finding_lines(finding)
        if finding.is_over:
            click.echo("\n".join([f"{finding.action:<10}{head}", *(f"          {line}" for line in examples)]))
        else:
            click.echo(f"{'':<10}{head}; data.profile acts above {finding.limit:.1%}")


@dataclass
class RowCounts:
    """What `loraflow data check` counts in the rows."""

    rows: int = 0
    partly: int = 0  # rows of which some answers are learned
    weighted: int = 0
    marks: Counter[str] = field(default_factory=Counter)  # rows that are not learned, by their mark
    prompts: set[str] = field(default_factory=set)  # at most two
    problems: list[dict[str, str]] = field(default_factory=list)
    unread: Counter[str] = field(default_factory=Counter)  # keys that are not read
    told: Counter[tuple[str, str]] = field(default_factory=Counter)  # what they say
    read: int = 0  # rows with a chat
    returns: int = 0  # with carriage returns
    sources: Counter[str] = field(default_factory=Counter)

    def add(self, row: Row, set_name: str, detector: Detector, *, by_source: bool) -> None:
        """Count a row. The detector gets it if it is learned."""
        self.rows += 1
        if by_source:
            self.sources[source_of(row.place)] += 1
        self.unread.update(row.unused_keys)
        self.told.update(row.told)
        if row.is_marked_false:
            self.marks[row.marked_by] += 1
        elif row.messages is None:
            self.problems.append({"place": row.place, "problem": row.problem or ""})
        else:
            self.read += 1
            self.returns += has_carriage_return(message["content"] for message in row.messages)
            detector.add(row.place, set_name, row.messages, is_learned=is_answer_learned(row))
            self.partly += is_partly_learned(row)
            self.weighted += row.weights is not None
            if len(self.prompts) < 2:
                self.prompts.add(prompt_key(row.messages))

    def document(self, columns: dict[str, str], unread: Counter[str], found: dict[str, object]) -> dict[str, object]:
        """Return the document of --json. `found` has what the detector found."""
        return {
            "rows": self.rows,
            "malformed": len(self.problems),
            "marked_false": self.marks.total(),
            "partly_marked": self.partly,
            **({"weighted": self.weighted} if self.weighted else {}),
            "columns": columns,
            "unread": dict(unread),
            **({"doubtful": found_doubts} if (found_doubts := doubtful(self.told, unread, self.read)) else {}),
            **({"carriage_returns": self.returns} if self.returns else {}),
            "problems": self.problems,
            **found,
            **({"sources": dict(self.sources)} if self.sources else {}),
            **({"marks": dict(self.marks)} if self.marks else {}),
        }
