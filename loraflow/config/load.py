"""Load a recipe from YAML, and report all its problems at once, each with its line."""

from __future__ import annotations

import copy
import difflib
import logging
import math
import re
import types
import typing
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from shlex import quote
from typing import NamedTuple

from pydantic import BaseModel, JsonValue, ValidationError
from pydantic.fields import FieldInfo

from loraflow.config import yaml
from loraflow.config.data_sources import DataSource
from loraflow.config.gate import contradictions
from loraflow.config.recipe import Recipe
from loraflow.config.recipe_text import find_and_read, shorten
from loraflow.config.renamed_keys import current_name, translate
from loraflow.credentials import hide_in_json
from loraflow.failures import BadConfig

if typing.TYPE_CHECKING:
    from pydantic_core import ErrorDetails

log = logging.getLogger(__name__)
MAX_PROBLEMS = 20  # listed in one message


class Problem(NamedTuple):
    """A problem of a recipe, and where it is: a line of the file, or the key of an override."""

    line: int  # 0 if unknown
    message: str
    override: str = ""  # dotted key; empty if the value is the file's


@dataclass(frozen=True)
class RecipeFile:
    """A recipe as it was read, once: what a run computes and what its record says come from the same text."""

    path: Path
    text: str
    overrides: Mapping[str, JsonValue]
    recipe: Recipe

    def with_overrides(self, overrides: Mapping[str, JsonValue]) -> RecipeFile:
        """Return the recipe with other overrides. The file is not read again.

        Raises:
            BadConfig: there are problems.
        """
        return _parse_file(self.path, self.text, overrides)


def load_recipe(path: str | Path, overrides: Mapping[str, JsonValue] | None = None) -> Recipe:
    """Load a recipe. See `read_recipe`."""
    return read_recipe(path, overrides).recipe


def read_recipe(path: str | Path, overrides: Mapping[str, JsonValue] | None = None) -> RecipeFile:
    """Read and parse a recipe.

    Args:
        path: the file, or the name of a recipe in `configs/`.
        overrides: {dotted key: value}, which replace the file's values.

    Raises:
        BadConfig: the file does not exist, or has problems. The message lists the problems, each with its line.
    """
    file, text = find_and_read(path)
    return _parse_file(file, text, overrides or {})


def _parse_file(file: Path, text: str, overrides: Mapping[str, JsonValue]) -> RecipeFile:
    return RecipeFile(file, text, dict(overrides), parse_recipe(text, name=str(file), overrides=overrides))


def parse_recipe(
    text: str, name: str = "recipe", overrides: Mapping[str, JsonValue] | None = None, *, is_recorded: bool = False
) -> Recipe:
    """Parse a recipe. See `load_recipe`.

    Args:
        is_recorded: it is the recipe of a run that was made. Rules of the gate that earlier versions accepted are no
            problem then: they do not change what the run's stages compute.

    Raises:
        BadConfig: the recipe has problems.
    """
    try:
        parsed, lines = yaml.parse(text)
    except yaml.Syntax as error:
        raise BadConfig(
            "The recipe is not plain YAML.",
            where=f"{name}:{error.line}",
            got=shorten(str(error)),
            next_step="correct this line",
        ) from None
    if not isinstance(parsed, dict):
        raise BadConfig(
            "The recipe is empty, or is not a mapping.",
            where=f"{name}:1",
            expected="keys such as name and base",
            next_step="`loraflow init` writes a recipe",
        )
    document, overrides = copy.deepcopy(parsed), dict(overrides or {})
    problems: list[Problem] = []
    for dotted, value in overrides.items():
        if unusable := _why_unusable(dotted, value):
            problems.append(Problem(0, unusable, dotted or '""'))
        else:
            _override(document, dotted, value, problems)
    document = _hide_credentials(document, name)
    _move_attention_to_runtime(document)
    problems += _translate_keys(document, name, lines, overrides)
    unlisted = 0
    try:
        recipe = Recipe.model_validate(document)
    except ValidationError as error:
        found = error.errors(include_url=False)
        problems += [
            Problem(
                yaml.nearest_line(lines, problem["loc"] or _first_key(problem["msg"])),
                _message(problem, document),
                _find_override(overrides, problem["loc"], problem["msg"], lines),
            )
            for problem in found[:MAX_PROBLEMS]
        ]
        unlisted = max(0, len(found) - MAX_PROBLEMS)
    else:
        problems += [
            Problem(yaml.nearest_line(lines, path), message, _find_override(overrides, path, message, lines))
            for path, message in (() if is_recorded else contradictions(recipe))
        ]
    if problems:
        raise _problems_of(name, problems, unlisted)
    return recipe


def _problems_of(name: str, problems: list[Problem], unlisted: int) -> BadConfig:
    """Return the failure that lists the problems, each with its line in the file or the override that causes it."""
    lines = []
    for problem in sorted(problems)[:MAX_PROBLEMS]:
        where = f"--set {shorten(problem.override)}" if problem.override else name
        line = f":{problem.line}" if problem.line and not problem.override else ""
        lines.append(f"    {where}{line}: {problem.message}")
    total = len(problems) + unlisted
    if total > len(lines):
        lines.append(f"    and {total - len(lines):,} more")
    listing = "\n".join(lines)
    count = f"{total:,} problem{'s' if total > 1 else ''}"
    keys = sorted({shorten(problem.override) for problem in problems if problem.override})
    if not keys:
        return BadConfig(
            f"The recipe has {count}:\n{listing}", next_step=f"correct {name}, then `loraflow plan {quote(name)}`"
        )
    step = f"correct --set {', '.join(keys[:5])} (in Prefect's form: the field, or `settings`)"
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


def _why_unusable(dotted: str, value: JsonValue) -> str:
    """Return why an override cannot be put into a recipe; empty if it can. Prefect's form has its own JSON reader."""
    if not all(dotted.split(".")):
        return "expected a key of the recipe, such as training_config.seed"
    values, depth = [value], dotted.count(".")
    while values:
        if depth > yaml.MAX_DEPTH:
            return yaml.TOO_DEEP
        inner: list[JsonValue] = []
        for item in values:
            if isinstance(item, float) and not math.isfinite(item):
                return f"{item} is not a number"
            if isinstance(item, str) and any("\ud800" <= character <= "\udfff" for character in item):
                return "the text has half a character (a lone surrogate)"
            inner += item.values() if isinstance(item, dict) else item if isinstance(item, list) else ()
        values, depth = inner, depth + 1
    return ""


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


def _find_override(
    overrides: Mapping[str, JsonValue],
    loc: tuple[str | int, ...],
    message: str = "",
    lines: Mapping[yaml.Path, int] | None = None,
) -> str:
    """Return the override that set the value at a location; empty if the file did.

    A problem with a combination of keys has the location of their section. Its message names the keys. A section that
    the file does not have was created by an override.
    """
    outside_file = lines is not None and loc[:1] not in lines
    path = [str(part) for part in loc]
    keys_of = {dotted: current_name(dotted).split(".") for dotted in overrides}
    if not path and (named := list(_first_key(message))):
        for dotted, keys in keys_of.items():
            if named[: len(keys)] == keys or (len(named) == 1 and keys[:1] == named):  # a whole section is named
                return dotted
    for dotted, keys in keys_of.items():
        if path[: len(keys)] == keys or path == dotted.split("."):
            return dotted
        if path == keys[: len(path)] and (outside_file or re.search(rf"\b{re.escape(keys[-1])}\b", message)):
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


def _message(error: ErrorDetails, document: Mapping[str, JsonValue]) -> str:
    """Return the message for a validation error, with the key that was probably meant."""
    loc = [part for part in error["loc"] if not _is_branch(part)]
    if error["type"] == "extra_forbidden":  # the key is the user's, and may look like a branch
        loc = list(error["loc"])
    dotted = shorten(_dotted(loc, document))
    if error["type"] == "extra_forbidden":
        # the same name in another place is more likely meant than a similar one here: seed is not base
        elsewhere = [".".join(path) for path in _all_paths(Recipe) if path[-1] == loc[-1]]
        meant = elsewhere or difflib.get_close_matches(str(loc[-1]), _names(loc[:-1]), 1, 0.5)
        hint = f"; did you mean {' or '.join(meant[:3])}?" if meant else ""
        return f"{dotted} is not a key of a recipe{hint}"
    message = error["msg"].removeprefix("Value error, ").replace("Input should be", "should be")
    got = "" if error["type"] in ("missing", "value_error") else f", not {shorten(repr(error['input']))}"
    return f"{dotted}: {message}{got}" if dotted else message


def _first_key(message: str) -> tuple[str, ...]:
    """Return the first key of a recipe that a message names, such as gate.primary; empty if it names none.

    A problem of keys that do not fit together has no location: its message names them.
    """
    for found in re.finditer(r"\b([a-z_]+)\.[a-z_.]*[a-z_]|\b[a-z_]+_config\b", message):
        if (found[1] or found[0]) in _names([]):
            return tuple(found[0].split("."))
    return ()


def _dotted(loc: Sequence[str | int], document: Mapping[str, JsonValue]) -> str:
    """Return a location as text. A source of a mixture has its number and name: people do not count from 0."""
    match loc:
        case ["data", "sources", int(index), *rest]:
            data = document.get("data")
            sources = data.get("sources") if isinstance(data, dict) else None
            source = sources[index] if isinstance(sources, list) else None
            name = (source.get("name") or source.get("source")) if isinstance(source, dict) else None
            label = f"source {index + 1}" + (f" ({name})" if isinstance(name, str) else "")
            return ": ".join(["data.sources", label, *([".".join(map(str, rest))] if rest else [])])
    return ".".join(str(part) for part in loc)


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
    if loc[:2] == ["data", "sources"]:
        model, loc = DataSource, []
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
