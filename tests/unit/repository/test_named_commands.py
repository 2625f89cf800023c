"""The commands that documents and messages name exist, with their options, arguments and recipe keys."""

from __future__ import annotations

import ast
import re
import shlex
import tomllib
from collections.abc import Iterator
from pathlib import Path

import click
import pytest
from pydantic import BaseModel

from loraflow.cli import cli
from loraflow.config.load import section_model
from loraflow.config.recipe import Recipe

REPOSITORY = Path(__file__).parents[3]
HISTORY = {"performance-log.md", "plan.md"}  # they name what was tried or is missing
PAGES = [
    REPOSITORY / "README.md",
    *(page for page in sorted((REPOSITORY / "docs").rglob("*.md")) if page.name not in HISTORY),
]
SOURCES = [
    REPOSITORY / "prefect.yaml",
    *sorted((REPOSITORY / "configs").glob("*.yaml")),
    *sorted(file for name in ("loraflow", "flows", "tasks") for file in (REPOSITORY / name).rglob("*.py")),
]
ENDS = re.compile(
    r"\s[|·#&;>](?:\s|&|$)|\s\s+|\)$|…"
)  # of a command: a pipe, the next command, a comment, a redirection


def commands_of_page(text: str) -> Iterator[str]:
    """Yield the lines of a page's blocks and its code spans that call `loraflow`."""
    for fence in re.findall(r"^ *```\w*\n(.*?)^ *```", text, re.DOTALL | re.MULTILINE):
        for line in re.sub(r"\s*\\\n\s*", " ", fence).splitlines():
            yield from commands_of_line(re.sub(r"^\s*(?:\$ )?(?:[A-Z_]+=\S+ )*(?:\.venv/bin/)?(?=loraflow )", "", line))
    yield from commands_of_spans(re.sub(r"^ *```.*?^ *```", "", text, flags=re.DOTALL | re.MULTILINE))


def commands_of_spans(text: str) -> Iterator[str]:
    for span in re.findall(r"`(loraflow [^`]+)`", text):
        yield from commands_of_line(" ".join(span.split()))


def commands_of_line(line: str) -> Iterator[str]:
    if re.match(r"loraflow [a-z-]", line):
        yield ENDS.split(line)[0]


def commands_of_source(file: Path) -> Iterator[str]:
    """Yield the commands in a module's messages and docstrings, or in another file's comments."""
    text = file.read_text(encoding="utf-8")
    if file.suffix == ".yaml":
        for comment in re.findall(r"#\s*(.*)", text):
            yield from (*commands_of_spans(comment), *commands_of_line(comment))
        return
    tree = ast.parse(text)
    heading = ast.get_docstring(tree, clean=False)  # of a module: it lists commands as "loraflow up, deploy"
    for node in ast.walk(tree):
        if isinstance(node, ast.Constant | ast.JoinedStr) and string_of(node) != heading:
            yield from commands_of_spans(string_of(node))
        if isinstance(node, ast.keyword) and node.arg == "next_step":
            steps = [string_of(part) for part in ast.walk(node.value) if isinstance(part, ast.Constant | ast.JoinedStr)]
            for step in steps:  # a sentence may follow the command
                yield from commands_of_line(re.split(r"[;,] | promotes | makes | on (?:the|a) ", step)[0])


def string_of(node: ast.Constant | ast.JoinedStr) -> str:
    """Return a string, with VALUE for what an f-string fills in."""
    if isinstance(node, ast.Constant):
        return node.value if isinstance(node.value, str) else ""
    return "".join(str(part.value) if isinstance(part, ast.Constant) else "VALUE" for part in node.values)


def wrong(command: str) -> str | None:
    """Return what is wrong with a command line, or None."""
    try:
        words = shlex.split(command)[1:]
    except ValueError:  # an apostrophe of a sentence
        words = command.split()[1:]
    found: click.Command = cli
    while isinstance(found, click.Group) and words and not words[0].startswith("-") and not words[0].isupper():
        inner = found.get_command(click.Context(found), words[0].rstrip(".,:"))
        if inner is None:
            return f"there is no command {words[0]}"
        found, words = inner, words[1:]
    return wrong_words(found, words)


def wrong_words(command: click.Command, words: list[str]) -> str | None:
    """Return which option, recipe key or argument the command does not have, or None."""
    named = {name: option for option in command.params if isinstance(option, click.Option)
             for name in (*option.opts, *option.secondary_opts)}  # fmt: skip
    given = 0
    while words and words[0] != "--":
        word, words = words[0].strip("[],"), words[1:]
        name, equals, value = word.partition("=")
        if not word.startswith("-"):
            given += 1
        elif name not in {*named, "--help", "-h", "--version"}:
            return f"there is no option {name}"
        elif name in named and not named[name].is_flag:
            value, words = (value, words) if equals else (" ".join(words[:1]), words[1:])
            if name in ("--set", "--grid") and "=" in value and not is_recipe_key(value.partition("=")[0]):
                return f"the recipe has no key {value}"
    arguments = [parameter.nargs for parameter in command.params if isinstance(parameter, click.Argument)]
    if isinstance(command, click.Group) or min(arguments, default=1) < 0 or given <= sum(arguments):
        return None
    return f"it takes {sum(arguments)} arguments, not {given}"


def is_recipe_key(key: str) -> bool:
    """Say whether a dotted key of capitals (a placeholder) or of the recipe's sections exists."""
    section: type[BaseModel] | None = Recipe
    for part in key.split("."):
        if part.isupper() or section is None:  # None: a mapping with names of the user's
            return True
        fields = {field.alias or name: field for name, field in section.model_fields.items()}
        if part not in fields:
            return False
        section = section_model(fields[part])
    return True


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(REPOSITORY)))
def test_commands_of_a_page_exist(page):
    commands = list(commands_of_page(page.read_text(encoding="utf-8")))
    assert [(command, wrong(command)) for command in commands if wrong(command)] == []


def test_commands_of_messages_and_comments_exist():
    found = [(file.name, command) for file in SOURCES for command in commands_of_source(file)]
    assert len(found) > 100
    assert [(name, command, wrong(command)) for name, command in found if wrong(command)] == []


@pytest.mark.parametrize(
    ("command", "says"),
    [
        ("loraflow trian RECIPE", "there is no command trian"),
        ("loraflow data pin data", "there is no command pin"),
        ("loraflow run RECIPE --steps 3", "there is no option --steps"),
        ("loraflow run RECIPE --set training_config.max_step=3", "the recipe has no key training_config.max_step=3"),
        ("loraflow up now", "it takes 0 arguments, not 1"),
    ],
)
def test_a_command_that_does_not_exist_is_found(command, says):
    assert wrong(command) == says


def test_make_targets_and_extras_of_the_documents_exist():
    targets = set(re.findall(r"^([a-z0-9-]+):", (REPOSITORY / "Makefile").read_text(), re.MULTILINE))
    project = tomllib.loads((REPOSITORY / "pyproject.toml").read_text())["project"]
    texts = [page.read_text(encoding="utf-8") for page in PAGES]
    named = {target for text in texts for target in re.findall(r"(?:`|^)make ([a-z0-9-]+)", text, re.MULTILINE)}
    assert "demo" in named and named <= targets
    extras = {
        extra
        for text in texts
        for group in re.findall(r"(?:loraflow|'\.)\[([a-z0-9,-]+)\]", text)
        for extra in group.split(",")
    }
    assert "s3" in extras and extras <= project["optional-dependencies"].keys()
