"""The grid of a sweep: keys of the recipe with the values to try, and the number of seeds."""

import itertools
import json
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

from pydantic import JsonValue

from loraflow.config import yaml
from loraflow.config.recipe_text import shorten
from loraflow.config.renamed_keys import current_name
from loraflow.credentials import hide_in_json
from loraflow.failures import BadConfig

SEED = "training_config.seed"
MAX_TRIALS = 64  # by default
EXAMPLE = "--grid peft_config.r=8,16"


@dataclass(frozen=True)
class Grid:
    """Values to try, for each key of the recipe, and how many seeds each combination of them is trained with."""

    values: Mapping[str, tuple[JsonValue, ...]]
    seeds: int = 1

    @property
    def size(self) -> int:
        """The number of trials: combinations times seeds."""
        return math.prod(len(values) for values in self.values.values()) * self.seeds

    def combinations(self) -> Iterator[dict[str, JsonValue]]:
        """Yield the settings of each combination; the last key changes fastest."""
        for values in itertools.product(*self.values.values()):
            yield dict(zip(self.values, values, strict=True))


def parse_grid(options: Sequence[str]) -> dict[str, JsonValue]:
    """Parse `--grid KEY=VALUE,VALUE` options into {key: list of values}. Values are written as in a recipe.

    Raises:
        BadConfig: an option is not KEY=VALUE,VALUE, or names a key that an earlier option has.
    """
    grid: dict[str, JsonValue] = {}
    for option in options:
        key, equals, text = option.partition("=")
        key, where = key.strip(), f"--grid {shorten(option)}"
        if not equals or not key or not text.strip():
            raise BadConfig(
                "--grid needs KEY=VALUE,VALUE.",
                where=where,
                expected=EXAMPLE,
                next_step="write the values after the key, separated by commas",
            )
        if key in grid:
            raise BadConfig(
                "Two --grid options have the same key.",
                where=where,
                expected=f"all values of {key} in one option",
                next_step=f"--grid {key}=VALUE,VALUE",
            )
        try:
            values = yaml.scalar(f"[{text}]")
        except yaml.Syntax as error:
            raise BadConfig(
                "The values of --grid are not plain values, separated by commas.",
                where=where,
                expected=f"{EXAMPLE}; a value with a comma or a bracket in quotes",
                got=str(error),
                next_step="quote the option, and the values that have commas or brackets",
            ) from None
        if not isinstance(values, list) or text.rstrip().endswith(","):
            raise BadConfig(
                "--grid has an empty value.",
                where=where,
                expected=EXAMPLE,
                next_step="remove the comma that has no value behind it",
            )
        grid[key] = hide_in_json(values)  # before prefect sees them
    return grid


def check_grid(
    given: Mapping[str, JsonValue], seeds: int, overrides: Mapping[str, JsonValue], max_trials: int = MAX_TRIALS
) -> Grid:
    """Return the grid, checked without the recipe.

    Args:
        given: {key of the recipe: list of values}.

    Raises:
        BadConfig: there is nothing to try, a key or a value is given twice, or there are too many trials.
    """
    if seeds < 1:
        raise BadConfig(
            "A sweep needs at least one seed.", where="--seeds", got=str(seeds), next_step="use --seeds 1 or more"
        )
    values: dict[str, tuple[JsonValue, ...]] = {}
    for key, listed in given.items():
        where = f"--grid {shorten(key)}"
        if not isinstance(listed, list) or not listed:
            raise BadConfig(
                "A key of the grid needs a list of values.",
                where=where,
                expected="such as [8, 16]",
                got=_text(listed),
                next_step="write the values as a list",
            )
        _refuse_repeated_values(listed, where)
        # Labels and records show the values, and a form may have them in clear.
        values[key] = tuple(hide_in_json(value) for value in listed)
    _refuse_repeated_keys([*values], overrides, seeds)
    grid = Grid(values, seeds)
    if grid.size == 1:
        raise BadConfig(
            "There is only one trial.",
            where="loraflow sweep",
            expected=f"a grid with several values ({EXAMPLE}), or several seeds (--seeds 3)",
            next_step="`loraflow run` trains a single model",
        )
    if grid.size > max_trials:
        sizes = " x ".join(f"{len(tried)} values of {shorten(key)}" for key, tried in values.items())
        sizes = " x ".join(filter(None, [sizes, f"{seeds:,} seeds" if seeds > 1 else ""]))
        raise BadConfig(
            f"The sweep has {grid.size:,} trials.",
            where="loraflow sweep",
            expected=f"at most {max_trials:,} (--max-trials)",
            got=sizes,
            next_step=f"try fewer values, or --max-trials {grid.size}",
        )
    return grid


def _refuse_repeated_values(values: list[JsonValue], where: str) -> None:
    seen: set[str] = set()
    for value in values:
        if _same(value) in seen:
            raise BadConfig(
                "The grid has a value twice.",
                where=where,
                got=_text(value),
                next_step="leave it out; --seeds N repeats a training with other seeds",
            )
        seen.add(_same(value))


def _refuse_repeated_keys(keys: list[str], overrides: Mapping[str, JsonValue], seeds: int) -> None:
    """Refuse keys that would replace each other, such as a key and its older name, or a section and a key in it."""
    taken = {current_name(key): f"--set {shorten(key)}" for key in overrides}
    for key in keys:
        name, where = current_name(key), f"--grid {shorten(key)}"
        if name == SEED and seeds > 1:
            raise BadConfig(
                "The seeds are given twice.",
                where=f"{where} and --seeds {seeds}",
                next_step="leave one of them out",
            )
        for other, option in taken.items():
            if name == other or name.startswith(f"{other}.") or other.startswith(f"{name}."):
                raise BadConfig("A key is set twice.", where=f"{where} and {option}", next_step="leave one of them out")
        taken[name] = where


def _same(value: JsonValue) -> str:
    """Return a text that two values share if the recipe reads them as the same: 8 and 8.0, but not 1 and true."""
    if isinstance(value, float) and value.is_integer():
        value = int(value)
    return json.dumps(value, sort_keys=True)


def _text(value: JsonValue) -> str:
    return shorten(json.dumps(value, ensure_ascii=False))


def show_value(value: JsonValue) -> str:
    """Return a value for tables and labels, as it is written in a recipe."""
    return shorten(value) if isinstance(value, str) else _text(value)


def short_names(keys: Sequence[str]) -> dict[str, str]:
    """Return {key: the shortest end of it that no other key has}, for tables and labels."""
    names = {}
    for key in keys:
        parts = key.split(".")
        ends = (".".join(parts[-length:]) for length in range(1, len(parts) + 1))
        names[key] = next(end for end in ends if sum(f".{k}".endswith(f".{end}") for k in keys) == 1 or end == key)
    return names
