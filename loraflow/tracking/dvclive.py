"""A run's scores, settings and curves as files that DVC reads: the layout of dvclive, <https://dvc.org/doc/dvclive>.

The library dvclive is not used: it reads the git repository when it starts, and refuses one without a commit.
The files have no times and no ids, so a run that finds everything cached writes the same bytes.
"""

import json
import shlex
import shutil
from pathlib import Path

import yaml
from pydantic import JsonValue

from loraflow.credentials import mask_json
from loraflow.failures import BadConfig
from loraflow.registry.runs import RunRecord
from loraflow.store import Store
from loraflow.store.files import replace_file
from loraflow.tracking.tracker import curves

PLOTS = "plots/metrics"
# What DVC needs to find the files, if no stage of a dvc.yaml names them.
FILES = {"params": ["params.yaml"], "metrics": ["metrics.json"], "plots": [{PLOTS: {"x": "step"}}]}


def write_dvclive(store: Store, record: RunRecord, folder: Path) -> None:
    """Write `metrics.json`, `params.yaml` and `plots/metrics/**.tsv` of a run that is done, in place of earlier ones."""
    folder.mkdir(exist_ok=True)
    metrics = json.dumps(_metrics(record), indent=1, ensure_ascii=False)
    replace_file(folder / "metrics.json", f"{metrics}\n".encode())
    settings = {key: mask_json(value) for key, value in record.resolved.items() if key != "runtime"}  # the machine's
    params = yaml.safe_dump(settings, allow_unicode=True, sort_keys=True)
    replace_file(folder / "params.yaml", params.encode())
    shutil.rmtree(folder / PLOTS, ignore_errors=True)
    plots: dict[str, list[str]] = {}
    for point in curves(store, record):
        rows = plots.setdefault(point.name, [f"step\t{point.name.rpartition('/')[2]}"])
        rows.append(f"{point.step}\t{point.value!r}")
    for name, rows in plots.items():
        path = folder / PLOTS / f"{name}.tsv"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("\n".join(rows) + "\n")
    if not _is_in_pipeline(folder):
        (folder / PIPELINE).write_text(yaml.safe_dump(FILES))


def _metrics(record: RunRecord) -> dict[str, JsonValue]:
    """Return the scores with their intervals by model, set and metric, and whether the model was promoted."""
    summary = record.summary
    if summary is None:
        return {}
    found: dict[str, JsonValue] = {
        side: {rows: {name: value.model_dump() for name, value in part.items()} for rows, part in scores.items()}
        for side, scores in summary.metrics.items()
        if scores
    }
    return {**found, "verdict": summary.decision.verdict} if summary.decision else found


def _is_in_pipeline(folder: Path) -> bool:
    pipeline = folder.parent / PIPELINE
    return pipeline.exists() and f"{folder.name}/metrics.json" in pipeline.read_text(encoding="utf-8", errors="replace")


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
        "DVC removes this copy of the project after the experiment (--temp, --queue), with its models, run record and "
        "promotion; only its metrics stay. To keep all, set runtime.store to an absolute path or a bucket"
    )
