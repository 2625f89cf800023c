"""`loraflow init`: create a recipe and a versioned dataset from a user's own file."""

from __future__ import annotations

import os
import re
import shutil
import unicodedata
from dataclasses import dataclass
from pathlib import Path

import click

from loraflow.cli import quiet_logging
from loraflow.cli.gitignore import extend_dvcignore, extend_gitignore
from loraflow.cli.init_dataset import UserDataset, read_dataset
from loraflow.cli.init_recipe import recipe_text
from loraflow.cli.init_report import WrittenFiles, print_dataset, print_files
from loraflow.cli.project_lock import project_lock
from loraflow.cli.undo import undone_on_failure
from loraflow.cli.undo_dvc import dvc_undone_on_failure
from loraflow.failures import BadConfig


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
            next_step=f"--project {slug(project)}",
        )
    options = _Options(_plain_name(name or data_file.stem), base, project, template, dvc_pipeline)
    _free_places(options)
    _require_base(base)
    dataset = read_dataset(data_file, columns, base)
    click.get_current_context().with_resource(project_lock(Path()))
    recipe, target = _free_places(options)  # another `init` may have ended meanwhile
    with undone_on_failure(_written_files(recipe, target)):
        written = _write_project(dataset, options, recipe, target)
    print_dataset(dataset)
    print_files(dataset, written, options.name, base)


@dataclass(frozen=True)
class _Options:
    """The options of the command that decide what is written."""

    name: str
    base: str
    project: str | None  # None: named after the folder
    template: str
    dvc_pipeline: bool


def _plain_name(name: str) -> str:
    """Return a name of a-z, digits, dots, hyphens and underscores: März becomes marz."""
    plain = unicodedata.normalize("NFKD", name)
    plain = "".join(letter for letter in plain if not unicodedata.combining(letter))
    return re.sub(r"[^a-z0-9._-]+", "-", plain.lower()).strip("-.") or "mine"


def _write_project(dataset: UserDataset, options: _Options, recipe: Path, target: Path) -> WrittenFiles:
    """Copy the dataset, version the copy, and write recipe, deployments and README."""
    from loraflow.cli.project_readme import write_readme
    from loraflow.data import dvc
    from loraflow.flows.server.new_prefect_yaml import slug, team_recipe_lines, write_prefect_yaml
    from loraflow.tracking.dvc_pipeline import write_pipeline

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
        readme = write_readme(Path(), recipe, target)
        if options.dvc_pipeline:
            write_pipeline(Path(), options.name, recipe, target)
        dvc.push_pin(pin)  # last: it cannot be undone
    return WrittenFiles(recipe, target, pin, deployments, readme, has_pipeline=options.dvc_pipeline)


def _require_base(base: str) -> None:
    """Check a base as `loraflow plan` does, as far as that needs no network.

    Raises:
        BadModel: there is no such base, or the folder has no model that can be trained.
    """
    from loraflow.base.model_files import model_files
    from loraflow.base.usable import refuse_unusable_folder, require_base_name

    folder = Path(base).expanduser()
    refuse_unusable_folder(folder, trust=True)  # the recipe may still allow the model's own code
    require_base_name(base, "--base")
    if folder.is_dir():
        model_files(folder, trust=True)


def _written_files(recipe: Path, target: Path) -> list[Path]:
    """Return what `init` may write, apart from DVC's own folder."""
    from loraflow.cli.project_readme import README
    from loraflow.config.project import FILE
    from loraflow.tracking.dvc_pipeline import PIPELINE

    ignored = [Path(".gitignore"), target.parent / ".gitignore", Path(".dvcignore")]
    return [recipe, target, Path(f"{target}.dvc"), Path(FILE), Path(README), Path(PIPELINE), *ignored]


def _free_places(options: _Options) -> tuple[Path, Path]:
    """Return where the recipe and the dataset go.

    Raises:
        BadConfig: one of the files that would be written exists, or is a link to a file that does not exist.
    """
    from loraflow.cli.project_readme import README
    from loraflow.config.project import FILE
    from loraflow.tracking.dvc_pipeline import refuse_second_pipeline

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
    given = f"--template {options.template}" if options.template != "local" else ""
    given = given or (f"--project {options.project}" if options.project else "")
    if given and Path(FILE).exists():
        raise BadConfig(
            f"{FILE} exists already, and {given.split()[0]} is for a new one.",
            where=given,
            next_step=f"omit {given.split()[0]}, or rename {FILE} and merge your changes into the new one",
        )
    return recipe, target
