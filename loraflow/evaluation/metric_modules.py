"""Metrics as modules of HF `evaluate`: ours, loaded by path, and any folder that a recipe names. All offline.

A bare name would make `evaluate` look for a script on the hub and run it, so that a name is always one of ours.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from loraflow.failures import BadConfig
from loraflow.store.files import HashMemo

OURS = Path(__file__).parent / "metrics"
LOWER_IS_BETTER = {"token_loss", "perplexity"}


def find_module(name: str) -> Path:
    """Return a metric's script.

    Raises:
        BadConfig: there is none of this name.
    """
    ours = OURS / name / f"{name}.py"
    if ours.exists() and "/" not in name:
        return ours
    folder = Path(name)
    script = folder if folder.suffix == ".py" else folder / f"{folder.name}.py"
    if "/" in name and script.is_file():
        return script
    have = sorted(path.name for path in OURS.iterdir() if (path / f"{path.name}.py").exists())
    raise BadConfig(
        "There is no such metric.",
        where="evaluation.metrics",
        expected=f"one of {', '.join(have)}, or the path of a folder with an `evaluate` module",
        got=name,
        next_step="a hub module: copy its folder beside the recipe and name its path, such as ./metrics/bleu",
    )


def identify(names: list[str], memo: HashMemo) -> dict[str, str]:
    """Return the content hashes of modules, part of an evaluation's identity."""
    return {name: memo.hash(find_module(name)) for name in names}


def compute(
    name: str, predictions: list[Any], references: list[Any]
) -> tuple[dict[str, float], dict[str, list[float]]]:
    """Return a module's values, and its scores row by row.

    A foreign module that gives no scores for rows is asked again row by row, so that models can be compared in pairs.
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
        rows = {key: [float(one[key]) for one in singles] for key in values}
    return values, rows
