"""From a YAML file to a recipe, with every problem at once, each with its line."""

from __future__ import annotations

import copy
import difflib
import logging
import types
import typing
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ValidationError

from loraflow.config import yaml
from loraflow.config.recipe import Recipe
from loraflow.config.renamed_keys import translate
from loraflow.failures import BadConfig

log = logging.getLogger(__name__)


def load_recipe(path: str | Path, overrides: dict[str, Any] | None = None) -> Recipe:
    """Read a recipe. `overrides` maps dotted keys to values and wins over the file.

    A path without a folder that does not exist is looked up in `configs/`, with `.yaml` added.

    Raises:
        BadConfig: the file is missing, or has problems: all of them are in the message, each with its line.
    """
    file = find_recipe(path)
    try:
        text = file.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise BadConfig("The recipe cannot be read.", where=str(file), got=str(error)) from error
    return parse_recipe(text, name=str(file), overrides=overrides)


def find_recipe(path: str | Path) -> Path:
    """Return a recipe's file, from a path or from the name of one in `configs/`."""
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
        expected="a YAML file, or the name of one in configs/",
        next_step=f"loraflow run {near[0]}" if near else "loraflow init --data FILE --base MODEL",
    )


def parse_recipe(text: str, name: str = "recipe", overrides: dict[str, Any] | None = None) -> Recipe:
    """Read a recipe from text. See `load_recipe`."""
    try:
        document, lines = yaml.parse(text)
    except yaml.Syntax as error:
        raise BadConfig("The recipe is no plain YAML.", where=f"{name}:{error.line}", got=str(error)) from error
    if not isinstance(document, dict):
        raise BadConfig("The recipe is empty or no mapping.", where=f"{name}:1", expected="keys such as name, base")
    problems: list[tuple[int, str]] = []

    document = copy.deepcopy(document)
    for dotted, value in (overrides or {}).items():
        _override(document, dotted, value, problems)
    base = document.get("base")
    if isinstance(base, dict) and "attn_implementation" in base:  # the guide has it beside the model; it is a kernel
        if not isinstance(document.setdefault("runtime", {}), dict):
            document["runtime"] = {}
        document["runtime"].setdefault("attn_implementation", base.pop("attn_implementation"))
    for section, values in document.items():
        if isinstance(values, dict):

            def refuse(key: str, message: str, section: str = section) -> None:
                problems.append((lines.get((section, key), 0), f"{section}.{key} {message}"))

            document[section], warnings = translate(section, values, refuse)
            for warning in warnings:
                log.warning("%s: %s", name, warning)
    try:
        recipe = Recipe.model_validate(document)
    except ValidationError as error:
        for one in error.errors():
            problems.append((_line(lines, one["loc"]), _say(one)))
    if problems:
        problems.sort()
        listing = "\n".join(f"    {name}{f':{line}' if line else ''}: {what}" for line, what in problems)
        count = f"{len(problems)} problem{'s' if len(problems) > 1 else ''}"
        raise BadConfig(f"The recipe has {count}:\n{listing}", next_step=f"mend {name}, then `loraflow plan {name}`")
    return recipe


def _override(document: dict[str, Any], dotted: str, value: Any, problems: list[tuple[int, str]]) -> None:
    *parents, last = dotted.split(".")
    place: Any = document
    for key in parents:
        place = place.setdefault(key, {})
        if not isinstance(place, dict):
            problems.append((0, f"--set {dotted}: {key} is no section"))
            return
    place[last] = value


def _line(lines: dict[yaml.Path, int], loc: tuple[str | int, ...]) -> int:
    """Return the line of a place in the document, or of the nearest place around it."""
    for end in range(len(loc), 0, -1):
        if loc[:end] in lines:
            return lines[loc[:end]]
    return 0


def _say(error: Any) -> str:
    loc = [part for part in error["loc"] if not _is_branch(part)]
    dotted = ".".join(str(part) for part in loc) or "recipe"
    if error["type"] == "extra_forbidden":
        near = difflib.get_close_matches(str(loc[-1]), _names(loc[:-1]), 1, 0.5)
        elsewhere = [".".join(path) for path in _all_paths(Recipe) if path[-1] == loc[-1]]
        hint = f"; did you mean {near[0]}?" if near else f"; did you mean {elsewhere[0]}?" if elsewhere else ""
        return f"{dotted} is no key of a recipe{hint}"
    message = error["msg"].removeprefix("Value error, ").replace("Input should be", "should be")
    got = "" if error["type"] in ("missing", "value_error") else f", not {error['input']!r}"
    return f"{dotted}: {message}{got}"


def _is_branch(part: str | int) -> bool:
    """Tell pydantic's names of union branches (`list[str]`, `literal['all-linear']`) from keys."""
    return isinstance(part, str) and (
        "[" in part or part in ("bool", "int", "float", "str", "constrained-int", "constrained-float")
    )


def _model_of(annotation: Any) -> type[BaseModel] | None:
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return annotation
    if isinstance(annotation, types.UnionType) or typing.get_origin(annotation) is typing.Union:
        return next((m for a in typing.get_args(annotation) if (m := _model_of(a))), None)
    return None


def _names(loc: list[str | int]) -> list[str]:
    model: type[BaseModel] | None = Recipe
    for part in loc:
        field = next((f for n, f in (model.model_fields if model else {}).items() if (f.alias or n) == part), None)
        model = _model_of(field.annotation) if field else None
    return [field.alias or name for name, field in model.model_fields.items()] if model else []


def _all_paths(model: type[BaseModel], prefix: tuple[str, ...] = ()) -> list[tuple[str, ...]]:
    paths = []
    for name, field in model.model_fields.items():
        path = (*prefix, field.alias or name)
        inner = _model_of(field.annotation)
        paths += _all_paths(inner, path) if inner else [path]
    return paths
