"""`loraflow upgrade`: bring the files of an older project forward, after showing what would change."""

from __future__ import annotations

import difflib
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import click

from loraflow.cli import quiet_logging
from loraflow.cli.init import project_lock
from loraflow.failures import BadConfig
from loraflow.store.files import replace_file

if TYPE_CHECKING:
    from loraflow.config.renamed_keys import Upgraded


@click.command()
@click.option("--write", is_flag=True, help="Write the changes without asking.")
def upgrade(write: bool) -> None:
    """Update this project's recipes in configs/, prefect.yaml, .gitignore and .dvcignore for this version of loraflow.

    Shows the changes as a unified diff, and writes them with --write or after a yes. Comments and everything else in the
    files stay as they are. Changes that are not safe are only listed.
    """
    quiet_logging()
    changes: dict[Path, tuple[bytes, bytes]] = {}
    for file, upgraded, before in _upgraded_files():
        for note in upgraded.notes:
            click.echo(f"note  {file}: {note}", err=True)
        if upgraded.text != before:
            changes[file] = before.encode(), upgraded.text.encode()
            _show_difference(file, before, upgraded.text)
    if not changes:
        click.echo("the files of this project are up to date")
        return
    if not write:
        if not sys.stdin.isatty():
            click.echo("\nnothing was written  ·  next  loraflow upgrade --write")
            return
        click.confirm("\nWrite these changes?", abort=True)
    with project_lock(Path()):
        for file, (old, new) in changes.items():
            _write(file, old, new)
            click.echo(f"{file}   written")
    if Path("prefect.yaml") in changes:
        click.echo("next  loraflow deploy   (or loraflow up), so that the server has the new deployments")


def _upgraded_files() -> Iterator[tuple[Path, Upgraded, str]]:
    """Yield each file of the project, with its new and its present text."""
    from loraflow.cli.init import FOR_DVCIGNORE, gitignore_lines, with_lines
    from loraflow.config.project import FILE
    from loraflow.config.recipe_text import recipe_files
    from loraflow.config.renamed_keys import Upgraded
    from loraflow.flows.server.new_prefect_yaml import upgrade_prefect_yaml

    recipes = recipe_files()
    if not recipes and not Path(FILE).exists():
        raise BadConfig(
            "This folder is not a loraflow project.",
            where=str(Path.cwd()),
            expected=f"configs/ with recipes, or {FILE}",
            next_step="go to the project's folder, or make a project: loraflow init --data FILE --base MODEL",
        )
    how: dict[Path, Callable[[str], Upgraded]] = {
        recipe: lambda text, name=recipe.stem: upgrade_recipe(text, name)  # type: ignore[misc]
        for recipe in recipes
    }
    how[Path(FILE)] = lambda text: upgrade_prefect_yaml(text, Path())
    for file, change in how.items():
        if file.is_file():
            text = _read(file)
            yield file, change(text), text
    ignore = Path(".gitignore")
    text = _read(ignore) if ignore.is_file() else ""
    yield ignore, Upgraded(with_lines(text, gitignore_lines()), []), text
    dvcignore = Path(".dvcignore")
    if Path(".dvc").is_dir():
        text = _read(dvcignore) if dvcignore.is_file() else ""
        yield dvcignore, Upgraded(with_lines(text, FOR_DVCIGNORE), []), text


def upgrade_recipe(text: str, name: str) -> Upgraded:
    """Rename the old keys of a recipe. The recipe means the same afterwards, or it is left unchanged, with a note."""
    from loraflow.config.load import parse_recipe
    from loraflow.config.renamed_keys import Upgraded, rename_keys
    from loraflow.config.yaml import Syntax

    try:
        new, notes = rename_keys(text)
        if new == text or parse_recipe(text, name) == parse_recipe(new, name):
            return Upgraded(new, notes)
        problem = ": new names would change its meaning"
    except Syntax as error:
        return Upgraded(text, [f"line {error.line}: {error}"])
    except BadConfig as failure:
        problem = f", because it has other problems: {failure.got or failure.what}"
    return Upgraded(text, [*notes, f"left unchanged{problem}"])


def _read(file: Path) -> str:
    """Return a file's text with its own line endings."""
    try:
        return file.read_bytes().decode()
    except (OSError, UnicodeDecodeError) as error:
        from loraflow.config.project import unreadable

        raise unreadable(file, error) from error


def _show_difference(file: Path, before: str, after: str) -> None:
    lines = difflib.unified_diff(
        before.splitlines(), after.splitlines(), f"a/{file.as_posix()}", f"b/{file.as_posix()}", lineterm="", n=1
    )
    colours = {"+": "green", "-": "red", "@": "cyan"}
    for line in lines:
        click.echo(click.style(line, fg=colours.get(line[:1])))


def _write(file: Path, old: bytes, new: bytes) -> None:
    present = file.read_bytes() if file.exists() else b""
    if present != old:
        raise BadConfig(f"{file} was changed in the meantime.", where=str(file), next_step="run loraflow upgrade again")
    replace_file(file, new)
