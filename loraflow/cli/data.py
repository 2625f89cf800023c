"""`loraflow data add, check, pull, diff`: the dataset alone."""

from __future__ import annotations

import json
import os
from collections import Counter
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING

import click

from loraflow.cli import json_option, quiet_logging

if TYPE_CHECKING:
    from loraflow.data.readers import Row


@click.group()
def data() -> None:
    """Version, check, fetch and compare datasets."""
    quiet_logging()


@data.command()
@click.argument("folder", default="data")
@click.option("--no-push", is_flag=True, help="Do not push to the DVC remote.")
@click.option("--commit", is_flag=True, help="Commit the .dvc file to git.")
@click.option("--git-push", is_flag=True, help="Push the branch too, before the server is told.")
@click.option("--remote", metavar="NAME", help="Push to this DVC remote, not to the default one.")
def add(folder: str, no_push: bool, commit: bool, git_push: bool, remote: str | None) -> None:
    """Make a version of FOLDER: `dvc add`, and `dvc push` where a remote is set up.

    Once the version is committed, the Prefect server at PREFECT_API_URL is told, so that it can retrain.
    """
    from loraflow.data import dvc
    from loraflow.data import git_branch as branch
    from loraflow.failures import BadConfig

    if no_push and remote:
        raise BadConfig("--remote says where to push, --no-push not to.", where="data add", next_step="leave one out")
    pin = dvc.add(folder, push=not no_push, remote=remote)
    click.echo(f"{pin.path} is {pin.md5}")
    if commit:
        branch.commit(pin)
    made = branch.committed(pin)
    if made is None:
        click.echo(f"next  git add {pin.dvc_file} && git commit -m 'Dataset {pin.md5[:8]}', or --commit does it")
        return
    if git_push:
        branch.push()
    elif branch.is_unpushed(made):
        click.echo("next  the same with --git-push: machines that retrain from the remote do not see it before")
    if os.environ.get("PREFECT_API_URL"):
        from loraflow.tasks.events import announce_dataset

        click.echo(f"told  {announce_dataset(pin.path, pin.md5, made)}")


@data.command()
@click.argument("dvc_file", default="data.dvc")
@click.option("--remote", metavar="NAME", help="Pull from this DVC remote, not from the default one.")
def pull(dvc_file: str, remote: str | None) -> None:
    """Bring the files that DVC_FILE pins into the work tree, and check them."""
    from loraflow.data import dvc
    from loraflow.store.files import HashMemo

    dvc.pull(dvc_file, remote=remote)
    pin = dvc.read_pin(".", dvc_file, None)
    dvc.require_clean(".", pin, HashMemo(None))
    click.echo(f"{pin.path} is {pin.md5}")


@data.command()
@click.argument("source")
@click.option("--format", "form", default="auto", help="messages, sharegpt, alpaca, prompt_completion or auto.")
@json_option
def check(source: str, form: str, as_json: bool) -> None:
    """Read SOURCE, a file or folder of chats, and say what is wrong with its rows. Exit status 1 if anything is."""
    from loraflow.data.guess_columns import columns_of
    from loraflow.data.readers import match_files, read_rows

    place = Path(source)
    folder, patterns = (place, ["*"]) if place.is_dir() else (place.parent, [place.name])
    if not place.exists():
        raise click.BadParameter(f"{source} does not exist")
    counts: Counter[str] = Counter()
    problems = []
    names = match_files(folder, patterns)
    columns = columns_of(folder / names[0], names[0]) if names and form == "auto" else {}
    unread: Counter[str] = Counter()
    for row in read_rows(folder, names, form, columns):
        unread.update(row.unread)
        counts["rows"] += 1
        if row.problem is not None:
            counts["malformed"] += 1
            problems.append({"place": row.place, "problem": row.problem})
    if as_json:
        found = {"columns": columns, "unread": dict(unread), "problems": problems}
        click.echo(json.dumps({"rows": counts["rows"], "malformed": counts["malformed"], **found}))
    else:
        for one in problems[:20]:
            click.echo(f"{one['place']}: {one['problem']}", err=True)
        if len(problems) > 20:
            click.echo(f"… and {len(problems) - 20} more", err=True)
        if columns:
            click.echo(f"read with data.columns: {json.dumps(columns, ensure_ascii=False)}", err=True)
        if unread:
            click.echo(_unread(unread), err=True)
        click.echo(f"{counts['rows']} rows, {counts['malformed']} malformed")
    if problems or not counts["rows"]:
        raise click.exceptions.Exit(1)


def said_unread(rows: Iterable[Row]) -> str:
    """Return a line that says which keys of the rows hold something that is not read; empty if none does."""
    counts = Counter(key for row in rows for key in row.unread)
    return _unread(counts) if counts else ""


def _unread(counts: Counter[str]) -> str:
    return "not read  " + ", ".join(f"{key} ({count} rows)" for key, count in counts.most_common(20))


@data.command()
@click.argument("old")
@click.argument("new", required=False)
@click.option("--source", default="data.dvc", show_default=True)
def diff(old: str, new: str | None, source: str) -> None:
    """Compare the dataset of git revision OLD with that of NEW (the work tree if left out), row by row."""
    from loraflow.config.recipe import Data
    from loraflow.data.compare import row_ids
    from loraflow.failures import BadConfig

    if not source.endswith(".dvc"):
        raise BadConfig(
            "Only a dataset with a .dvc file has revisions.", where=f"--source {source}", expected="data.dvc"
        )

    before, after = (row_ids(Data(source=source, rev=rev)) for rev in (old, new))
    for name in sorted(before.keys() | after.keys()):
        one, two = before.get(name, set()), after.get(name, set())
        click.echo(f"{name}: {len(one)} → {len(two)} rows, {len(two - one)} added, {len(one - two)} removed")
