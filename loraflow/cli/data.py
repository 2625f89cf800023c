"""`loraflow data add, check, pull, diff`: version, check, fetch and compare datasets."""

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

MAX_PROBLEMS = 20  # malformed rows that are printed


@click.group()
def data() -> None:
    """Version, check, pull and compare datasets."""
    quiet_logging()


@data.command()
@click.argument("folder", default="data")
@click.option("--no-push", is_flag=True, help="Do not push to the DVC remote.")
@click.option("--commit", is_flag=True, help="Commit the .dvc file to git.")
@click.option("--git-push", is_flag=True, help="Push the git branch too, before the Prefect server is notified.")
@click.option("--remote", metavar="NAME", help="Push to this DVC remote instead of the default remote.")
def add(folder: str, no_push: bool, commit: bool, git_push: bool, remote: str | None) -> None:
    """Make a version of FOLDER: `dvc add`, and `dvc push` if a remote is configured.

    Once the version is committed, the Prefect server at PREFECT_API_URL is notified, so that it can retrain.
    """
    from loraflow.data import dvc
    from loraflow.data import git_branch as branch
    from loraflow.failures import BadConfig

    if no_push and remote:
        raise BadConfig("--remote and --no-push exclude each other.", where="data add", next_step="leave one out")
    pin = dvc.add(folder, push=not no_push, remote=remote)
    click.echo(f"{pin.path} is version {pin.md5}")
    if commit:
        branch.commit(pin)
    revision = branch.committed(pin)
    if revision is None:
        click.echo(f"next      git add {pin.dvc_file} && git commit -m 'Dataset {pin.md5[:8]}', or add --commit")
        return
    if git_push:
        branch.push()
    elif branch.is_unpushed(revision):
        click.echo(
            "next      run it again with --git-push: other machines read the dataset's version from the git remote"
        )
    if os.environ.get("PREFECT_API_URL"):
        from loraflow.flows.server.project import project_name
        from loraflow.tasks.events import announce_dataset

        click.echo(f"notified  {announce_dataset(pin.path, pin.md5, revision, project_name(Path()))}")


@data.command()
@click.argument("dvc_file", default="data.dvc", metavar="[DVC_FILE | FOLDER]")
@click.option("--remote", metavar="NAME", help="Pull from this DVC remote instead of the default remote.")
def pull(dvc_file: str, remote: str | None) -> None:
    """Pull the files that DVC_FILE, or FOLDER.dvc, pins into the work tree, and check their contents."""
    from loraflow.data import dvc

    if not dvc_file.endswith(".dvc"):  # the dataset's own name
        dvc_file = f"{dvc_file.rstrip('/')}.dvc"
    pin = dvc.pull(dvc_file, remote=remote)
    click.echo(f"{pin.path} is version {pin.md5}")


@data.command()
@click.argument("source")
@click.option("--format", "form", default="auto", help="messages, sharegpt, alpaca, prompt_completion or auto.")
@json_option
def check(source: str, form: str, as_json: bool) -> None:
    """Check the rows of SOURCE, a file or folder of chats. Exit status 1 if a row is malformed or there are no rows."""
    from loraflow.data.guess_columns import columns_of
    from loraflow.data.readers import match_files, read_rows

    path = Path(source)
    folder, patterns = (path, ["*"]) if path.is_dir() else (path.parent, [path.name])
    if not path.exists():
        raise click.BadParameter(f"{source} does not exist")
    names = match_files(folder, patterns)
    columns = columns_of(folder / names[0], names[0]) if names and form == "auto" else {}
    rows = 0
    problems: list[dict[str, str]] = []
    unread: Counter[str] = Counter()
    for row in read_rows(folder, names, form, columns):
        rows += 1
        unread.update(row.unused_keys)
        if row.problem is not None:
            problems.append({"place": row.place, "problem": row.problem})
    if as_json:
        counts = {"rows": rows, "malformed": len(problems)}
        click.echo(json.dumps({**counts, "columns": columns, "unread": dict(unread), "problems": problems}))
    else:
        _print_check(rows, problems, columns, unread)
    if problems or not rows:
        raise click.exceptions.Exit(1)


def _print_check(rows: int, problems: list[dict[str, str]], columns: dict[str, str], unread: Counter[str]) -> None:
    for problem in problems[:MAX_PROBLEMS]:
        click.echo(f"{problem['place']}: {problem['problem']}", err=True)
    if len(problems) > MAX_PROBLEMS:
        click.echo(f"… and {len(problems) - MAX_PROBLEMS} more", err=True)
    if columns:
        click.echo(f"read with data.columns: {json.dumps(columns, ensure_ascii=False)}", err=True)
    if unread:
        click.echo(_unread_line(unread), err=True)
    click.echo(f"{rows} rows, {len(problems)} malformed")


def unread_keys(rows: Iterable[Row]) -> str:
    """Return a line that names the keys of the rows that are not read although they have values; empty if there are none."""
    counts = Counter(key for row in rows for key in row.unused_keys)
    return _unread_line(counts) if counts else ""


def _unread_line(counts: Counter[str]) -> str:
    return "not read  " + ", ".join(f"{key} ({count} rows)" for key, count in counts.most_common(20))


@data.command()
@click.argument("old")
@click.argument("new", required=False)
@click.option("--source", default="data.dvc", show_default=True, help="The dataset's .dvc file.")
def diff(old: str, new: str | None, source: str) -> None:
    """Compare the rows of the dataset at git revision OLD with those at NEW. Default of NEW: the work tree."""
    from loraflow.config.recipe import Data
    from loraflow.data.compare import row_ids
    from loraflow.failures import BadConfig

    if not source.endswith(".dvc"):
        raise BadConfig(
            "Only a dataset with a .dvc file has revisions.", where=f"--source {source}", expected="data.dvc"
        )
    before, after = (row_ids(Data(source=source, rev=revision)) for revision in (old, new))
    for name in sorted(before.keys() | after.keys()):
        was, is_now = before.get(name, set()), after.get(name, set())
        added, removed = len(is_now - was), len(was - is_now)
        click.echo(f"{name}: {len(was)} → {len(is_now)} rows, {added} added, {removed} removed")
