"""Load a recipe from YAML, and report all its problems at once, each with its line."""

from __future__ import annotations

import copy
import difflib
import logging
import re
import types
import typing
from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

from pydantic import BaseModel, JsonValue, ValidationError
from pydantic.fields import FieldInfo

from loraflow.config import yaml
from loraflow.config.recipe import Recipe
from loraflow.config.renamed_keys import TRANSLATED, translate
from loraflow.credentials import hide_in_json
from loraflow.failures import BadConfig

if typing.TYPE_CHECKING:
    from pydantic_core import ErrorDetails

log = logging.getLogger(__name__)


class Problem(NamedTuple):
    """A problem of a recipe, and where it is: a line of the file, or the key of an override."""

    line: int  # 0 if unknown
    message: str
    override: str = ""  # dotted key; empty if the value is the file's


def load_recipe(path: str | Path, overrides: Mapping[str, JsonValue] | None = None) -> Recipe:
    """Load a recipe.

    Args:
        path: the file, or the name of a recipe in `configs/`.
        overrides: {dotted key: value}, which replace the file's values.

    Raises:
        BadConfig: the file does not exist, or has problems. The message lists all problems, each with its line.
    """
    file = find_recipe(path)
    try:
        text = file.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise BadConfig("The recipe cannot be read.", where=str(file), got=str(error)) from error
    return parse_recipe(text, name=str(file), overrides=overrides)


def find_recipe(path: str | Path) -> Path:
    """Return a recipe's file, given its path or the name of a recipe in `configs/`.

    Raises:
        BadConfig: there is no such recipe.
    """
    file = Path(path)
    if file.is_file():
        return file
    named = Path("configs", file.name).with_suffix(".yaml")
    if file.parent == Path() and named.is_file():
        return named
    have = sorted(str(found) for found in Path("configs").glob("*.yaml"))
    near = difflib.get_close_matches(str(path), have, 1, 0.4) or have[:1]
    raise BadConfig(
        "There is no such recipe.",
        where=str(path),
        expected="a YAML file, or the name of a recipe in configs/",
        next_step=f"loraflow run {near[0]}" if near else "loraflow init --data FILE --base MODEL",
    )


def parse_recipe(text: str, name: str = "recipe", overrides: Mapping[str, JsonValue] | None = None) -> Recipe:
    """Parse a recipe. `name` is the file's name in messages. See `load_recipe`."""
    try:
        parsed, lines = yaml.parse(text)
    except yaml.Syntax as error:
        raise BadConfig("The recipe is not plain YAML.", where=f"{name}:{error.line}", got=str(error)) from error
    if not isinstance(parsed, dict):
        raise BadConfig(
            "The recipe is empty, or is not a mapping.", where=f"{name}:1", expected="keys such as name and base"
        )
    document, overrides = copy.deepcopy(parsed), dict(overrides or {})
    problems: list[Problem] = []
    for dotted, value in overrides.items():
        _override(document, dotted, value, problems)
    document = _hide_credentials(document, name)
    _move_attention_to_runtime(document)
    problems += _translate_keys(document, name, lines, overrides)
    try:
        recipe = Recipe.model_validate(document)
    except ValidationError as error:
        problems += [
            Problem(
                _line(lines, problem["loc"]),
                _message(problem),
                _find_override(overrides, problem["loc"], problem["msg"]),
            )
            for problem in error.errors()
        ]
    if problems:
        raise _problems_of(name, problems)
    return recipe


def _problems_of(name: str, problems: list[Problem]) -> BadConfig:
    """Return the failure that lists all problems, each with its line in the file or the override that causes it."""
    lines = []
    for problem in sorted(problems):
        where = (
            f"--set {problem.override}" if problem.override else f"{name}{f':{problem.line}' if problem.line else ''}"
        )
        lines.append(f"    {where}: {problem.message}")
    listing = "\n".join(lines)
    count = f"{len(problems)} problem{'s' if len(problems) > 1 else ''}"
    keys = sorted({problem.override for problem in problems if problem.override})
    if not keys:
        return BadConfig(
            f"The recipe has {count}:\n{listing}", next_step=f"correct {name}, then `loraflow plan {name}`"
        )
    step = f"correct --set {', '.join(keys)} (in Prefect's form: the field, or `settings`)"
    if any(not problem.override for problem in problems):
        step += f", and {name}"
    return BadConfig(f"The recipe {name} with its overrides has {count}:\n{listing}", next_step=step)


def _hide_credentials(document: dict[str, JsonValue], name: str) -> dict[str, JsonValue]:
    """Hide the credentials of URLs. Everything after this sees the masked URL; only git and DVC get the real one."""
    hidden: dict[str, JsonValue] = {}
    for section, value in document.items():
        hidden[section] = hide_in_json(value)
        if hidden[section] != value:
            log.warning(
                "%s: a URL in `%s` has a password or token in it. It is masked in all output, but the recipe is often "
                "committed and shared: use a git credential helper and a URL without it",
                name,
                section,
            )
    return hidden


def _override(document: dict[str, JsonValue], dotted: str, value: JsonValue, problems: list[Problem]) -> None:
    *parents, last = dotted.split(".")
    section = document
    for key in parents:
        inner = section.setdefault(key, {})
        if not isinstance(inner, dict):
            problems.append(Problem(0, f"{key} is not a section", dotted))
            return
        section = inner
    section[last] = value


def _find_override(overrides: Mapping[str, JsonValue], loc: tuple[str | int, ...], message: str = "") -> str:
    """Return the override that set the value at a location; empty if the file did.

    A problem with a combination of keys has the location of their section. Its message names the keys.
    """
    path = [str(part) for part in loc]
    for dotted in overrides:
        section, _, key = dotted.partition(".")
        keys = f"{section}.{TRANSLATED.get(section, {}).get(key, key)}".split(".") if key else [section]
        if path[: len(keys)] == keys or path == dotted.split("."):
            return dotted
        if path == keys[: len(path)] and re.search(rf"\b{re.escape(keys[-1])}\b", message):
            return dotted
    return ""


def _move_attention_to_runtime(document: dict[str, JsonValue]) -> None:
    """Move base.attn_implementation to the runtime: the Phi-3 guide has it beside the model, but it is a kernel."""
    base = document.get("base")
    if isinstance(base, dict) and "attn_implementation" in base:
        runtime = document.get("runtime")
        if not isinstance(runtime, dict):
            runtime = document["runtime"] = {}
        runtime.setdefault("attn_implementation", base.pop("attn_implementation"))


def _translate_keys(
    document: dict[str, JsonValue], name: str, lines: dict[yaml.Path, int], overrides: Mapping[str, JsonValue]
) -> list[Problem]:
    """Give the keys of all sections their current names, log the warnings, and return the problems."""
    problems: list[Problem] = []
    for section, values in document.items():
        if isinstance(values, dict):
            translated = translate(section, values)
            document[section] = translated.values
            for key, message in translated.refused.items():
                override = _find_override(overrides, (section, key))
                problems.append(Problem(lines.get((section, key), 0), f"{section}.{key} {message}", override))
            for warning in translated.warnings:
                log.warning("%s: %s", name, warning)
    return problems


def _line(lines: dict[yaml.Path, int], loc: tuple[str | int, ...]) -> int:
    """Return the line of a key or item, or of the nearest section around it; 0 if there is none."""
    for end in range(len(loc), 0, -1):
        if loc[:end] in lines:
            return lines[loc[:end]]
    return 0


def _message(error: ErrorDetails) -> str:
    """Return the message for a validation error, with the key that was probably meant."""
    loc = [part for part in error["loc"] if not _is_branch(part)] or list(error["loc"])
    dotted = ".".join(str(part) for part in loc) or "recipe"
    if error["type"] == "extra_forbidden":
        near = difflib.get_close_matches(str(loc[-1]), _names(loc[:-1]), 1, 0.5)
        elsewhere = [".".join(path) for path in _all_paths(Recipe) if path[-1] == loc[-1]]
        hint = f"; did you mean {near[0]}?" if near else f"; did you mean {elsewhere[0]}?" if elsewhere else ""
        return f"{dotted} is not a key of a recipe{hint}"
    message = error["msg"].removeprefix("Value error, ").replace("Input should be", "should be")
    got = "" if error["type"] in ("missing", "value_error") else f", not {error['input']!r}"
    return f"{dotted}: {message}{got}"


def _is_branch(part: str | int) -> bool:
    """Return whether a part of a location is pydantic's name for a branch of a union, such as `list[str]`."""
    return isinstance(part, str) and (
        "[" in part or part in ("bool", "int", "float", "str", "constrained-int", "constrained-float")
    )


def section_model(field: FieldInfo) -> type[BaseModel] | None:
    """Return the model of a section, or of an optional section; None if the field is a plain value."""
    annotation = field.annotation
    branches = (
        typing.get_args(annotation)
        if isinstance(annotation, types.UnionType) or typing.get_origin(annotation) is typing.Union
        else (annotation,)
    )
    return next((kind for kind in branches if isinstance(kind, type) and issubclass(kind, BaseModel)), None)


def _names(loc: list[str | int]) -> list[str]:
    """Return the keys of a section."""
    model: type[BaseModel] | None = Recipe
    for part in loc:
        field = next((f for n, f in (model.model_fields if model else {}).items() if (f.alias or n) == part), None)
        model = section_model(field) if field else None
    return [field.alias or name for name, field in model.model_fields.items()] if model else []


def _all_paths(model: type[BaseModel], prefix: tuple[str, ...] = ()) -> list[tuple[str, ...]]:
    """Return the path of every key below a model."""
    paths: list[tuple[str, ...]] = []
    for name, field in model.model_fields.items():
        path = (*prefix, field.alias or name)
        inner = section_model(field)
        paths += _all_paths(inner, path) if inner else [path]
    return paths
