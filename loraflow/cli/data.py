"""`loraflow data add, check, show, pull, diff`: version, check, show, fetch and compare datasets."""

from __future__ import annotations

import json
import os
from collections import Counter
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, TypeGuard

import click

from loraflow.cli import FORMATS, json_option, parse_overrides, quiet_logging, set_option, store_option
from loraflow.failures import BadConfig, BadData

if TYPE_CHECKING:
    from loraflow.data.checks.compare import Version
    from loraflow.data.files.readers import Row
    from loraflow.store import Store


MAX_PROBLEMS = 20  # different problems of malformed rows that are printed


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
    from loraflow.data.versions import dvc
    from loraflow.data.versions import git_branch as branch

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
        from loraflow.config.project import served_project
        from loraflow.tasks.events import announce_dataset

        click.echo(f"notified  {announce_dataset(pin.path, pin.md5, revision, served_project(Path()))}")


@data.command()
@click.argument("dvc_file", default="data.dvc", metavar="[DVC_FILE | FOLDER]")
@click.option("--remote", metavar="NAME", help="Pull from this DVC remote instead of the default remote.")
def pull(dvc_file: str, remote: str | None) -> None:
    """Pull the files that DVC_FILE, or FOLDER.dvc, pins into the work tree, and check their contents."""
    from loraflow.data.versions import dvc

    if not dvc_file.endswith(".dvc"):  # the dataset's own name
        dvc_file = f"{dvc_file.rstrip('/')}.dvc"
    pin = dvc.pull(dvc_file, remote=remote)
    click.echo(f"{pin.path} is version {pin.md5}")


@data.command()
@click.argument("source", metavar="RECIPE|FILE|FOLDER")
@click.option(
    "--format", "form", type=click.Choice(FORMATS), help="Format of the rows; auto by default. Not with a recipe."
)
@click.option("--ignore", multiple=True, metavar="KEY", help="Ignore this key, as data.ignore does. Not with a recipe.")
@click.option(
    "--personal", is_flag=True, help="Look for personal data too: emails, phone and card numbers, IBANs, IPs."
)
@json_option
def check(source: str, form: str | None, ignore: tuple[str, ...], personal: bool, as_json: bool) -> None:
    """Check the rows of a recipe's dataset, or of a file or folder of chats, and report what is unusual about them.

    Exit status 1 if a row is malformed, there are no rows, or a check of data.profile with `fail` found too many rows.
    """
    from loraflow.cli.data_check import RowCounts, checked_source, print_findings, print_unread
    from loraflow.data.answers.mark_names import without_marks
    from loraflow.data.answers.unread_values import doubtful, questions
    from loraflow.data.checks.findings import Detector
    from loraflow.data.files.readers import match_nothing

    read = checked_source(source, form, ignore, personal=personal)
    detector, counts = Detector(read.rules), RowCounts()
    for set_name, row in read.rows():
        counts.add(row, set_name, detector, by_source=read.config is not None)
    findings = detector.findings()
    unread = Counter(without_marks(counts.unread, counts.marks))
    if as_json:
        found: dict[str, object] = {
            "profile": [finding.model_dump() for finding in findings],
            "scripts": detector.scripts,
            **({"unread_files": read.unread_files} if read.unread_files else {}),
        }
        document = counts.document(read.columns, unread, found)
        click.echo(json.dumps(document))
    else:
        _print_check(counts.rows, counts.problems, read.columns, unread)
        for name, count in counts.sources.items():
            click.echo(f"source {name}: {count} rows")
        for line in questions(doubtful(counts.told, unread, counts.read)):
            click.echo(f"question  {line}", err=True)
        if counts.returns:
            click.echo(f"{counts.returns} rows have carriage returns in their texts; the training keeps them")
        for line in marked_lines(counts.marks, counts.partly, counts.weighted):
            click.echo(line)
        print_findings(findings, detector.scripts)
        if Path(source).is_dir():
            print_unread(match_nothing(Path(source)), "not one of the supported file types")
        print_unread(read.unread_files, "no pattern of the recipe names it")
        if len(counts.prompts) == 1:
            click.echo("every row has the same prompt: none can be held out (data.heldout takes a file)", err=True)
    if counts.problems or not counts.rows or any(f.is_over and f.action == "fail" for f in findings):
        raise click.exceptions.Exit(1)


@data.command("show")
@click.argument("recipe")
@click.option("--row", type=click.IntRange(1), default=1, show_default=True, help="Number of the training row.")
@set_option
def show_row(recipe: str, row: int, sets: tuple[str, ...]) -> None:
    """Show a training row of RECIPE as the model reads it. The parts that are learned are in ⟦ ⟧."""
    from loraflow.config import load_recipe
    from loraflow.config.stage_configs import TokenizeConfig
    from loraflow.data.tokens.loss_mask import ChatTemplate
    from loraflow.data.tokens.mask_view import masked_row
    from loraflow.execution.runner import intact_result, run_stage
    from loraflow.execution.workspace import Workspace
    from loraflow.reporting.sections import marked
    from loraflow.stages import CHECK_DATASET, RESOLVE_BASE, VERSION_DATASET

    workspace = Workspace(load_recipe(recipe, parse_overrides(sets)))
    store = workspace.store
    with store.reader_lock():
        rows = intact_result(workspace, CHECK_DATASET, dataset=run_stage(workspace, VERSION_DATASET))
        base = intact_result(workspace, RESOLVE_BASE)
        config = TokenizeConfig.from_recipe(workspace.recipe, workspace)
        shown = masked_row(store.path(rows) / "train.jsonl", row, ChatTemplate(store.path(base)), config)
        workspace.save()
    styled = (click.style(marked(*part), fg="green", bold=True) if part[1] else part[0] for part in shown.parts)
    click.echo("".join(styled))
    click.echo(f"{shown.place}: {shown.tokens} tokens, {shown.learned_tokens} learned")
    if shown.left_out:
        click.echo(shown.left_out)


def marked_lines(marks: Counter[str], partly: int, weighted: int = 0) -> list[str]:
    """Say how many rows are left out, and by which marks, or learned in part or with weights, because of their marks."""
    from loraflow.data.answers.mark_names import named_marks, split_hint

    marked = marks.total()
    why = f"their answers are marked as not to be learned ({named_marks(marks)})"
    lines = [f"{marked} rows are left out: {why}{split_hint(marks)}"] if marked else []
    lines += [f"{partly} rows are learned in part: some of their answers are marked so"] if partly else []
    return lines + ([f"{weighted} rows have weights other than 0 and 1 in the loss"] if weighted else [])


def _print_check(rows: int, problems: list[dict[str, str]], columns: dict[str, str], unread: Counter[str]) -> None:
    places: dict[str, list[str]] = {}
    for problem in problems:
        places.setdefault(problem["problem"], []).append(problem["place"])
    for text, (first, *others) in list(places.items())[:MAX_PROBLEMS]:
        click.echo(f"{first}: {text}", err=True)
        if others:
            etc = ", …" if len(others) > 2 else ""
            click.echo(f"  the same: {len(others)} more ({', '.join(others[:2])}{etc})", err=True)
    if unlisted := sum(map(len, list(places.values())[MAX_PROBLEMS:])):
        click.echo(f"… and {unlisted} more rows with other problems", err=True)
    if columns:
        click.echo(f"read with data.columns: {json.dumps(columns, ensure_ascii=False)}", err=True)
    if unread:
        click.echo(_unread_line(unread), err=True)
    click.echo(f"{rows} rows, {len(problems)} malformed")


def unread_keys(rows: Iterable[Row]) -> str:
    """Return a line that names the keys of the rows that are not read although they have values; empty if there are none."""
    from loraflow.data.answers.mark_names import without_marks
    from loraflow.data.answers.unread_values import counted, doubtful, questions

    read = list(rows)
    marks = Counter(row.marked_by for row in read if row.is_marked_false)
    counts = Counter(without_marks(Counter(key for row in read for key in row.unused_keys), marks))
    if not counts:
        return ""
    total = sum(row.messages is not None for row in read)
    asked = questions(doubtful(counted([row.told for row in read]), counts, total))
    return "\n".join([_unread_line(counts), *(f"question  {line}" for line in asked)])


def _unread_line(counts: Counter[str]) -> str:
    return "not read  " + ", ".join(f"{key} ({count} rows)" for key, count in counts.most_common(20))


@data.command()
@click.argument("old", default="HEAD")
@click.argument("new", required=False)
@click.option("--source", default="data.dvc", show_default=True, help="The dataset's .dvc file, for revisions.")
@store_option
def diff(old: str, new: str | None, source: str, store: str) -> None:
    """Compare the rows of OLD with those of NEW: files, folders, runs' ids, or git revisions of the dataset.

    Without NEW: the dataset in the work tree, versioned or not. Without OLD: the version that git's last commit names.
    """
    from loraflow.data.checks.compare import difference_lines

    before, after = read_versions(old, new, source, store)
    for line in difference_lines(before, after):
        click.echo(line)


def read_versions(old: str, new: str | None, source: str, store: str) -> tuple[Version, Version]:
    """Read the rows of two versions. The store is opened only if one of them is a run."""
    from loraflow.store import open_store

    if not any(map(_is_run, (old, new))):
        return version_of(old, source, None), version_of(new, source, None)
    opened = open_store(store)
    with opened.reader_lock():
        return version_of(old, source, opened), version_of(new, source, opened)


def _is_path(name: str | None) -> TypeGuard[str]:
    return name is not None and Path(name).exists() and not name.endswith(".dvc")


def _is_run(name: str | None) -> TypeGuard[str]:
    from loraflow.registry.runs import RUN_ID

    return name is not None and not _is_path(name) and RUN_ID.fullmatch(name) is not None


def version_of(name: str | None, source: str, store: Store | None) -> Version:
    """Read the rows of a version.

    Args:
        name: a file, a folder, a run's id, or a git revision of `source`. None is the dataset in the work tree, as it is
            there; the pinned version, if the work tree does not have it.
        store: where runs are; None if the name is no run's.

    Raises:
        BadConfig: a revision is named, and `source` is no `.dvc` file.
        BadData: the version cannot be read.
    """
    from loraflow.config.data import Data
    from loraflow.data.checks.compare import read_files, read_revision
    from loraflow.data.files.dataset_files import IgnoreRules, dataset_files
    from loraflow.data.files.readers import match_files
    from loraflow.data.versions.dvc_pin import read_pin

    belonging = None  # files of the folder that belong to the dataset; None: all
    if name is None and source.endswith(".dvc") and Path(pinned := read_pin(".", source, None).path).exists():
        name = pinned
        if (dataset := Path(name)).is_dir():
            belonging = {file.name for file in dataset_files(dataset, IgnoreRules(dataset))}
    if _is_path(name):
        path = Path(name)
        folder, patterns = (path, ["*"]) if path.is_dir() else (path.parent, [path.name])
        files = [file for file in match_files(folder, patterns) if belonging is None or file in belonging]
        return read_files(folder, files, "auto", {})
    if store is not None and _is_run(name):
        return _of_run(name, store)
    if not source.endswith(".dvc"):
        raise BadConfig(
            "Only a dataset with a .dvc file has revisions.",
            where=f"--source {source}",
            expected="data.dvc",
            next_step="name its .dvc file with --source, or compare files, folders or runs",
        )
    return read_revision(Data(source=source, rev=name))


def _of_run(name: str, store: Store) -> Version:
    """Read the dataset of a run, as the run read it."""
    from loraflow.data.checks.compare import read_files
    from loraflow.data.files.readers import match_files
    from loraflow.registry.runs import require_run
    from loraflow.store import hash_memo, require_intact

    record = require_run(store, name)
    stage = record.stage("version_dataset")
    ref = store.find("version_dataset", stage.fingerprint) if stage is not None else None
    if ref is None:
        raise BadData(
            "The dataset of this run is no longer in the store.",
            where=name,
            next_step="name the git revision of its .dvc file instead",
        )
    require_intact(store, ref, hash_memo(store))
    data = record.section("data")
    columns, form = data.get("columns"), data.get("format")
    folder = store.path(ref) / "files"
    used = {key: str(value) for key, value in columns.items()} if isinstance(columns, dict) else {}
    ignore = data.get("ignore")
    ignored = [str(key) for key in ignore] if isinstance(ignore, list) else []
    return read_files(folder, match_files(folder, ["*"]), form if isinstance(form, str) else "auto", used, ignored)
