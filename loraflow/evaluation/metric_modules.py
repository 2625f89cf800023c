"""Metrics as modules of HF `evaluate`: loraflow's own, loaded by path, and any folder that a recipe names. All offline.

`evaluate` would look up a bare name on the hub and run the script it finds, so a bare name always means a module of
loraflow.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from loraflow.evaluation.metric_files import metric_files, metric_hash
from loraflow.failures import BadConfig
from loraflow.store.files import HashMemo

BUILT_IN = Path(__file__).parent / "metrics"
LOWER_IS_BETTER = frozenset({"token_loss", "perplexity"})


class ModuleScores(NamedTuple):
    """The scores of a metric's module, by name: over all rows, and of each row."""

    values: dict[str, float]
    rows: dict[str, list[float]]


def find_module(name: str) -> Path:
    """Return a metric's script.

    Raises:
        BadConfig: there is no metric of this name.
    """
    own = BUILT_IN / name / f"{name}.py"
    if own.exists() and "/" not in name:
        return own
    folder = Path(name)
    script = folder if folder.suffix == ".py" else folder / f"{folder.name}.py"
    if "/" in name and script.is_file():
        return script
    names = sorted(path.name for path in BUILT_IN.iterdir() if (path / f"{path.name}.py").exists())
    raise BadConfig(
        "There is no such metric.",
        where="evaluation.metrics",
        expected=f"one of {', '.join(names)}, or the path of a folder with an `evaluate` module",
        got=name,
        next_step="for a module of the hub, copy its folder and name its path from the working directory: ./metrics/bleu",
    )


def module_hashes(names: Sequence[str], memo: HashMemo) -> dict[str, str]:
    """Return the hashes of metric modules' files, which are part of an evaluation's fingerprint."""
    return {name: _hash(name, memo) for name in names}


def _hash(name: str, memo: HashMemo) -> str:
    script = find_module(name)
    return memo.hash(script) if BUILT_IN in script.parents else metric_hash(script, memo)


def require_unchanged(name: str, expected: str) -> None:
    """Check that a metric's module is still the one that the evaluation's fingerprint names.

    Raises:
        BadConfig: its script, or another of its files, was edited or replaced since the run started.
    """
    if _hash(name, HashMemo(None)) != expected:
        raise BadConfig(
            f"The metric {name} was edited during the run, so its scores cannot be kept.",
            where=", ".join(map(str, metric_files(find_module(name)))),
            next_step="run again: the finished stages are cached. If the metric wrote one of these files itself, open it in "
            "the module that names it, or build its name at run time: then it does not count",
        )


def compute(name: str, predictions: Sequence[str | float], references: Sequence[str | int]) -> ModuleScores:
    """Return a module's scores.

    A module that gives no scores for rows is called again for each row, so that models can be compared in pairs.
    """
    import evaluate

    module = evaluate.load(str(find_module(name).absolute()), keep_in_memory=True, experiment_id="loraflow", seed=0)
    result = module.compute(predictions=predictions, references=references)
    values = {key: float(value) for key, value in result.items() if isinstance(value, int | float)}
    rows = {key: [float(x) for x in result[f"{key}_scores"]] for key in values if f"{key}_scores" in result}
    if not rows:
        singles = [
            module.compute(predictions=[p], references=[r]) for p, r in zip(predictions, references, strict=True)
        ]
        rows = {key: [float(single[key]) for single in singles] for key in values}
    return ModuleScores(values, rows)
