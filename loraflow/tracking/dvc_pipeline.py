"""A `dvc.yaml` whose stage runs a recipe, for people who work with `dvc repro` and `dvc exp`."""

from __future__ import annotations

import shlex
from pathlib import Path

import yaml

from loraflow.failures import BadConfig

PIPELINE = "dvc.yaml"
SECTIONS = ("training_config", "peft_config")  # shown by `dvc params diff`, set by `dvc exp run -S`


def refuse_second_pipeline(folder: Path) -> None:
    """Refuse a folder that has a `dvc.yaml`.

    Raises:
        BadConfig: there is one. A stage for a second recipe cannot be added: DVC refuses two stages that write `dvclive/`.
    """
    if (folder / PIPELINE).exists():
        raise BadConfig(
            f"{PIPELINE} exists already.",
            where="--dvc-pipeline",
            expected=f"no {PIPELINE}: two stages of one file cannot both write dvclive/",
            next_step="omit --dvc-pipeline, and add a stage by hand that runs `loraflow run RECIPE` without --dvclive",
        )


def write_pipeline(folder: Path, name: str, recipe: Path, data: Path) -> None:
    """Write `dvc.yaml` with one stage: it depends on recipe and data, and has the metrics and plots of `--dvclive`."""
    text = recipe.as_posix()
    stage = {
        "cmd": f"loraflow run {shlex.quote(text)} --dvclive",
        "deps": [text, data.as_posix()],
        "params": [{text: list(SECTIONS)}],
        "metrics": [{"dvclive/metrics.json": {"cache": False}}],
        "plots": [{"dvclive/plots/metrics": {"cache": False, "x": "step"}}],
    }
    # A dot separates stage and file in DVC's addresses.
    document = {"stages": {name.replace(".", "-"): stage}, "params": ["dvclive/params.yaml"]}
    header = "# `dvc repro` runs the recipe if it or the data changed; `dvc exp show` compares runs. See docs/dvc.md.\n"
    (folder / PIPELINE).write_text(header + yaml.safe_dump(document, sort_keys=False, allow_unicode=True), "utf-8")


def lost_with_experiment(folder: Path, store: str) -> str | None:
    """Return what is lost if `dvc exp run --temp` or `--queue` runs in this copy of the project; None if nothing is."""
    if "/.dvc/tmp/exps/" not in f"{folder.as_posix()}/" or "://" in store or Path(store).is_absolute():
        return None
    return (
        "this is a copy of the project that DVC removes after the experiment (--temp, --queue): its models, its run record "
        "and a promotion go with it; its metrics stay. To keep them, set runtime.store to an absolute path or a bucket"
    )
