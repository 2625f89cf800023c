"""Find a recipe's file and read its text, with one sentence for each thing that prevents it."""

import difflib
import stat
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from pathlib import Path

from loraflow.config import yaml
from loraflow.failures import BadConfig

MAX_NAME = 200  # characters of a recipe's name; file systems allow 255 bytes
MAX_SHOWN = 80  # characters of a key or value in a message

_texts_read: ContextVar[dict[str, tuple[Path, str]] | None] = ContextVar("texts_read", default=None)


@contextmanager
def recipes_read_once() -> Iterator[None]:
    """Read each recipe file once in this block: later reads return the same text, even if the file is changed or deleted."""
    if _texts_read.get() is not None:
        yield
        return
    token = _texts_read.set({})
    try:
        yield
    finally:
        _texts_read.reset(token)


def find_and_read(path: str | Path) -> tuple[Path, str]:
    """Return a recipe's file and its text, given its path or the name of a recipe in `configs/`.

    Raises:
        BadConfig: there is no such recipe, or it cannot be read.
    """
    texts = _texts_read.get()
    if texts is not None and str(path) in texts:
        return texts[str(path)]
    file = find_recipe(path)
    text = _read_text(file)
    if texts is not None:
        texts[str(path)] = file, text
    return file, text


RECIPES = Path("configs")  # folder of the recipes, in the project's
SUFFIXES = (".yaml", ".yml")


def recipe_files(folder: Path = Path()) -> list[Path]:
    """Return the recipes in `configs/` of a project's folder, by name."""
    return sorted(path for path in (folder / RECIPES).glob("*") if path.suffix in SUFFIXES)


def recipe_names(folder: Path = Path()) -> list[str]:
    """Return the names of the recipes in `configs/` of a project's folder."""
    return sorted({path.stem for path in recipe_files(folder)})


def find_recipe(path: str | Path) -> Path:
    """Return a recipe's file, given its path or the name of a recipe in `configs/`.

    Raises:
        BadConfig: there is no such recipe.
    """
    file = Path(path)
    instead = _instead_of_file(file)
    if instead is None:
        return file
    if file.name and file.parent == Path() and len(file.name) < MAX_NAME:
        stem = file.stem if file.suffix in SUFFIXES else file.name  # a name may have a dot: v1.2
        for suffix in SUFFIXES:
            named = RECIPES / f"{stem}{suffix}"
            if _instead_of_file(named) is None:
                return named
    have = [str(found) for found in recipe_files()]
    near = difflib.get_close_matches(str(path), have, 1, 0.4) or have[:1]
    raise BadConfig(
        "There is no such recipe.",
        where=shorten(str(path)),
        expected=f"a YAML file, or the name of a recipe in {RECIPES.absolute()}",
        got=instead,
        next_step=f"loraflow run {near[0]}" if near else "loraflow init --data FILE --base MODEL",
    )


def _instead_of_file(path: Path) -> str | None:
    """Return what is at a path instead of a regular file: empty if nothing; None if it is a regular file."""
    try:
        mode = path.stat().st_mode
    except FileNotFoundError:
        return ""
    except OSError as error:  # a name that is too long, a loop of links, a folder without permission
        return error.strerror or str(error)
    except ValueError:  # Python's own words differ between 3.12 and 3.13
        return "a name with a null character"
    return None if stat.S_ISREG(mode) else "a folder" if stat.S_ISDIR(mode) else "not a regular file"


def _read_text(file: Path) -> str:
    try:
        with file.open("rb") as stream:
            data = stream.read(4 * yaml.MAX_CHARACTERS + 1)  # a character has up to four bytes
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = error.object.count(b"\n", 0, error.start) + 1
        raise BadConfig(
            "The recipe is not UTF-8 text.",
            where=f"{file}:{line}",
            got=f"byte {error.object[error.start]:#04x} ({error.reason})",
            next_step="save it as UTF-8",
        ) from None
    except OSError as error:
        raise BadConfig(
            "The recipe cannot be read.",
            where=str(file),
            got=error.strerror or str(error),
            next_step="correct its permissions, or name another file",
        ) from error


def shorten(text: str) -> str:
    """Return a text from outside on one line, as it may be shown on a terminal."""
    shown = text if text.isprintable() else ascii(text)[1:-1]
    return shown if len(shown) <= MAX_SHOWN else f"{shown[:MAX_SHOWN]}… ({len(shown):,} characters)"
